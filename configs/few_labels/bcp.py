"""Few labels on ACDC: bidirectional copy-paste, 500 steps on labelled images, 1,500 with a teacher. See supervised.py.

medseg train configs/few_labels/bcp.py --out runs/bcp_acdc
"""

from medseg_jax import BCP, Augment, BCPUNet, Config, CopyPaste, Mix, Stage

net, augment = BCPUNet(width=8), Augment(p_blur=0, p_low_resolution=0)
config = Config(
    data="data/acdc",
    plan="configs/few_labels/acdc_64.plan.json",
    labelled=("patient038", "patient050", "patient099"),
    stages=(
        Stage(CopyPaste(net), steps=500, mix=Mix(8), augment=augment, name="pretrain"),
        Stage(BCP(net), steps=1500, mix=Mix(4, 4), augment=augment, name="selftrain"),
    ),
    ema=0.99,
    validate_every=500,
)

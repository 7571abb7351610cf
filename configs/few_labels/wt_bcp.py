"""Few labels on ACDC: WT-BCP, as bcp.py with XNet-Plus of the same size and wavelet inputs. See supervised.py.

medseg train configs/few_labels/wt_bcp.py --out runs/wt_bcp_acdc
"""

from medseg_jax import WTBCP, Augment, Config, Mix, Stage, WTCopyPaste, XNet

net, augment = XNet(width=4), Augment(p_blur=0, p_low_resolution=0)
config = Config(
    data="data/acdc",
    plan="configs/few_labels/acdc_64.plan.json",
    labelled=("patient038", "patient050", "patient099"),
    stages=(
        Stage(WTCopyPaste(net=net), steps=500, mix=Mix(8), augment=augment, name="pretrain"),
        Stage(WTBCP(net=net, ramp=1500), steps=1500, mix=Mix(4, 4), augment=augment, name="selftrain"),
    ),
    ema=0.99,
    validate_every=500,
)

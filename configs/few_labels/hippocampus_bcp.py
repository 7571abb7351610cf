"""Few labels in 3-D: bidirectional copy-paste, 300 steps on labelled volumes, 300 with a teacher. See
hippocampus_supervised.py.

medseg train configs/few_labels/hippocampus_bcp.py --out runs/bcp_hippocampus
"""

from medseg_jax import BCP, Augment, Config, CopyPaste, Mix, Optim, Stage, UNet

net = UNet(features=(8, 16, 32), strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)), kernel_sizes=((3, 3, 3),) * 3)
augment, optim = Augment(mirror_axes=(2,)), Optim(lr=3e-3)
config = Config(
    data="data/hippocampus",
    labelled=("hippocampus_003", "hippocampus_004"),
    stages=(
        Stage(CopyPaste(net), 300, optim, Mix(4), augment, "pretrain"),
        Stage(BCP(net), 300, optim, Mix(2, 2), augment, "selftrain"),
    ),
    ema=0.99,
    validate_every=300,
)

"""Smoke: BCP on synthetic volumes, three labelled patients and unlabelled others.

medseg train configs/smoke/bcp3d.py --out runs/smoke_bcp3d
"""

from medseg_jax import BCP, Augment, Config, CopyPaste, Mix, Optim, Stage, UNet

net = UNet(features=(8, 16), strides=((1, 1, 1), (2, 2, 2)), kernel_sizes=((3, 3, 3),) * 2)
optim, augment = Optim(lr=3e-3, warmup=10), Augment.none()
config = Config(
    data="phantoms3d",
    labelled=3,
    stages=(
        Stage(CopyPaste(net), 40, optim, Mix(2), augment, "pretrain"),
        Stage(BCP(net), 20, optim, Mix(2, 2), augment, "selftrain"),
    ),
    validate_every=20,
)

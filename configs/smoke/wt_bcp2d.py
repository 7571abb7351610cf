"""Smoke: WT-BCP on synthetic pictures, three labelled patients and unlabelled others.

medseg train configs/smoke/wt_bcp2d.py --out runs/smoke_wt_bcp2d

XNet-Plus is 77 convolutions: of some two minutes on two cores most go into compiling its two steps. Compiled programs
are kept: the second run takes three quarters of a minute.
"""

from medseg_jax import WTBCP, Augment, Config, Mix, Optim, Stage, WTCopyPaste, XNet

net, optim, augment = XNet(width=2), Optim(lr=1e-2, warmup=10), Augment.none()
config = Config(
    data="phantoms2d",
    labelled=3,
    stages=(
        Stage(WTCopyPaste(net=net), 60, optim, Mix(8), augment, "pretrain"),
        Stage(WTBCP(net=net, ramp=40), 40, optim, Mix(4, 4), augment, "selftrain"),
    ),
    validate_every=20,
)

"""Smoke: WT-BCP on synthetic volumes, three labelled patients and unlabelled others.

medseg train configs/smoke/wt_bcp3d.py --out runs/smoke_wt_bcp3d

As in 2-D most of the two minutes go into compiling the two steps, the first time that they are run.
"""

from medseg_jax import WTBCP, Augment, Config, Mix, Optim, Stage, WTCopyPaste, XNet

net, optim, augment = XNet(width=2), Optim(lr=1e-2, warmup=10), Augment.none()
config = Config(
    data="phantoms3d",
    plan="configs/plans/wt_bcp_phantoms3d.json",
    labelled=3,
    stages=(
        Stage(WTCopyPaste(net=net), 40, optim, Mix(4), augment, "pretrain"),
        Stage(WTBCP(net=net, ramp=20), 20, optim, Mix(2, 2), augment, "selftrain"),
    ),
    validate_every=20,
)

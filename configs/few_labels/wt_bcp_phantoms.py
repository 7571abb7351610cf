"""WT-BCP on synthetic pictures, three labelled patients and unlabelled others: to see it run without any data.

    medseg train configs/few_labels/wt_bcp_phantoms.py --out runs/wt_bcp_phantoms

No smoke config: XNet-Plus is 77 convolutions, whose two training steps take minutes to compile on two cores.
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

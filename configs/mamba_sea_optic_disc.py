"""Mamba-Sea in small, from scratch: optic discs of two sites (Drishti-GS, IDRiD), each left out in turn.

    medseg data convert --source optic_disc optic_disc data/optic_disc
    medseg train configs/mamba_sea_optic_disc.py --hold-out all --out runs/mamba_sea_optic_disc

The settings of configs/mamba_sea_vessels.py on whole images of 128 x 128; the network has the published skips.
"""

from medseg_jax import Config, MambaSea, Mix, Optim, Stage, VMUNet

net = VMUNet(features=(32, 64, 128), depths=(1, 1, 1), decoder_depths=(1, 1, 1), states=8, drop_path=0.1)
stage = Stage(MambaSea(net), optim=Optim(lr=2e-3, warmup=20), mix=Mix(balance="domain"))
config = Config(
    data="data/optic_disc", stages=(stage,), plan="configs/plans/mamba_sea_optic_disc.json", validate_every=250
)

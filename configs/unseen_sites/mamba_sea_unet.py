"""An unseen site: Mamba-Sea's method (two branches, GVA, LSA, consistency) on a U-Net.

A row of the study `domain_generalisation` (benchmarks/studies), on vessels:

    medseg train configs/unseen_sites/mamba_sea_unet.py --hold-out all --out runs/mamba_sea_unet --stages.0.steps 300

Data, plan and batches as in configs/mamba_sea_vessels.py.
"""

from medseg_jax import Config, MambaSea, Mix, Optim, Stage, UNet

net = UNet.isotropic(2, 16, 32, 64, 128)
stage = Stage(MambaSea(net), optim=Optim(lr=3e-3, warmup=20), mix=Mix(balance="domain"))
config = Config(data="data/vessels", stages=(stage,), plan="configs/plans/mamba_sea_vessels.json", validate_every=250)

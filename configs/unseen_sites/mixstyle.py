"""An unseen site: U-Net with MixStyle.

A row of the study `domain_generalisation` (benchmarks/studies), on vessels:

    medseg train configs/unseen_sites/mixstyle.py --hold-out all --out runs/mixstyle --stages.0.steps 300

Data, plan and batches as in configs/mamba_sea_vessels.py.
"""

from medseg_jax import Config, Mix, MixStyle, Optim, Stage, UNet

net = UNet.isotropic(2, 16, 32, 64, 128)
stage = Stage(MixStyle(net), optim=Optim(lr=3e-3, warmup=20), mix=Mix(balance="domain"))
config = Config(data="data/vessels", stages=(stage,), plan="configs/plans/mamba_sea_vessels.json", validate_every=250)

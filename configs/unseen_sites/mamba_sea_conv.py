"""An unseen site: Mamba-Sea with a convolution in place of each scan.

A row of the study `domain_generalisation` (benchmarks/studies), on vessels:

    medseg train configs/unseen_sites/mamba_sea_conv.py --hold-out all --out runs/mamba_sea_conv --stages.0.steps 300 \\
        --stages.0.objective.net.skips unet

Data, plan and batches as in configs/mamba_sea_vessels.py.
"""

from medseg_jax import Config, MambaSea, Mix, Optim, Stage, VMUNet

net = VMUNet((32, 64, 128), (1, 1, 1), (1, 1, 1), states=8, drop_path=0.1, mixer="conv")
stage = Stage(MambaSea(net), optim=Optim(lr=2e-3, warmup=20), mix=Mix(balance="domain"))
config = Config(data="data/vessels", stages=(stage,), plan="configs/plans/mamba_sea_vessels.json", validate_every=250)

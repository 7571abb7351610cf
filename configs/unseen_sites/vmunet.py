"""An unseen site: plain VM-UNet.

A row of the study `domain_generalisation` (benchmarks/studies), on vessels:

    medseg train configs/unseen_sites/vmunet.py --hold-out all --out runs/vmunet --stages.0.steps 300 \\
        --stages.0.objective.net.skips unet

Data, plan and batches as in configs/mamba_sea_vessels.py.
"""

from medseg_jax import Config, Mix, Optim, Stage, Supervised, VMUNet

net = VMUNet(features=(32, 64, 128), depths=(1, 1, 1), decoder_depths=(1, 1, 1), states=8, drop_path=0.1)
stage = Stage(Supervised(net), optim=Optim(lr=2e-3, warmup=20), mix=Mix(balance="domain"))
config = Config(data="data/vessels", stages=(stage,), plan="configs/plans/mamba_sea_vessels.json", validate_every=250)

"""An unseen site: plain VM-UNet.

A row of the study `domain_generalisation` (benchmarks/studies):

    medseg train configs/unseen_sites/vmunet.py --hold-out all --out runs/vmunet

Data, plan, steps and batches as in configs/mamba_sea_vessels.py.
"""

from medseg_jax import Config, Mix, Optim, Stage, Supervised, VMUNet

net = VMUNet(features=(32, 64, 128), depths=(1, 1, 1), decoder_depths=(1, 1, 1), states=8, drop_path=0.1)
stage = Stage(Supervised(net), optim=Optim(lr=2e-3, warmup=20), mix=Mix(balance="domain"))
config = Config(data="data/vessels", stages=(stage,), plan="configs/plans/mamba_sea_vessels.json", validate_every=250)

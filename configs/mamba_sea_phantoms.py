"""Mamba-Sea on synthetic pictures of three sites. Not measured yet, hence no smoke config with a golden number.

medseg train configs/mamba_sea_phantoms.py --hold-out site2 --out runs/mamba_sea_phantoms
"""

from medseg_jax import Config, MambaSea, Mix, Optim, Stage, VMUNet

net = VMUNet(features=(8, 16), depths=(1, 1), decoder_depths=(1, 1), states=4, drop_path=0.0)
stage = Stage(MambaSea(net), steps=60, optim=Optim(lr=5e-3, warmup=10), mix=Mix(balance="domain"))
config = Config(data="phantoms2d", stages=(stage,))

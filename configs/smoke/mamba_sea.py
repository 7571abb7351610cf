"""Smoke: Mamba-Sea on synthetic pictures of three sites, under a minute on two cores.

medseg train configs/smoke/mamba_sea.py --hold-out site2 --out runs/smoke_mamba_sea
"""

from medseg_jax import Config, MambaSea, Mix, Optim, Stage, VMUNet

net = VMUNet(features=(8, 16), depths=(1, 1), decoder_depths=(1, 1), states=4, drop_path=0.0)
stage = Stage(MambaSea(net), steps=60, optim=Optim(lr=5e-3, warmup=10), mix=Mix(balance="domain"))
config = Config(data="phantoms2d", stages=(stage,))

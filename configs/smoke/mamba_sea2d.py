"""Smoke: Mamba-Sea on synthetic pictures of three sites; without one of them with `--hold-out site2`.

medseg train configs/smoke/mamba_sea2d.py --out runs/smoke_mamba_sea2d
"""

from medseg_jax import Config, MambaSea, Mix, Optim, Stage, VMUNet

net = VMUNet(features=(16, 32), depths=(1, 1), decoder_depths=(1, 1), states=4, drop_path=0.0)
stage = Stage(MambaSea(net), steps=60, optim=Optim(lr=1e-2, warmup=10), mix=Mix(balance="domain"))
config = Config(data="phantoms2d", stages=(stage,))

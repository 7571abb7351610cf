"""Smoke: Mamba-Sea's method on a U-Net, on synthetic pictures of three sites; without one of them with `--hold-out`.

    medseg train configs/smoke/mamba_sea_unet2d.py --hold-out site2 --out runs/smoke_mamba_sea_unet2d

Dice on the site left out, seeds 0 and 1: 0.62 and 0.64; the plain U-Net of unet2d.py: 0.58 and 0.20.
"""

from medseg_jax import Config, MambaSea, Mix, Optim, Stage, UNet

net = UNet(features=(8, 16, 32), strides=((1, 1), (2, 2), (2, 2)), kernel_sizes=((3, 3),) * 3)
stage = Stage(MambaSea(net), steps=60, optim=Optim(lr=3e-3, warmup=10), mix=Mix(balance="domain"))
config = Config(data="phantoms2d", stages=(stage,))

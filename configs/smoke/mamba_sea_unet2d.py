"""Smoke: Mamba-Sea's method on a U-Net, on synthetic pictures of three sites; without one of them with `--hold-out`.

    medseg train configs/smoke/mamba_sea_unet2d.py --hold-out site2 --out runs/smoke_mamba_sea_unet2d

Dice on the site left out, seeds 0 to 2: 0.62, 0.64, 0.40; the plain U-Net of unet2d.py with this Mix: 0.60, 0.20, 0.34.
On the sites seen: 0.78, 0.80, 0.66 against 0.78, 0.26, 0.44, so that most of it is that 60 steps are few for one net.
"""

from medseg_jax import Config, MambaSea, Mix, Optim, Stage, UNet

net = UNet(features=(8, 16, 32), strides=((1, 1), (2, 2), (2, 2)), kernel_sizes=((3, 3),) * 3)
stage = Stage(MambaSea(net), steps=60, optim=Optim(lr=3e-3, warmup=10), mix=Mix(balance="domain"))
config = Config(data="phantoms2d", stages=(stage,))

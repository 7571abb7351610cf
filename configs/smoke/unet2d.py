"""Smoke: 2-D U-Net on synthetic pictures, under a minute on two cores.

medseg train configs/smoke/unet2d.py --out runs/smoke2d
"""

from medseg_jax import Config, Optim, Stage, Supervised, UNet

net = UNet(features=(8, 16, 32), strides=((1, 1), (2, 2), (2, 2)), kernel_sizes=((3, 3),) * 3)
config = Config(data="phantoms2d", stages=(Stage(Supervised(net), steps=60, optim=Optim(lr=3e-3, warmup=10)),))

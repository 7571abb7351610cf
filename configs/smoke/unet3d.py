"""Smoke: 3-D U-Net on synthetic volumes, under a minute on two cores.

medseg train configs/smoke/unet3d.py --out runs/smoke3d
"""

from medseg_jax import Config, Optim, Stage, Supervised, UNet

net = UNet(features=(8, 16), strides=((1, 1, 1), (2, 2, 2)), kernel_sizes=((3, 3, 3),) * 2)
config = Config(data="phantoms3d", stages=(Stage(Supervised(net), steps=40, optim=Optim(lr=3e-3, warmup=10)),))

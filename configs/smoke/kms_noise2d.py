"""Smoke: KMS noise on synthetic pictures, under a minute on two cores.

medseg train configs/smoke/kms_noise2d.py --out runs/smoke_kms2d
"""

from medseg_jax import Config, KMSNoise, Optim, Stage, UNet

net = UNet(features=(8, 16, 32), strides=((1, 1), (2, 2), (2, 2)), kernel_sizes=((3, 3),) * 3)
stage = Stage(KMSNoise(net, e_steps=3, warmup=10, begin=0), steps=60, optim=Optim(lr=3e-3, warmup=10))
config = Config(data="phantoms2d", stages=(stage,))

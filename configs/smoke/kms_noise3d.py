"""Smoke: KMS noise on synthetic volumes, with a learned correlation, under a minute on two cores.

medseg train configs/smoke/kms_noise3d.py --out runs/kms3d
"""

from medseg_jax import Config, KMSNoise, Optim, Stage, UNet

net = UNet(features=(8, 16), strides=((1, 1, 1), (2, 2, 2)), kernel_sizes=((3, 3, 3),) * 2)
method = KMSNoise(net, e_steps=3, warmup=10, begin=0, learn_rho=True)
config = Config(data="phantoms3d", stages=(Stage(method, steps=40, optim=Optim(lr=3e-3, warmup=10)),))

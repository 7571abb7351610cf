"""Smoke: 2-D U-Net on synthetic pictures, under a minute on two cores.

python -c "import medseg_jax as ms; ms.make_phantoms('data/phantoms2d', dim=2, cases=18, sites=3, size=64, seed=0)"
medseg train configs/smoke/unet2d.py --out runs/smoke2d
"""

from medseg_jax import Config, Optim, Stage, Supervised, UNet

net = UNet(features=(8, 16, 32), strides=((1, 1), (2, 2), (2, 2)), kernel_sizes=((3, 3),) * 3)
config = Config(data="data/phantoms2d", stages=(Stage(Supervised(net), steps=60, optim=Optim(lr=3e-3, warmup=10)),))

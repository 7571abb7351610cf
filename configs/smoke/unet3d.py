"""Smoke: 3-D U-Net on synthetic volumes, under a minute on two cores.

python -c "import medseg_jax as ms; ms.make_phantoms('data/phantoms3d', dim=3, cases=12, sites=2, size=24, seed=0)"
medseg train configs/smoke/unet3d.py --out runs/smoke3d
"""

from medseg_jax import Config, Optim, Stage, Supervised, UNet

net = UNet(features=(8, 16), strides=((1, 1, 1), (2, 2, 2)), kernel_sizes=((3, 3, 3),) * 2)
config = Config(data="data/phantoms3d", stages=(Stage(Supervised(net), steps=40, optim=Optim(lr=3e-3, warmup=10)),))

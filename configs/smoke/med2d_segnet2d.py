"""Smoke: a Med-2D SegNet of three narrow stages on synthetic pictures, under a minute on two cores.

medseg train configs/smoke/med2d_segnet2d.py --out runs/smoke_med2d
"""

from medseg_jax import Config, Med2DSegNet, Optim, Stage, Supervised

net = Med2DSegNet(widths=(8, 12, 16), kernel_size=3)
stage = Stage(Supervised(net), steps=60, optim=Optim(lr=3e-3, warmup=10))
config = Config(data="phantoms2d", stages=(stage,))

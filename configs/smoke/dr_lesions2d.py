"""Smoke: the loss for lesions on synthetic pictures, under a minute on two cores; or a network a class.

    medseg train configs/smoke/dr_lesions2d.py --out runs/smoke_dr
    medseg train configs/smoke/dr_lesions2d.py --classes lesion vessel --class all --out runs/smoke_dr_by_class

The network is a small U-Net, which compiles faster than a DeepLabv3+.
"""

from medseg_jax import Config, DRLesions, Optim, Stage, UNet

net = UNet(features=(8, 16, 32), strides=((1, 1), (2, 2), (2, 2)), kernel_sizes=((3, 3),) * 3)
stage = Stage(DRLesions(net), steps=60, optim=Optim(lr=3e-3, warmup=10))
config = Config(data="phantoms2d", stages=(stage,), classes=("lesion",))

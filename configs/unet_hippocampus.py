"""3-D U-Net on the hippocampus of the Medical Segmentation Decathlon (task 4), from `data plan` alone.

    medseg data convert hippocampus_msd04 data/hippocampus
    medseg data plan data/hippocampus
    medseg train configs/unet_hippocampus.py --out runs/hippocampus

The two classes differ by where they lie from front to back, so only left and right are mirrored.
"""

from medseg_jax import Augment, Config, Optim, Stage, Supervised, UNet

stage = Stage(Supervised(UNet()), optim=Optim(lr=3e-3), augment=Augment(mirror_axes=(2,)))
config = Config(data="data/hippocampus", stages=(stage,), ema=0.99)

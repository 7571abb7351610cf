"""3-D U-Net on the hippocampus of the Medical Segmentation Decathlon (task 4), from `data plan` alone.

medseg data convert hippocampus_msd04 data/hippocampus
medseg train configs/unet_hippocampus.py --out runs/hippocampus
"""

from medseg_jax import Config, Optim, Stage, Supervised, UNet

config = Config(data="data/hippocampus", stages=(Stage(Supervised(UNet()), optim=Optim(lr=2e-3)),), ema=0.99)

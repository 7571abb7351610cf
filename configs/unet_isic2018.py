"""2-D U-Net on skin lesions (ISIC 2018, squeezed to 256 x 256), from `data plan` alone.

medseg data convert isic2018_256 data/isic2018
medseg train configs/unet_isic2018.py --out runs/isic2018
"""

from medseg_jax import Config, Optim, Stage, Supervised, UNet

config = Config(data="data/isic2018", stages=(Stage(Supervised(UNet()), optim=Optim(lr=1e-3)),), ema=0.99)

"""2-D U-Net on skin lesions (ISIC 2018, squeezed to 256 x 256), from `data plan` alone.

    medseg data convert isic2018_256 data/isic2018
    medseg data plan data/isic2018
    medseg train configs/unet_isic2018.py --out runs/isic2018

Time: 8 to 20 minutes on two CPU cores (1,300 steps), by how busy they are. Expected on the 100 validation cases (the
set's own split): mean Dice per image 0.92. Observed (November 2026, seeds 0, 1, 2; in
benchmarks/results/baseline), last weights: Dice 0.927, 0.926, 0.927; HD95 15.1, 15.7, 15.1 px; NSD at 1 px 0.301,
0.305, 0.300.
"""

from medseg_jax import Config, Optim, Stage, Supervised, UNet

config = Config(data="data/isic2018", stages=(Stage(Supervised(UNet()), optim=Optim(lr=1e-3)),), ema=0.99)

"""3-D U-Net on the hippocampus of the Medical Segmentation Decathlon (task 4), from `data plan` alone.

    medseg data convert hippocampus_msd04 data/hippocampus
    medseg data plan data/hippocampus
    medseg train configs/unet_hippocampus.py --out runs/hippocampus

Time: about 15 minutes on two CPU cores (1,500 steps). Expected on the 24 validation cases (every fifth case, sorted):
mean Dice of the two parts 0.89. Observed (November 2026, seeds 0, 1, 2; in benchmarks/results/baseline), last weights:
Dice 0.890, 0.888, 0.892; NSD at 1 mm 0.966, 0.967, 0.967; HD95 1.34, 1.37, 1.28 mm. Best weights, which were chosen on
these cases: Dice 0.890, 0.888, 0.893.
"""

from medseg_jax import Augment, Config, Optim, Stage, Supervised, UNet

stage = Stage(Supervised(UNet()), optim=Optim(lr=3e-3), augment=Augment(mirror_axes=(2,)))
config = Config(data="data/hippocampus", stages=(stage,), ema=0.99)

"""Few labels on ACDC at a size for two CPU cores: a U-Net on the labelled patients alone.

    medseg data convert --source acdc_ssl acdc/derived_128 data/acdc
    medseg train configs/few_labels/supervised.py --out runs/supervised_acdc

The configs of this folder are compared by benchmarks/studies/few_labels.py: slices of 64 x 64, four labelled ones a
step (and four unlabelled ones; stage 1 of bcp.py and wt_bcp.py takes eight labelled ones and mixes them into four, so
that they see 10,000 labelled slices and the others 8,000), 2,000 steps, one optimiser, one augmentation, two networks
of equal size (0.45 M parameters). Labelled are the three patients of the papers' 5 % setting. Observed (seed 0, 16
minutes on two busy cores, last weights): mean Dice 0.626, HD95 9.0 pixels; the others as far as they were run in
docs/how-to/few-labels.md.
"""

from medseg_jax import Augment, BCPUNet, Config, Mix, Stage, Supervised

config = Config(
    data="data/acdc",
    plan="configs/few_labels/acdc_64.plan.json",
    labelled=("patient038", "patient050", "patient099"),
    stages=(Stage(Supervised(BCPUNet(width=8)), mix=Mix(4), augment=Augment(p_blur=0, p_low_resolution=0)),),
    ema=0.99,
    validate_every=500,
)

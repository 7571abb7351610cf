"""Lesions of IDRiD at a size for two CPU cores: a DeepLabv3+ each for haemorrhages and hard exudates.

    medseg data convert --source idrid "A. Segmentation" data/idrid
    medseg train configs/lesions/each.py --class all --out runs/lesions_each

The configs of this folder are compared by benchmarks/studies/dr_lesions.py: images of 1429 x 949, patches of 192 x 192,
four a step, half of them with a lesion in the middle; 150 steps a lesion, or 300 for both together; one loss, one
optimiser, one augmentation. From scratch.
"""

from medseg_jax import Augment, Config, DeepLabV3Plus, DRLesions, Mix, Optim, Stage

net = DeepLabV3Plus(channels=64, dropout=0.1, drop_connect=0.0)
augment = Augment(p_rotation=0.5, rotation=10.0, p_scale=0.0, p_noise=0.0, p_blur=0.0, p_low_resolution=0.0)
stage = Stage(DRLesions(net), steps=150, optim=Optim(lr=2e-3, warmup=20), mix=Mix(foreground=0.5), augment=augment)
config = Config(
    data="data/idrid",
    plan="configs/plans/dr_lesions_idrid_small.json",
    stages=(stage,),
    classes=("HE", "EX"),
    ema=0.95,
    validate_every=150,
)

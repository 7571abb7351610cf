"""Lesions of diabetic retinopathy (IDRiD): one DeepLabv3+ with a sigmoid for each of four lesions.

    medseg data convert --source idrid "A. Segmentation" data/idrid
    medseg train configs/dr_lesions_multilabel_idrid.py --out runs/dr_lesions_multilabel

The alternative to configs/dr_lesions_idrid.py, from which it takes everything else: a quarter of the cost in training
and prediction, features shared by all lesions.
"""

from medseg_jax import Augment, Config, DeepLabV3Plus, DRLesions, Mix, Optim, Stage

augment = Augment(p_rotation=0.5, rotation=10.0, p_scale=0.5, scale=(0.8, 1.25), p_noise=0.0, p_low_resolution=0.0)
stage = Stage(
    DRLesions(DeepLabV3Plus()), optim=Optim(lr=1e-3, weight_decay=1e-4), mix=Mix(foreground=0.5), augment=augment
)
config = Config(
    data="data/idrid",
    stages=(stage,),
    classes=("MA", "HE", "SE", "EX"),
    plan="configs/plans/dr_lesions_idrid.json",
    ema=0.999,
)

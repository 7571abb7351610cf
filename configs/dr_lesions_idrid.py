"""Lesions of diabetic retinopathy in fundus photographs (IDRiD): a DeepLabv3+ for each of four lesions.

    medseg data convert --source idrid "A. Segmentation" data/idrid
    medseg train configs/dr_lesions_idrid.py --class all --out runs/dr_lesions
    medseg predict runs/dr_lesions -i data/idrid --split test -o predictions

MA microaneurysms, HE haemorrhages, SE soft and EX hard exudates; small ones first, since of equal probabilities the
first class wins in the merged map. On a GPU, the plan trains each for 40,000 steps on patches of 512 x 512. On two CPU
cores, minutes a lesion: --plan configs/plans/dr_lesions_idrid_small.json --ema 0.98. ImageNet weights of the encoder
(segmentation_models_pytorch, timm): --pretrained FILE. Not trained yet.
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

"""Med-2D SegNet on skin lesions (ISIC 2018).

    medseg data convert --source isic2018 ISIC2018 data/isic2018
    medseg train configs/med2d_segnet_isic2018.py --out runs/med2d_isic2018

The recipe is that of configs/med2d_segnet_polyp.py. Not trained yet.
"""

from medseg_jax import Augment, Config, Med2DSegNet, Optim, Stage, Supervised

optim = Optim(lr=1e-3, weight_decay=1e-4, schedule="cosine", warmup=250, clip_norm=1.0)
augment = Augment(p_rotation=0.8, rotation=180.0, p_scale=0.8, scale=(0.7, 1.4), p_holes=0.5)
config = Config(
    data="data/isic2018",
    stages=(Stage(Supervised(Med2DSegNet()), optim=optim, augment=augment),),
    plan="configs/plans/med2d_segnet_isic2018.json",
    ema=0.999,
)

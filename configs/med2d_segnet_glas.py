"""Med-2D SegNet on glands in histology (GlaS).

    medseg data convert --source glas "Warwick QU Dataset" data/glas
    medseg train configs/med2d_segnet_glas.py --out runs/med2d_glas

The recipe is that of configs/med2d_segnet_polyp.py, for half as many steps: 85 pictures. Not trained yet.
"""

from medseg_jax import Augment, Config, Med2DSegNet, Optim, Stage, Supervised

optim = Optim(lr=1e-3, weight_decay=1e-4, schedule="cosine", warmup=250, clip_norm=1.0)
augment = Augment(p_rotation=0.8, rotation=180.0, p_scale=0.8, scale=(0.7, 1.4), p_holes=0.5)
config = Config(
    data="data/glas",
    stages=(Stage(Supervised(Med2DSegNet()), optim=optim, augment=augment),),
    plan="configs/plans/med2d_segnet_glas.json",
    ema=0.999,
)

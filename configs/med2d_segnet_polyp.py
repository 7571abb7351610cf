"""Med-2D SegNet on polyps (Kvasir-SEG), trained there and tested on other centres.

    medseg data convert --source kvasir_seg Kvasir-SEG data/kvasir_seg
    medseg train configs/med2d_segnet_polyp.py --out runs/med2d_polyp
    medseg data convert --source cvc_clinicdb CVC-ClinicDB data/cvc_clinicdb
    medseg predict runs/med2d_polyp -i data/cvc_clinicdb -o predictions
    medseg evaluate predictions data/cvc_clinicdb -o scores

The recipe is our choice, since the article's could not be read: pictures of 352 x 352 in ImageNet's norm, Dice +
cross-entropy, AdamW from 1e-3 by a cosine, clipped at 1, batches of 16, moving average; about 200 passes through 800
pictures, half of them with some boxes blanked (coarse dropout; the mask stays). The article's 95.78 % cannot be
compared with the Dice that is printed here: its authors' later code scores a soft Dice pooled over batches, and the
split is not known. For an accelerator; on two CPU cores see configs/small_networks. Not trained yet.
"""

from medseg_jax import Augment, Config, Med2DSegNet, Optim, Stage, Supervised

optim = Optim(lr=1e-3, weight_decay=1e-4, schedule="cosine", warmup=250, clip_norm=1.0)
augment = Augment(p_rotation=0.8, rotation=180.0, p_scale=0.8, scale=(0.7, 1.4), p_holes=0.5)
config = Config(
    data="data/kvasir_seg",
    stages=(Stage(Supervised(Med2DSegNet()), optim=optim, augment=augment),),
    plan="configs/plans/med2d_segnet_polyp.json",
    ema=0.999,
)

"""Lesions of IDRiD at a size for two CPU cores: one U-Net with a sigmoid a lesion. See each.py.

medseg train configs/lesions/unet_shared.py --out runs/lesions_unet_shared
"""

from medseg_jax import Augment, Config, DRLesions, Mix, Optim, Stage, UNet

net = UNet.isotropic(2, 16, 32, 64, 128, 128)
augment = Augment(p_rotation=0.5, rotation=10.0, p_scale=0.0, p_noise=0.0, p_blur=0.0, p_low_resolution=0.0)
stage = Stage(DRLesions(net), steps=300, optim=Optim(lr=2e-3, warmup=20), mix=Mix(foreground=0.5), augment=augment)
config = Config(
    data="data/idrid",
    plan="configs/plans/dr_lesions_idrid_small.json",
    stages=(stage,),
    classes=("HE", "EX"),
    ema=0.95,
    validate_every=300,
)

"""Small networks: Med-2D SegNet, 2.05 million parameters, on pictures of 96 x 96.

    medseg data convert --source kvasir_seg polyp/kvasir_seg data/kvasir_seg
    medseg train configs/small_networks/med2d_segnet.py --out runs/med2d_segnet_kvasir

Compared with unet_params.py and unet_time.py by benchmarks/studies/small_networks.py: same plan, 200 steps of four
pictures, same loss, optimiser and augmentation.
"""

from medseg_jax import Config, Med2DSegNet, Optim, Stage, Supervised

config = Config(
    data="data/kvasir_seg",
    plan="configs/small_networks/polyp_96.plan.json",
    stages=(Stage(Supervised(Med2DSegNet()), optim=Optim(lr=2e-3, warmup=20)),),
    ema=0.95,
    validate_every=100,
)

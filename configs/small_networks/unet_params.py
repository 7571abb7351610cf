"""Small networks: a U-Net with as many parameters as Med-2D SegNet (2.07 million). See med2d_segnet.py.

medseg train configs/small_networks/unet_params.py --out runs/unet_params_kvasir
"""

from medseg_jax import Config, Optim, Stage, Supervised, UNet

net = UNet.isotropic(2, 17, 34, 66, 132, 264, deep_supervision=False)
config = Config(
    data="data/kvasir_seg",
    plan="configs/small_networks/polyp_96.plan.json",
    stages=(Stage(Supervised(net), optim=Optim(lr=2e-3, warmup=20)),),
    ema=0.95,
    validate_every=100,
)

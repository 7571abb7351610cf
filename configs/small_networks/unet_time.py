"""Small networks: a wider U-Net, whose training step takes as long on two idle CPU cores. See med2d_segnet.py.

medseg train configs/small_networks/unet_time.py --out runs/unet_time_kvasir
"""

from medseg_jax import Config, Optim, Stage, Supervised, UNet

net = UNet.isotropic(2, 48, 96, 192, 384, deep_supervision=False)
config = Config(
    data="data/kvasir_seg",
    plan="configs/small_networks/polyp_96.plan.json",
    stages=(Stage(Supervised(net), optim=Optim(lr=2e-3, warmup=20)),),
    ema=0.95,
    validate_every=100,
)

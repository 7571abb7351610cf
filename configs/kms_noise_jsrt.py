"""Learning from wrong labels: KMS noise on chest X-rays whose training labels were corrupted on purpose.

    medseg data convert --source jsrt jsrt data/jsrt
    medseg data plan data/jsrt
    medseg data corrupt data/jsrt data/jsrt_wrong --style jsrt --alpha 0.5 --beta 0.7
    medseg train configs/kms_noise_jsrt.py --out runs/jsrt --data data/jsrt_wrong
    medseg audit data/jsrt_wrong runs/jsrt

128 x 128, five organs that overlap, 400 steps of 8 images. `robust_jsrt.py` is the same with the losses that it is
compared with. Three E-steps a step, since the whitened posterior converges in a few visits. An organ's labels are
doubted once the network agrees with them to a Dice of 0.5, for one that it does not know yet looks like a wrong label.
Left and right organs are different classes, so nothing is mirrored. Expected and observed: docs/how-to/wrong-labels.md.
"""

from medseg_jax import Augment, Config, KMSNoise, Optim, Stage, UNet

net = UNet(features=(8, 16, 32, 64, 64, 64))
augment = Augment(p_rotation=0.0, p_scale=0.0, mirror_axes=())
stage = Stage(KMSNoise(net, e_steps=3, begin=0.5), steps=400, optim=Optim(lr=1e-2), augment=augment)
config = Config(data="data/jsrt_wrong", stages=(stage,), ema=0.99, validate_every=250)

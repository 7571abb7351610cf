"""What KMS noise is compared with on JSRT: the same network, data, optimiser and steps with another loss.

    medseg train configs/robust_jsrt.py --out runs/ce --data data/jsrt_wrong --stages.0.objective.loss-name ce

(or dice_ce, gce, smoothing, em, t_loss). The ceiling is `ce` on data/jsrt, whose labels are clean. See
`kms_noise_jsrt.py` for the data; expected and observed: docs/how-to/wrong-labels.md.
"""

from medseg_jax import Augment, Config, Optim, Robust, Stage, UNet

net = UNet(features=(8, 16, 32, 64, 64, 64))
augment = Augment(p_rotation=0.0, p_scale=0.0, mirror_axes=())
stage = Stage(Robust(net, loss_name="ce"), steps=400, optim=Optim(lr=1e-2), augment=augment)
config = Config(data="data/jsrt_wrong", stages=(stage,), ema=0.99, validate_every=250)

"""Few labels in 3-D: mean teacher. See hippocampus_supervised.py.

medseg train configs/few_labels/hippocampus_mean_teacher.py --out runs/mean_teacher_hippocampus
"""

from medseg_jax import Augment, Config, MeanTeacher, Mix, Optim, Stage, UNet

net = UNet(features=(8, 16, 32), strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)), kernel_sizes=((3, 3, 3),) * 3)
augment, optim = Augment(mirror_axes=(2,)), Optim(lr=3e-3)
config = Config(
    data="data/hippocampus",
    labelled=("hippocampus_003", "hippocampus_004"),
    stages=(Stage(MeanTeacher(net, ramp=300), 600, optim, Mix(2, 2), augment),),
    ema=0.99,
    validate_every=300,
)

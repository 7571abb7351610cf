"""Few labels in 3-D: the hippocampus of the Medical Segmentation Decathlon, a U-Net on two labelled volumes alone.

    medseg data convert hippocampus_msd04 data/hippocampus
    medseg train configs/few_labels/hippocampus_supervised.py --out runs/supervised_hippocampus

With hippocampus_mean_teacher.py and hippocampus_bcp.py: two of 96 training volumes are labelled, the other 94 are not;
600 steps of two labelled volumes (and two unlabelled ones; stage 1 of BCP takes four labelled ones and mixes them into
two), one network, one optimiser, one augmentation. Scores on 24 volumes stand in docs/how-to/few-labels.md.
"""

from medseg_jax import Augment, Config, Mix, Optim, Stage, Supervised, UNet

net = UNet(features=(8, 16, 32), strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)), kernel_sizes=((3, 3, 3),) * 3)
augment, optim = Augment(mirror_axes=(2,)), Optim(lr=3e-3)
config = Config(
    data="data/hippocampus",
    labelled=("hippocampus_003", "hippocampus_004"),
    stages=(Stage(Supervised(net), 600, optim, Mix(2), augment),),
    ema=0.99,
    validate_every=300,
)

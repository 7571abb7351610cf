"""Few labels on ACDC: mean teacher. See supervised.py.

medseg train configs/few_labels/mean_teacher.py --out runs/mean_teacher_acdc
"""

from medseg_jax import Augment, BCPUNet, Config, MeanTeacher, Mix, Stage

stage = Stage(MeanTeacher(BCPUNet(width=8), ramp=1000), mix=Mix(4, 4), augment=Augment(p_blur=0, p_low_resolution=0))
config = Config(
    data="data/acdc",
    plan="configs/few_labels/acdc_64.plan.json",
    labelled=("patient038", "patient050", "patient099"),
    stages=(stage,),
    ema=0.99,
    validate_every=500,
)

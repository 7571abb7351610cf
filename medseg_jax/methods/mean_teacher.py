"""Mean teacher: a student that must agree with the average of its past on unlabelled images.

    loss = supervised(x_l, y_l) + lambda(t) * mean (p_student(u + n) - p_teacher(u + n'))^2

n, n' are independent Gaussian noise, clipped at two standard deviations; lambda rises to its value along a sigmoid.
Source: Tarvainen & Valpola, "Mean teachers are better role models", NeurIPS 2017, as SSL4MIS applies it to segmentation
(noise on the teacher's input, mean square over voxels and classes, weight 0.1). Departures: the student's input gets
noise too (the paper's figure 2), both after the same augmentation; the teacher runs in training mode as in SSL4MIS.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from medseg_jax.methods import teacher as teachers
from medseg_jax.methods.objective import Tree, check_numbers, probabilities
from medseg_jax.methods.supervised import Supervised
from medseg_jax.types import Batch


@dataclass(frozen=True)
class MeanTeacher(Supervised):
    """Dice + cross entropy on labelled images, consistency with the teacher on unlabelled ones.

    Attributes:
        ema_decay: of the teacher.
        consistency: largest weight of the consistency.
        ramp: steps until the weight is reached.
        noise: standard deviation of the noise, in units of the normalised image.
    """

    batch_spec: ClassVar[tuple[str, ...]] = ("image", "label", "unlabelled")

    ema_decay: float = 0.99
    consistency: float = 0.1
    ramp: int = 2000
    noise: float = 0.1

    def __post_init__(self):
        check_numbers(self, shares=("ema_decay",), amounts=("consistency", "ramp", "noise"))

    def init(self, key: Array, batch: Batch) -> tuple[Tree, Tree]:
        params, aux = super().init(key, batch)
        return params, teachers.with_teacher(params, aux["stats"])

    def loss(self, params: Tree, aux: Tree, frozen: Tree, batch: Batch, key: Array):
        keys = jax.random.split(key, 5)
        supervised, (new, _) = super().loss(params, aux, frozen, batch, keys[0])
        teacher, image, exclusive = teachers.current(params, aux), batch["unlabelled"], self.task.labels.exclusive

        def noisy(key):
            return image + self.noise * jnp.clip(jax.random.normal(key, image.shape), -2, 2)

        theirs, _ = self.fn.apply(teacher["params"], teacher["stats"], noisy(keys[1]), train=True, key=keys[2])
        ours, stats = self.fn.apply(params, new["stats"], noisy(keys[3]), train=True, key=keys[4])
        gap = probabilities(ours[0], exclusive) - jax.lax.stop_gradient(probabilities(theirs[0], exclusive))
        consistency = jnp.square(gap).mean()
        weight = self.consistency * teachers.sigmoid_ramp(aux["step"], self.ramp)
        metrics = {"supervised": supervised, "consistency": consistency}
        return supervised + weight * consistency, ({**aux, "stats": stats, "teacher": teacher}, metrics)

    def after_update(self, params: Tree, aux: Tree, step: Array) -> Tree:
        return teachers.updated(params, aux, self.ema_decay)

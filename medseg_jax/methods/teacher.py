"""The mean teacher that the semi-supervised methods share, and what they make of its predictions.

    teacher <- d * teacher + (1 - d) * student      after every update, over parameters and running statistics

(Tarvainen & Valpola 2017, eq. 2.) It lives in `aux`:

    {"stats": the student's statistics, "teacher": {"params": ..., "stats": ...}, "step": updates in this stage}

At the first step of a stage the teacher is the student as the stage before left it (`current`), also where that stage
had a teacher: "step" is never taken over (`transfer` in training/prepare.py). No gradient flows through it, and since a
step whose state is not finite is undone as a whole (training/step.py), no NaN enters it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from medseg_jax.methods.objective import Tree
from medseg_jax.ops.components import largest_component
from medseg_jax.types import Batch, UserError


def with_teacher(params: Tree, stats: Tree) -> Tree:
    """`aux` of a student that has a teacher."""
    copy = jax.tree.map(jnp.copy, {"params": params, "stats": stats})
    return {"stats": stats, "teacher": copy, "step": jnp.zeros((), jnp.int32)}


def current(params: Tree, aux: Tree) -> Tree:
    """The teacher {"params", "stats"}; before the first update, the student itself."""
    student, first = {"params": params, "stats": aux["stats"]}, aux["step"] == 0
    return jax.lax.stop_gradient(jax.tree.map(lambda s, t: jnp.where(first, s, t), student, aux["teacher"]))


def average(teacher: Tree, student: Tree, decay: float) -> Tree:
    """decay * teacher + (1 - decay) * student, leaf by leaf."""
    return jax.tree.map(lambda t, s: decay * t + (1 - decay) * s, teacher, student)


def updated(params: Tree, aux: Tree, decay: float) -> Tree:
    """`aux` after an update of the student."""
    teacher = average(aux["teacher"], {"params": params, "stats": aux["stats"]}, decay)
    return {**aux, "teacher": teacher, "step": aux["step"] + 1}


def sigmoid_ramp(step: Array, length: int) -> Array:
    """exp(-5 (1 - t)^2) with t = step / length up to 1 (Laine & Aila 2017)."""
    return jnp.exp(-5 * (1 - linear_ramp(step, length)) ** 2)


def linear_ramp(step: Array, length: int) -> Array:
    """step / length, up to 1; 1 at once if there is no length."""
    return jnp.minimum(step / length, 1.0) if length else jnp.ones(())


def pseudo_target(logits: Float[Array, "b *s k"], exclusive: bool, neighbours: int) -> Float[Array, "b *s k"]:
    """What the teacher says, as a target of zeros and ones: of every class its largest component in each image.

    Voxels of dropped components become background. Runs on the device, without a trip to the host.

    Args:
        logits: of the teacher; not finite: the target is NaN, so that the step is skipped instead of learning from it.
        exclusive: argmax over background and classes, else one threshold (1/2) a class.
        neighbours: of a voxel: 4 or 8 in pictures, 6, 18 or 26 in volumes.
    """
    said = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=bool)[..., 1:] if exclusive else logits > 0
    masks = largest(said, neighbours)
    if exclusive:
        masks = jnp.concatenate([~masks.any(-1, keepdims=True), masks], -1)
    return jax.lax.stop_gradient(jnp.where(jnp.isfinite(logits).all(), masks.astype(jnp.float32), jnp.nan))


def largest(masks: Bool[Array, "b *s k"], neighbours: int) -> Bool[Array, "b *s k"]:
    """The largest component of each mask; of equally large ones the first in reading order."""
    moved = jnp.moveaxis(masks, -1, 1)  # [b, k, *s]
    flat = moved.reshape(-1, *masks.shape[1:-1])  # [b k, *s]
    kept = largest_component(flat, neighbours)
    return jnp.moveaxis(kept.reshape(moved.shape), 1, -1)


def halves(batch: Batch, *names: str) -> list[tuple[Array, Array]]:
    """Rows 0, 2, ... and rows 1, 3, ... of each field: two groups that lie on every device alike.

    Raises:
        UserError: the fields do not have one even number of rows.
    """
    rows = {name: len(batch[name]) for name in names}
    if len(set(rows.values())) > 1 or rows[names[0]] % 2:
        raise UserError(
            "Copy-paste wants pairs of images",
            found=", ".join(f"{count} rows of {name}" for name, count in rows.items()),
            expected="an even number of labelled rows, and as many unlabelled ones",
            remedy="set the stage's mix, such as Mix(labelled=4, unlabelled=4)",
        )
    return [(batch[name][0::2], batch[name][1::2]) for name in names]

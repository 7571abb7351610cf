"""Bidirectional copy-paste: labelled and unlabelled images are pasted into each other.

A mask m is 1, but 0 in one box of two thirds of each side at a random place; one mask a step, for the whole batch. Rows
of the labelled images x, y and of the unlabelled ones u fall into two groups a and b.

    stage 1, `CopyPaste`:   x = x_a m + x_b (1 - m),    loss = R(x; y_a, y_b; 1, 1)
    stage 2, `BCP`:         q = largest component per class of the teacher's prediction on u
                            in:   u_a m + x_a (1 - m),  loss = R(in;  q_a, y_a; w, 1)
                            out:  x_b m + u_b (1 - m),  loss + R(out; y_b, q_b; 1, w)

R(x; y, z; v, w) = v L(y; m) + w L(z; 1 - m), with L = (Dice + cross entropy) / 2 of the voxels where its mask is 1. The
teacher is the average of the student's past (teacher.py) and starts from stage 1.

Source: Bai et al., "Bidirectional Copy-Paste for Semi-Supervised Medical Image Segmentation", CVPR 2023, and its code.
As there, Dice counts the background; in pictures it has squares and runs over the batch, in volumes it has none and
runs over each sample, and stage 1 in volumes takes L of the mixed label instead of R. The two directions are two
forward passes, each with its own batch statistics, and the teacher runs in training mode. Departures: the teacher's
running statistics are averaged in volumes too; any network, deep supervision, ignored voxels and overlapping classes
are allowed.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from medseg_jax import losses
from medseg_jax.methods import teacher as teachers
from medseg_jax.methods.objective import Tree, check_numbers
from medseg_jax.methods.supervised import Supervised
from medseg_jax.types import Batch

type Heads = tuple[tuple[Array, ...], ...]
"""Logits [b, *t, k] of every head of a network, each by resolution, the full one first."""

type Truth = tuple[Float[Array, "b *s k"], Float[Array, "b *s"] | None]
"""Target and voxel weights (None: all 1)."""

DICE = {
    2: {"squared": True, "batch": True, "smooth": 1e-10, "background": True},
    3: {"squared": False, "batch": False, "smooth": 1e-5, "background": True},
}
"""By the number of axes, as in the released scripts."""


# ---------------------------------------------------------------- masks


def box_size(shape: tuple[int, ...], ratio: float) -> tuple[int, ...]:
    """Sides of the box: `ratio` of each side, rounded down."""
    return tuple(int(n * ratio + 1e-9) for n in shape)


def paste_mask(key: Array, shape: tuple[int, ...], ratio: float) -> Bool[Array, "*s"]:
    """True, but False in a box at a random place. As released, the box never touches the far end of an axis."""
    size = box_size(shape, ratio)
    free = jnp.array([max(n - side, 1) for n, side in zip(shape, size, strict=True)])
    start = jax.random.randint(key, (len(shape),), 0, free)
    return ~in_box(shape, start, size)


def in_box(shape: tuple[int, ...], start: Array, size: tuple[int, ...]) -> Bool[Array, "*s"]:
    """True where start <= index < start + size along all axes."""
    inside = jnp.ones(shape, bool)
    for axis, (n, side) in enumerate(zip(shape, size, strict=True)):
        index = jnp.arange(n).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        inside &= (index >= start[axis]) & (index < start[axis] + side)
    return inside


def mix(outside: Float[Array, "b *s c"], inside: Float[Array, "b *s c"], mask: Bool[Array, "*s"]) -> Array:
    """`outside` where the mask is True, else `inside`. A product, so that no NaN of either is hidden."""
    m = mask[..., None].astype(outside.dtype)
    return outside * m + inside * (1 - m)


# ---------------------------------------------------------------- losses


def region_loss(heads: Heads, truth: Truth, where: Bool[Array, "*s"] | None, exclusive: bool) -> Float[Array, "heads"]:
    """(Dice + cross entropy) / 2 of the voxels where `where` is True, for each head."""
    target, weight = truth
    if where is not None:
        weight = jnp.broadcast_to(where, target.shape[:-1]) * (1.0 if weight is None else weight)

    def one_scale(z, y, w):
        return losses.dice_ce(z, y, w, exclusive=exclusive, **DICE[target.ndim - 2]) / 2

    return jnp.stack([losses.deep_supervision(one_scale, head, target, weight) for head in heads])


def mixed_loss(
    heads: Heads,
    outside: Truth,
    inside: Truth,
    mask: Bool[Array, "*s"],
    weights: tuple[float, float],
    exclusive: bool = True,
) -> Float[Array, "heads"]:
    """weights[0] * loss outside the box + weights[1] * loss inside, for each head."""
    first, second = weights
    outer = region_loss(heads, outside, mask, exclusive)
    return first * outer + second * region_loss(heads, inside, ~mask, exclusive)


# ---------------------------------------------------------------- stage 1


@dataclass(frozen=True)
class CopyPaste(Supervised):
    """Stage 1 of BCP: labelled images pasted into each other.

    Attributes:
        ratio: share of each side that the box takes.
    """

    ratio: float = 2 / 3

    def __post_init__(self):
        check_numbers(self, shares=("ratio",))

    def heads(self, params: Tree, stats: Tree, image: Array, key: Array) -> tuple[Heads, Tree]:
        """All heads of the network on an image [b, *s, c], in training mode, and the new statistics."""
        logits, stats = self.fn.apply(params, stats, image, train=True, key=key)
        return (logits,), stats

    def loss(self, params: Tree, aux: Tree, frozen: Tree, batch: Batch, key: Array):
        mask_key, key = jax.random.split(key)
        (image_a, image_b), (label_a, label_b) = teachers.halves(batch, "image", "label")
        mask, exclusive = paste_mask(mask_key, image_a.shape[1:-1], self.ratio), self.task.labels.exclusive
        heads, stats = self.heads(params, aux["stats"], mix(image_a, image_b, mask), key)
        if mask.ndim == 2:
            each = mixed_loss(heads, self.target(label_a), self.target(label_b), mask, (1, 1), exclusive)
        else:
            each = region_loss(heads, self.target(jnp.where(mask, label_a, label_b)), None, exclusive)
        return self.over_heads(each), ({**aux, "stats": stats}, {})

    def over_heads(self, each: Float[Array, "heads"]) -> Float[Array, ""]:
        """One loss of those of all heads."""
        return each.mean()


# ---------------------------------------------------------------- stage 2


@dataclass(frozen=True)
class BCP(CopyPaste):
    """Stage 2 of BCP: labelled and unlabelled images pasted into each other, pseudo-labels by a mean teacher.

    Attributes:
        ema_decay: of the teacher.
        unlabelled_weight: weight of regions with pseudo-labels, w.
        neighbours: of a voxel, where the largest component is sought: 4 or 8; 6, 18 or 26.
            None: 8 in pictures (as for ACDC), 26 in volumes (as for LA; Pancreas had 6).
    """

    batch_spec: ClassVar[tuple[str, ...]] = ("image", "label", "unlabelled")

    ema_decay: float = 0.99
    unlabelled_weight: float = 0.5
    neighbours: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, shares=("ema_decay",), amounts=("unlabelled_weight",))

    def init(self, key: Array, batch: Batch) -> tuple[Tree, Tree]:
        params, aux = super().init(key, batch)
        return params, teachers.with_teacher(params, aux["stats"])

    def loss(self, params: Tree, aux: Tree, frozen: Tree, batch: Batch, key: Array):
        keys = jax.random.split(key, 5)
        pairs = teachers.halves(batch, "image", "label", "unlabelled")
        (image_a, image_b), (label_a, label_b), (other_a, other_b) = pairs
        mask, exclusive = paste_mask(keys[0], image_a.shape[1:-1], self.ratio), self.task.labels.exclusive

        # ------------------------------------------------------------ what the teacher says
        teacher = teachers.current(params, aux)
        guess_a = self.pseudo_target(teacher, other_a, keys[1])
        guess_b = self.pseudo_target(teacher, other_b, keys[2])

        # ------------------------------------------------------------ what the student learns from it
        w = self.unlabelled_weight
        inward, stats = self.heads(params, aux["stats"], mix(other_a, image_a, mask), keys[3])
        outward, stats = self.heads(params, stats, mix(image_b, other_b, mask), keys[4])
        loss_in = mixed_loss(inward, (guess_a, None), self.target(label_a), mask, (w, 1), exclusive)
        loss_out = mixed_loss(outward, self.target(label_b), (guess_b, None), mask, (1, w), exclusive)
        loss = self.over_heads(loss_in + loss_out)
        extra, metrics = self.extra_loss(inward, aux["step"])
        metrics = {"in": loss_in.mean(), "out": loss_out.mean(), **metrics}
        return loss + extra, ({**aux, "stats": stats, "teacher": teacher}, metrics)

    def pseudo_target(self, teacher: Tree, image: Array, key: Array) -> Float[Array, "b *s k"]:
        """The teacher's cleaned prediction by its first head."""
        heads, _ = self.heads(teacher["params"], teacher["stats"], image, key)
        neighbours = self.neighbours or (8 if image.ndim == 4 else 26)
        return teachers.pseudo_target(heads[0][0], self.task.labels.exclusive, neighbours)

    def extra_loss(self, inward: Heads, step: Array) -> tuple[Array | float, dict[str, Array]]:
        """A further term on the heads of the inward images, and metrics; for methods that build on this one."""
        del inward, step
        return 0.0, {}

    def after_update(self, params: Tree, aux: Tree, step: Array) -> Tree:
        return teachers.updated(params, aux, self.ema_decay)

"""Test-time augmentation: a network looks at an image in several ways, and what it sees is averaged.

    flips   all mirror images                                       2 ** dim views
    rot90   the quarter turns of the (h, w) plane                   4 views; 2 ** (dim + 1) together with flips
    scale   the image resampled by each of SCALES                   about 3 times the work

They compose: every scale is seen through every view. Flips and quarter turns only permute voxels, so that they are
undone exactly, and a network that is equivariant to them predicts the same with and without. Scales go through the same
resampling as a run with another spacing would.

A mean over a group of symmetries makes any network equivariant to it (Cohen & Welling, ICML 2016, section 3); mirroring
at test time is nnU-Net's (Isensee et al., Nature Methods 2021).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from medseg_jax.runtime.run import Predict
from medseg_jax.types import UserError

type Augmentation = Literal["flips", "rot90", "scale"]
AUGMENTATIONS: tuple[str, ...] = get_args(Augmentation.__value__)

SCALES = (1.0, 0.8, 1.25)
"""Zoom factors of "scale", within the range of scales that training augments with."""

SQUARE = 0.02
"""Relative difference of two spacings up to which a pixel counts as square."""


@dataclass(frozen=True)
class View:
    """One way to look at a patch [b, *s, c]: swap the last two spatial axes if `transposed`, mirror `flipped` axes."""

    transposed: bool
    flipped: tuple[bool, ...]

    def apply(self, image: Any) -> Any:
        """[b, *s, c] -> the same as seen in this view."""
        image = image.swapaxes(-3, -2) if self.transposed else image
        return np.flip(image, tuple(axis + 1 for axis, flip in enumerate(self.flipped) if flip))


def views(augmentations: Sequence[str], dim: int) -> tuple[View, ...]:
    """Every view once, the plain one first."""
    mirrors = [tuple(flips) for flips in product((False, True), repeat=dim)]
    if "flips" in augmentations:
        return tuple(View(t, f) for t in ((False, True) if "rot90" in augmentations else (False,)) for f in mirrors)
    if "rot90" in augmentations:
        still = (False,) * (dim - 2)
        # Turns by 0, 90, 180 and 270 degrees, each a transposition and mirrors.
        turns = ((False, False, False), (True, True, False), (False, True, True), (True, False, True))
        return tuple(View(t, (*still, h, w)) for t, h, w in turns)
    return (View(False, (False,) * dim),)


def scales(augmentations: Sequence[str]) -> tuple[float, ...]:
    """Factors by which the image is zoomed, 1 first."""
    return SCALES if "scale" in augmentations else (1.0,)


def check(augmentations: Sequence[str], patch_size: Sequence[int], spacing: Sequence[float | None]) -> None:
    """Refuses unknown words, and quarter turns where they would show the network something it was never trained on.

    Args:
        patch_size: `dim` entries.
        spacing: of the network's input, (d, h, w); None where it is not known yet.

    Raises:
        UserError: an unknown augmentation; a patch whose (h, w) is not square; pixels that are not.
    """
    if unknown := [name for name in augmentations if name not in AUGMENTATIONS]:
        raise UserError("Unknown test-time augmentation", found=", ".join(unknown), expected=", ".join(AUGMENTATIONS))
    if "rot90" not in augmentations:
        return
    remedy = " ".join(["--tta", *(name for name in augmentations if name != "rot90")]) + " leaves them out"
    remedy = remedy if len(augmentations) > 1 else "leave --tta rot90 out"
    if patch_size[-2] != patch_size[-1]:
        raise UserError(
            "Quarter turns need a patch that is square in its plane",
            found=f"a patch of {' x '.join(map(str, patch_size))}",
            expected=f"height and width alike, such as {patch_size[-1]} x {patch_size[-1]}",
            remedy=remedy,
        )
    h, w = spacing[-2:]
    if h is not None and w is not None and abs(h - w) > SQUARE * min(h, w):
        raise UserError(
            "Quarter turns need square pixels",
            found=f"a spacing of {h:.4g} x {w:.4g} in the plane",
            expected="the same along height and width",
            remedy=remedy,
        )


def average(predict: Predict, seen: Sequence[View]) -> Predict:
    """A network that returns the mean of the predictions of all views, each undone."""
    if len(seen) == 1 and not seen[0].transposed and not any(seen[0].flipped):
        return predict

    def mean(image: np.ndarray) -> jax.Array:
        total = jnp.float32(0)
        for view in seen:
            probabilities = predict(view.apply(image))
            total = _add_undone(total, probabilities, np.array(view.flipped), 1 / len(seen), view.transposed)
        return total

    return mean


@partial(jax.jit, static_argnames="transposed")
def _add_undone(total: jax.Array, image: jax.Array, flipped: jax.Array, weight: float, transposed: bool) -> jax.Array:
    """total + weight * the view of image [b, *s, k] undone: two programs for all views."""
    for a in range(image.ndim - 2):
        image = jnp.where(flipped[a], jnp.flip(image, a + 1), image)
    image = image.swapaxes(-3, -2) if transposed else image
    return total + weight * image.astype(jnp.float32)

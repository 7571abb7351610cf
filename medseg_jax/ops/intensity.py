"""Intensities of a sample: colour, blur and low resolution, contrast, gamma, holes. Each keeps the image's shape."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

type Image = Float[Array, "*s c"]


def color_matrix(degrees: Array, saturation: Array) -> Float[Array, "3 3"]:
    """Turn colours about the grey axis (1, 1, 1) (Rodrigues) and scale their distance from it."""
    grey = jnp.full((3, 3), 1 / 3)
    cross = jnp.array([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    angle = jnp.deg2rad(degrees)
    return grey + saturation * (jnp.cos(angle) * (jnp.eye(3) - grey) + jnp.sin(angle) * cross)


def smooth(image: Image, deviation: Float[Array, "c n"], keep: Float[Array, " c"], axes: Sequence[int]) -> Image:
    """Gaussian blur, then low resolution. Both are linear along each axis, so they are one matrix an axis and channel.

    Args:
        deviation: of the Gaussian in voxels for each channel and axis; 0 leaves the channel as it is.
        keep: share of the voxels kept along each of `axes`, for each channel; 1 leaves it as it is.
    """
    letters = "xyz"[: image.ndim - 1]
    for axis, letter in enumerate(letters):
        side = image.shape[axis]
        matrix = _blur_matrix(deviation[:, axis], side)
        if axis in axes:
            matrix = jnp.matmul(_coarse_matrix(keep, side), matrix, precision="highest")
        image = jnp.einsum(
            f"ci{letter},{letters}c->{letters.replace(letter, 'i')}c", matrix, image, precision="highest"
        )
    return image


def _blur_matrix(deviation: Float[Array, " c"], side: int) -> Float[Array, "c side side"]:
    """Gaussian weights, cut off at the border and normalised; the identity for deviation 0."""
    distance = np.subtract.outer(np.arange(side), np.arange(side)).astype(np.float32)
    weights = jnp.exp(-0.5 * (distance / jnp.maximum(deviation, 1e-3)[:, None, None]) ** 2)
    return weights / weights.sum(-1, keepdims=True)


def _coarse_matrix(keep: Float[Array, " c"], side: int) -> Float[Array, "c side side"]:
    """Nearest-neighbour reduction to round(keep * side) voxels, then linear interpolation back, as in nnU-Net."""
    voxel = np.arange(side)
    count = jnp.maximum(jnp.round(keep * side), 1).astype(jnp.int32)[:, None]  # [c, 1]
    # The coarse position (voxel + 1/2) count / side - 1/2 in units of 1 / (2 side): integers make keep = 1 exact.
    at = jnp.clip((2 * voxel + 1) * count - side, 0, 2 * side * (count - 1))  # [c, side]
    low, share = at // (2 * side), (at % (2 * side)) / (2 * side)
    matrix = jnp.zeros((), jnp.float32)
    for coarse, weight in ((low, 1 - share), (jnp.minimum(low + 1, count - 1), share)):
        source = (2 * coarse + 1) * side // (2 * count)
        matrix += weight[..., None] * jax.nn.one_hot(source, side)
    return matrix


def contrast(image: Image, factor: Float[Array, " c"]) -> Image:
    """Scale each channel about its mean and clip it to the range that it had."""
    space = tuple(range(image.ndim - 1))
    mean = image.mean(space)
    return jnp.clip((image - mean) * factor + mean, image.min(space), image.max(space))


def gamma(image: Image, exponent: Float[Array, " c"]) -> Image:
    """Raise each channel, brought to [0, 1], to a power; then restore its mean and standard deviation.

    A constant channel stays what it is.
    """
    space = tuple(range(image.ndim - 1))
    low = image.min(space)
    span = image.max(space) - low
    unit = (image - low) / jnp.where(span > 0, span, 1)
    bent = unit**exponent
    ratio = unit.std(space) / jnp.maximum(bent.std(space), 1e-8)
    return ((bent - bent.mean(space)) * ratio + unit.mean(space)) * span + low


def punch(image: Image, place: Float[Array, "n d"], side: Float[Array, "n d"], count: Int[Array, ""]) -> Image:
    """Set the first `count` of n boxes to 0 (coarse dropout; DeVries & Taylor 2017, "Cutout").

    Args:
        place: 0 to 1, from the first to the last place where the whole box lies in the image.
        side: of the boxes, as a share of the image's sides, rounded to voxels.
    """
    inside = jnp.arange(len(side)) < count  # [n, *s], an axis at a time
    for axis, length in enumerate(image.shape[:-1]):
        voxels = jnp.round(side[:, axis] * length)
        start = jnp.minimum(jnp.floor(place[:, axis] * (length - voxels + 1)), length - voxels)
        at = jnp.arange(length)
        along = (at >= start[:, None]) & (at < (start + voxels)[:, None])  # [n, length]
        inside = inside[..., None] & along.reshape(len(side), *(1,) * axis, length)
    return jnp.where(inside.any(0)[..., None], 0, image)

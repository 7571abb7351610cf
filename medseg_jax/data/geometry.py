"""Space: canonical orientation and its exact inverse, resampling, and whether two files lie in the same place.

Canonical order is [d, h, w] pointing S, A, R: the closest permutation and flips of the file's axes, never an
interpolation, so that the way back is exact. A picture [h, w] becomes [1, h, w] and is not turned.

Resampling treats voxels as volumes whose outer faces coincide before and after: output index i lies at input coordinate
(i + 0.5) * old / new - 0.5, and the outermost value is repeated beyond the edge. This is what nnU-Net does through
skimage.transform.resize(mode="edge", anti_aliasing=False), clipping included. Along a low-resolution axis (slices more
than 3 times as thick as the pixels) nothing is interpolated: the nearest slice is taken, as in nnU-Net.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy import ndimage, sparse

from medseg_jax.types import Geometry

CANONICAL = ("S", "A", "R")
ANISOTROPY = 3.0
"""nnU-Net's threshold: largest over smallest spacing above which an axis counts as low resolution."""

SPACING_TOLERANCE = 1e-3
"""Relative difference of two spacings that still counts as equal (headers store float32, and some tools round)."""

POSITION_TOLERANCE = 0.1
"""How far apart, in voxels (of the smallest spacing), corners of two grids may lie that still count as the same."""

REACH = 64
"""Voxels: from one input of a cubic spline to another that no value of float32 depends on both."""

type Order = Literal[1, 3, "nearest"]


# ---------------------------------------------------------------------------------------------------------- orientation


def _to_canonical(geometry: Geometry) -> tuple[list[int], list[int]]:
    """For each canonical axis: the file's axis it comes from, and 1 or -1 where that axis must be flipped."""
    ornt = ornt_transform(
        io_orientation(geometry.affine), axcodes2ornt(CANONICAL)
    )  # [3, 2]: file axis -> (target, flip)
    source = [int(axis) for axis in np.argsort(ornt[:, 0])]
    return source, [int(ornt[axis, 1]) for axis in source]


def to_canonical(array: np.ndarray, geometry: Geometry, channels: bool) -> np.ndarray:
    """File order to canonical order, a view of the same type.

    Args:
        array: [*s, c] if `channels`, else [*s], with *s as in `geometry.shape`.

    Returns:
        [d, h, w, c] or [d, h, w].
    """
    spatial = array.shape[:-1] if channels else array.shape
    if spatial != tuple(geometry.shape):
        raise ValueError(f"array {array.shape} does not lie in a space of shape {geometry.shape}")
    if len(spatial) == 2:
        return array[None]  # [1, h, w, ...]
    source, flips = _to_canonical(geometry)
    array = array.transpose(*source, *range(3, array.ndim))
    return array[tuple(slice(None, None, flip) for flip in flips)]


def from_canonical(array: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Canonical [d, h, w] or [d, h, w, c] back to the file's order: the exact inverse of `to_canonical`, a view."""
    if array.shape[:3] != canonical_shape(geometry):
        raise ValueError(f"array {array.shape} is not in canonical space {canonical_shape(geometry)}")
    if len(geometry.shape) == 2:
        return array[0]  # [h, w, ...]
    source, flips = _to_canonical(geometry)
    array = array[tuple(slice(None, None, flip) for flip in flips)]
    return array.transpose(*np.argsort(source).tolist(), *range(3, array.ndim))


def canonical_shape(geometry: Geometry) -> tuple[int, int, int]:
    """(d, h, w) of the file's array in canonical space."""
    if len(geometry.shape) == 2:
        return (1, *geometry.shape)  # pyright: ignore[reportReturnType]
    d, h, w = (geometry.shape[axis] for axis in _to_canonical(geometry)[0])
    return d, h, w


def spacing_canonical(geometry: Geometry) -> tuple[float, float, float]:
    """Voxel size along d, h, w in mm; (1, 1, 1) for pictures."""
    if len(geometry.shape) == 2:
        return 1.0, 1.0, 1.0
    d, h, w = (geometry.spacing[axis] for axis in _to_canonical(geometry)[0])
    return d, h, w


# ----------------------------------------------------------------------------------------------------------- resampling


def low_resolution_axis(*spacings: Sequence[float]) -> int | None:
    """The one axis along which slices are more than 3 times as thick as the finest, in the first spacing that has one.

    Call with the spacing before and the spacing after, as nnU-Net does. None where no axis or more than one is coarse:
    then all axes are interpolated.
    """
    for spacing in spacings:
        coarse = [axis for axis, size in enumerate(spacing) if size > ANISOTROPY * min(spacing)]
        if coarse:
            return coarse[0] if len(coarse) == 1 else None
    return None


def resample(array: np.ndarray, new_shape: Sequence[int], order: Order = 1, axis: int | None = None) -> np.ndarray:
    """Resample [d, h, w, c] to [*new_shape, c]: images with order 3, probabilities with order 1.

    A spline resize is separable: one small sparse matrix per axis, applied to one channel at a time in float32. That is
    scipy's three-dimensional zoom at twice (linear) to twenty times (cubic) its speed, with three copies of a channel.

    Args:
        order: 1 linear, 3 cubic spline (clipped to the channel's range), "nearest" (type and values kept).
        axis: low-resolution axis (see `low_resolution_axis`), along which the nearest slice is taken.

    Returns:
        float32 (sums over channels are kept), or the array's own type for "nearest" and for an unchanged shape.
    """
    if tuple(new_shape) == array.shape[:3]:
        return array
    nearest = [0, 1, 2] if order == "nearest" else [axis]
    for i in range(3):
        if i in nearest and array.shape[i] != new_shape[i]:
            array = array.take(_nearest(array.shape[i], new_shape[i]), axis=i)
    if order == "nearest" or tuple(new_shape) == array.shape[:3]:
        return array if order == "nearest" else array.astype(np.float32, copy=False)
    result = np.empty((*new_shape, array.shape[3]), np.float32)
    for channel in range(array.shape[3]):
        result[..., channel] = _resize(np.asarray(array[..., channel], np.float32), new_shape, order)
    return result


def resample_label(label: np.ndarray, new_shape: Sequence[int], axis: int | None = None) -> np.ndarray:
    """Resample a label map [d, h, w]: each value's mask is resized linearly and the largest wins (ties: the smaller).

    Smoother than nearest neighbour, and no value appears that was not there. One mask is alive at a time.
    """
    if tuple(new_shape) == label.shape:
        return label
    result = np.zeros(tuple(new_shape), label.dtype)
    best = np.full(tuple(new_shape), -1, np.float32)
    for value in np.unique(label):
        score = resample((label == value)[..., None], new_shape, 1, axis)[..., 0]
        wins = score > best + 1e-5
        result[wins], best[wins] = value, score[wins]
    return result


def resample_to(array: np.ndarray, source: Geometry, target: Geometry, order: Order = 1) -> np.ndarray:
    """Bring [*s, c] onto another file's grid through the affines (a PET onto its CT, a mask drawn on another series).

    Voxels of the target whose centre lies outside the source's volume become 0 in label maps ("nearest") and the
    channel's smallest value in images.

    Returns:
        [*target.shape, c], float32, or the array's own type for "nearest".
    """
    rank = len(source.shape)
    change = np.linalg.inv(source.affine) @ target.affine  # target index -> source index
    matrix, offset = change[:rank, :rank], change[:rank, 3].tolist()
    if np.allclose(matrix, np.diag(np.diag(matrix)), atol=1e-6):
        matrix = np.diag(matrix)  # parallel axes: scipy then goes axis by axis
    shape = tuple(target.shape)
    dtype = array.dtype if order == "nearest" else np.dtype(np.float32)
    result = np.empty((*shape, array.shape[-1]), dtype)
    ones = np.ones(source.shape, np.uint8)
    inside = ndimage.affine_transform(ones, matrix, offset, shape, order=0, mode="grid-constant")
    for channel in range(array.shape[-1]):
        values = np.ascontiguousarray(array[..., channel], dtype)
        degree = 0 if order == "nearest" else order
        moved = ndimage.affine_transform(values, matrix, offset, shape, order=degree, mode="nearest")
        outside = 0 if order == "nearest" else values.min()
        result[..., channel] = np.where(inside, np.clip(moved, values.min(), values.max()), outside)
    return result


def _nearest(old: int, new: int) -> np.ndarray:
    """[new]: input index whose voxel contains the centre of each output voxel; exact in integers, ties go up."""
    return (2 * np.arange(new) + 1) * old // (2 * new)


@lru_cache(maxsize=256)
def _weights(old: int, new: int, order: int) -> sparse.csr_array:
    """[new, old] sparse: the linear map that scipy's spline zoom applies along an axis, prefilter included."""
    period = min(old, REACH)
    place = (np.arange(new) + 0.5) * old / new - 0.5  # of each output among the inputs
    found = []
    for first in range(period):  # inputs so far apart that no output sees two of them are probed at once
        comb = np.zeros(old)
        comb[first::period] = 1
        response = np.asarray(ndimage.zoom(comb, new / old, order=order, mode="nearest", grid_mode=True))
        tooth = first + period * np.clip(np.rint((place - first) / period), 0, (old - 1 - first) // period).astype(int)
        # A cubic spline's prefilter reaches everywhere but decays fourfold per voxel: below float32 it is dropped.
        seen = np.flatnonzero(np.abs(response) >= 1e-8)
        found.append((response[seen].astype(np.float32), seen, tooth[seen]))
    values, rows, columns = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return sparse.csr_array((values, (rows, columns)), shape=(new, old))


def _resize(volume: np.ndarray, new_shape: Sequence[int], order: int) -> np.ndarray:
    """Interpolate one channel [d, h, w] float32, the axis that shrinks most first."""
    low, high = volume.min(), volume.max()
    for axis in sorted(range(3), key=lambda i: new_shape[i] / volume.shape[i]):
        old, new = volume.shape[axis], new_shape[axis]
        if old == new:
            continue
        front = np.moveaxis(volume, axis, 0)  # [old, a, b]
        flat = _weights(old, new, order) @ np.ascontiguousarray(front).reshape(old, -1)  # [new, a * b]
        volume = np.moveaxis(flat.reshape(new, *front.shape[1:]), 0, axis)
    return np.clip(volume, low, high) if order > 1 else volume


# ------------------------------------------------------------------------------------------------------------ comparing


def same_space(a: Geometry, b: Geometry) -> list[str]:
    """Differences between two geometries in words; empty if voxel (i, j, k) of both is the same place.

    Shapes must be equal, spacings within 0.1 %, and no corner of the grid may lie more than a tenth of a voxel apart.
    Where one of the two knows no millimetres (pictures, bare arrays), only shapes are compared.
    """
    words = []
    if tuple(a.shape) != tuple(b.shape):
        words.append(f"shape {_by(a.shape)} against {_by(b.shape)} voxels")
    if a.unit != "mm" or b.unit != "mm" or len(a.shape) != len(b.shape):
        return words
    if not np.allclose(a.spacing, b.spacing, rtol=SPACING_TOLERANCE, atol=0):
        words.append(f"spacing {_by(a.spacing)} against {_by(b.spacing)} mm")
    rank = len(a.shape)
    corners = np.array(list(np.ndindex(*(2,) * rank))) * (np.array(a.shape) - 1)  # [2 ** rank, rank]
    moved = corners @ (a.affine - b.affine)[:3, :rank].T + (a.affine - b.affine)[:3, 3]  # [2 ** rank, 3] mm
    distance = float(np.linalg.norm(moved, axis=1).max())
    if distance <= POSITION_TOLERANCE * min(*a.spacing, *b.spacing):
        return words
    codes = ["".join(str(code) for code in nib.aff2axcodes(g.affine)) for g in (a, b)]
    directions = [g.affine[:3, :rank] / np.array(g.spacing) for g in (a, b)]  # [3, rank], unit columns
    angle = float(np.degrees(np.arccos(np.clip((directions[0] * directions[1]).sum(0), -1, 1))).max())
    shift = float(np.linalg.norm(a.affine[:3, 3] - b.affine[:3, 3]))
    if codes[0] != codes[1]:
        words.append(f"axes point to {codes[0]} against {codes[1]}")
    elif angle > 0.1:
        words.append(f"axes turned by {angle:.3g} degrees")
    if shift > POSITION_TOLERANCE * min(*a.spacing, *b.spacing):
        origins = [", ".join(f"{v:.2f}" for v in g.affine[:3, 3]) for g in (a, b)]
        words.append(f"first voxels {shift:.3g} mm apart, ({origins[0]}) against ({origins[1]}) mm")
    return [*words, f"corners of the grids up to {distance:.3g} mm apart"]


def _by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.4g}" if isinstance(number, float) else str(number) for number in numbers)

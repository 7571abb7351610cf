"""Sliding windows: a network with a fixed patch size predicts an image of any size, in bounded memory.

Windows start at evenly spread places and overlap (nnU-Net's rule). Where they overlap, their probabilities are
averaged with Gaussian weights, which trust the middle of a window more than its rim. The weights are a product over the
axes, and so is the grid of windows. Hence they can be normalised axis by axis beforehand: for window i with start s_i

    weight_i(x) = g(x - s_i) / sum_j g(x - s_j),        sum_i weight_i(x) = 1 for every voxel x

and no second volume that counts weights is ever held. Windows run slowest along the slab axis (depth; height for a
picture). As soon as they have moved past a row it is final, so that only one slab as thick as a window is held.

The slab lies on the device, which weighs and adds up what the network returns, so that each voxel's probabilities
travel to the host once and not once a window; and it works on the next batch while the host takes a finished slab.

Source: Isensee et al., nnU-Net (Nature Methods 2021), supplement: overlap one half, Gaussian of sigma patch / 8.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import batched, groupby, product
from math import ceil, prod

import jax
import jax.numpy as jnp
import numpy as np

from medseg_jax.runtime.run import Predict
from medseg_jax.types import UserError

# ---------------------------------------------------------------------------------------------------------------------
# Where windows lie and what they weigh
# ---------------------------------------------------------------------------------------------------------------------


def plan_windows(shape: Sequence[int], patch_size: Sequence[int], overlap: float = 0.5) -> tuple[tuple[int, ...], ...]:
    """First index of every window, per axis.

    Args:
        shape: image shape; an axis shorter than the patch gets one window at 0 (the image is padded to it).
        patch_size: window shape, as many entries as `shape`.
        overlap: least share of a window that its neighbour covers as well, in [0, 1).

    Returns:
        For each axis ascending starts, the first 0 and the last `shape - patch`, as evenly spread as integers can be.
    """
    if not 0 <= overlap < 1:
        raise UserError("Windows cannot be laid out", found=f"overlap {overlap}", expected="0 <= overlap < 1")
    return tuple(_starts(size, patch, overlap) for size, patch in zip(shape, patch_size, strict=True))


def _starts(size: int, patch: int, overlap: float) -> tuple[int, ...]:
    room = max(size - patch, 0)
    steps = ceil(room / max(patch * (1 - overlap), 1))
    return tuple(round(i * room / steps) for i in range(steps + 1)) if steps else (0,)


def gaussian(patch: int) -> np.ndarray:
    """Importance of each position in a window: [patch] float64, at least exp(-8) > 0, symmetric; sigma is patch / 8."""
    x = np.arange(patch) - (patch - 1) / 2
    return np.exp(-0.5 * (8 * x / patch) ** 2)


def axis_weights(starts: Sequence[int], patch: int) -> np.ndarray:
    """Weights of all windows along one axis, summing to 1 at every position: [windows, patch] float32."""
    g = gaussian(patch)
    total = np.zeros(starts[-1] + patch)
    for start in starts:
        total[start : start + patch] += g
    return np.stack([g / total[start : start + patch] for start in starts]).astype(np.float32)


def windows_at_once(windows: int, batch_size: int) -> int:
    """Rows of the one batch that is compiled: `batch_size`, or the next power of two if there are fewer windows."""
    return min(batch_size, 1 << (windows - 1).bit_length())


def slab_axis(shape: Sequence[int], patch_size: Sequence[int]) -> int:
    """Best `axis` for `predict_slabs`: 0 (depth), or 1 (height) for a picture [1, h, w] under a 2-D network."""
    return int(len(patch_size) == 2 and shape[0] == 1)


def _window_shape(shape: Sequence[int], patch_size: Sequence[int]) -> tuple[int, int, int]:
    """Patch size with an entry for each of (d, h, w): a 2-D network sees one slice at a time."""
    depth, height, width = (1, *patch_size)[-3:]
    return depth, height, width


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def memory_bound(
    shape: Sequence[int],
    patch_size: Sequence[int],
    channels_in: int,
    channels_out: int,
    batch_size: int = 1,
    axis: int = 0,
) -> int:
    """Upper bound in bytes on the arrays of `predict_slabs`, the image included; on a CPU all of it is host memory.

    image d h w c (once more if it must be padded to the patch)
    + 3 slabs of patch depth, their planes rounded up (`_slab_plane`): being filled, finished, and with the caller
    + 2 batches in flight, each with its patches on host and device, probabilities and weighted probabilities,
    all float32. What the network itself needs on its device comes on top and does not grow with the image.
    """
    window = _window_shape(shape, patch_size)
    if axis:
        shape, window = (shape[1], shape[0], shape[2]), (window[1], window[0], window[2])
    padded = [max(size, patch) for size, patch in zip(shape, window, strict=True)]
    slab = window[0] * prod(_slab_plane(padded, window))
    image = prod(shape) + (prod(padded) if padded != list(shape) else 0)
    batch = batch_size * prod(window)
    return 4 * (image * channels_in + 3 * slab * channels_out + 4 * batch * (channels_in + channels_out))


# ---------------------------------------------------------------------------------------------------------------------
# Prediction
# ---------------------------------------------------------------------------------------------------------------------


def predict_slabs(
    predict: Predict,
    image: np.ndarray,
    patch_size: Sequence[int],
    channels: int,
    overlap: float = 0.5,
    batch_size: int = 1,
    axis: int = 0,
) -> Iterator[tuple[int, np.ndarray]]:
    """Predict an image window by window and hand out finished slabs in order.

    Args:
        predict: the network. It sees one batch shape only (see `windows_at_once`); a last batch that is not full is
            filled with zeros.
        image: [d, h, w, c] float32, in memory or memory-mapped. Axes shorter than the patch are padded with zeros on
            both sides, and cropped again.
        patch_size: (pd, ph, pw), or (ph, pw) for a 2-D network, which predicts slice by slice.
        channels: k, output channels of the network.
        overlap: least share of a window that its neighbour covers too, in [0, 1).
        batch_size: windows that go through the network at once.
        axis: along which slabs follow each other: 0, the depth; or 1, the height, for a picture under a 2-D network.

    Yields:
        (start, probabilities): float32 [slab, h, w, k] with rows start ... start + slab of the depth; or
        [1, slab, w, k] with those of the height. The first starts at 0, each where the one before ended. Read-only.
    """
    if axis > slab_axis(image.shape, patch_size):
        raise ValueError(f"Slabs along the height need a picture and a 2-D patch, not {image.shape} and {patch_size}")
    window = _window_shape(image.shape, patch_size)
    if axis:
        image, window = image.swapaxes(0, 1), (window[1], window[0], window[2])  # [h, 1, w, c]
    (d, h, w, _), (lo, top, left) = image.shape, _margins(image.shape, window)
    image = _pad(image, window)
    starts = plan_windows(image.shape[:3], window, overlap)
    slab = jnp.zeros((window[0], *_slab_plane(image.shape, window), channels), jnp.float32)  # begins at row `base`
    base, finished = 0, None

    def cropped(slab: jax.Array, base: int, rows: int) -> tuple[int, np.ndarray]:
        done = np.asarray(slab)[max(lo - base, 0) : min(rows, lo + d - base), top : top + h, left : left + w]
        return max(base - lo, 0), done.swapaxes(0, 1) if axis else done

    weights = [axis_weights(s, patch) for s, patch in zip(starts, window, strict=True)]
    for group, probabilities in _run_windows(predict, image, window, tuple(patch_size), starts, channels, batch_size):
        for z, members in groupby(enumerate(group), key=lambda member: member[1][0]):
            if (rows := starts[0][z] - base) > 0:
                finished = (slab, base, rows)
                slab, base = _move_on(slab, rows), base + rows
            corners = np.zeros((len(probabilities), 2), np.int32)
            tables = [np.zeros((len(probabilities), n), np.float32) for n in window]  # other windows weigh nothing
            for row, index in members:
                corners[row] = [s[i] for s, i in zip(starts[1:], index[1:], strict=True)]
                for table, weight, i in zip(tables, weights, index, strict=True):
                    table[row] = weight[i]
            slab = _accumulate(slab, probabilities, corners, *tables)
            if finished:  # the device has its next work: time to look at what is done
                yield cropped(*finished)
                finished = None
    yield cropped(slab, base, window[0])


def predict_volume(
    predict: Predict,
    image: np.ndarray,
    patch_size: Sequence[int],
    channels: int,
    overlap: float = 0.5,
    batch_size: int = 1,
) -> np.ndarray:
    """All of `predict_slabs` in one array [d, h, w, k] float32, for images whose probabilities fit into memory."""
    slabs = [p for _, p in predict_slabs(predict, image, patch_size, channels, overlap, batch_size)]
    return np.concatenate(slabs) if len(slabs) > 1 else slabs[0]


@partial(jax.jit, donate_argnums=0)
def _accumulate(
    slab: jax.Array, probabilities: jax.Array, corners: jax.Array, wd: jax.Array, wh: jax.Array, ww: jax.Array
) -> jax.Array:
    """slab [pd, h, w, k] + probabilities [b, *patch, k] at corners [b, 2], times a weight per axis and window."""
    b, k = probabilities.shape[0], probabilities.shape[-1]
    p = probabilities.reshape(b, wd.shape[1], wh.shape[1], ww.shape[1], k)  # [b, pd, ph, pw, k]

    def add(i: jax.Array, slab: jax.Array) -> jax.Array:
        weight = (wd[i][:, None, None] * wh[i][None, :, None] * ww[i][None, None, :])[..., None]
        place = (0, corners[i, 0], corners[i, 1], 0)
        there = jax.lax.dynamic_slice(slab, place, p.shape[1:])
        return jax.lax.dynamic_update_slice(slab, there + weight * p[i].astype(jnp.float32), place)

    return jax.lax.fori_loop(0, b, add, slab)


@jax.jit
def _move_on(slab: jax.Array, rows: jax.Array) -> jax.Array:
    """The slab without its first rows, and empty ones behind: a new array, the old one goes to the host."""
    return jnp.take(slab, jnp.arange(slab.shape[0]) + rows, axis=0, mode="fill", fill_value=0)


def _slab_plane(shape: Sequence[int], window: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of a slab: the padded image's, rounded up by half windows, so that few shapes are compiled."""

    def rounded(size: int, patch: int) -> int:
        half = max(patch // 2, 1)
        return patch + ceil((size - patch) / half) * half

    return rounded(shape[1], window[1]), rounded(shape[2], window[2])


def _margins(shape: Sequence[int], window: Sequence[int]) -> list[int]:
    return [max(patch - size, 0) // 2 for size, patch in zip(shape[:3], window, strict=True)]


def _pad(image: np.ndarray, window: Sequence[int]) -> np.ndarray:
    """Image [d, h, w, c], padded with zeros to at least the window's shape; the same array if it is large enough."""
    missing = [max(patch - size, 0) for size, patch in zip(image.shape[:3], window, strict=True)]
    if not any(missing):
        return image
    return np.pad(image, [*((m // 2, m - m // 2) for m in missing), (0, 0)])


def _run_windows(
    predict: Predict,
    image: np.ndarray,
    window: tuple[int, ...],
    patch_size: tuple[int, ...],
    starts: tuple[tuple[int, ...], ...],
    channels: int,
    batch_size: int,
) -> Iterator[tuple[Sequence[tuple[int, ...]], jax.Array]]:
    """(each window's index per axis, probabilities [b, *patch, k]) of batches, the first axis running slowest."""
    indices = list(product(*(range(len(s)) for s in starts)))
    batch_size = windows_at_once(len(indices), batch_size)
    before = None
    for group in batched(indices, batch_size):
        patches = np.zeros((batch_size, *window, image.shape[-1]), np.float32)
        for row, index in enumerate(group):
            place = tuple(slice(s[i], s[i] + p) for s, i, p in zip(starts, index, window, strict=True))
            patches[row] = image[place]
        # A 2-D window has one axis of length 1; it vanishes here.
        probabilities = predict(patches.reshape(batch_size, *patch_size, image.shape[-1]))  # [b, *patch, k]
        if probabilities.shape != (expected := (batch_size, *patch_size, channels)):
            raise ValueError(f"The network returned {probabilities.shape}; {expected} was expected")
        jax.block_until_ready(before)  # one batch runs, one waits: no more are in flight
        before = probabilities
        yield group, probabilities

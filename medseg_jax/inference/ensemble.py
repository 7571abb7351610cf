"""Several predictions of one image, a few rows at a time: members of an ensemble, scales, views.

Each member predicts on its own grid (its run's spacing, crop and patch, or a zoomed one) and hands out slabs there:

    predict_slabs --resample_slabs--> rows of the member's crop --in_frame--> rows of a box common to all members

`in_lockstep` then cuts the slabs of all members, which differ in thickness, where any of them ends. No member is ever
more than one slab ahead, so that the memory needed is one slab a member, however large the image is.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from medseg_jax.data.cache import Preprocessed, Record
from medseg_jax.data.geometry import resample
from medseg_jax.data.pipeline import with_neighbours
from medseg_jax.inference import tta
from medseg_jax.inference.sliding_window import predict_slabs
from medseg_jax.runtime.run import Run

type Slabs = Iterator[tuple[int, np.ndarray]]
"""(start, probabilities [.., rows, .., k]), consecutive along the slab axis."""

type Box = tuple[tuple[int, int], ...]
"""(low, high) along d, h, w."""


def member_slabs(
    run: Run, prepared: Preprocessed, augmentations: Sequence[str], overlap: float, batch: int, axis: int, apart: bool
) -> Iterator[Slabs]:
    """The predictions of one run, each in the space of its crop before resampling.

    Args:
        augmentations: see `tta`.
        batch: windows at once.
        axis: along which slabs follow each other.
        apart: one member for every view, to tell how they differ; else one a scale, the mean of its views.
    """
    views = tta.views(augmentations, run.plan.dim)
    record = prepared.record
    for factor in tta.scales(augmentations):
        image = resample(prepared.image, zoomed_shape(record, factor, run.plan.dim), 3, record.coarse_axis)
        shown = with_neighbours(image, run.plan.neighbours)
        for seen in [(view,) for view in views] if apart else [views]:
            network = tta.average(run.predict, seen)
            slabs = predict_slabs(network, shown, run.plan.patch_size, run.labels.channels, overlap, batch, axis)
            yield resample_slabs(slabs, image.shape[:3], record.crop_shape, axis, record.coarse_axis)


def zoomed_shape(record: Record, factor: float, dim: int) -> tuple[int, ...]:
    """(d, h, w) of a preprocessed image zoomed by a factor, but for axes that no network looks along or are coarse."""
    still = {record.coarse_axis, *range(3 - dim)}
    return tuple(n if a in still else max(1, round(n * factor)) for a, n in enumerate(record.resampled_shape))


def bounding_box(boxes: Sequence[Box]) -> Box:
    """The smallest box around all boxes."""
    return tuple((min(low for low, _ in along), max(high for _, high in along)) for along in zip(*boxes, strict=True))


def in_frame(slabs: Slabs, crop: Box, frame: Box, axis: int, outside: np.ndarray) -> Iterator[np.ndarray]:
    """Slabs of a crop as slabs of a frame around it.

    Args:
        outside: probabilities [k] of what the crop left out.

    Yields:
        [.., rows, .., k], from the first row of the frame to its last.
    """
    shape = [high - low for low, high in frame]
    place = [slice(low - start, high - start) for (low, high), (start, _) in zip(crop, frame, strict=True)]
    before, after = place[axis].start, shape[axis] - place[axis].stop
    place[axis] = slice(None)

    def empty(rows: int) -> np.ndarray:
        return np.broadcast_to(outside, (*shape[:axis], rows, *shape[axis + 1 :], len(outside)))

    if before:
        yield empty(before)
    for _, slab in slabs:
        whole = empty(slab.shape[axis])
        if whole.shape != slab.shape:
            whole = whole.copy()
            whole[tuple(place)] = slab
            slab = whole
        yield slab
    if after:
        yield empty(after)


def in_lockstep(members: Sequence[Iterator[np.ndarray]], axis: int) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(start, the same rows of every member), cut wherever the slab of any member ends."""
    start, slabs = 0, [next(member) for member in members]
    while slabs[0] is not None:
        rows = min(slab.shape[axis] for slab in slabs)
        head, tail = ((slice(None),) * axis + (part,) for part in (slice(rows), slice(rows, None)))
        yield start, [slab[head] for slab in slabs]
        start += rows
        for i, member in enumerate(members):
            slabs[i] = slabs[i][tail] if slabs[i].shape[axis] > rows else next(member, None)  # pyright: ignore


def mean(members: Sequence[np.ndarray]) -> np.ndarray:
    """Mean of equal arrays, float32; the array itself if it is alone."""
    if len(members) == 1:
        return members[0]
    total = members[0] + members[1]
    for other in members[2:]:
        total += other
    total /= len(members)
    return total


def resample_slabs(
    slabs: Iterable[tuple[int, np.ndarray]],
    source: Sequence[int],
    target: Sequence[int],
    axis: int,
    coarse: int | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Resampling of probabilities while they arrive: `geometry.resample(..., 1, coarse)`, a few rows at a time.

    Linear interpolation is a product over the axes. Along the slab axis each new row needs two old neighbours at most,
    so that the last row of a slab is all that must be kept until the next one comes.

    Args:
        slabs: (start, [.., slab, .., k]), consecutive along `axis`.
        source: (d, h, w) of all slabs together.
        target: (d, h, w) wanted.
        axis: along which slabs follow each other, 0 or 1.
        coarse: low-resolution axis, along which the nearest slice is taken.

    Yields:
        (start, probabilities) that together have the target's shape.
    """
    if tuple(source) == tuple(target):
        yield from slabs
        return
    index = np.arange(source[axis], dtype=np.float32).reshape(-1, 1, 1, 1)  # [source rows, 1, 1, 1]
    position = resample(index, (target[axis], 1, 1), 1, 0 if coarse == axis else None)[:, 0, 0, 0]  # [target rows]
    low, high = np.floor(position).astype(int), np.ceil(position).astype(int)
    weight = (position - low).reshape(-1, *(1,) * (3 - axis))
    done, rest = 0, None
    for start, slab in slabs:
        rows = slab if rest is None else np.concatenate([rest, slab], axis)
        first, end = start + slab.shape[axis] - rows.shape[axis], start + slab.shape[axis]
        ready = int(np.searchsorted(high, end))
        # As many new rows at a time as take no more room than the slab.
        step = max(1, slab[..., 0].size * target[axis] // int(np.prod(target)))
        while done < ready:
            part = slice(done, min(done + step, ready))
            below, above = rows.take(low[part] - first, axis), rows.take(high[part] - first, axis)
            shape = [*target[:axis], part.stop - part.start, *target[axis + 1 :]]
            yield done, resample(below + weight[part] * (above - below), shape, 1, coarse)
            done = part.stop
        rest = rows.take([-1], axis)

"""How much host memory the prediction of a case takes at most, known as soon as its image has been read."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from nibabel.nifti1 import Nifti1Header

from medseg_jax.data.cache import Record, target_grid
from medseg_jax.data.geometry import canonical_shape, spacing_canonical
from medseg_jax.inference import tta
from medseg_jax.inference.ensemble import zoomed_shape
from medseg_jax.inference.sliding_window import memory_bound, plan_windows, slab_axis, windows_at_once
from medseg_jax.runtime.run import Run
from medseg_jax.types import Geometry

SLACK = 16 * 2**20
"""For what does not grow with the image: the allocator's rounding, tables, single slices in double precision."""


def case_bound(image: np.ndarray, geometry: Geometry, runs: Sequence[Run], settings: Any) -> int:
    """Upper bound in bytes on what predicting an image [*s, c] takes beyond the program and the network's own needs.

    With V voxels of the file, V_r those of run r after preprocessing (without its crop), c channels, i bytes a value as
    read: the largest of

        reading         V c (i + stored bytes a value)
        preparing r     V c i + 4 V c [normalised] + 4 sum_(q < r) V_q c [earlier runs];
                        where non-zero voxels count also V (c + 1) [masks];
                        where it is resampled also 4 V_r c + 12 max(V, V_r) [one channel's copies]
        predicting      4 sum_r V_r c (once more for each zoomed image) + V [labels] + for every member its slabs and
                        batches (`memory_bound`), 6 slabs more where it is resampled, and one slab of the mean
        writing         2 V, 8 V more with post-processing; 4 V more for one map of probability or uncertainty;
                        10 V more for each channel [masks of a DICOM-SEG]

    and SLACK on top.

    Args:
        settings: `predict.Settings`.
    """
    voxels, channels, value = prod(image.shape[:-1]), image.shape[-1], image.dtype.itemsize
    # only NIfTI scales while it reads; all others have the voxels as they are stored
    stored = geometry.header.get_data_dtype().itemsize if isinstance(geometry.header, Nifti1Header) else value
    phases = [voxels * channels * (value + stored), (10 if settings.cleaning else 2) * voxels]
    if settings.extras:
        phases[-1] += 4 * voxels
    if settings.dicom_seg:
        phases[-1] += 10 * voxels * runs[0].labels.channels
    inputs, predicting = 0, 2 * voxels
    for run in runs:
        shape = canonical_shape(geometry)
        spacing = spacing_canonical(geometry)
        new, new_spacing = target_grid(shape, spacing, run.plan)
        record = Record(shape, tuple((0, n) for n in shape), new, new_spacing, spacing)
        resampled = new != shape
        prepared = 4 * prod(new) * channels
        inputs += prepared
        masks = voxels * (channels + 1) if any(entry.get("nonzero") for entry in run.plan.normalization) else 0
        extra = 12 * max(voxels, prod(new)) + inputs if resampled else inputs - prepared
        phases.append(voxels * channels * (value + 4) + masks + extra)
        members = len(tta.views(settings.tta, run.plan.dim)) if settings.uncertainty else 1
        for factor in tta.scales(settings.tta):
            predicting += members * _member_bound(run, record, factor, settings)
            seen = channels + (run.plan.channels_seen if run.plan.neighbours else 0)
            predicting += 4 * prod(zoomed_shape(record, factor, run.plan.dim)) * seen
    return max(*phases, predicting) + SLACK


def _member_bound(run: Run, record: Record, factor: float, settings: Any) -> int:
    """Of one stream of slabs, without its image."""
    shape, patch, k = zoomed_shape(record, factor, run.plan.dim), run.plan.patch_size, run.labels.channels
    axis = slab_axis(shape, patch)
    windows = prod(len(s) for s in plan_windows(shape, (1, *patch)[-3:], settings.overlap))
    batch = windows_at_once(windows, settings.batch_size or run.plan.batch_size)
    channels = run.plan.channels_seen
    slabs = memory_bound(shape, patch, channels, k, batch, axis) - 4 * prod(shape) * channels
    rows = min((1, *patch)[-3:][axis], shape[axis])
    plane = prod(shape) // shape[axis]
    target = prod(record.crop_shape) // record.crop_shape[axis]
    resampling = 6 * rows * max(plane, target) if shape != record.crop_shape else 0
    return slabs + 4 * k * (resampling + rows * target)

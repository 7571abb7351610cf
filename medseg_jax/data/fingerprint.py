"""What the training cases are like: shapes, spacings, intensities, class shares; a plan follows from it."""

import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from medseg_jax.data.geometry import spacing_canonical, to_canonical
from medseg_jax.types import Case, Labels, UserError

if TYPE_CHECKING:
    from medseg_jax.data.dataset import Dataset

SAMPLES = 10_000  # voxels a case for the intensity statistics, as nnU-Net


@dataclass(frozen=True)
class Fingerprint:
    """What the n training cases are like.

    Attributes:
        pictures: True for 2-D files (no millimetres).
        shapes: [n, 3] canonical (d, h, w), after cropping to what is not 0 (volumes only).
        spacings: [n, 3] mm, or px.
        kept: [n] share of voxels that the crop keeps.
        foreground: one dict a channel: mean, std, low, high (0.5 and 99.5 percentile), over labelled foreground voxels.
        overall: one dict a channel: mean, std, low, high over all voxels.
        frequency: class -> share of all voxels.
        thickness: [n, classes] twice the area over the outline, in pixels: the width of a vessel, the radius of a blob;
            nan where the class is absent, and for volumes.
        eight_bit: True if every image is stored as uint8.
    """

    pictures: bool
    shapes: np.ndarray
    spacings: np.ndarray
    kept: np.ndarray
    foreground: tuple[dict[str, float], ...]
    overall: tuple[dict[str, float], ...]
    frequency: dict[str, float]
    thickness: np.ndarray
    eight_bit: bool


def fingerprint(dataset: "Dataset") -> Fingerprint:
    """Reads every training case once (labelled ones where there are any; never a case of the split "test" or "val").

    Folds are made afterwards and share one plan, as nnU-Net's do: a training case that validates in a fold has had its
    part in these numbers.

    Raises:
        UserError: no training cases, pictures mixed with volumes, or differing numbers of channels.
    """
    cases = dataset.subset("train", labelled=True) or dataset.subset("train")
    if not cases:
        raise UserError("The data set has no training cases", file=dataset.root, remedy="medseg data check DATASET")
    with ThreadPoolExecutor(min(len(cases), os.cpu_count() or 1)) as pool:
        seen = list(pool.map(lambda item: _look(dataset, item[1], item[0]), enumerate(cases)))
    for key, what in (("pictures", "pictures and volumes"), ("channels", "images with different numbers of channels")):
        odd = [c for c, s in zip(cases, seen, strict=True) if s[key] != seen[0][key]]
        if odd:
            file = odd[0].images[0]
            raise UserError(f"The data set mixes {what}", file=file, found=f"{len(odd)} unlike {cases[0].id}")

    totals = np.sum([s["counts"] for s in seen], 0) / sum(s["voxels"] for s in seen)
    overall = np.concatenate([s["overall"] for s in seen])  # [samples, c]
    inside = np.concatenate([s["foreground"] for s in seen])
    return Fingerprint(
        pictures=seen[0]["pictures"],
        shapes=np.array([s["shape"] for s in seen]),
        spacings=np.array([s["spacing"] for s in seen], np.float64),
        kept=np.array([s["kept"] for s in seen]),
        foreground=_statistics(inside if len(inside) else overall),
        overall=_statistics(overall),
        frequency=dict(zip(dataset.labels.names, totals.tolist(), strict=True)),
        thickness=np.array([s["thickness"] for s in seen]),
        eight_bit=all(s["eight_bit"] for s in seen),
    )


def _look(dataset: "Dataset", case: Case, seed: int) -> dict[str, Any]:
    image, label, geometry = dataset.load(case)
    eight_bit = image.dtype == np.uint8
    pictures = len(geometry.shape) == 2
    image = to_canonical(image, geometry, channels=True)  # [d, h, w, c]
    voxels = math.prod(image.shape[:3])
    box = ((0, n) for n in image.shape[:3]) if pictures else nonzero_box(image)
    crop = tuple(slice(low, high) for low, high in box)
    image = image[crop]
    values = image.reshape(-1, image.shape[-1])  # [voxels, c]
    rng = np.random.default_rng([0, seed])
    overall = values[rng.integers(0, len(values), SAMPLES)].astype(np.float64)
    classes = len(dataset.labels.names)
    counts, thickness, foreground = np.zeros(classes), np.full(classes, np.nan), overall[:0]
    if label is not None:
        label = to_canonical(label, geometry, channels=False)[crop]
        for i, mask in enumerate(class_masks(dataset.labels, label)):
            counts[i] = mask.sum()
            if pictures and counts[i]:
                thickness[i] = _thickness(mask[0])
        inside = np.flatnonzero(
            np.isin(label, [0] if dataset.labels.ignore is None else [0, dataset.labels.ignore], invert=True)
        )
        if len(inside):
            foreground = values[rng.choice(inside, SAMPLES)].astype(np.float64)
    return {
        "pictures": pictures,
        "channels": image.shape[-1],
        "shape": image.shape[:3],
        "spacing": spacing_canonical(geometry),
        "voxels": math.prod(image.shape[:3]),
        "kept": math.prod(image.shape[:3]) / voxels,
        "overall": overall,
        "foreground": foreground,
        "counts": counts,
        "thickness": thickness,
        "eight_bit": eight_bit,
    }


def class_masks(labels: Labels, label: np.ndarray) -> Iterator[np.ndarray]:
    """The boolean mask [*s] of each class, one after another (`Labels.masks` holds all of them at once)."""
    for member in labels.table.T[labels.channels - len(labels.names) :] > 0:
        yield member[label]


def nonzero_box(image: np.ndarray) -> tuple[tuple[int, int], ...]:
    """Box ((low, high) per axis) around the voxels of [d, h, w, c] where any channel is not 0; all of it if none is."""
    mask = (image != 0).any(-1)
    box = []
    for axis in range(3):
        hit = np.flatnonzero(mask.any(tuple(a for a in range(3) if a != axis)))
        box.append((int(hit[0]), int(hit[-1]) + 1) if len(hit) else (0, mask.shape[axis]))
    return tuple(box)


def field_of_view(picture: np.ndarray, least: int = 10, margin: float = 0.005) -> tuple[tuple[int, int], ...]:
    """Box ((low, high), (low, high)) around what a camera lit of a picture [h, w, c] of 8 bits; all of it if nothing.

    The largest connected area whose brightest channel, after a median over 5 x 5 pixels, is above `least`; and `margin`
    of the sides around it. Spec: bayes_spe_med2d_dr D4.
    """
    # The median is above a level where more than half of the pixels are.
    lit = ndimage.uniform_filter((picture.max(-1) > least).astype(np.float32), 5, mode="nearest") > 0.5
    found: Any = ndimage.label(lit)
    areas, count = found
    if not count:
        return tuple((0, n) for n in lit.shape)
    sizes = np.bincount(areas.ravel())
    rows, columns = ndimage.find_objects(areas)[int(sizes[1:].argmax())]
    box = []
    for part, n in zip((rows, columns), lit.shape, strict=True):
        more = round(margin * n)
        box.append((max(part.start - more, 0), min(part.stop + more, n)))
    return tuple(box)


def _thickness(mask: np.ndarray) -> float:
    """2 area / outline of a mask [h, w]. The staircase outline is 4/π too long on average over directions."""
    padded = np.pad(mask, 1)
    outline = (padded[1:] != padded[:-1]).sum() + (padded[:, 1:] != padded[:, :-1]).sum()
    return float(8 / math.pi * mask.sum() / outline)


def _statistics(values: np.ndarray) -> tuple[dict[str, float], ...]:
    low, high = np.percentile(values, [0.5, 99.5], axis=0)
    rows = zip(values.mean(0), values.std(0), low, high, strict=True)
    return tuple({"mean": float(m), "std": float(s), "low": float(a), "high": float(b)} for m, s, a, b in rows)

"""Wrong labels on purpose: corrupts the training labels of any data set, reproducibly, and keeps the clean ones aside.

    jsrt   whole masks are dilated, eroded, or turned and shifted, in a share `alpha` of the cases, until the share
           `beta` of the foreground has changed (Li et al., MICCAI 2021, as used on JSRT by Tadokoro et al. 2026)
    whu    each object is dropped, or its border eroded or dilated, and objects of other cases are pasted in (Tadokoro
           et al. 2026; their levels (drop, add, border) are (.1, 0, .3), (.2, .05, .5), (.3, .1, .7) on aerial images)
    mrf    voxels flip with probability sigmoid(eta), eta a Gaussian Markov random field of Kac-Murdock-Szegő
           covariance: the noise that `KMSNoise` assumes

Each class is corrupted on its own; where classes exclude each other, later ones lie on top and what they leave becomes
background. Ignored voxels stay ignored. The type of corruption is the case's, the same for all of its classes. Volumes:
morphology in space, rotation, shift and pasting in the plane of the first axis. Validation and test labels stay clean.

`compat=True` repeats the quirks of the published generators, for comparison with them.
"""

import math
import os
import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from scipy import ndimage

from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset
from medseg_jax.types import Case, Labels, UserError

CLEAN = "labelsClean"
"""Folder of a corrupted data set that keeps the labels as they were."""

DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
LARGEST_STEP = 100

type Mask = np.ndarray


@dataclass(frozen=True)
class LabelNoise:
    """What is done to the labels.

    Attributes:
        style: jsrt: masks are dilated, eroded, or turned and shifted; whu: objects are dropped and added, borders
            moved; mrf: voxels flip by a smooth random field, as KMSNoise assumes.
        alpha: jsrt: share of the cases that are corrupted.
        beta: jsrt: share of the foreground that changes.
        angle: jsrt: largest rotation in degrees (the paper: 15 for lungs and heart, 2 for clavicles).
        drop: whu: probability that an object goes.
        add: whu: probability that an object of another case comes.
        border: whu: probability that the border of an object moves.
        mu: mrf: mean of the field, whose sigmoid is the probability of a flip.
        s: mrf: standard deviation of the field.
        rho: mrf: correlation of neighbours.
        seed: of everything.
    """

    style: Literal["jsrt", "whu", "mrf"] = "jsrt"
    alpha: float = 0.5
    beta: float = 0.7
    angle: float = 15.0
    drop: float = 0.2
    add: float = 0.05
    border: float = 0.5
    mu: float = -3.0
    s: float = 2.0
    rho: float = 0.9
    seed: int = 0

    def __post_init__(self):
        if self.style not in ("jsrt", "whu", "mrf"):
            raise UserError("No such style of label noise", found=self.style, expected="jsrt, whu or mrf")
        for name in ("alpha", "drop", "add", "border"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is no share", found=getattr(self, name), expected="0 to 1")
        bounds = {"beta > 0": self.beta > 0, "s >= 0": self.s >= 0, "0 <= rho < 1": 0 <= self.rho < 1}
        bounds |= {"angle >= 0": self.angle >= 0, "seed >= 0": self.seed >= 0}
        finite = all(math.isfinite(value) for value in (self.beta, self.s, self.angle, self.mu))
        if not finite or not all(bounds.values()):
            found = f"beta={self.beta}, s={self.s}, rho={self.rho}, angle={self.angle}, mu={self.mu}, seed={self.seed}"
            raise UserError("No noise like this", found=found, expected=f"{', '.join(bounds)}; finite numbers")


# ---------------------------------------------------------------------------------------------------------------------
# A data set
# ---------------------------------------------------------------------------------------------------------------------


def corrupt(source: str | Path, target: str | Path, noise: LabelNoise) -> Dataset:
    """Writes a copy of a data set whose training labels are wrong; the clean ones go to `labelsClean`.

    Images are hard links where the file system allows, copies otherwise. A plan.json goes along. dataset.json says
    under "label_noise" what was done and which cases changed.

    Args:
        source: a data set.
        target: new folder.
        noise: what to do.

    Raises:
        UserError: the target holds a data set already, or the source is none.
    """
    dataset, root = Dataset.open(source), Path(target)
    if (root / "dataset.json").exists():
        raise UserError("There is a data set already", file=root, remedy="give a new folder")
    training = dataset.subset("train")
    chosen = select([case.id for case in training], noise.alpha, noise.seed) if noise.style == "jsrt" else None
    cases, changed = [], {}
    for case in dataset.cases:
        moved = replace(
            case,
            images=tuple(_carry(path, dataset.root, root) for path in case.images),
            label=None if case.label is None else _carry(case.label, dataset.root, root),
        )
        cases.append(moved)
        if case.label is None or moved.label is None or case not in training:
            continue
        label, geometry = io.read_label(case.label)
        clean = root / CLEAN / moved.label.name
        clean.parent.mkdir(exist_ok=True)
        shutil.move(moved.label, clean)
        wrong = label
        if chosen is None or case.id in chosen:
            rng = np.random.default_rng([noise.seed, *case.id.encode()])
            wrong = corrupt_label(label, dataset.labels, noise, rng, _donors(dataset, training, case, noise, rng))
        changed[case.id] = float((wrong != label).sum() / max((label > 0).sum(), 1))
        io.write_label(moved.label, wrong, geometry)
    said = {"noise": {name: getattr(noise, name) for name in noise.__dataclass_fields__}, "changed": changed}
    replace(dataset, root=root, cases=tuple(cases), extra={**dataset.extra, "label_noise": said}).save()
    if (dataset.root / "plan.json").exists():
        shutil.copyfile(dataset.root / "plan.json", root / "plan.json")
    return Dataset.open(root)


def clean_label(dataset: Dataset, case: Case) -> Path | None:
    """File of a case's label as it was before `corrupt`, if the data set was made by it."""
    path = dataset.root / CLEAN / case.label.name if case.label else None
    return path if path is not None and path.exists() else None


def _carry(path: Path, source: Path, target: Path) -> Path:
    """Puts a file of one data set into another."""
    new = target / path.relative_to(source)
    new.parent.mkdir(parents=True, exist_ok=True)
    new.unlink(missing_ok=True)  # of an attempt that was interrupted
    try:
        os.link(path, new)
    except OSError:
        shutil.copyfile(path, new)
    return new


def _donors(
    dataset: Dataset, training: Sequence[Case], case: Case, noise: LabelNoise, rng: np.random.Generator
) -> list[np.ndarray]:
    """Labels of some other cases, whose objects may be pasted."""
    others = [other for other in training if other.id != case.id and other.label]
    if noise.style != "whu" or not noise.add or not others:
        return []
    picked = rng.choice(len(others), min(8, len(others)), replace=False)
    return [io.read_label(label)[0] for i in picked if (label := others[i].label)]


def select(ids: Sequence[str], alpha: float, seed: int = 0) -> list[str]:
    """The share `alpha` of the cases that are corrupted: the ids sorted, shuffled, the first ones."""
    shuffled = sorted(ids)
    random.Random(seed).shuffle(shuffled)
    return shuffled[: int(alpha * len(shuffled))]


def corrupt_label(
    label: np.ndarray, labels: Labels, noise: LabelNoise, rng: np.random.Generator, donors: Sequence[np.ndarray] = ()
) -> np.ndarray:
    """A label map [*s] with wrong classes; see the module's docstring."""
    masks = labels.masks(label)  # [classes, *s]
    kind = ("dilate", "erode", "affine")[rng.integers(3)]
    angle = rng.uniform(-noise.angle, noise.angle)
    direction = DIRECTIONS[rng.integers(len(DIRECTIONS))]
    wrong = []
    for i, mask in enumerate(masks):
        if noise.style == "jsrt":
            wrong.append(_jsrt(mask, kind, noise.beta, angle, direction) if mask.any() else mask)
        elif noise.style == "whu":
            wrong.append(whu(mask, [labels.masks(d)[i] for d in donors], noise.drop, noise.add, noise.border, rng))
    made = mrf(label, labels, noise, rng) if noise.style == "mrf" else labels.decode(_scores(np.array(wrong), labels))
    made = made.astype(label.dtype)
    if labels.ignore is not None:
        made[label == labels.ignore] = labels.ignore
    return made


def _scores(masks: np.ndarray, labels: Labels) -> np.ndarray:
    """Masks [classes, *s] as scores [*s, channels] that decode to them; of exclusive classes the last one wins."""
    if not labels.exclusive:
        return np.moveaxis(masks, 0, -1).astype(np.float32)
    ranks = masks * np.arange(1, len(masks) + 1).reshape(-1, *(1,) * (masks.ndim - 1))
    return np.moveaxis(np.concatenate([np.full((1, *masks.shape[1:]), 0.5), ranks]), 0, -1)


# ---------------------------------------------------------------------------------------------------------------------
# jsrt: whole masks
# ---------------------------------------------------------------------------------------------------------------------


def _jsrt(mask: Mask, kind: str, beta: float, angle: float, direction: tuple[int, int]) -> Mask:
    if kind == "dilate":
        return dilate(mask, beta)
    return erode(mask, beta) if kind == "erode" else affine(mask, beta, angle, direction)


def dilate(mask: Mask, beta: float) -> Mask:
    """Grows a mask by its neighbours until its size is `1 + beta` times the old one, or as close as a step allows."""
    size = int(mask.sum())
    return _grow(mask, size + int(beta * size), ndimage.binary_dilation)


def erode(mask: Mask, beta: float) -> Mask:
    """Shrinks a mask likewise to `1 - beta` times its size, but never to nothing."""
    size = int(mask.sum())
    return _grow(mask, size - int(beta * size), ndimage.binary_erosion)


def _grow(mask: Mask, goal: int, step: Any) -> Mask:
    """Repeats a step until the goal is passed; the last or the last but one mask, whichever comes closer."""
    before = now = mask.astype(bool)
    shrinking = goal < now.sum()
    while now.sum() > goal if shrinking else now.sum() < goal:
        before, now = now, step(now)
        if not now.any() or now.all() or np.array_equal(before, now):
            return before
    closer = abs(int(now.sum()) - goal) <= abs(int(before.sum()) - goal)
    return now if closer else before


def rotate(mask: Mask, angle: float) -> np.ndarray:
    """A mask [..., h, w] turned counter-clockwise by `angle` degrees about its middle, bilinear, float64 in 0 .. 1."""
    middle = (np.array(mask.shape[-2:]) - 1) / 2
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    matrix = np.array([[c, s], [-s, c]])
    flat = mask.reshape(-1, *mask.shape[-2:]).astype(float)
    options = {"offset": middle - matrix @ middle, "order": 1, "mode": "grid-constant"}
    return np.stack([ndimage.affine_transform(m, matrix, **options) for m in flat]).reshape(mask.shape)


def affine(mask: Mask, beta: float, angle: float, direction: tuple[int, int], compat: bool = False) -> Mask:
    """Turns a mask, then shifts it along `direction` (rows, columns) until the share `beta` of its size is wrong.

    `compat`: as published: what the rotation leaves below 1 is cut off, the shift goes down or right whatever the sign,
    and the last shift tried counts, not the closest.
    """
    turned = rotate(mask, angle)
    turned = turned >= (1 - 1e-6 if compat else 0.5)
    if compat:
        direction = (abs(direction[0]), abs(direction[1]))
    low, high = 0, LARGEST_STEP
    tried: list[tuple[float, Mask]] = []
    while low < high or (low == high and not compat):
        middle = (low + high) // 2
        moved = shift(turned, (direction[0] * middle, direction[1] * middle))
        share = float((moved != mask).sum() / mask.sum())
        tried.append((abs(share - beta), moved))
        if share < beta:
            low = middle + 1
        else:
            high = middle - 1
    return tried[-1][1] if compat else min(tried, key=lambda pair: pair[0])[1]


def shift(mask: Mask, by: tuple[int, int]) -> Mask:
    """A mask [..., h, w] moved by whole pixels, empty where it came from."""
    out = np.zeros_like(mask)
    source, target = [], []
    for n, step in zip(mask.shape[-2:], by, strict=True):
        d = max(-n, min(step, n))
        source.append(slice(max(-d, 0), n - max(d, 0)))
        target.append(slice(max(d, 0), n - max(-d, 0)))
    out[..., target[0], target[1]] = mask[..., source[0], source[1]]
    return out


# ---------------------------------------------------------------------------------------------------------------------
# whu: objects
# ---------------------------------------------------------------------------------------------------------------------

SIZES = ((150, 1, 1), (400, 3, 2), (math.inf, 5, 3))
"""Below which area an object's border moves by how large a kernel and how many times at most."""

EIGHT = np.ones((3, 3))
CANVAS = 128  # objects are pasted from a square of this side
UNKNOWN_AREA = 400  # of what is pasted where the case itself shows no object


def whu(mask: Mask, donors: Sequence[Mask], drop: float, add: float, border: float, rng: np.random.Generator) -> Mask:
    """A mask [..., h, w] whose objects were dropped, changed and added; see the module's docstring."""
    planes = mask.reshape(-1, *mask.shape[-2:])
    others = [d.reshape(-1, *d.shape[-2:]) for d in donors]
    filled = [p for d in others for p in d if p.any()]
    return np.stack([_whu_plane(p, filled, drop, add, border, rng)[0] for p in planes]).reshape(mask.shape)


def _whu_plane(
    mask: Mask, donors: Sequence[Mask], drop: float, add: float, border: float, rng: np.random.Generator
) -> tuple[Mask, int, int]:
    """A plane, how many objects were dropped, and how many were to be added."""
    found, count = _objects(mask)
    noisy, dropped = np.zeros(mask.shape, bool), 0
    for number in range(1, count + 1):
        thing = found == number
        if rng.random() < drop:
            dropped += 1
            continue
        if rng.random() < border:
            kernel, times = next((k, t) for limit, k, t in SIZES if thing.sum() < limit)
            change = ("erode", "dilate")[rng.integers(2)]
            thing = morphology(thing, change, int(rng.integers(1, kernel + 1)), int(rng.integers(1, times + 1)))
        noisy |= thing
    added = int((rng.random(count + 1) < add).sum()) if donors else 0
    areas = ndimage.sum_labels(mask, found, range(1, count + 1)) if count else np.array([UNKNOWN_AREA])
    for _ in range(added):
        _paste(noisy, mask, donors[int(rng.integers(len(donors)))], float(rng.choice(areas)), rng)
    return noisy, dropped, added


def _objects(mask: Mask) -> tuple[np.ndarray, int]:
    """Objects numbered from 1, neighbours across corners joined, and how many."""
    found: Any = ndimage.label(mask, EIGHT)
    return found[0], int(found[1])


def morphology(mask: Mask, change: str, kernel: int, times: int) -> Mask:
    """Erosion (outside counts as foreground) or dilation with a square of ones, repeated.

    An even square reaches one pixel further up and left, as OpenCV's does.
    """
    step = ndimage.minimum_filter if change == "erode" else ndimage.maximum_filter
    out = mask.astype(np.uint8)
    for _ in range(times):
        out = step(out, size=kernel, mode="constant", cval=int(change == "erode"))
    return out.astype(bool)


def crop_resize(mask: Mask) -> Mask:
    """An object's bounding box enlarged to fit a square of side CANVAS, aspect kept, centred."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scale = CANVAS / max(box.shape)
    size = tuple(max(1, int(n * scale)) for n in box.shape)
    out = np.zeros((CANVAS, CANVAS), bool)
    corner = [(CANVAS - n) // 2 for n in size]
    out[corner[0] : corner[0] + size[0], corner[1] : corner[1] + size[1]] = resize(box, size)
    return out


def resize(mask: Mask, size: Sequence[int]) -> Mask:
    """A mask brought to another size by cubic convolution (a = -.75, half-pixel centres), cut at one half."""
    out = mask.astype(float)
    for axis, n in enumerate(size):
        out = np.moveaxis(np.tensordot(_cubic(out.shape[axis], n), out, (1, axis)), 0, axis)
    return out >= 0.5


def _cubic(old: int, new: int) -> np.ndarray:
    """[new, old]: Keys' cubic kernel with a = -.75; beyond the border the last pixel goes on."""
    at = (np.arange(new) + 0.5) * old / new - 0.5
    base = np.floor(at).astype(int)
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        t = np.abs(at - (base + tap))
        near = 1.25 * t**3 - 2.25 * t**2 + 1
        far = -0.75 * (t**3 - 5 * t**2 + 8 * t - 4)
        np.add.at(matrix, (np.arange(new), np.clip(base + tap, 0, old - 1)), np.where(t <= 1, near, far))
    return matrix


def _paste(noisy: Mask, clean: Mask, donor: Mask, area: float, rng: np.random.Generator) -> None:
    """Puts one object of another case, `area` pixels large, where no true object is; as a whole box, as published."""
    found, count = _objects(donor)
    thing = crop_resize(found == rng.integers(1, count + 1))
    scale = math.sqrt(area / thing.sum())
    thing = resize(thing, [max(1, int(n * scale)) for n in thing.shape])
    if not thing.any():
        return
    rows, columns = np.flatnonzero(thing.any(1)), np.flatnonzero(thing.any(0))
    thing = thing[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if any(n >= m for n, m in zip(thing.shape, clean.shape, strict=True)):
        return
    for _ in range(100):
        top, left = (int(rng.integers(m - n)) for n, m in zip(thing.shape, clean.shape, strict=True))
        place = np.s_[top : top + thing.shape[0], left : left + thing.shape[1]]
        if not (clean[place] & thing).any():
            noisy[place] = thing
            return


# ---------------------------------------------------------------------------------------------------------------------
# mrf: a smooth field of errors
# ---------------------------------------------------------------------------------------------------------------------


def mrf(label: np.ndarray, labels: Labels, noise: LabelNoise, rng: np.random.Generator) -> np.ndarray:
    """A label map whose voxels flip with probability sigmoid(eta); of exclusive classes, to any other one."""
    if labels.exclusive:
        flips = rng.random(label.shape) < 1 / (1 + np.exp(-sample_field(label.shape, noise, rng)))
        values = np.array([0, *(v[0] for v in labels.values)])
        place = np.searchsorted(np.sort(values), label)
        known = np.isin(label, values)
        other = (place + rng.integers(1, len(values), label.shape)) % len(values)
        return np.where(flips & known, np.sort(values)[other], label)
    masks = labels.masks(label)
    flipped = [m ^ (rng.random(m.shape) < 1 / (1 + np.exp(-sample_field(m.shape, noise, rng)))) for m in masks]
    return labels.decode(_scores(np.array(flipped), labels))


def sample_field(shape: Sequence[int], noise: LabelNoise, rng: np.random.Generator) -> np.ndarray:
    """A sample of N(mu, s^2 K(rho)): a stationary autoregression of first order along each axis in turn."""
    field = rng.normal(size=tuple(shape))
    for axis in range(len(shape)):
        field = np.moveaxis(field, axis, 0)  # [n, ...]
        for t in range(1, len(field)):
            field[t] = noise.rho * field[t - 1] + math.sqrt(1 - noise.rho**2) * field[t]
        field = np.moveaxis(field, 0, axis)
    return noise.mu + noise.s * field

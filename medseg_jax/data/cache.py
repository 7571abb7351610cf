"""Preprocessed cases on disk: canonical, cropped, normalised, resampled, memory-mapped.

    preprocess(file's array) -> network's array + Record        restore(network's array, Record) -> file's array
    build_cache(dataset, plan) -> Cache                         cache.case(id) -> CachedCase (memory maps)

A case is one folder with image.npy [d, h, w, c] float32, label.npy [d, h, w] and case.json (record, foreground voxels,
size and sha256 of both files, and its own sha256). It is written under another name and renamed into place, so a folder
that bears a case's name is whole, whoever was killed; bits that rot later are found by size, or by hash with `verify`.
"""

import dataclasses
import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.ndimage import gaussian_filter1d

from medseg_jax.data.fingerprint import class_masks, field_of_view, nonzero_box
from medseg_jax.data.geometry import (
    from_canonical,
    low_resolution_axis,
    resample,
    resample_label,
    spacing_canonical,
    to_canonical,
)
from medseg_jax.data.plan import Plan
from medseg_jax.ops.clahe import clahe_lab
from medseg_jax.paths import cache_home, file_sha256
from medseg_jax.types import Case, Geometry, Labels, UserError

if TYPE_CHECKING:
    from medseg_jax.data.dataset import Dataset

FORMAT = 1  # raised whenever the same plan would give other arrays
LOCATIONS = 500  # foreground voxels remembered per class and case

log = logging.getLogger(__name__)

# ------------------------------------------------------------------------------------------------- there and back again


@dataclass(frozen=True)
class Record:
    """What was done to a case, enough to undo it.

    Attributes:
        canonical_shape: (d, h, w) of the whole image in canonical orientation.
        crop: ((low, high),) * 3, the part of it that was kept.
        resampled_shape: (d, h, w) of the preprocessed image.
        spacing: after resampling, in the file's unit.
        original_spacing: before, in canonical order.
    """

    canonical_shape: tuple[int, int, int]
    crop: tuple[tuple[int, int], ...]
    resampled_shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    original_spacing: tuple[float, float, float]

    @property
    def crop_shape(self) -> tuple[int, ...]:
        return tuple(high - low for low, high in self.crop)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(low, high) for low, high in self.crop)

    @property
    def coarse_axis(self) -> int | None:
        return low_resolution_axis(self.original_spacing, self.spacing)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Record":
        """The inverse of `dataclasses.asdict` after a trip through JSON."""
        fields: dict[str, Any] = {
            key: tuple(tuple(v) if isinstance(v, list) else v for v in value) for key, value in values.items()
        }
        return cls(**fields)


@dataclass(frozen=True, eq=False)
class Preprocessed:
    """image [d, h, w, c] float32, label [d, h, w] or None, and how they came about."""

    image: np.ndarray
    label: np.ndarray | None
    record: Record


def preprocess(
    image: np.ndarray,
    label: np.ndarray | None,
    geometry: Geometry,
    plan: Plan,
    files: Sequence[Path] = (),
) -> Preprocessed:
    """From the file's array to the network's: canonical orientation, crop, normalise, resample (in nnU-Net's order).

    Args:
        image: [*s, c] as read.
        label: [*s] as read, or None.
        files: the image's files, named in errors.

    Raises:
        UserError: another number of channels than planned, image and label differ in shape, NaN or Inf.
    """
    file = files[0] if files else None
    if image.shape[-1] != plan.in_channels:
        raise UserError(
            "The image has another number of channels than the plan",
            file=file,
            found=image.shape[-1],
            expected=plan.in_channels,
        )
    if label is not None and label.shape != image.shape[:-1]:
        raise UserError("Image and label differ in shape", file=file, found=label.shape, expected=image.shape[:-1])
    for channel in range(image.shape[-1]):
        bad = image[..., channel].size - int(np.isfinite(image[..., channel]).sum())
        if bad:
            file = files[channel] if len(files) == image.shape[-1] else file
            remedy = "replace them in the file; medseg data check lists every such case"
            raise UserError(
                "The image holds NaN or Inf", file=file, found=f"{bad} voxels of channel {channel}", remedy=remedy
            )

    if (plan.crop_field or plan.clahe) and (image.dtype != np.uint8 or len(geometry.shape) != 2):
        raise UserError(
            "The plan's field of view and CLAHE are for 8-bit pictures",
            file=file,
            found=f"{image.dtype}, {len(geometry.shape)}-D",
            remedy='set "crop_field" to false and "clahe" to null in plan.json',
        )
    image = to_canonical(image, geometry, channels=True)  # [d, h, w, c]
    canonical_shape = image.shape[:3]
    crop = tuple((0, n) for n in canonical_shape)
    if plan.crop_nonzero:
        crop = nonzero_box(image)
    elif plan.crop_field:
        crop = ((0, 1), *field_of_view(image[0]))
    original = spacing_canonical(geometry)
    crop_shape = tuple(high - low for low, high in crop)
    shape, spacing = target_grid(crop_shape, original, plan)
    record = Record(canonical_shape, crop, shape, spacing, original)
    image = image[record.slices]
    if plan.clahe:
        image = clahe_lab(image[0], plan.clahe["clip"], plan.clahe["grid"])[None]
    image = _normalize(image, plan)
    if len(geometry.shape) == 2:
        # Pictures are shrunk by large factors: without a low-pass filter fine texture turns into noise.
        image = _low_pass(image, shape)
    image = resample(image, shape, order=3, axis=record.coarse_axis)
    if label is not None:
        label = to_canonical(label, geometry, channels=False)[record.slices]
        label = np.ascontiguousarray(resample_label(label, shape, axis=record.coarse_axis))
    return Preprocessed(np.ascontiguousarray(image, np.float32), label, record)


def target_grid(
    shape: tuple[int, ...], original: tuple[float, ...], plan: Plan
) -> tuple[tuple[int, int, int], tuple[float, float, float]]:
    """(d, h, w) and spacing after resampling a canonical image of this shape and spacing."""
    if plan.working_size is not None:
        new = (shape[0], *plan.working_size)
    elif plan.spacing is not None:
        wanted = [o if s is None else s for s, o in zip(plan.spacing, original, strict=True)]
        new = tuple(max(1, round(n * o / s)) for n, o, s in zip(shape, original, wanted, strict=True))
    else:
        new = shape
    spacing = tuple(float(o * n / m) for o, n, m in zip(original, shape, new, strict=True))
    return (new[0], new[1], new[2]), (spacing[0], spacing[1], spacing[2])


def _normalize(image: np.ndarray, plan: Plan) -> np.ndarray:
    """[d, h, w, c] -> float32, each channel by its scheme (see plan.SCHEMES)."""
    out = np.empty(image.shape, np.float32)  # in canonical order, whatever order the file has
    out[...] = image
    inside = (image != 0).any(-1) if any(entry.get("nonzero") for entry in plan.normalization) else None
    for channel, entry in enumerate(plan.normalization):
        values = out[..., channel]
        scheme = entry["scheme"]
        if scheme == "none":
            continue
        if scheme == "minmax":
            values -= values.min()
            values /= max(values.max(), 1e-8)
            continue
        if scheme == "zscore":
            used = inside if entry["nonzero"] and inside is not None and inside.any() else None
            mean, std = _mean_std(values, used)
        else:
            mean, std = entry["mean"], entry["std"]
        if scheme == "ct":
            np.clip(values, entry["low"], entry["high"], out=values)
        values -= mean
        values /= max(std, 1e-8)
        if entry.get("nonzero") and inside is not None:
            values[~inside] = 0
    return out


def _mean_std(values: np.ndarray, used: np.ndarray | None) -> tuple[float, float]:
    """Of [d, h, w], or of its voxels where `used`; slice by slice, since double precision takes twice the memory."""
    slices = [slice(i, i + 1) for i in range(len(values))] if len(values) > 1 else [slice(None)]

    def total(power: int, mean: float) -> float:
        parts = (values[i] if used is None else values[i][used[i]] for i in slices)
        return float(sum(((part.astype(np.float64) - mean) ** power).sum() for part in parts))

    count = values.size if used is None else int(np.count_nonzero(used))
    mean = total(1, 0.0) / count
    return mean, math.sqrt(total(2, mean) / count)


def _low_pass(image: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Gaussian of sigma (factor - 1) / 2 along every axis of [d, h, w, c] that shrinks by a factor."""
    for axis in range(3):
        factor = image.shape[axis] / shape[axis]
        if factor > 1:
            image = gaussian_filter1d(image, (factor - 1) / 2, axis, mode="nearest")
    return image


def restore(probabilities: np.ndarray, record: Record, geometry: Geometry, plan: Plan) -> np.ndarray:
    """Probabilities [d, h, w, k] of a preprocessed case -> [*s, k] in the space of its file, float32.

    Outside the crop: background has probability 1 if the classes are exclusive (k = classes + 1), all others 0.
    """
    if probabilities.shape[:3] != record.resampled_shape:
        raise ValueError(
            f"probabilities {probabilities.shape[:3]} are not in the space of the record {record.resampled_shape}"
        )
    outputs = probabilities.shape[-1]
    whole = np.zeros((*record.canonical_shape, outputs), np.float32)
    if outputs == len(plan.classes) + 1:
        whole[..., 0] = 1
    for i in range(outputs):  # one at a time: a whole body with many classes would not fit twice
        channel = np.asarray(probabilities[..., i : i + 1], np.float32)
        channel = resample(channel, record.crop_shape, order=1, axis=record.coarse_axis)
        whole[(*record.slices, i)] = channel[..., 0]
    return from_canonical(whole, geometry)


# ------------------------------------------------------------------------------------------------------------ one entry


@dataclass(frozen=True, eq=False)
class CachedCase:
    """A preprocessed case on disk.

    Attributes:
        image: [d, h, w, c] float32 memory map, read-only; slicing reads the slice's bytes only.
        label: [d, h, w] memory map, or None.
        record: see Record.
        foreground: class -> [n <= 500, 3] int32 voxels that belong to it; an absent class has n = 0.
    """

    image: np.ndarray
    label: np.ndarray | None
    record: Record
    foreground: dict[str, np.ndarray]


class Damaged(Exception):
    """An entry cannot be used; the message says why."""


def _digest(body: Any) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _write_entry(folder: Path, done: Preprocessed, labels: Labels, case: Case) -> None:
    folder.mkdir(parents=True)
    arrays = {"image.npy": done.image} | ({} if done.label is None else {"label.npy": done.label})
    files = {}
    for name, array in arrays.items():
        with (folder / name).open("wb") as file:
            np.save(file, array)
            file.flush()
            os.fsync(file.fileno())
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": file_sha256(folder / name)}
    body = {
        "record": dataclasses.asdict(done.record),
        "files": files,
        "foreground": {} if done.label is None else _locations(done.label, labels, case.id),
    }
    body = json.loads(json.dumps(body))
    (folder / "case.json").write_text(json.dumps({"body": body, "sha256": _digest(body)}), encoding="utf-8")


def _locations(label: np.ndarray, labels: Labels, case_id: str) -> dict[str, list[list[int]]]:
    """Class -> up to LOCATIONS of its voxels, drawn by the case's name: rebuilding gives the same ones."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(case_id.encode()).digest()[:8]))
    found = {}
    for name, mask in zip(labels.names, class_masks(labels, label), strict=True):
        flat = np.flatnonzero(mask)
        if len(flat) > LOCATIONS:
            flat = np.sort(rng.choice(flat, LOCATIONS, replace=False))
        found[name] = np.stack(np.unravel_index(flat, label.shape), -1).tolist()
    return found


def _inspect(folder: Path, verify: bool) -> dict[str, Any]:
    """Body of a whole entry's case.json. Raises Damaged."""
    try:
        written = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        body, digest = written["body"], written["sha256"]
    except OSError as error:
        raise Damaged(f"case.json: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged("case.json is not readable") from error
    if _digest(body) != digest:
        raise Damaged("case.json was altered")
    for name, facts in body["files"].items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        if size != facts["bytes"]:
            raise Damaged(f"{name} is missing" if size < 0 else f"{name} has {size} bytes instead of {facts['bytes']}")
        if verify and file_sha256(path) != facts["sha256"]:
            raise Damaged(f"{name} was altered (sha256)")
    return body


@functools.lru_cache(maxsize=256)  # each open case holds two file descriptors
def _open(folder: Path) -> CachedCase:
    body = _inspect(folder, verify=False)
    arrays = {name: np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in body["files"]}
    foreground = {name: np.array(v, np.int32).reshape(-1, 3) for name, v in body["foreground"].items()}
    return CachedCase(arrays["image.npy"], arrays.get("label.npy"), Record.from_dict(body["record"]), foreground)


# ------------------------------------------------------------------------------------------------------------ the cache


@dataclass(frozen=True)
class Cache:
    """The preprocessed cases of one data set under one plan. Holds paths only: it may be sent to other processes.

    Attributes:
        root: its folder, one sub-folder a case.
        ids: the cases in it.
        repaired: case -> what was wrong with its entry, for entries that had to be rebuilt.
    """

    root: Path
    ids: frozenset[str]
    repaired: dict[str, str] = field(default_factory=dict)

    def case(self, case_id: str) -> CachedCase:
        """Opens a case.

        Raises:
            UserError: not in the cache, or its entry was damaged since the cache was built.
        """
        if case_id not in self.ids:
            raise UserError(
                f'Case "{case_id}" was not preprocessed', file=self.root, expected=f"one of {len(self.ids)} cases"
            )
        for wait in (0.01, 0.1, 1.0):
            try:
                return _open(self.root / case_id)
            except Damaged:
                time.sleep(wait)  # another process may be replacing the entry at this instant
        try:
            return _open(self.root / case_id)
        except Damaged as error:
            remedy = "start again: the entry will be rebuilt"
            raise UserError(
                "A preprocessed case is damaged", file=self.root / case_id, found=error, remedy=remedy
            ) from error

    def extent(self, case_ids: Sequence[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Smallest and largest side of these cases along (d, h, w)."""
        sides = np.array([self.case(id).image.shape[:3] for id in case_ids])  # [cases, 3]
        return tuple(map(int, sides.min(0))), tuple(map(int, sides.max(0)))


def cache_folder(dataset: "Dataset", plan: Plan, directory: str | Path | None = None) -> Path:
    """Where the cases of this data set under this plan are kept; named by what changes their arrays, and only that."""
    base = directory or cache_home() / "preprocessed"
    relevant = ("dim", "spacing", "working_size", "normalization", "crop_nonzero", "in_channels")
    values = [getattr(plan, name) for name in relevant]
    values += [value for value in (plan.crop_field, plan.clahe) if value]  # plans without them are older
    key = _digest([FORMAT, dataset.fingerprint(), json.loads(json.dumps(values))])
    name = re.sub(r"[^\w.-]+", "_", dataset.name).strip(".") or "dataset"
    return Path(base).expanduser() / f"{name}-{key[:16]}"


def build_cache(
    dataset: "Dataset",
    plan: Plan,
    directory: str | Path | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    *,
    verify: bool = False,
) -> Cache:
    """Preprocesses the training and validation cases that are not there yet, several at once; never a test case.

    Args:
        directory: default `preprocessed` in the user's cache folder (paths.cache_home).
        progress: called as progress(done, total, case_id) after each case, in this thread.
        verify: compare every entry with its sha256 (reads everything once).

    Raises:
        UserError: a case that cannot be preprocessed (named), disk full, folder not writable.
    """
    cases = [case for case in dataset.cases if case.split in ("train", "val")]
    root = cache_folder(dataset, plan, directory)
    repaired: dict[str, str] = {}

    def one(case: Case) -> Case:
        problem = _build_entry(root, dataset, plan, case, verify)
        if problem:
            log.warning("preprocessed case %s was damaged (%s) and has been rebuilt", case.id, problem)
            repaired[case.id] = problem
        return case

    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        # Processes that build at the same time start at different cases and share the work.
        order = np.random.default_rng(os.getpid()).permutation(len(cases))
        with ThreadPoolExecutor(max(1, min(len(cases), os.cpu_count() or 1, 8))) as pool:
            futures = [pool.submit(one, cases[i]) for i in order]
            try:
                for done, future in enumerate(as_completed(futures), 1):
                    case = future.result()
                    if progress:
                        progress(done, len(cases), case.id)
            finally:
                pool.shutdown(cancel_futures=True)
    except OSError as error:
        remedy = "set MEDSEG_CACHE to a folder of yours that has room"
        raise UserError.from_os(error, root, remedy) from error
    return Cache(root, frozenset(case.id for case in cases), repaired)


def _build_entry(root: Path, dataset: "Dataset", plan: Plan, case: Case, verify: bool) -> str | None:
    """Makes sure that the case's entry is there and whole; returns what was wrong with the one before, if any."""
    target = root / case.id
    problem = None
    if target.exists():
        try:
            _inspect(target, verify)
            return None
        except Damaged as error:
            problem = str(error)
    draft = root / f".draft-{uuid.uuid4().hex}"
    try:
        _write_entry(draft, _preprocess_case(dataset, plan, case), dataset.labels, case)
        _put(draft, target, verify)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    _open.cache_clear()
    return problem


def _preprocess_case(dataset: "Dataset", plan: Plan, case: Case) -> Preprocessed:
    image, label, geometry = dataset.load(case)
    return preprocess(image, label, geometry, plan, case.images)


def _put(draft: Path, target: Path, verify: bool) -> None:
    """Renames a finished entry into place. One that another process has put there meanwhile stays if it is whole."""
    for _ in range(10):
        try:
            draft.rename(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES):
                raise
        try:
            _inspect(target, verify)
            return
        except Damaged:
            trash = target.with_name(f".trash-{uuid.uuid4().hex}")
            try:
                target.rename(trash)
            except FileNotFoundError:
                continue  # the other process was quicker
            shutil.rmtree(trash, ignore_errors=True)
    raise UserError(
        "An entry of the cache keeps changing", file=target, remedy="look for other programs that write there"
    )


def _sweep(root: Path) -> None:
    """Removes what killed processes left behind more than a day ago."""
    for pattern in (".draft-*", ".trash-*"):
        for folder in root.glob(pattern):
            try:
                if time.time() - folder.stat().st_mtime > 24 * 3600:
                    shutil.rmtree(folder, ignore_errors=True)
            except FileNotFoundError:
                continue

"""Which files are a case, and reading them: a single image, a folder of images, DICOM series, a data set."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medseg_jax.data import dicom, io
from medseg_jax.data.dataset import CHANNEL, Dataset, is_dataset
from medseg_jax.data.geometry import same_space
from medseg_jax.types import Case, Geometry, UserError


def find_cases(input: str | Path | Dataset, channels: Sequence[str], split: str | None = None) -> tuple[Case, ...]:
    """The cases that a path stands for, sorted by id. Opens no image.

    A file <case>_0000 ... <case>_000n is one channel of a case if the folder uses such names (some file ends in _0000);
    a picture like IMG_0007.jpg on its own is a case. One file <case>_0000 may hold all channels (RGB). A folder without
    images may hold DICOM series, in itself or in folders below it: each is a case; only their headers are read.

    Args:
        input: an image, a folder of images, a DICOM series (its folder or one of its files), a folder of such series,
            or a data set, opened or its folder.
        channels: names of the run's channels.
        split: of a data set folder.
    """
    if isinstance(input, Dataset):
        return _dataset_cases(input, channels, split)
    input = Path(input)
    if input.is_file():
        cases = _series([dicom.series_of(input)]) if io.kind(input) == "dicom" else _one_file(input, len(channels))
    elif not input.is_dir():
        raise UserError("There is no such image or folder", file=input, remedy="check the path after -i")
    elif is_dataset(input):  # before its files: a preview or a log's picture beside dataset.json is no case
        return _dataset_cases(Dataset.open(input), channels, split)
    elif files := io.list_files(input):
        _refuse_mixture(input, files)
        cases = _group(files)
    elif (input / "dataset.json").is_file():
        return _dataset_cases(Dataset.open(input), channels, split)
    elif (series := dicom.find_series(input)) or io.kind(input) == "dicom":
        cases = _series(series or [dicom.series_of(input)])
    else:
        inside = sorted(p.name for p in input.iterdir() if p.is_dir() and not p.name.startswith("."))
        raise UserError(
            "The folder holds no image",
            file=input,
            found=f"folders {', '.join(inside[:8])}" if inside else "no readable file",
            expected=f"files ending in {', '.join(io.SUFFIXES)}",
            remedy=f"-i {input / inside[0]}" if inside else None,
        )
    if split is not None:
        raise UserError(
            "Only a data set folder has splits", file=input, found=f"--split {split}", remedy="leave it out"
        )
    return cases


def _dataset_cases(dataset: Dataset, channels: Sequence[str], split: str | None) -> tuple[Case, ...]:
    if sorted(dataset.channels) == sorted(channels) and tuple(dataset.channels) != tuple(channels):
        raise UserError(
            "The data set has its channels in another order than the run",
            file=dataset.root / "dataset.json",
            found=", ".join(dataset.channels),
            expected=", ".join(channels),
        )
    cases = dataset.subset(split, labelled=None) if split else dataset.cases
    if not cases:
        raise UserError(
            f"The data set has no case in split {split}", file=dataset.root, remedy="leave --split out for all cases"
        )
    return tuple(sorted((dataclasses.replace(case, label=None) for case in cases), key=lambda case: case.id))


def _series(found: Sequence[dicom.Series]) -> tuple[Case, ...]:
    return tuple(Case(series.id, (series.path,), patient=series.patient) for series in found)


def _refuse_mixture(folder: Path, files: Sequence[Path]) -> None:
    """A mask beside its DICOM series must not be taken for the image."""
    if io.kind(folder) == "dicom":
        slice_ = next(path for path in sorted(folder.iterdir()) if path.is_file() and io.kind(path) == "dicom")
        raise UserError(
            "The folder holds a DICOM series and other images",
            file=folder,
            found=f"{slice_.name} ...; {', '.join(path.name for path in files[:5])}",
            expected="one or the other",
            remedy=f"-i {slice_} for the series, -i {files[0]} for an image",
        )


def _numbered(path: Path) -> tuple[str, int] | None:
    """(case, channel) of a file named <case>_<4 digits>."""
    match = CHANNEL.fullmatch(io.stem(path))
    return (match["id"], int(match["channel"])) if match else None


def _one_file(path: Path, channels: int) -> tuple[Case, ...]:
    named = _numbered(path)
    if named is None:
        return (Case(io.stem(path), (path,)),)
    siblings = {other[1]: p for p in io.list_files(path.parent) if (other := _numbered(p)) and other[0] == named[0]}
    if sorted(siblings) == list(range(channels)):
        return (Case(named[0], tuple(siblings[i] for i in range(channels))),)
    return (Case(named[0] if named[1] == 0 else io.stem(path), (path,)),)


def _group(files: Sequence[Path]) -> tuple[Case, ...]:
    """Files of one folder by case."""
    by_channel = any((named := _numbered(p)) and named[1] == 0 for p in files)
    groups: dict[str, list[Path]] = {}
    for path in files:
        named = _numbered(path) if by_channel else None
        groups.setdefault(named[0] if named else io.stem(path), []).append(path)
    for id, paths in groups.items():
        numbers = [named[1] for p in paths if by_channel and (named := _numbered(p))]
        if len(set(numbers)) < len(paths) > 1:
            raise UserError(
                f"Several files would give the prediction {id}",
                file=paths[0].parent,
                found=", ".join(p.name for p in paths),
                expected=f"one image {id}, or one file per channel: {id}_0000, {id}_0001 ...",
                remedy="move the others to another folder",
            )
    return tuple(Case(id, tuple(paths)) for id, paths in sorted(groups.items()))


def load_case(case: Case, channels: Sequence[str]) -> tuple[np.ndarray, Geometry]:
    """Image [*s, c] of a case and the geometry of its first file.

    Raises:
        UserError: a file is unreadable, channels lie in different spaces, or their number is not the run's.
    """
    if not case.images:
        raise UserError(f"Case {case.id} has no image")
    names = ", ".join(path.name for path in case.images)
    numbers = [named[1] for path in case.images if (named := _numbered(path))]
    if len(numbers) == len(case.images) > 1 and numbers != list(range(len(numbers))):
        raise UserError(f"Case {case.id} lacks a channel", found=names, expected=_expected_files(case, channels))
    arrays, geometries = zip(*(io.read_image(path) for path in case.images), strict=True)
    for path, other in zip(case.images[1:], geometries[1:], strict=True):
        if differences := same_space(other, geometries[0]):
            raise UserError(
                f"The channels of case {case.id} do not lie in the same space",
                file=path,
                found="; ".join(differences),
                expected=f"the space of {case.images[0].name}",
                remedy="resample one onto the other first",
            )
    image = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, -1)  # [*s, c]
    if image.shape[-1] != len(channels):
        raise UserError(
            f"Case {case.id} has another number of channels than the run",
            file=case.images[0].parent,
            found=f"{image.shape[-1]} in {names}",
            expected=f"{len(channels)}: {_expected_files(case, channels)}",
        )
    return image, geometries[0]


def _expected_files(case: Case, channels: Sequence[str]) -> str:
    ending = ".nii.gz" if io.kind(case.images[0]) == "dicom" else io.suffix(case.images[0])
    return ", ".join(f"{case.id}_{i:04d}{ending} ({name})" for i, name in enumerate(channels))

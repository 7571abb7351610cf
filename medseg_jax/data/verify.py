"""Every problem of every case at once, before anything trains on it.

Each rule below has a test with a file that triggers it, and none of them speaks on a clean data set.

| rule | severity |
|---|---|
| image or label missing or unreadable; a channel file missing; number of channels | error |
| channels or label of another shape than the image, or lying elsewhere (affine, shown in mm) | error |
| NIfTI header that contradicts itself: sform, qform, pixdim | warning |
| NaN or infinite voxels | error |
| label values that are not whole numbers, or that dataset.json does not name (which, how many voxels) | error |
| label of ignored voxels only | error |
| label without foreground; class that no training label shows | warning |
| constant image; intensities or spacing far from the other cases' | warning |
| the same picture in two cases: of two splits | error, else warning |
| a patient in two splits | error |
| label without image; case of dataset.json without files; no training case; 2-D and 3-D mixed; numTraining | error |
| no validation case; file that belongs to no case | warning |
"""

import hashlib
import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from rich.markup import escape
from rich.table import Table

from medseg_jax.data import geometry as space
from medseg_jax.data import io
from medseg_jax.data.dataset import CHANNEL, FOLDERS, Dataset, value_counts, visible_files
from medseg_jax.data.nifti import contradictions
from medseg_jax.types import Case, Geometry, UserError

SPACING_FACTOR = 3.0
"""A spacing this many times the median of the data set, or this many times smaller, is worth a look."""

INTENSITY_FACTOR = 20.0
"""The same for the spread (0.5 to 99.5 percentile) of a channel's intensities."""

INTENSITY_SHIFT = 3.0
"""A channel whose median lies this many typical spreads away from the others' is worth a look."""

SAMPLE = 1_000_000
"""Voxels of a channel from which its percentiles are taken."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a data set.

    Attributes:
        case: id of the case, or "" where the whole data set is meant.
        severity: "error" (do not train on this) or "warning" (look at it).
        file: where it was found.
        text: what is wrong, with the numbers found.
        remedy: what to do about it.
    """

    case: str
    severity: str
    file: Path
    text: str
    remedy: str


@dataclass
class _Findings:
    """What reading one case has shown: its own problems, and what the rules on the whole set compare."""

    case: Case
    problems: list[Problem] = field(default_factory=list)
    dims: int | None = None
    spacing: tuple[float, ...] = ()
    spread: list[float] = field(default_factory=list)  # one a channel
    median: list[float] = field(default_factory=list)
    content: str | None = None
    classes: set[str] = field(default_factory=set)

    def error(self, file: Path, text: str, remedy: str) -> None:
        self.problems.append(Problem(self.case.id, "error", file, text, remedy))

    def warn(self, file: Path, text: str, remedy: str) -> None:
        self.problems.append(Problem(self.case.id, "warning", file, text, remedy))


def check_dataset(
    dataset: Dataset,
    *,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
    splits: Sequence[str] = ("train", "val", "test"),
) -> list[Problem]:
    """Reads every file of a data set and lists all problems: errors first, then by case.

    Args:
        dataset: an opened data set.
        progress: called with (cases done, cases) after each case.
        workers: threads that read, each holding one case in memory; all cores, at most 4, by default.
        splits: whose files are opened. Training leaves those of test cases closed.
    """
    findings = []
    with ThreadPoolExecutor(workers or min(4, os.cpu_count() or 1)) as pool:
        cases = [case for case in dataset.cases if case.split in splits]
        try:
            for found in pool.map(lambda case: _check_case(dataset, case), cases):
                findings.append(found)
                if progress:
                    progress(len(findings), len(cases))
        finally:
            pool.shutdown(cancel_futures=True)
    problems = [problem for found in findings for problem in found.problems]
    for rule in (_spacings, _intensities, _duplicates, _patients, _classes, _splits, _dims, _files):
        problems += rule(dataset, findings)
    return sorted(problems, key=lambda p: (p.severity != "error", p.case, str(p.file), p.text))


# ------------------------------------------------------------------------------------------------------------- one case


def _check_case(dataset: Dataset, case: Case) -> _Findings:
    found = _Findings(case)
    image, geometry = _check_image(dataset, case, found)
    if case.label is not None:
        _check_label(dataset, case, found, geometry)
    if image is not None and geometry is not None:
        found.dims = len(geometry.shape)
        found.spacing = space.spacing_canonical(geometry)
        found.content = _content(image)
        _check_intensities(dataset, case, found, image)
    return found


def _content(image: np.ndarray) -> str:
    """sha256 of the voxels: the same for the same image, however it was compressed."""
    digest = hashlib.sha256(f"{image.shape} {image.dtype}".encode())
    digest.update(np.ascontiguousarray(image))
    return digest.hexdigest()


def _check_image(dataset: Dataset, case: Case, found: _Findings) -> tuple[np.ndarray | None, Geometry | None]:
    """Image [*s, c] and geometry of the first channel, or None where they cannot be had."""
    if not case.images:
        text = "dataset.json names this case, but it has no image"
        found.error(dataset.root / "dataset.json", text, f"add imagesTr/{case.id}_0000{dataset.file_ending}")
        return None, None
    read = [(path, _read(path, io.read_image, found)) for path in case.images]
    _check_channels(dataset, case, found, sum(result[0].shape[-1] if result else 1 for _, result in read))
    good = [(path, *result) for path, result in read if result is not None]
    if not good:
        return None, None
    first, _, geometry = good[0]
    arrays = []
    for path, array, other in good:
        _check_header(found, path, other)
        differences = space.same_space(other, geometry)
        if differences:
            text = f"lies elsewhere than {first.name}: {'; '.join(differences)}"
            found.error(path, text, "resample the channels of a case to one grid")
        else:
            arrays.append(array)
    if len(arrays) < len(read):
        return None, geometry
    image = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, -1)  # [*s, c]
    return image, geometry


def _check_header(found: _Findings, file: Path, geometry: Geometry) -> None:
    if words := contradictions(geometry):
        found.warn(
            file,
            "; ".join(words),
            "other programs may place it elsewhere: write the file again with the right one in both",
        )


def _check_channels(dataset: Dataset, case: Case, found: _Findings, channels: int) -> None:
    """Compares what a case holds (`channels` in all its files) with the channels that dataset.json names."""
    if len(case.images) == 1 and channels == len(dataset.channels):
        return
    stems = [path.name.removesuffix(dataset.file_ending) for path in case.images]
    numbers = [int(match["channel"]) for stem in stems if (match := CHANNEL.fullmatch(stem)) and stem != case.id]
    if len(numbers) < len(stems) or channels != len(stems):
        if channels != len(dataset.channels):
            text = f"has {_count(channels, 'channel')}, dataset.json names {len(dataset.channels)}"
            found.error(case.images[0], f"{text} ({', '.join(dataset.channels)})", "mend channel_names or the file")
        return
    expected = set(range(len(dataset.channels)))
    names = {i: f"{case.id}_{i:04d}{dataset.file_ending}" for i in expected | set(numbers)}
    for i in sorted(expected - set(numbers)):
        text = f"channel {i} ({dataset.channels[i]}) is missing: {names[i]}"
        found.error(case.images[0], text, "add the file or take the case out")
    for i in sorted(set(numbers) - expected):
        text = f"is channel {i}, dataset.json names {_count(len(expected), 'channel')}"
        found.error(case.images[0].with_name(names[i]), text, "mend channel_names or take the file out")


def _check_label(dataset: Dataset, case: Case, found: _Findings, geometry: Geometry | None) -> None:
    file, labels = case.label, dataset.labels
    assert file is not None
    if not file.is_file():
        found.error(file, "this label is missing", "add it, or move the image to imagesUn")
        return
    result = _read(file, io.read_label, found)
    if result is None:
        return
    label, other = result
    _check_header(found, file, other)
    differences = space.same_space(other, geometry) if geometry is not None else []
    if differences:
        text = f"does not lie where its image does: {'; '.join(differences)}"
        found.error(file, text, "export the label again from the image it was drawn on")
    counts = value_counts(label)
    if unknown := {value: count for value, count in counts.items() if value not in labels.known}:
        values = ", ".join(f"{value} ({_count(count, 'voxel')})" for value, count in list(unknown.items())[:10])
        more = f" and {len(unknown) - 10} other values" if len(unknown) > 10 else ""
        text = f"holds {values}{more}; dataset.json names {_shorten(sorted(labels.known))}"
        found.error(file, text, "mend the label, or add the value to dataset.json")
        return
    found.classes = {name for name, values in zip(labels.names, labels.values, strict=True) if counts.keys() & values}
    if counts.keys() == {labels.ignore}:
        found.error(file, "every voxel is ignored", "label some of it, or move the image to imagesUn")
    elif not found.classes:
        found.warn(file, "is empty: no class is labelled", "make sure that nothing is to be seen in this case")


def _check_intensities(dataset: Dataset, case: Case, found: _Findings, image: np.ndarray) -> None:
    """image [*s, c]."""
    if bad := int(image.size - np.isfinite(image).sum()):
        found.error(case.images[0], f"{_count(bad, 'voxel')} NaN or infinite", "replace them, by 0 or the minimum")
        return
    if image.shape[-1] != len(dataset.channels):
        return
    for channel, name in enumerate(dataset.channels):
        values = image[..., channel]
        sample = values.reshape(-1)[:: max(1, values.size // SAMPLE)]
        low, median, high = np.percentile(sample, (0.5, 50, 99.5))
        if values.min() == values.max():
            text = f"channel {channel} ({name}) is constant: {float(values.flat[0]):g} everywhere"
            found.warn(case.images[min(channel, len(case.images) - 1)], text, "make sure that this is the right file")
        found.spread.append(float(high - low))
        found.median.append(float(median))


def _read(path: Path, reader: Callable, found: _Findings) -> tuple[np.ndarray, Geometry] | None:
    # A damaged file may raise anything, and the other cases are still to be checked.
    try:
        return reader(path)
    except UserError as error:
        details = f" (found {error.found})" if error.found is not None else ""
        found.error(path, f"{error.problem}{details}", error.remedy or "replace the file")
    except Exception as error:
        found.error(path, f"cannot be read: {type(error).__name__}: {error}", "replace the file")
    return None


# -------------------------------------------------------------------------------------------------------- the whole set


def _spacings(dataset: Dataset, findings: Sequence[_Findings]) -> Iterator[Problem]:
    known = [found for found in findings if found.spacing]
    if len(known) < 3:
        return
    median = np.median([found.spacing for found in known], axis=0)
    for found in known:
        ratio = np.asarray(found.spacing) / median
        if max(ratio.max(), 1 / ratio.min()) > SPACING_FACTOR:
            text = f"spacing {_numbers(found.spacing)} {dataset.unit}, the others' median is {_numbers(median)}"
            yield _warning(found.case, found.case.images[0], text, "make sure that the file's voxel size is right")


def _intensities(dataset: Dataset, findings: Sequence[_Findings]) -> Iterator[Problem]:
    known = [found for found in findings if found.spread]
    if len(known) < 3:
        return
    spreads = np.array([found.spread for found in known])  # [cases, c]
    medians = np.array([found.median for found in known])
    for channel, name in enumerate(dataset.channels):
        spread, median = np.median(spreads[:, channel]), np.median(medians[:, channel])
        for found, own, middle in zip(known, spreads[:, channel], medians[:, channel], strict=True):
            if own == 0 or spread == 0:
                continue
            far = max(own / spread, spread / own) > INTENSITY_FACTOR
            if far or abs(middle - median) > INTENSITY_SHIFT * spread:
                text = (
                    f"intensities of channel {channel} ({name}) are unlike the others': median {middle:.4g}, "
                    f"spread {own:.4g}; typical are {median:.4g} and {spread:.4g}"
                )
                file = found.case.images[min(channel, len(found.case.images) - 1)]
                yield _warning(found.case, file, text, "make sure that unit and modality are the others'")


def _duplicates(dataset: Dataset, findings: Sequence[_Findings]) -> Iterator[Problem]:
    same = defaultdict(list)
    for found in findings:
        if found.content is not None:
            same[found.content].append(found.case)
    for cases in same.values():
        if len(cases) > 1:
            across = len({case.split for case in cases}) > 1
            others = ", ".join(f"{case.id} ({case.split})" for case in cases[1:])
            text = f"{cases[0].id} ({cases[0].split}) holds the same image as {others}"
            remedy = "take the copies out" + (": a model must not be scored on what it has seen" if across else "")
            yield Problem(cases[0].id, "error" if across else "warning", cases[0].images[0], text, remedy)


def _patients(dataset: Dataset, findings: Sequence[_Findings]) -> Iterator[Problem]:
    splits = defaultdict(lambda: defaultdict(list))
    for case in dataset.cases:
        if case.patient:
            splits[case.patient][case.split].append(case.id)
    for patient, by_split in splits.items():
        if len(by_split) > 1:
            where = "; ".join(f"{split}: {_shorten(ids)}" for split, ids in by_split.items())
            text = f"patient {patient} is in several splits: {where}"
            yield _error(dataset, dataset.root / "dataset.json", text, "give all cases of a patient one split")


def _classes(dataset: Dataset, findings: Sequence[_Findings]) -> Iterator[Problem]:
    training = [found for found in findings if found.case.split == "train" and found.case.label is not None]
    seen = set().union(*(found.classes for found in training))
    for name in dataset.labels.names:
        if training and name not in seen:
            text = f"class {name} is in none of the {len(training)} training labels"
            yield Problem("", "warning", dataset.root / "dataset.json", text, "take it out or add cases that show it")


def _splits(dataset: Dataset, findings: Sequence[_Findings]) -> Iterator[Problem]:
    file = dataset.root / "dataset.json"
    if not dataset.subset("train"):
        yield _error(dataset, file, "no labelled case trains", 'give cases the split "train"')
    if not dataset.subset("val"):
        yield Problem("", "warning", file, "no labelled case validates", 'give some cases the split "val"')


def _dims(dataset: Dataset, findings: Sequence[_Findings]) -> Iterator[Problem]:
    counts = Counter(found.dims for found in findings if found.dims is not None)
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        odd = [found.case.id for found in findings if found.dims not in (None, usual)]
        text = f"mixes dimensions: most cases are {usual}-D, but not {_shorten(odd)}"
        yield _error(dataset, dataset.root, text, "keep 2-D pictures and 3-D volumes in data sets of their own")


def _files(dataset: Dataset, findings: Sequence[_Findings]) -> Iterator[Problem]:
    """Files that belong to no case, and the number of cases that dataset.json announces."""
    images = {path for case in dataset.cases for path in case.images}
    labels = {case.label for case in dataset.cases}
    for image_folder, label_folder in FOLDERS.items():
        for path in visible_files(dataset.root / image_folder):
            if path not in images:
                text = f"belongs to no case: it does not end in {dataset.file_ending}"
                yield Problem("", "warning", path, text, "rename it or take it out")
        for path in visible_files(dataset.root / label_folder) if label_folder else []:
            if path in labels:
                continue
            if path.name.endswith(dataset.file_ending):
                yield _error(dataset, path, f"is a label without an image in {image_folder}", "add the image")
            else:
                text = f"belongs to no case: it does not end in {dataset.file_ending}"
                yield Problem("", "warning", path, text, "rename it or take it out")
    file = dataset.root / "dataset.json"
    announced = json.loads(file.read_text(encoding="utf-8-sig")).get("numTraining")
    actual = dataset.description()["numTraining"]
    if announced is not None and announced != actual:
        text = f"numTraining is {announced}, but imagesTr holds {_count(actual, 'case')}"
        yield _error(dataset, file, text, "mend numTraining, or look for the missing cases")


def _error(dataset: Dataset, file: Path, text: str, remedy: str) -> Problem:
    return Problem("", "error", file, text, remedy)


def _warning(case: Case, file: Path, text: str, remedy: str) -> Problem:
    return Problem(case.id, "warning", file, text, remedy)


# -------------------------------------------------------------------------------------------------------- how they read


MANY = 5
"""So many cases of one finding have a line each for people; of more, one line names the first of them."""


def problems_table(problems: Sequence[Problem], root: Path) -> Table:
    """A table for a terminal, file names relative to the data set; findings of many cases have one row."""
    table = Table(title=summary(problems), title_justify="left", show_lines=False)
    for column in ("", "case", "file", "problem", "what to do"):
        table.add_column(column, overflow="fold")
    for same in _alike(problems):
        problem, cells = same[0], _words(same, root)
        colour = "red" if problem.severity == "error" else "yellow"
        table.add_row(f"[{colour}]{problem.severity}[/]", *map(escape, (*cells, problem.remedy)))
    return table


def problems_lines(problems: Sequence[Problem], root: Path) -> list[str]:
    """One plain line a problem, for pipes and logs; findings of many cases have one together."""
    lines = [f"{p[0].severity}: {': '.join(_words(p, root))} -> {p[0].remedy}" for p in _alike(problems)]
    return [*lines, summary(problems)]


def _alike(problems: Sequence[Problem]) -> list[list[Problem]]:
    """Problems by finding, in their order, more than MANY cases of one together.

    Errors may differ in how many voxels are wrong, warnings in all numbers.
    """
    groups: defaultdict[tuple, list[Problem]] = defaultdict(list)
    for p in problems:
        numbers = r"\d+ voxels?" if p.severity == "error" else r"\d[\d.]*"
        groups[p.severity, p.case == "", re.sub(numbers, "#", p.text), p.remedy].append(p)
    return [part for group in groups.values() for part in ([group] if len(group) > MANY else [[p] for p in group])]


def _words(same: Sequence[Problem], root: Path) -> tuple[str, str, str]:
    """Case, file and text of what `_alike` has put together."""
    first = same[0]
    if len(same) == 1:
        return first.case or "all", _relative(first.file, root), first.text
    files = ", ".join(_relative(problem.file, root) for problem in same[:3])
    text = first.text if all(problem.text == first.text for problem in same) else f"{first.text} (the first)"
    where = _count(len({problem.case for problem in same}), "case") if first.case else _count(len(same), "file")
    return where, f"{files} ... (--json lists all)", text


def problems_json(problems: Sequence[Problem], root: Path) -> list[dict[str, str]]:
    """JSON-able form for `--json`."""
    return [asdict(problem) | {"file": _relative(problem.file, root)} for problem in problems]


def summary(problems: Sequence[Problem]) -> str:
    """ "2 errors, 1 warning" or "no problem found"."""
    counts = Counter(problem.severity for problem in problems)
    return ", ".join(_count(counts[s], s) for s in ("error", "warning") if counts[s]) or "no problem found"


def _relative(file: Path, root: Path) -> str:
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else str(file)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _shorten(items: Sequence) -> str:
    more = f" ... ({len(items)} in all)" if len(items) > 8 else ""
    return ", ".join(map(str, items[:8])) + more


def _numbers(values: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{float(value):.3g}" for value in values)

"""DICOM series as images, with masks as files of other formats beside them.

A case is a series; its name and its patient are those of its tags. A mask belongs to the only series in its own folder
or, failing that, in the nearest folder around it that holds any; where that holds several, the mask must be called like
the series' folder, its id or its patient.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from medseg_jax.data import io
from medseg_jax.data.convert.found import Found, Layout, Mask
from medseg_jax.data.convert.options import Ambiguous, Options, count
from medseg_jax.data.convert.pairs import matches, mind_unmatched
from medseg_jax.data.convert.words import match, plain
from medseg_jax.data.dicom import Series
from medseg_jax.types import UserError


def find_series_cases(src: Path, series: Sequence[Series], files: Sequence[Path], options: Options) -> Layout:
    """Cases of a folder with DICOM series.

    Args:
        series: found in `src`.
        files: all readable files of other formats in it: masks, unless --masks says which of them.

    Raises:
        UserError: a mask belongs to no series.
        Ambiguous: there are no masks, or some series have none.
    """
    if options.images is not None:
        series = [one for one in series if matches(one.path.relative_to(src) / "x", options.images) is not None]
    if options.masks is not None:
        files = [file for file in files if matches(file.relative_to(src), options.masks) is not None]
    if not series:
        raise UserError("--images names no DICOM series", file=src, found=options.images)
    if not files and not (options.unlabelled or options.empty):
        raise Ambiguous(
            "No masks found",
            [("they are called otherwise", {"masks": "..."}), ("there are none", {"unlabelled": True})],
            file=src,
            found=count(len(series), "DICOM series").removesuffix("s") if len(series) == 1 else f"{len(series)} series",
        )
    masks: dict[Series, list[tuple[Path, str]]] = defaultdict(list)
    for file in files:
        one, ending = _owner(src, file, series)
        masks[one].append((file, plain(ending) if ending else ""))
    several = any(len(own) > 1 for own in masks.values())
    cases = []
    for one in series:
        own = tuple(Mask(file, tag if several else "") for file, tag in masks[one])
        if twice := [tag for tag, number in Counter(mask.tag for mask in own).items() if number > 1]:
            raise UserError(
                "A DICOM series has several masks of one class",
                file=one.path,
                found=", ".join(mask.path.name for mask in own if mask.tag == twice[0]),
                remedy="--masks PATTERN names the one that is meant",
            )
        cases.append(Found(one.id, (one.path,), own, bool(own), patient=plain(one.patient) if one.patient else ""))
    return Layout("DICOM series", tuple(mind_unmatched(src, cases, options)))


def _owner(src: Path, file: Path, series: Sequence[Series]) -> tuple[Series, str]:
    """The series that a mask belongs to, and what its name says beyond the series': "liver" of liver.nii.gz."""
    here = [one for one in series if file.parent in (one.path, one.path.parent) and _holds(file.parent, one)]
    around = (folder for folder in file.parents if folder == src or src in folder.parents)
    near = here or next(filter(None, ([one for one in series if folder in one.path.parents] for folder in around)), [])
    if len(near) == 1:
        return near[0], _beyond(io.stem(file), near[0])
    names = [(one, name) for one in near for name in dict.fromkeys((one.path.name, one.id, one.patient)) if name]
    known = Counter(name for _, name in names)
    names = [(one, name) for one, name in names if known[name] == 1]
    stem = io.stem(file)
    found = match([name for _, name in names], [stem], [""]) if names else None
    if found is None or not found.found or found.rule == "same last number":
        raise UserError(
            "A mask belongs to no DICOM series, or to several",
            file=file,
            found=stem,
            expected="one series in its folder, or a name such as " + ", ".join(name for _, name in names[:4]),
            remedy="--masks FOLDER or PATTERN names the files that are masks",
        )
    index, ending = found.found[0]
    return names[index][0], ending


def _holds(folder: Path, one: Series) -> bool:
    """True if the slices themselves lie in the folder."""
    return one.path == folder or (one.path.is_file() and one.path.parent == folder)


def _beyond(stem: str, one: Series) -> str:
    for name in (one.path.name, one.id, one.patient):
        if name and stem.startswith(name) and stem != name:
            return stem.removeprefix(name).strip("_-. ")
    return stem

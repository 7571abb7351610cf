"""What the values of mask files mean: 0/1, 0/255, soft edges, several values, colours; and how classes are encoded."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import NoReturn

import numpy as np
from PIL import Image
from scipy import ndimage

from medseg_jax.data import io
from medseg_jax.data.convert.found import Found, Layout
from medseg_jax.data.convert.options import Ambiguous, Options
from medseg_jax.types import Geometry, UserError

MIDDLE = 127
IGNORE = 254
"""Class number of ignored voxels until the number of classes is known."""

LOSSY = (".jpg", ".jpeg")


def read_mask(path: Path, key: str | None, options: Options) -> tuple[np.ndarray, Geometry]:
    """Raw mask: numbers [*s], or colours [h, w, 3] if its channels differ.

    A palette picture gives its index (or brightness, if its palette is inverted grey: see `io`); JPEG noise in the
    colour of a grey mask is overlooked.
    """
    if io.SUFFIXES[io.suffix(path)] != "picture":
        if options.threshold is None:
            return io.read_label(path, key)
        values, geometry = io.read_image(path, key)
        if (values != values[..., :1]).any():
            raise UserError(
                "A mask holds several channels that differ",
                file=path,
                found=f"{values.shape[-1]} channels",
                expected="one, or the same in each",
                remedy="--threshold makes one class: save class numbers instead, or each channel as a file of its own",
            )
        return values[..., 0], geometry
    with Image.open(path) as header:
        palette = header.mode == "P"
    if palette:
        return io.read_label(path)
    values, geometry = io.read_image(path)
    if values.shape[-1] == 1:
        return values[..., 0], geometry
    tolerance = 48 if io.suffix(path) in LOSSY else 0
    darkest = np.minimum(np.minimum(values[..., 0], values[..., 1]), values[..., 2])
    if int((brightest(values) - darkest).max()) > tolerance:
        return values, geometry
    return values[..., 1], geometry  # green carries most of what JPEG calls brightness


def is_coloured(mask: np.ndarray, path: Path) -> bool:
    """True for what `read_mask` gives of a coloured picture: [h, w, 3], not a volume."""
    return mask.ndim == 3 and mask.shape[-1] == 3 and io.SUFFIXES[io.suffix(path)] == "picture"


def brightest(colours: np.ndarray) -> np.ndarray:
    """[h, w, 3] -> largest channel [h, w]; several times faster than a reduction of a short axis."""
    return np.maximum(np.maximum(colours[..., 0], colours[..., 1]), colours[..., 2])


# --------------------------------------------------------------------------------------------------- what masks hold


@dataclass
class Survey:
    """What all masks of one domain and tag hold."""

    files: int = 0
    lossy: int = 0
    voxels: Counter = field(default_factory=Counter)
    first: dict[int, Path] = field(default_factory=dict)
    largest: dict[Path, int] = field(default_factory=dict)
    counted: int = 0  # files whose values are 1, 2, ..., n, one connected object each
    colours: Counter = field(default_factory=Counter)
    coloured: Path | None = None

    def add(self, path: Path, mask: np.ndarray) -> None:
        self.files += 1
        lossy = io.suffix(path) in LOSSY
        self.lossy += lossy
        if is_coloured(mask, path):
            self.coloured = self.coloured or path
            self.colours += _count_colours(mask, lossy)
            mask = brightest(mask)
        values, counts = _count_values(mask)
        self.voxels.update(dict(zip(values, counts, strict=True)))
        for value in values:
            self.first.setdefault(value, path)
        self.largest[path] = max(values)
        foreground = [value for value in values if value]
        if mask.ndim == 2 and 3 < len(foreground) < 500 and foreground == list(range(1, len(foreground) + 1)):
            self.counted += _single_objects(mask, len(foreground))

    @property
    def foreground(self) -> list[int]:
        return sorted(value for value in self.voxels if value)


def _count_values(mask: np.ndarray) -> tuple[list[int], list[int]]:
    if mask.dtype in (np.uint8, np.uint16):
        counts = np.bincount(mask.ravel())
        values = np.flatnonzero(counts)
        return values.tolist(), counts[values].tolist()
    values, counts = np.unique(mask, return_counts=True)
    return values.tolist(), counts.tolist()


def _count_colours(mask: np.ndarray, lossy: bool) -> Counter:
    """JPEG colours are taken as the pure ones they were drawn in."""
    if lossy:
        mask = np.where(mask > MIDDLE, np.uint8(255), np.uint8(0))
    wide = mask.astype(np.uint32)
    packed = wide[..., 0] << 16 | wide[..., 1] << 8 | wide[..., 2]
    values, counts = np.unique(packed, return_counts=True)
    colours = [(int(v) >> 16, int(v) >> 8 & 255, int(v) & 255) for v in values]
    return Counter(dict(zip(colours, counts.tolist(), strict=True)))


def _single_objects(mask: np.ndarray, number: int) -> bool:
    """True if most values of a mask are one connected object each: instance numbers rather than classes."""
    single = 0
    for value, box in enumerate(ndimage.find_objects(mask), start=1):
        single += box is not None and ndimage.label(mask[box] == value, np.ones((3, 3)))[1] == 1  # pyright: ignore[reportIndexIssue]
    return single >= 0.8 * number


@dataclass
class Study:
    """Surveys by (domain, tag); for each two tags, in how many voxels both are drawn."""

    surveys: dict[tuple[str, str], Survey] = field(default_factory=lambda: defaultdict(Survey))
    overlap: Counter = field(default_factory=Counter)


def study_masks(cases: Iterable[Found], layout: Layout, options: Options) -> Study:
    """Reads every mask once, one case at a time."""
    study = Study()
    key = layout.keys[1] if layout.keys else None
    for case in cases:
        drawn: dict[str, np.ndarray] = {}  # tag -> foreground [*s]
        for mask in case.masks:
            values, _ = read_mask(mask.path, key, options)
            study.surveys[case.domain, mask.tag].add(mask.path, values)
            if len({mask.tag for mask in case.masks}) > 1:
                inside = likely_foreground(brightest(values) if is_coloured(values, mask.path) else values, options)
                before = drawn.get(mask.tag)
                drawn[mask.tag] = inside | before if before is not None and before.shape == inside.shape else inside
        for one, other in combinations(sorted(drawn), 2):
            if drawn[one].shape == drawn[other].shape:
                study.overlap[one, other] += int(np.count_nonzero(drawn[one] & drawn[other]))
    study.surveys = dict(sorted(study.surveys.items(), key=lambda item: item[0]))
    return study


def likely_foreground(values: np.ndarray, options: Options) -> np.ndarray:
    threshold = options.threshold
    if threshold is None:
        threshold = values.max(initial=0) / 2 if values.max(initial=0) <= MIDDLE else MIDDLE
    return (values > threshold) ^ options.invert


# ------------------------------------------------------------------------------------------------ what a value means


@dataclass(frozen=True)
class Reading:
    """How a mask becomes class numbers.

    Attributes:
        above: binary masks: foreground (`number`) lies above this value, at or below it with `invert`.
        table: masks with values: source value -> class number.
        palette: coloured masks: class number of each colour; anything between takes the nearest colour's.
        ignored: source value that is given the class number IGNORE.
    """

    above: float | None = None
    invert: bool = False
    number: int = 1
    table: tuple[tuple[int, int], ...] = ()
    palette: tuple[tuple[tuple[int, int, int], int], ...] = ()
    ignored: int | None = None

    def apply(self, mask: np.ndarray, file: Path) -> np.ndarray:
        """Raw mask -> class numbers [*s] uint8."""
        coloured = is_coloured(mask, file)
        if self.palette:
            return self._nearest(mask if coloured else np.repeat(mask[..., None], 3, -1))
        mask = brightest(mask) if coloured else mask
        if self.above is not None:
            numbers = ((mask > self.above) ^ self.invert).astype(np.uint8) * np.uint8(self.number)
        else:
            numbers = self._look_up(mask, file)
        if self.ignored is not None:
            numbers[mask == self.ignored] = IGNORE
        return numbers

    def _look_up(self, mask: np.ndarray, file: Path) -> np.ndarray:
        table = np.full(max(int(mask.max(initial=0)), *(value for value, _ in self.table)) + 1, 255, np.uint8)
        for value, number in (*self.table, *(((self.ignored, IGNORE),) if self.ignored is not None else ())):
            table[value : value + 1] = number
        numbers = table[mask]
        if (unknown := numbers == 255).any():
            values = np.unique(mask[unknown]).tolist()
            raise UserError("The mask holds values that stand for nothing", file=file, found=values[:10])
        return numbers

    def _nearest(self, mask: np.ndarray) -> np.ndarray:
        numbers, best = np.zeros(mask.shape[:2], np.uint8), np.full(mask.shape[:2], 1 << 30, np.int32)
        for colour, number in self.palette:
            distance = np.zeros(mask.shape[:2], np.int32)
            for channel in range(3):
                distance += np.abs(mask[..., channel].astype(np.int32) - colour[channel])
            closer = distance < best
            numbers[closer], best[closer] = number, distance[closer]
        return numbers


def is_binary(survey: Survey) -> bool:
    """One foreground value, or soft edges: too many levels to be classes, or JPEG with few voxels in between.

    A few levels of lossless masks may always be classes (of which 255 may be a void), however rare they are.
    """
    values = survey.foreground
    if len(values) <= 1:
        return True
    if values[-1] <= MIDDLE:
        return False
    return len(values) > 8 or (survey.lossy > 0 and _between(survey) < 0.02)


def few_levels(survey: Survey) -> bool:
    """True if values up to 255 may be classes, soft edges, or a void beside classes: nothing in the files tells."""
    values = survey.foreground
    return not survey.lossy and not survey.coloured and 1 < len(values) <= 8 and values[-1] > MIDDLE


def ask_levels(survey: Survey, classes: bool = True) -> NoReturn:
    """Asks what a few levels mean; `classes`: if each may be a class of its own."""
    values = survey.foreground
    choices: list[tuple[str, dict[str, object]]] = [
        ("soft edges, or the share of experts who agree", {"threshold": MIDDLE}),
        ("all above 0 is one class", {"threshold": 0}),
    ]
    if classes:
        choices.append(("classes", {"classes": ",".join(f"NAME={value}" for value in values)}))
    if values[-1] == 255:
        choices.append(("255 is a void: nothing is known there", {"ignore": 255}))
    raise Ambiguous(
        "These masks hold a few grey levels: classes, or soft edges of one?",
        choices,
        file=survey.first[values[0]],
        found=", ".join(map(str, values)),
    )


def _between(survey: Survey) -> float:
    """Share of grey voxels (a tenth to nine tenths of the largest value) among all that are not background."""
    top = survey.foreground[-1]
    inside = sum(count for value, count in survey.voxels.items() if value > 0.1 * top)
    grey = sum(count for value, count in survey.voxels.items() if 0.1 * top < value < 0.9 * top)
    return grey / inside


def numbered_objects(survey: Survey) -> bool:
    """True if the values look like instance numbers: contiguous, connected, and of very different number by file."""
    largest = sorted(survey.largest.values())
    return survey.counted > 0 and survey.counted * 2 >= survey.files and largest[-1] > 1.5 * max(1, largest[0])


def threshold_of(survey: Survey, options: Options) -> tuple[float, str]:
    """Threshold of a binary mask, and what to say about it."""
    values = survey.foreground
    top = values[-1] if values else 255
    if options.threshold is not None:
        return options.threshold, f"above {options.threshold:g}"
    if len(values) <= 1:
        return top / 2, f"0/{top}"
    if top <= MIDDLE:
        raise UserError(
            "A mask of one class holds several values",
            file=survey.first[values[-1]],
            found=values[:10],
            expected="0/1 or 0/255",
            remedy="--threshold 0 (all above 0 is foreground)",
        )
    if few_levels(survey) and values[0] <= 8:  # class numbers; the steps of experts who agree are larger
        ask_levels(survey, classes=False)
    _refuse_mixture(survey)
    grey = sum(count for value, count in survey.voxels.items() if 32 < value < 224) / sum(survey.voxels.values())
    if grey > 0.5 and len(values) > 8:
        raise UserError(
            "These masks look like ordinary images",
            file=survey.first[values[-1]],
            found=f"{len(values)} grey values, {grey:.0%} of the pixels between black and white",
            remedy="--masks SUBFOLDER names the right folder; --threshold 127 if they are meant",
        )
    why = "JPEG ringing" if survey.lossy else f"{len(values) + 1} levels" if len(values) <= 8 else "soft edges"
    return MIDDLE, f"{why}: {_between(survey):.1%} of the drawn pixels are grey; above {MIDDLE} is foreground"


def _refuse_mixture(survey: Survey) -> None:
    """0/1 (or 0/2 ...) and 0/255 in one folder: the small numbers may be foreground or noise."""
    dark = [path for path, top in survey.largest.items() if 0 < top <= MIDDLE and io.suffix(path) not in LOSSY]
    if dark:
        raise Ambiguous(
            "Some masks of a folder hold small numbers such as 0/1 and others 0/255",
            [("all above 0 is foreground", {"threshold": 0}), ("small numbers are noise", {"threshold": MIDDLE})],
            file=dark[0],
            found=f"{len(dark)} of {survey.files} masks with no value above {MIDDLE}",
        )


def union(surveys: Sequence[Survey]) -> Survey:
    """All surveys as one."""
    total = Survey()
    for survey in surveys:
        total.files += survey.files
        total.lossy += survey.lossy
        total.counted += survey.counted
        total.voxels += survey.voxels
        total.colours += survey.colours
        total.coloured = total.coloured or survey.coloured
        total.largest |= survey.largest
        total.first = survey.first | total.first
    return total

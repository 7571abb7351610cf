"""Prediction of files and folders: runs and new images in, label maps in the space of those images out.

    files --read--> [*s, c] --preprocess--> [d, h, w, c] --network, slab by slab--> probabilities
          --resample each slab back, average over members, decode--> labels [d, h, w]
          --inverse orientation--> --post-processing--> --original header--> file

Probabilities are decoded as soon as a slab is finished, also when they must be resampled to the image's own grid first;
a volume of all probabilities is held only if it is asked for, and then in a temporary file instead of in memory.

    OUT/<case><ending>             label maps; NIfTI and arrays end as the input does, pictures are PNG, DICOM is NIfTI
    OUT/<case>.dcm                 on request, of DICOM series: DICOM-SEG that refers to the series (dicom_seg.py)
    OUT/probabilities/<case>.npz   on request: probabilities [*s, k] float16, classes [k]; and one image per class
    OUT/merged/<case>.png          of runs that were trained class by class: one class a pixel (merge.py)
    OUT/uncertainty/               on request: <case>_entropy<ending> and others (uncertainty.py); <case>.npz
    OUT/dataset.json               the run's, so that `medseg evaluate OUT REFERENCE` knows the classes
    OUT/predict.json               weights (sha256), settings, finished cases; an interrupted prediction goes on from it
"""

import math
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medseg_jax.data import io
from medseg_jax.data.cache import Preprocessed, preprocess
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.geometry import from_canonical
from medseg_jax.inference import dicom_seg, merge, postprocess, tta, uncertainty
from medseg_jax.inference.cases import find_cases, load_case
from medseg_jax.inference.ensemble import bounding_box, in_frame, in_lockstep, mean, member_slabs
from medseg_jax.inference.journal import Journal, lock
from medseg_jax.inference.memory import case_bound
from medseg_jax.inference.postprocess import Cleaning
from medseg_jax.inference.sliding_window import plan_windows, slab_axis
from medseg_jax.paths import replacing, write
from medseg_jax.runtime.run import Run, open_runs
from medseg_jax.types import Case, Geometry, UserError


class CasesFailed(UserError):
    """Some cases could not be predicted; all others were.

    Attributes:
        written: label maps of the cases that are done.
        failed: case id -> what was wrong with it.
    """

    def __init__(self, written: Sequence[Path], failed: Mapping[str, str], output: Path):
        self.written, self.failed = list(written), dict(failed)
        details = "\n".join(f"- {id}: {text}".replace("\n", "\n  ") for id, text in failed.items())
        super().__init__(
            f"{len(failed)} of {len(written) + len(failed)} cases could not be predicted\n{details}",
            file=output,
            remedy="mend these files and start the same command again: finished cases are not repeated",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Many cases
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How to predict; see `predict`."""

    tta: tuple[str, ...] = ()
    overlap: float = 0.5
    batch_size: int | None = None
    probabilities: bool = False
    uncertainty: bool = False
    dicom_seg: bool = False
    cleaning: Mapping[str, Cleaning] = field(default_factory=dict)

    @property
    def extras(self) -> list[str]:
        """Folders beside the label maps that are written to."""
        return [name for name in ("probabilities", "uncertainty") if getattr(self, name)]

    def members(self, runs: Sequence[Run]) -> int:
        """How many predictions are told apart for the uncertainty."""
        return sum(len(tta.views(self.tta, run.plan.dim)) * len(tta.scales(self.tta)) for run in runs)


def predict(
    runs: Run | str | Path | Sequence[Run | str | Path],
    input: str | Path | Dataset,
    output: str | Path,
    *,
    checkpoint: Literal["best", "last"] = "best",
    tta: bool | Sequence[str] = False,
    overlap: float = 0.5,
    batch_size: int | None = None,
    split: str | None = None,
    save_probabilities: bool = False,
    save_uncertainty: bool = False,
    save_dicom_seg: bool = False,
    postprocessing: Literal["chosen", "none"] = "chosen",
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Predicts every case of `input`. Started again, it goes on with the cases that are missing.

    Args:
        runs: a run's folder or an opened run; or several, whose probabilities are averaged in the image's own grid. A
            cross-validated run stands for all its folds. They must agree on channels and classes; plans may differ.
        input: one image; a folder of images (<case>_0000.nii.gz, <case>_0001.nii.gz ... one file per channel, or plain
            pictures); a DICOM series or a folder of them; or a data set, opened or its folder. Never written to.
        output: folder for the predictions; created if missing.
        checkpoint: "best" on validation, or "last"; opened runs keep theirs.
        tta: test-time augmentation, some of "flips", "rot90", "scale" (see inference/tta.py); True means flips.
        overlap: least share of a window that its neighbour covers too, in [0, 1).
        batch_size: windows at once; default the plan's batch size.
        split: "train", "val" or "test" of a data set; default all its cases.
        save_probabilities: also write the probabilities; runs that were trained class by class always do.
        save_uncertainty: also write maps of entropy and, where several predictions are averaged, of their variance and
            mutual information. It holds a slab for each of them, instead of one for all augmented views.
        save_dicom_seg: also write each label map as DICOM-SEG; all cases must be DICOM series.
        postprocessing: "chosen": as the run chose on its validation cases; "none".
        overwrite: predict every case anew, also where `output` was made by another run or with other settings; earlier
            predictions are removed first.
        progress: tell on stderr how far it is.

    Returns:
        The label maps of all cases, sorted by case, those from an earlier start included.

    Raises:
        UserError: nothing to predict, runs that do not belong together, or `output` holds something else than earlier
            predictions of the same kind.
        CasesFailed: some cases are broken; raised after all others are done.
    """
    output = Path(output)
    given = list(runs) if isinstance(runs, Sequence) and not isinstance(runs, str) else [runs]
    opened = open_runs(given, checkpoint)
    folders = [Path(run) if isinstance(run, str | Path) else run.path for run in given]
    settings = Settings(
        ("flips",) if tta is True else tuple(tta or ()),
        overlap,
        batch_size,
        save_probabilities,
        save_uncertainty,
        save_dicom_seg,
        postprocess.load(folders, opened[0].checkpoint) if postprocessing == "chosen" else {},
    )
    if thresholds := common_thresholds(opened):
        opened[0] = replace(opened[0], thresholds=thresholds)
        settings = replace(settings, probabilities=True)
    _check_settings(settings, opened)
    cases = find_cases(input, opened[0].channels, split)
    _refuse_output_among_inputs(cases, output)
    described = (opened[0].members or opened)[0].path / "dataset.json"
    _refuse_output_in_dataset(output, described)
    if settings.dicom_seg:
        dicom_seg.require_dicom(cases)
    written: list[Path] = []
    failed: dict[str, str] = {}
    with lock(output), Display(len(cases), progress) as display:
        journal = Journal.open(output, opened, _that_matter(settings, opened[0]), overwrite)
        if described.is_file():
            write(output / "dataset.json", described.read_bytes())
        for case in cases:
            try:
                label = journal.find(case, [*settings.extras, *([f"{case.id}.dcm"] if settings.dicom_seg else [])])
                label = label or _predict_case(opened, case, output, settings, journal, display)
                written.append(label)
            except Exception as error:  # one broken case must not cost the others
                failed[case.id] = str(error) if isinstance(error, UserError) else traceback.format_exc().strip()
                display.say(f"{case.id}: failed, {str(error).partition(chr(10))[0] or type(error).__name__}")
            display.next_case()
    if failed:
        raise CasesFailed(written, failed, output)
    return written


def _check_settings(settings: Settings, runs: Sequence[Run]) -> None:
    if settings.batch_size is not None and settings.batch_size < 1:
        raise UserError("A batch needs at least one window", found=settings.batch_size, expected="1 or more")
    plan_windows((1,), (1,), settings.overlap)
    for run in runs:
        tta.check(settings.tta, run.plan.patch_size, run.plan.spacing or (None,) * 3)


def _that_matter(settings: Settings, run: Run) -> dict[str, Any]:
    """Settings that change the numbers, for the journal."""
    augmented = bool(settings.tta) if settings.tta in ((), ("flips",)) else sorted(settings.tta)
    cleaning = {"postprocessing": postprocess.to_json(settings.cleaning)} if settings.cleaning else {}
    chosen = {"thresholds": list(run.thresholds)} if run.thresholds else {}
    return {"tta": augmented, "overlap": settings.overlap, **cleaning, **chosen}


def common_thresholds(runs: Sequence[Run]) -> tuple[float, ...] | None:
    """The mean of the runs' thresholds (0.5 where one has none), as their probabilities are averaged; None for none."""
    if not any(run.thresholds for run in runs):
        return None
    each = [run.thresholds or (0.5,) * len(run.labels.names) for run in runs]
    return tuple(float(value) for value in np.mean(each, 0))


def _refuse_output_among_inputs(cases: Iterable[Case], output: Path) -> None:
    images = [path for case in cases for path in case.images]
    folders = {(path if path.is_dir() else path.parent).resolve() for path in images}
    if output.resolve() in folders:
        raise UserError(
            "Predictions would lie among the images, and replace those of the same name",
            file=output,
            remedy="choose another folder for the output",
        )


def _refuse_output_in_dataset(output: Path, described: Path) -> None:
    """A data set keeps its dataset.json, which holds its labels, splits and patients: the run's would replace it."""
    theirs = output / "dataset.json"
    folders = [name for name in ("imagesTr", "imagesTs", "labelsTr") if (output / name).is_dir()]
    foreign = theirs.is_file() and not (output / "predict.json").is_file() and described.is_file()
    if folders or (foreign and theirs.read_bytes() != described.read_bytes()):
        raise UserError(
            "Predictions would lie in a data set, and replace its dataset.json",
            file=output,
            found=", ".join([*folders, *(["dataset.json"] if theirs.is_file() else [])]),
            expected="a new folder, or one with earlier predictions",
            remedy="choose another folder for the output",
        )


# ---------------------------------------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------------------------------------


def _predict_case(
    runs: Sequence[Run], case: Case, output: Path, settings: Settings, journal: Journal, display: "Display"
) -> Path:
    """Reads, predicts and writes one case; returns its label map."""
    started = time.perf_counter()
    labels = runs[0].labels
    image, geometry = load_case(case, runs[0].channels)
    display.tell_memory(case.id, image, geometry, runs, settings)
    inputs = [(run, preprocess(image, None, geometry, run.plan, case.images)) for run in runs]
    del image
    for run, prepared in inputs:
        _refuse_turns(run, prepared, geometry, settings)
    shape = inputs[0][1].record.canonical_shape
    kept = _scratch(output, np.float16, (*shape, labels.channels)) if settings.probabilities else None
    names = uncertainty.names(settings.members(runs)) if settings.uncertainty else ()
    maps = {name: _scratch(output, np.float32, shape) for name in names}
    label = segment(inputs, geometry, settings, kept, maps, display.rows)
    del inputs
    label = postprocess.clean(label, labels, settings.cleaning, geometry.spacing)
    target = output / f"{case.id}{_ending(case.images[0], geometry)}"
    files = [target]
    if kept is not None:
        files += _write_probabilities(runs[0], kept, geometry, target)
        if runs[0].thresholds and len(geometry.shape) == 2:
            one = merge.one_map(from_canonical(kept, geometry), runs[0].thresholds)
            files += merge.write(output / "merged", case.id, one, labels.names)
    if maps:
        files += _write_maps(maps, geometry, target)
    if settings.dicom_seg:
        files.append(output / f"{case.id}.dcm")
        dicom_seg.write(files[-1], label, labels, case.images[0])
    io.write_label(target, label, geometry)
    seconds = time.perf_counter() - started
    journal.add(case, [p.relative_to(output) for p in files], label.shape, seconds)
    display.say(f"{case.id}: {_by(label.shape)}, {seconds:.1f} s")
    return target


def _refuse_turns(run: Run, prepared: Preprocessed, geometry: Geometry, settings: Settings) -> None:
    """Quarter turns of a volume whose plan leaves the spacing as it is; the pixels of pictures count as square."""
    if len(geometry.shape) == 3 and geometry.unit == "mm":
        planned = run.plan.spacing or (None,) * 3
        spacing = [s if s is not None else own for s, own in zip(planned, prepared.record.spacing, strict=True)]
        tta.check(settings.tta, run.plan.patch_size, spacing)


def segment(
    inputs: Sequence[tuple[Run, Preprocessed]],
    geometry: Geometry,
    settings: Settings,
    keep: np.ndarray | None = None,
    maps: Mapping[str, np.ndarray] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """A preprocessed image to a label map in the space of its file, without ever holding all its probabilities.

    Args:
        inputs: each run with what its plan's `preprocess` (or the cache) made of the image.
        geometry: of the file.
        keep: [*canonical_shape, k], filled with the probabilities; outside the crop with those of background.
        maps: name -> [*canonical_shape], filled with these maps of uncertainty (see uncertainty.py).
        progress: told (finished rows, all rows) after every slab.

    Returns:
        Label map [*s]; 0 outside the crop.
    """
    labels, thresholds = inputs[0][0].labels, inputs[0][0].thresholds
    frame = bounding_box([prepared.record.crop for _, prepared in inputs])
    place = tuple(slice(low, high) for low, high in frame)
    axis = min(slab_axis(prepared.image.shape, run.plan.patch_size) for run, prepared in inputs)
    outside = np.eye(labels.channels, dtype=np.float32)[0] * labels.exclusive  # background, or nothing at all
    members = [
        in_frame(slabs, prepared.record.crop, frame, axis, outside)
        for run, prepared in inputs
        for slabs in member_slabs(
            run,
            prepared,
            settings.tta,
            settings.overlap,
            settings.batch_size or run.plan.batch_size,
            axis,
            apart=bool(maps),
        )
    ]
    label = np.zeros(inputs[0][1].record.canonical_shape, labels.decode(outside[None]).dtype)
    if keep is not None:
        keep[...] = outside
    for start, parts in in_lockstep(members, axis):
        probabilities = mean(parts)
        end = start + probabilities.shape[axis]
        rows = (slice(None),) * axis + (slice(start, end),)
        label[place][rows] = labels.decode(probabilities, thresholds)
        if keep is not None:
            keep[place][rows] = probabilities
        if maps:
            for name, values in uncertainty.maps(parts, probabilities, labels.exclusive).items():
                maps[name][place][rows] = values
        if progress is not None:
            progress(end, label[place].shape[axis])
    return from_canonical(label, geometry)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _scratch(folder: Path, dtype: type, shape: Sequence[int]) -> np.ndarray:
    """An array of zeros in a nameless file: the system removes it with its last user, however that one ends."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, dtype, "w+", shape=tuple(shape))


def _ending(image: Path, geometry: Geometry) -> str:
    """Suffix of the label map that belongs to an image."""
    ending = ".nii.gz" if io.kind(image) == "dicom" else io.suffix(image)
    if io.SUFFIXES[ending] != "picture":
        return io.DETACHED.get(ending, ending)
    return ".png" if len(geometry.shape) == 2 else ".tif"


def _write_probabilities(run: Run, kept: np.ndarray, geometry: Geometry, label: Path) -> list[Path]:
    """One array with all classes, and an image of each class to look at: 0 ... 1, or 0 ... 255 in a PNG."""
    probabilities = from_canonical(kept, geometry)  # [*s, k]
    classes = [*(["background"] if run.labels.exclusive else []), *run.labels.names]
    files = [label.parent / "probabilities" / f"{io.stem(label)}.npz"]
    _write_npz(files[0], probabilities=probabilities, classes=classes, affine=geometry.affine)
    for name, index in zip(run.labels.names, range(len(classes) - len(run.labels.names), len(classes)), strict=True):
        files.append(files[0].with_name(f"{io.stem(label)}_{re.sub(r'[^\w.-]', '_', name)}{io.suffix(label)}"))
        write_map(files[-1], probabilities[..., index], geometry)
    return files


def _write_maps(maps: Mapping[str, np.ndarray], geometry: Geometry, label: Path) -> list[Path]:
    """An image of each map; and one array file of all, where the image is a PNG of 256 greys."""
    folder, found = label.parent / "uncertainty", {name: from_canonical(m, geometry) for name, m in maps.items()}
    files = [folder / f"{io.stem(label)}_{name}{io.suffix(label)}" for name in found]
    for path, (name, values) in zip(files, found.items(), strict=True):
        write_map(path, values, geometry, uncertainty.LARGEST[name])
    if io.suffix(label) == ".png":
        files.append(folder / f"{io.stem(label)}.npz")
        _write_npz(files[-1], **found, affine=geometry.affine)
    return files


def write_map(path: Path, values: np.ndarray, geometry: Geometry, largest: float = 1.0) -> None:
    """A map [*s] of numbers from 0 to `largest`, float32; in a PNG from black to white."""
    values = values[..., None]  # [*s, 1]
    png = io.suffix(path) == ".png"
    values = np.rint(255 / largest * values.astype(np.float32)).astype(np.uint8) if png else values
    io.write_image(path, values, geometry)


def _write_npz(path: Path, **arrays: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as draft:
        np.savez_compressed(draft, **arrays)


# ---------------------------------------------------------------------------------------------------------------------
# Telling how far it is
# ---------------------------------------------------------------------------------------------------------------------


class Display:
    """Two bars on a terminal, one line a case elsewhere; both on stderr.

    Args:
        cases: how many there are.
        shown: False for silence.
    """

    def __init__(self, cases: int, shown: bool):
        terminal = sys.stderr.isatty()  # not so in a notebook, which gets plain lines
        console = Console(stderr=True, quiet=not shown, force_terminal=terminal, force_jupyter=False)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True)
        self._cases = self._bars.add_task("cases", total=cases)
        self._rows = self._bars.add_task("rows", total=None)
        self._number, self._total, self._largest = 1, cases, 0

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._bars.disable:  # else it would end with an empty line
            self._bars.stop()

    def say(self, text: str) -> None:
        """One line on the case at hand."""
        self._bars.console.print(
            f"[{self._number}/{self._total}] {text}", markup=False, highlight=False, soft_wrap=True
        )

    def tell_memory(
        self, id: str, image: np.ndarray, geometry: Geometry, runs: Sequence[Run], settings: Settings
    ) -> None:
        """Tells how much memory a case will take, if it is more than any before it took."""
        bound = math.ceil(case_bound(image, geometry, runs, settings) / 2**20)  # MiB
        if bound > self._largest:
            self._largest = bound
            size, several = _by(image.shape[:-1]), len(runs) * len(tta.scales(settings.tta))
            views = " and ".join(sorted({str(len(tta.views(settings.tta, run.plan.dim))) for run in runs}))
            work = f", {several} predictions of {views} views each" if settings.tta or several > 1 else ""
            self.say(f"{id}: {size}{work}; takes at most {bound} MiB of host memory")

    def rows(self, done: int, total: int) -> None:
        """Progress within the case."""
        self._bars.update(self._rows, completed=done, total=total)

    def next_case(self) -> None:
        """A case is over."""
        self._bars.advance(self._cases)
        self._number += 1


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))

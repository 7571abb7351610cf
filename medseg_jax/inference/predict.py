"""Prediction of files and folders: a run and new images in, label maps in the space of those images out.

    files --read--> [*s, c] --preprocess--> [d, h, w, c] --network, slab by slab--> probabilities
          --resample each slab back, decode it--> labels [d, h, w] --inverse orientation, original header--> file

Probabilities are decoded as soon as a slab is finished, also when they must be resampled to the image's own grid first;
a volume of all probabilities is held only if it is asked for, and then in a temporary file instead of in memory.

    OUT/<case><ending>             label maps; NIfTI and arrays end as the input does, pictures are PNG
    OUT/probabilities/<case>.npz   on request: probabilities [*s, k] float16, classes [k]; and one image per class
    OUT/dataset.json               the run's, so that `medseg evaluate OUT REFERENCE` knows the classes
    OUT/predict.json               weights (sha256), settings, finished cases; an interrupted prediction goes on from it
"""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medseg_jax.data import io
from medseg_jax.data.cache import Record, preprocess
from medseg_jax.data.geometry import from_canonical, resample
from medseg_jax.inference.cases import find_cases, load_case
from medseg_jax.inference.sliding_window import memory_bound, plan_windows, predict_slabs, slab_axis, windows_at_once
from medseg_jax.runtime.run import Run, open_run
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

    tta: bool = False
    overlap: float = 0.5
    batch_size: int = 1
    save_probabilities: bool = False


def predict(
    run: Run | str | Path,
    input: str | Path,
    output: str | Path,
    *,
    checkpoint: Literal["best", "last"] = "best",
    tta: bool = False,
    overlap: float = 0.5,
    batch_size: int | None = None,
    split: str | None = None,
    save_probabilities: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> list[Path]:
    """Predicts every case of `input`. Started again, it goes on with the cases that are missing.

    Args:
        run: a run's folder, or an opened run (then `checkpoint` has no say).
        input: one image; a folder of images (<case>_0000.nii.gz, <case>_0001.nii.gz ... one file per channel, or plain
            pictures); or a data set folder. Never written to.
        output: folder for the predictions; created if missing.
        checkpoint: "best" on validation, or "last".
        tta: average over all mirror images (4 or 8 times the work).
        overlap: least share of a window that its neighbour covers too, in [0, 1).
        batch_size: windows at once; default the plan's batch size.
        split: "train", "val" or "test" of a data set folder; default all its cases.
        save_probabilities: also write the probabilities.
        overwrite: predict every case anew, also where `output` was made by another run or with other settings; what
            that run left there is removed.
        progress: tell on stderr how far it is.

    Returns:
        The label maps of all cases, sorted by case, those from an earlier start included.

    Raises:
        UserError: nothing to predict, or `output` holds something else than earlier predictions of the same kind.
        CasesFailed: some cases are broken; raised after all others are done.
    """
    input, output = Path(input), Path(output)
    run = open_run(run, checkpoint) if isinstance(run, str | Path) else run
    settings = Settings(tta, overlap, run.plan.batch_size if batch_size is None else batch_size, save_probabilities)
    _check_settings(settings)
    cases = find_cases(input, run.channels, split)
    _refuse_output_among_inputs(cases, output)
    journal = Journal.open(output, run, settings, overwrite)
    if (run.path / "dataset.json").is_file():
        shutil.copyfile(run.path / "dataset.json", output / "dataset.json")
    written: list[Path] = []
    failed: dict[str, str] = {}
    with Display(len(cases), progress) as display:
        for case in cases:
            try:
                label = journal.find(case, save_probabilities)
                label = label or _predict_case(run, case, output, settings, journal, display)
                written.append(label)
            except Exception as error:  # one broken case must not cost the others
                failed[case.id] = str(error) if isinstance(error, UserError) else traceback.format_exc().strip()
                display.say(f"{case.id}: failed, {str(error).partition(chr(10))[0] or type(error).__name__}")
            display.next_case()
    if failed:
        raise CasesFailed(written, failed, output)
    return written


def _check_settings(settings: Settings) -> None:
    if settings.batch_size < 1:
        raise UserError("A batch needs at least one window", found=settings.batch_size, expected="1 or more")
    plan_windows((1,), (1,), settings.overlap)


def _refuse_output_among_inputs(cases: Iterable[Case], output: Path) -> None:
    folders = {path.parent.resolve() for case in cases for path in case.images}
    if output.resolve() in folders:
        raise UserError(
            "Predictions would lie among the images, and replace those of the same name",
            file=output,
            remedy="choose another folder for the output",
        )


# ---------------------------------------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------------------------------------


def _predict_case(
    run: Run, case: Case, output: Path, settings: Settings, journal: "Journal", display: "Display"
) -> Path:
    """Reads, predicts and writes one case; returns its label map."""
    started = time.perf_counter()
    image, geometry = load_case(case, run.channels)
    prepared = preprocess(image, None, geometry, run.plan, case.images)
    del image
    display.start_case(case.id, prepared.image.shape, run, settings)
    kept = None
    if settings.save_probabilities:
        kept = _scratch(output, (*prepared.record.canonical_shape, run.labels.channels))
    label = segment(run, prepared.image, prepared.record, geometry, settings, kept, display.rows)
    target = output / f"{case.id}{_ending(case.images[0], geometry)}"
    files = [target]
    if kept is not None:
        files += _write_probabilities(run, kept, geometry, target)
    io.write_label(target, label, geometry)
    seconds = time.perf_counter() - started
    journal.add(case, [p.relative_to(output) for p in files], label.shape, seconds)
    display.say(f"{case.id}: {_by(label.shape)}, {seconds:.1f} s")
    return target


def segment(
    run: Run,
    image: np.ndarray,
    record: Record,
    geometry: Geometry,
    settings: Settings,
    keep: np.ndarray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """A preprocessed image to a label map in the space of its file, without ever holding all its probabilities.

    Args:
        image: [d, h, w, c] float32, what `preprocess` (or the cache) gives, with its `record`.
        geometry: of the file.
        keep: [*record.canonical_shape, k], filled with the probabilities; outside the crop with those of background.
        progress: told (finished rows, all rows) after every slab.

    Returns:
        Label map [*s]; 0 outside the crop.
    """
    axis = slab_axis(image.shape, run.plan.patch_size)
    slabs = predict_slabs(
        run.predict,
        image,
        run.plan.patch_size,
        run.labels.channels,
        settings.overlap,
        settings.batch_size,
        settings.tta,
        axis,
    )
    empty = np.zeros((1, run.labels.channels), np.float32)
    label = np.zeros(record.canonical_shape, run.labels.decode(empty).dtype)
    if keep is not None and run.labels.exclusive:
        keep[..., 0] = 1
    for start, probabilities in resample_slabs(
        slabs, record.resampled_shape, record.crop_shape, axis, record.coarse_axis
    ):
        end = start + probabilities.shape[axis]
        rows = (slice(None),) * axis + (slice(start, end),)
        label[record.slices][rows] = run.labels.decode(probabilities)
        if keep is not None:
            keep[record.slices][rows] = probabilities
        if progress is not None:
            progress(end, record.crop_shape[axis])
    return from_canonical(label, geometry)


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


def _scratch(folder: Path, shape: Sequence[int]) -> np.ndarray:
    """A float16 array in a nameless file: the system removes it with its last user, however that one ends."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return np.memmap(file, np.float16, "w+", shape=tuple(shape))


def _ending(image: Path, geometry: Geometry) -> str:
    """Suffix of the label map that belongs to an image."""
    ending = io.suffix(image)
    if io.SUFFIXES[ending] != "picture":
        return io.DETACHED.get(ending, ending)
    return ".png" if len(geometry.shape) == 2 else ".tif"


def _write_probabilities(run: Run, kept: np.ndarray, geometry: Geometry, label: Path) -> list[Path]:
    """One array with all classes, and an image of each class to look at: 0 ... 1, or 0 ... 255 in a PNG."""
    folder = label.parent / "probabilities"
    folder.mkdir(exist_ok=True)
    probabilities = from_canonical(kept, geometry)  # [*s, k]
    classes = [*(["background"] if run.labels.exclusive else []), *run.labels.names]
    files = [folder / f"{io.stem(label)}.npz"]
    draft = folder / f".{files[0].name}"
    np.savez_compressed(draft, probabilities=probabilities, classes=classes, affine=geometry.affine)
    os.replace(draft, files[0])
    for name, index in zip(run.labels.names, range(len(classes) - len(run.labels.names), len(classes)), strict=True):
        one = probabilities[..., index : index + 1].astype(np.float32)  # [*s, 1]
        one = np.rint(255 * one).astype(np.uint8) if io.suffix(label) == ".png" else one
        files.append(folder / f"{io.stem(label)}_{re.sub(r'[^\w.-]', '_', name)}{io.suffix(label)}")
        io.write_image(files[-1], one, geometry)
    return files


# ---------------------------------------------------------------------------------------------------------------------
# What is done already
# ---------------------------------------------------------------------------------------------------------------------


class Journal:
    """OUT/predict.json: what made these predictions, and which cases are finished. Rewritten atomically after each."""

    def __init__(self, folder: Path, content: dict[str, Any]):
        self.folder, self.content = folder, content

    @classmethod
    def open(cls, folder: Path, run: Run, settings: Settings, overwrite: bool) -> "Journal":
        """Starts or continues the predictions of a folder.

        Raises:
            UserError: it holds predictions with other weights or settings, or files of unknown origin.
        """
        made_by = {
            "weights": weights_sha256(run),
            "plan": hashlib.sha256(repr(dataclasses.replace(run.plan, reasons={})).encode()).hexdigest(),
            "tta": settings.tta,
            "overlap": settings.overlap,
        }
        about = {
            "run": str(run.path),
            "checkpoint": run.checkpoint,
            "step": run.step,
            "batch_size": settings.batch_size,
        }
        folder.mkdir(parents=True, exist_ok=True)
        earlier = _read_journal(folder / "predict.json")
        if earlier is None and not overwrite and (found := io.list_files(folder)):
            raise UserError(
                "The output folder holds images that `medseg predict` did not write",
                file=folder,
                found=", ".join(p.name for p in found[:5]),
                remedy="choose an empty folder, or --overwrite",
            )
        finished = earlier["cases"] if earlier else {}
        if earlier and earlier["made_by"] != made_by:
            changed = [f"{k}: {earlier['made_by'].get(k)}, now {v}" for k, v in made_by.items()]
            changed = [
                text for text, (k, v) in zip(changed, made_by.items(), strict=True) if earlier["made_by"].get(k) != v
            ]
            if finished and not overwrite:
                raise UserError(
                    "The output folder holds predictions of another run or with other settings",
                    file=folder / "predict.json",
                    found="; ".join(changed),
                    remedy="choose another folder, or --overwrite",
                )
            for entry in finished.values():
                for name in entry["outputs"]:
                    (folder / name).unlink(missing_ok=True)
            finished = {}
        journal = cls(folder, {**about, "made_by": made_by, "cases": {} if overwrite else finished})
        journal.save()
        return journal

    def find(self, case: Case, probabilities: bool) -> Path | None:
        """The label map of a case that is finished: same input files, all outputs there."""
        entry = self.content["cases"].get(case.id)
        if entry is None or entry["inputs"] != _stamps(case) or (probabilities and len(entry["outputs"]) == 1):
            return None
        outputs = [self.folder / name for name in entry["outputs"]]
        return outputs[0] if all(path.is_file() for path in outputs) else None

    def add(self, case: Case, outputs: Sequence[Path], shape: Sequence[int], seconds: float) -> None:
        """Notes that a case is finished; `outputs` are relative to the folder, the label map first."""
        self.content["cases"][case.id] = {
            "inputs": _stamps(case),
            "outputs": [path.as_posix() for path in outputs],
            "shape": list(shape),
            "seconds": round(seconds, 3),
        }
        self.save()

    def save(self) -> None:
        """Writes predict.json, whole or not at all."""
        draft = self.folder / ".predict.json"
        draft.write_text(json.dumps(self.content, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(draft, self.folder / "predict.json")


def _read_journal(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content["cases"], dict) and isinstance(content["made_by"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stamps(case: Case) -> dict[str, list[int]]:
    """Size and time of last change of a case's files: enough to notice that they were replaced."""
    stats = {path.name: path.stat() for path in case.images}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def weights_sha256(run: Run) -> str | None:
    """Hash of the checkpoint's manifest, which holds the hashes of all its files; None without checkpoints."""
    manifests = run.path.glob(f"checkpoints/*/{run.checkpoint}/{run.step}.sha256.json")
    newest = sorted(manifests, key=lambda path: int(path.parts[-3].partition("_")[0]))[-1:]
    return json.loads(newest[0].read_text())["self"] if newest else None


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
        console = Console(stderr=True, quiet=not shown)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bars = Progress(*columns, console=console, disable=not (shown and console.is_terminal), transient=True)
        self._cases = self._bars.add_task("cases", total=cases)
        self._rows = self._bars.add_task("rows", total=None)
        self._number, self._total, self._largest = 1, cases, 0

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def say(self, text: str) -> None:
        """One line on the case at hand."""
        self._bars.console.print(
            f"[{self._number}/{self._total}] {text}", markup=False, highlight=False, soft_wrap=True
        )

    def start_case(self, id: str, shape: Sequence[int], run: Run, settings: Settings) -> None:
        """Tells how much memory a case will take, if it is more than any before it took."""
        patch = run.plan.patch_size
        starts = plan_windows(shape[:-1], (1, *patch)[-3:], settings.overlap)
        windows = math.prod(len(s) for s in starts)
        batch, axis = windows_at_once(windows, settings.batch_size), slab_axis(shape[:-1], patch)
        bound = memory_bound(shape[:-1], patch, shape[-1], run.labels.channels, batch, axis)
        if bound > self._largest:
            self._largest = bound
            size = f"{_by(shape[:-1])} after preprocessing, {windows} windows of {_by(patch)}"
            self.say(f"{id}: {size}; image and slabs take at most {math.ceil(bound / 2**20)} MiB of host memory")

    def rows(self, done: int, total: int) -> None:
        """Progress within the case."""
        self._bars.update(self._rows, completed=done, total=total)

    def next_case(self) -> None:
        """A case is over."""
        self._bars.advance(self._cases)
        self._number += 1


def _by(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))

"""A network for each class: several binary trainings by one command, put together to one run that predicts all.

Each is a run like any other, of the same data set with one class left (data/views.py); the loop knows nothing of it.
Plan and preprocessed cases are shared.

    RUN/class_<name>/                   an ordinary run
    RUN/classes.json                    their names, in order
    RUN/thresholds.json                 of each class, chosen on the validation cases: largest F1 over all pixels
    RUN/validation/{last,best}/         label maps of all classes, probabilities, merged maps, cases.csv, report.html

The scores by thresholds (Dice, IoU, lesions) are of the cases that the thresholds were chosen on: a little too good.
The areas under precision-recall use none. Test cases take part in neither.
"""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from medseg_jax.config import Config
from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.plan import Plan
from medseg_jax.data.views import class_view
from medseg_jax.evaluation import probabilities
from medseg_jax.evaluation.metrics.pr import LEVELS, ScoreHistogram
from medseg_jax.inference import merge
from medseg_jax.paths import write
from medseg_jax.runtime.checkpoint import Checkpoints
from medseg_jax.runtime.log import say
from medseg_jax.runtime.run import THRESHOLDS, class_folder, stage_folder
from medseg_jax.training.pool import CHECKPOINTS
from medseg_jax.types import UserError


def train_by_class(
    config: Config, out: str | Path, name: str | None = None, *, fresh: bool = False, report: bool = True
) -> Path:
    """Trains a network for one class, or for each; as soon as all are there, scores them together. Resumable.

    Args:
        config: its `classes` says which; None there: all of the data set.
        out: folder of all these runs.
        name: which one; None for all.
        fresh: throw away what these runs had and start them anew.
        report: write scores and reports.

    Returns:
        `out`.

    Raises:
        UserError, Interrupted: as `train`; no such class.
    """
    import jax

    from medseg_jax.training.prepare import open_data, refuse_other_config
    from medseg_jax.training.train import train

    out, (whole, dataset) = Path(out), open_data(config)
    if (out / "run.json").exists():
        raise UserError(
            "This folder holds one run of all classes",
            file=out,
            remedy="choose another --out, or leave --class out to go on with it",
        )
    labels = dataset.labels
    names = labels.names
    replace(labels, exclusive=False).storable(whole.root / "dataset.json")  # as one they are predicted side by side
    class_view(whole, names if name is None else (name,))
    out.mkdir(parents=True, exist_ok=True)
    _remember(out, names)
    for one in names if name is None else [name]:
        folder, own = class_folder(out, one), replace(config, classes=(one,))
        if finished(own, folder) and not fresh:
            refuse_other_config(own, folder, whole)
            say(f"{one}: finished already")
            continue
        say(f"{one}: {folder}")
        if jax.process_index() == 0:
            (out / THRESHOLDS).unlink(missing_ok=True)  # those of other weights
        train(own, folder, fresh=fresh, report=False)
    done = all(finished(replace(config, classes=(one,)), class_folder(out, one)) for one in names)
    if report and done and jax.process_index() == 0:
        summarise(replace(config, classes=names), out)
    return out


def _remember(out: Path, names: Sequence[str]) -> None:
    """classes.json, written by the first process alone; what is there must agree."""
    import jax

    file = out / "classes.json"
    if file.is_file() and (before := json.loads(file.read_text(encoding="utf-8"))) != list(names):
        raise UserError(
            "The runs in this folder are of other classes",
            file=file,
            found=", ".join(names),
            expected=", ".join(before),
            remedy="choose another --out",
        )
    folders: dict[Path, str] = {}
    for name in names:
        if (other := folders.setdefault(class_folder(out, name), name)) != name:
            raise UserError(
                "The runs of two classes would share a folder",
                file=class_folder(out, name),
                found=f"{other}, {name}",
                remedy="rename one of them in dataset.json",
            )
    if not file.is_file() and jax.process_index() == 0:
        write(file, json.dumps(list(names), ensure_ascii=False))


def finished(config: Config, folder: Path) -> bool:
    """Whether a class was trained to its end."""
    if not (folder / "plan.json").is_file():
        return False
    stage, index = config.stages[-1], len(config.stages) - 1
    steps = stage.steps or Plan.load(folder / "plan.json").steps
    return steps in Checkpoints(stage_folder(folder, index, stage.name) / "last", read_only=True).steps()


def summarise(config: Config, out: Path) -> None:
    """Predicts the validation cases with all classes together, chooses thresholds, scores, reports."""
    from medseg_jax.evaluation.evaluate import evaluate
    from medseg_jax.evaluation.report import report
    from medseg_jax.inference.predict import predict
    from medseg_jax.runtime.run import open_by_class
    from medseg_jax.training.prepare import open_data

    _, dataset = open_data(config)
    dataset = replace(dataset, labels=replace(dataset.labels, exclusive=False))
    if not dataset.subset("val", labelled=True):
        say("no validation cases: no thresholds and no scores (give some a split of val in dataset.json)")
        return
    (out / THRESHOLDS).unlink(missing_ok=True)
    chosen, runs = {}, {checkpoint: open_by_class(out, checkpoint) for checkpoint in CHECKPOINTS}
    same = [member.step for member in runs["last"].members] == [member.step for member in runs["best"].members]
    for checkpoint, run in runs.items():
        folder = out / "validation" / checkpoint
        if checkpoint == "best" and same:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(out / "validation" / "last", folder)
            chosen["best"] = chosen["last"]
            continue
        predict(run, dataset, folder, split="val", postprocessing="none", overwrite=True, save_probabilities=True)
        chosen[checkpoint] = choose_thresholds(folder, dataset)
        apply_thresholds(folder, dataset, chosen[checkpoint])
        summary = evaluate(folder, dataset, folder, lesions=True)
        for name, figures in summary["probabilities"]["classes"].items():
            say(f"{name} ({checkpoint}): AUPR {figures['aupr33']:.3f}, threshold {chosen[checkpoint][name]:.3f}")
        say(f"report: {report(folder)}")
    write(out / THRESHOLDS, json.dumps(chosen, indent=1))


def choose_thresholds(folder: Path, dataset: Dataset) -> dict[str, float]:
    """Class -> threshold with the largest F1 over all pixels of the validation cases; 0.5 for a class none of them has.

    Args:
        folder: predictions with their probabilities.
    """
    names = dataset.labels.names
    histograms = [ScoreHistogram() for _ in names]
    for case in dataset.subset("val", labelled=True):
        reference, values = _read(folder, dataset, case.id)
        masks = dataset.labels.masks(reference)
        valid = np.ones(reference.shape, bool) if dataset.labels.ignore is None else reference != dataset.labels.ignore
        for k, mask in enumerate(masks):
            histograms[k] = histograms[k] + ScoreHistogram.of(values[..., k][valid], mask[valid])
    return {name: best_threshold(histogram) for name, histogram in zip(names, histograms, strict=True)}


def best_threshold(histogram: ScoreHistogram) -> float:
    """Midway between the two neighbouring levels of the scores between which a cut gives the largest F1."""
    if not histogram.positive.any():
        return 0.5
    tp, fp = (np.cumsum(counts[::-1])[::-1] for counts in (histogram.positive, histogram.negative))
    f1 = 2 * tp / (tp + fp + histogram.positive.sum())
    f1[0] = -1  # everything would be positive
    least = int(f1.argmax())
    least += int(np.flatnonzero(histogram.total[least:])[0])  # F1 is the same for all levels between two scores
    used = np.flatnonzero(histogram.total[:least])
    return float((LEVELS[least] + (LEVELS[used[-1]] if len(used) else 0.0)) / 2)


def apply_thresholds(folder: Path, dataset: Dataset, thresholds: dict[str, float]) -> None:
    """Label maps decoded anew from the probabilities, and merged maps."""
    tau = [thresholds[name] for name in dataset.labels.names]
    for path in io.list_files(folder):
        label, geometry = io.read_label(path)
        values = _probabilities(folder, dataset, io.stem(path), label.shape)
        io.write_label(path, dataset.labels.decode(values, tau), geometry)
        if values.ndim == 3:
            merge.write(folder / "merged", io.stem(path), merge.one_map(values, tau), dataset.labels.names)


def _read(folder: Path, dataset: Dataset, id: str) -> tuple[np.ndarray, np.ndarray]:
    """Reference label map [*s] and probabilities [*s, k] of a case."""
    label = dataset.case(id).label
    assert label is not None
    reference, _ = io.read_label(label)
    return reference, _probabilities(folder, dataset, id, reference.shape)


def _probabilities(folder: Path, dataset: Dataset, id: str, shape: tuple[int, ...]) -> np.ndarray:
    """[*s, k] float16."""
    return probabilities.read(folder / "probabilities" / f"{id}.npz", dataset.labels, shape)

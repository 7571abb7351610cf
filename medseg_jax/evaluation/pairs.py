"""Which prediction belongs to which reference, and what the classes are."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset, read_description
from medseg_jax.types import Labels, UserError


@dataclass(frozen=True)
class Pair:
    """One case to score: its reference, and its prediction (None: missing, scored as empty)."""

    id: str
    prediction: Path | None
    reference: Path
    domain: str = ""
    patient: str = ""


@dataclass(frozen=True)
class Pairs:
    """What is to be scored.

    Attributes:
        pairs: one per reference, sorted by id.
        labels: the classes, or None where no dataset.json says what they are.
        extra: predictions without a reference.
        notes: decisions that the reader should know of.
    """

    pairs: tuple[Pair, ...]
    labels: Labels | None
    extra: tuple[Path, ...]
    notes: tuple[str, ...]


def find_pairs(pred: Path, ref: Path, split: str | None, missing: str, view: Dataset | None = None) -> Pairs:
    """Match predictions and references by the stem of their file names; arguments and errors as in `evaluate`.

    Args:
        view: the data set that lies in `ref`, where its splits are others than those of its dataset.json (a fold).
    """
    for path, role in ((pred, "predictions"), (ref, "references")):
        if not path.exists():
            raise UserError(f"There are no {role} here", file=path, found="no such file or folder")
    notes: list[str] = []
    dataset, labels = (view, view.labels) if view else _describe(ref, pred, notes)
    predictions = _stems(pred)
    if dataset and (view or ref == dataset.root):
        references, chosen = _labels_of(dataset, split, predictions)
        notes.append(f"Scored the labelled cases of the split{'s' * (',' in chosen)} {chosen}.")
        if learned := sum(case.split == "train" and case.id in references for case in dataset.cases):
            notes.append(
                f"{learned} of {len(references)} cases are training cases of this data set: for a model that learned "
                "from them these scores say nothing about new images (--split val or test scores others)."
            )
    elif split:
        raise UserError(
            "Only a data set has splits", file=ref, expected="a folder with dataset.json and labelsTr, as REF"
        )
    else:
        references = _one_each(_stems(ref), endings=set())
    if pred.is_file():
        id, paths = predictions.popitem()
        if ref.is_file():
            id = io.stem(ref)
        predictions, references = {id: paths}, {id: references[id]} if id in references else references
    found = _one_each(predictions, endings={io.suffix(path) for path in references.values()})
    _refuse_absent(pred, ref, references, found, missing)
    cases = {case.id: case for case in dataset.cases} if dataset else {}
    if missing == "skip" and (absent := sorted(references.keys() - found.keys())):
        notes.append(f"References without a prediction, left out: {some(absent)}.")
        references = {id: path for id, path in references.items() if id in found}
    pairs = []
    for id, reference in sorted(references.items()):
        domain, patient = (cases[id].domain, cases[id].patient) if id in cases else ("", "")
        pairs.append(Pair(id, found.get(id), reference, domain, patient))
    extra = tuple(found[id] for id in sorted(found.keys() - references.keys()))
    return Pairs(tuple(pairs), labels, extra, tuple(notes))


def _describe(ref: Path, pred: Path, notes: list[str]) -> tuple[Dataset | None, Labels | None]:
    """The data set of the references, and the classes by the nearest dataset.json; one that cannot be read is noted."""
    root = dataset_root(ref)
    if root == ref:
        dataset = Dataset.open(ref)
        return dataset, dataset.labels
    for path in (ref, ref.parent, pred, pred.parent):
        if not (path / "dataset.json").is_file():
            continue
        try:
            dataset = Dataset.open(path) if path == root else None
            return dataset, dataset.labels if dataset else read_description(path / "dataset.json")[1]
        except UserError as error:
            notes.append(f"Not used: {path / 'dataset.json'}. {error.problem}.")
    return None, None


def dataset_root(ref: Path) -> Path | None:
    """The folder of the data set that `ref` is, or whose folder of labels it is (or lies in)."""
    folder = ref if ref.is_dir() else ref.parent
    for root in (folder, folder.parent):
        is_dataset = any((root / name).is_dir() for name in ("imagesTr", "imagesTs"))
        if (root / "dataset.json").is_file() and is_dataset and (root == folder or folder.name.startswith("labels")):
            return root
    return None


def _labels_of(dataset: Dataset, split: str | None, predictions: Mapping[str, Any]) -> tuple[dict[str, Path], str]:
    """Label files of a split, or of all splits that some prediction belongs to; and the names of these splits."""
    labelled = [case for case in dataset.cases if case.label is not None]
    splits = {split} if split else {case.split for case in labelled if case.id in predictions}
    if split:
        dataset.subset(split)  # names the splits if there is no such one
    chosen = {case.id: case.label for case in labelled if case.split in (splits or {c.split for c in labelled})}
    return {id: label for id, label in chosen.items() if label is not None}, ", ".join(sorted(splits)) or "none"


def _stems(path: Path) -> dict[str, list[Path]]:
    stems: dict[str, list[Path]] = {}
    for file in [path] if path.is_file() else io.list_files(path):
        stems.setdefault(io.stem(file), []).append(file)
    return stems


def _one_each(stems: Mapping[str, Sequence[Path]], endings: set[str]) -> dict[str, Path]:
    """One file for each stem: where there are several (label map and probabilities), that with one of the endings."""
    chosen = {}
    for id, paths in stems.items():
        fitting = [path for path in paths if io.suffix(path) in endings] or paths
        if len(fitting) > 1:
            raise UserError(
                f"Several files could be case {id}",
                file=fitting[0].parent,
                found=", ".join(path.name for path in fitting),
                expected="one label map per case",
            )
        chosen[id] = fitting[0]
    return chosen


def _refuse_absent(pred: Path, ref: Path, references: Mapping, predictions: Mapping, missing: str) -> None:
    if not references:
        raise UserError("There is no reference to score against", file=ref, found="no label map")
    if not references.keys() & predictions.keys():
        raise UserError(
            "No prediction has the name of a reference",
            file=pred,
            found=some(sorted(predictions)) or "no label map",
            expected=some(sorted(references)),
        )
    absent = sorted(references.keys() - predictions.keys())
    if absent and missing == "error":
        raise UserError(
            f"{len(absent)} of {len(references)} references have no prediction",
            file=pred,
            found="no " + some(absent, 20),
            remedy="predict them; or --missing skip scores the others alone, --missing worst scores these as empty",
        )


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many there are if not all are shown."""
    return ", ".join(names[:most]) + (f" ... ({len(names)} in all)" if len(names) > most else "")


def discover_labels(pairs: Sequence[Pair]) -> Labels:
    """One class for each value but 0 that occurs in a reference."""
    values = sorted({int(v) for pair in pairs for v in np.unique(io.read_label(pair.reference)[0])} - {0})
    if not 0 < len(values) <= 32:
        raise UserError(
            "The references do not look like label maps, and no dataset.json names the classes",
            file=pairs[0].reference.parent,
            found=f"{len(values)} values beside 0" if values else "nothing but 0",
            expected="1 to 32 values beside 0, or a dataset.json",
            remedy="medseg data convert makes a data set of masks with soft edges or JPEG ringing",
        )
    return Labels(tuple(f"label {v}" for v in values), tuple((v,) for v in values))


def compare_classes(pred: Path, labels: Labels, notes: list[str]) -> None:
    """Refuses a class that has other values in the predictions' dataset.json, if there is one; notes other names."""
    file = (pred if pred.is_dir() else pred.parent) / "dataset.json"
    if not file.is_file():
        return
    try:
        mine = read_description(file)[1]
    except UserError as error:
        notes.append(f"Not used: {file}. {error.problem}.")
        return
    both = mine.known & labels.known
    theirs = dict(zip(labels.names, labels.values, strict=True))
    for name, values in zip(mine.names, mine.values, strict=True):
        if name in theirs and both & set(values) != both & set(theirs[name]):
            raise UserError(
                f'"{name}" is not the same value in predictions and references',
                file=file,
                found=f"{name} = {', '.join(map(str, values))}",
                expected=f"{', '.join(map(str, theirs[name]))}, as in the references",
                remedy="convert one of them: medseg data convert --classes says which value is which class",
            )
    if set(mine.names) != theirs.keys():
        notes.append(
            f"The predictions name their classes {', '.join(mine.names)}, the references {', '.join(labels.names)}: "
            "values were compared as they are."
        )


def only_learned(pred: Path, labels: Labels, notes: list[str]) -> Labels:
    """The labels without classes that the predicting run never learned (`classes` in its config); notes which."""
    file = (pred if pred.is_dir() else pred.parent) / "predict.json"
    try:
        learned = json.loads(file.read_text(encoding="utf-8"))["classes"]
    except (OSError, ValueError, KeyError, TypeError):  # predictions of another program, or of an older version
        return labels
    if not set(learned) < set(labels.names):
        return labels
    absent = [name for name in labels.names if name not in learned]
    notes.append(f"Not scored, since the run that predicted learned nothing of them: {', '.join(absent)}.")
    return labels.only(learned)

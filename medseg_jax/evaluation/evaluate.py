"""Scores of a folder of predictions: every metric of every case and class, means, and how sure we are of them.

    find_pairs     which prediction belongs to which reference, and what the classes are (pairs.py)
    score_case     all metrics of all classes of one case                               -> rows of cases.csv
    summarise      means, spread and bootstrap intervals, overall, by class and domain   -> summary.json

What is reported, and how (after Metrics Reloaded, Maier-Hein et al. 2024):

* The mean of a case is the mean over its classes; the headline is the mean over cases, and so are sd and median.
* A class that is empty in reference and prediction scores 1 (distances 0). If one of them is empty, it scores 0 and its
  distances are infinite: cases.csv says so, and means take the diagonal of that image instead. No case is ever dropped.
  `summary["present"]` holds the other convention (nnU-Net's): the mean over the cases in which the class occurs in the
  reference or the prediction.
* The 95 % interval is a percentile bootstrap over patients where patients are known, else over cases.
* Voxels with the ignore label count as outside in both masks.
* What has no answer (average precision without a positive voxel, relative volume error of an empty reference) is nan in
  cases.csv and left out of its mean; `summary["undefined"]` counts it.
* A volume one voxel thick along an axis is measured as the picture that it is (the volumes of its masks in ml, where
  the evaluation has thicker ones too); pictures without a known pixel size are measured in px.
"""

import csv
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from medseg_jax import __version__
from medseg_jax.data import geometry as space
from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset, unknown_values
from medseg_jax.evaluation import probabilities
from medseg_jax.evaluation.metrics.cldice import cldice
from medseg_jax.evaluation.metrics.detection import IOU, match_lesions
from medseg_jax.evaluation.metrics.overlap import overlap, relative_volume_error, volume
from medseg_jax.evaluation.metrics.surface import assd, hausdorff, nsd, surface_distances
from medseg_jax.evaluation.pairs import Pair, Pairs, compare_classes, discover_labels, find_pairs, only_learned, some
from medseg_jax.paths import replacing
from medseg_jax.types import Labels, UserError

METRICS = ("dice", "iou", "precision", "recall", "hd", "hd95", "assd", "nsd", "volume_error", "volume_error_relative")
"""Metrics of a mask, in the order of the columns; volume_error is |volume of the prediction - of the reference|, and
volume_error_relative that over the volume of the reference."""

LESIONS = ("lesion_f1", "lesion_sensitivity", "lesion_precision", "lesion_fp", "lesion_pq")
"""Metrics of connected components, on request; lesion_fp is the number of false positive lesions."""

ACCURACY = ("accuracy", "accuracy_of_nothing")
"""Share of voxels that are right, and what an empty prediction would have got: never one without the other, since with
lesions that fill a thousandth of the image both are near 1. On request, with the lesions."""

ALL_METRICS = (*METRICS, *LESIONS, *ACCURACY, "cldice", *probabilities.METRICS)
"""Every metric that a row may have."""

DISTANCES = ("hd", "hd95", "assd")
"""Those in mm (px for pictures), of which less is better."""

VOLUMES = ("volume_error", "volume_prediction", "volume_reference")
"""Columns that are in `Score.volume_unit`."""

TEXTS = ("case", "class", "domain", "patient")
REST = ("volume_prediction", "volume_reference", "empty", "diagonal")
BOOTSTRAP = 2000


@dataclass(frozen=True)
class Score:
    """The scores of one case.

    Attributes:
        rows: one row of cases.csv per class, keyed by its columns; none if every voxel carries the ignore label.
        unit: of its spacing, "mm" or "px".
        volume_unit: "ml", "mm²" or "px".
        thickness: of a volume in mm that is one voxel thick, else 0.
        problem: why the case could not be scored, or "".
        pooled: of its probabilities, if they are scored.
    """

    id: str
    rows: tuple[dict[str, Any], ...] = ()
    unit: str = ""
    volume_unit: str = ""
    thickness: float = 0.0
    problem: str = ""
    pooled: probabilities.Pooled | None = None


@dataclass(frozen=True)
class Settings:
    """What is measured; see `evaluate`."""

    nsd_tolerance: float = 1.0
    lesions: bool = False
    lesion_iou: float = IOU
    cldice: bool = False

    def __post_init__(self):
        iou, tolerance = self.lesion_iou, self.nsd_tolerance
        if not 0 < iou <= 1:
            raise UserError("The IoU of matching lesions is a share", found=iou, expected="above 0, at most 1")
        if not 0 <= tolerance < math.inf:
            raise UserError("The tolerance of nsd is a distance", found=tolerance, expected="a number, 0 or more")


def evaluate(
    pred: str | Path,
    ref: str | Path | Dataset,
    out: str | Path,
    *,
    nsd_tolerance: float = 1.0,
    labels: Labels | None = None,
    split: str | None = None,
    missing: Literal["error", "worst", "skip"] = "error",
    seed: int = 0,
    workers: int = 1,
    lesions: bool = False,
    lesion_iou: float = IOU,
    cldice: bool = False,
    probabilities: str | Path | None = None,
) -> dict[str, Any]:
    """Score predictions against references; writes OUT/summary.json and OUT/cases.csv.

    Args:
        pred: folder of label maps, or one file.
        ref: folder of label maps, one file, or a data set, opened or its folder (whose dataset.json knows the classes,
            the ignore label, domains and patients).
        out: folder to write to; made if needed. It may be `pred`.
        nsd_tolerance: distance within which surfaces agree, in mm (px for pictures).
        labels: the classes; by default those of the dataset.json of `ref`, of the folder above it, or of `pred`, else
            every value that the references hold; but for those that the predicting run never learned.
        split: cases of a data set to score; by default the splits that the predictions belong to.
        missing: what to do where a reference has no prediction: "error"; "worst" scores it as empty; "skip" scores the
            predicted cases alone, and says so.
        seed: of the bootstrap.
        workers: threads.
        lesions: also match connected components: F1, sensitivity, precision, false positives, panoptic quality.
        lesion_iou: least IoU of a predicted and a true lesion that match.
        cldice: also clDice, for vessels and other tubes.
        probabilities: folder of <case>.npz as `medseg predict` writes them, to score average precision and calibration,
            with a plot in OUT/plots/calibration.png; by default PRED/probabilities if that has one of these
            classes for every case.

    Returns:
        What summary.json holds: mean, ci95, sd, median (over cases), present (nnU-Net's convention for empty masks),
        each a dict of METRICS; classes, domains and patients with the same figures; numbers of cases and empty masks;
        worst (ids, the worst first); probabilities (pooled over all voxels) if there are any; settings.

    Raises:
        UserError: nothing to score, missing predictions, a class that is another value in predictions than in
            references, files that do not lie in one space, unknown label values. All cases with a problem are listed
            at once; nothing is written.
    """
    settings = Settings(nsd_tolerance, lesions, lesion_iou, cldice)
    view = ref if isinstance(ref, Dataset) else None
    pred, ref = Path(pred).absolute(), Path(ref.root if isinstance(ref, Dataset) else ref).absolute()
    found = find_pairs(pred, ref, split, missing, view)
    notes = list(found.notes)
    labels = _choose_labels(pred, found, labels, notes)
    if labels.scores and probabilities is not None:
        raise UserError("Probabilities of regions that are scored instead of classes are not known", file=probabilities)
    maps = {} if labels.scores else _find_maps(pred, probabilities, found.pairs, labels, notes)
    labels = labels.judged
    scores, pooled = _score_all(found.pairs, labels, settings, maps, workers)
    unscored = [s.id for s in scores if not s.rows]
    if unscored:
        notes.append(f"Not scored, all voxels carry the ignore label: {', '.join(unscored)}.")
    scored = [s for s in scores if s.rows]
    rows = [row for s in scored for row in s.rows]
    summary = summarise(rows, seed=seed) | {
        "unit": scored[0].unit,
        "volume_unit": scored[0].volume_unit,
        "missing": [p.id for p in found.pairs if p.prediction is None],
        "extra": [path.name for path in found.extra],
        "unscored": unscored,
        "notes": notes,
        "settings": _settings(pred, ref, settings, labels, seed),
    }
    if pooled is not None:
        summary["probabilities"] = pooled.summary(labels.names)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    _draw_calibration(out, summary)
    _write(out / "cases.csv", lambda file: _write_rows(file, rows))
    _write(out / "summary.json", lambda file: json.dump(summary, file, indent=1, ensure_ascii=False, allow_nan=False))
    return summary


def _choose_labels(pred: Path, found: Pairs, given: Labels | None, notes: list[str]) -> Labels:
    """The classes to score: those `given`, or of the references those that the predicting run has learned."""
    labels = given or found.labels
    if labels is None:
        labels = discover_labels(found.pairs)
        values = ", ".join(str(vs[0]) for vs in labels.values)
        notes.append(f"No dataset.json names the classes; scored every value of the references: {values}.")
    compare_classes(pred, labels, notes)
    return given or only_learned(pred, labels, notes)


# ---------------------------------------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------------------------------------


def _find_maps(
    pred: Path, folder: str | Path | None, pairs: Sequence[Pair], labels: Labels, notes: list[str]
) -> dict[str, Path]:
    """The probability map of each predicted case; none if they are not asked for and not all there and of `labels`."""
    where = Path(folder) if folder is not None else (pred if pred.is_dir() else pred.parent) / "probabilities"
    if folder is None and not where.is_dir():
        return {}
    maps = {pair.id: where / f"{pair.id}.npz" for pair in pairs if pair.prediction is not None}
    missing = [id for id, path in maps.items() if not path.is_file()]
    if missing and folder is not None:
        raise UserError(
            f"{len(missing)} of {len(maps)} cases have no probability map",
            file=where,
            found=f"none for {some(missing)}",
            expected="<case>.npz for every case",
            remedy="medseg predict RUN -i IN -o OUT --probabilities writes them",
        )
    if missing:
        notes.append(f"Probabilities not scored: {len(missing)} of {len(maps)} cases have none in {where.name}/.")
        return {}
    expected = probabilities.channels(labels)
    for path in maps.values() if folder is None else ():
        with suppress(UserError):  # a damaged one is listed with the problems of all cases
            if (classes := probabilities.read_classes(path)) != expected:
                found = f"{where.name}/{path.name} has the channels {', '.join(classes)}"
                notes.append(f"Probabilities not scored: {found}, expected were {', '.join(expected)}.")
                return {}
    return maps


def score_case(pair: Pair, labels: Labels, settings: Settings, maps: Mapping[str, Path] | None = None) -> Score:
    """Every metric of every class of one case, in the space of its reference.

    Args:
        maps: probability map of each case; if there are any, a case without a prediction counts as sure background.

    Raises:
        UserError: the two files lie in different spaces, or hold values that `labels` does not name.
    """
    reference, geometry = io.read_label(pair.reference)
    _refuse_unknown(reference, labels, pair.reference)
    if pair.prediction is None:
        prediction = np.zeros_like(reference)
    else:
        prediction, found = io.read_label(pair.prediction)
        if differences := space.same_space(found, geometry):
            raise UserError(
                f"Prediction and reference of case {pair.id} do not lie in the same space",
                file=pair.prediction,
                found="; ".join(differences),
                expected=f"the space of {pair.reference}",
            )
        _refuse_unknown(prediction, labels, pair.prediction)
    valid = True if labels.ignore is None else reference != labels.ignore
    if not np.any(valid):
        return Score(pair.id)
    spacing = geometry.spacing
    diagonal = float(np.linalg.norm(np.multiply(reference.shape, spacing)))
    member = labels.table[:, labels.channels - len(labels.names) :] > 0  # [values, classes]
    flat = reference.shape.index(1) if reference.ndim == 3 and 1 in reference.shape else None
    sides = [s for axis, s in enumerate(spacing) if axis != flat]
    volume_unit = "px" if geometry.unit == "px" else {2: "mm²", 3: "ml"}[len(sides)]
    pooled = None
    if maps:
        if pair.id in maps:
            values = probabilities.read(maps[pair.id], labels, reference.shape)
        else:
            values = np.zeros((*reference.shape, labels.channels), np.float16)
            values[..., : labels.exclusive] = 1
        pooled = probabilities.score(values, reference, labels)
    rows = []
    for k, name in enumerate(labels.names):
        p, r = (member[:, k][label] & valid for label in (prediction, reference))  # [*s] each
        if flat is not None:
            p, r = p.squeeze(flat), r.squeeze(flat)
        about = {"case": pair.id, "class": name, "domain": pair.domain, "patient": pair.patient, "diagonal": diagonal}
        measured = measure(p, r, sides, settings, 1000 if volume_unit == "ml" else 1)
        rows.append(about | measured | (pooled.row(k) if pooled else {}))
    thickness = 0.0 if flat is None or geometry.unit == "px" else spacing[flat]
    return Score(pair.id, tuple(rows), geometry.unit, volume_unit, thickness, pooled=pooled)


def measure(
    prediction: np.ndarray, reference: np.ndarray, spacing: Sequence[float], settings: Settings, per_volume: float = 1
) -> dict[str, Any]:
    """All metrics of two boolean masks [*s]; volumes are divided by `per_volume` (1000: mm³ to ml)."""
    o = overlap(prediction, reference)
    d = surface_distances(prediction, reference, spacing)
    volumes = [volume(mask, spacing) / per_volume for mask in (prediction, reference)]
    empty = (o.tp + o.fp == 0, o.tp + o.fn == 0)
    relative = math.nan if empty[1] else abs(relative_volume_error(prediction, reference))
    scores = {
        "dice": o.dice,
        "iou": o.iou,
        "precision": o.precision,
        "recall": o.recall,
        "hd": hausdorff(d),
        "hd95": hausdorff(d, 95),
        "assd": assd(d),
        "nsd": nsd(d, settings.nsd_tolerance),
        "volume_error": abs(volumes[0] - volumes[1]),
        "volume_error_relative": relative,
        "volume_prediction": volumes[0],
        "volume_reference": volumes[1],
        "empty": {(True, True): "both", (True, False): "prediction", (False, True): "reference"}.get(empty, ""),
    }
    if settings.lesions:
        found = match_lesions(prediction, reference, iou=settings.lesion_iou)
        figures = (found.f1, found.sensitivity, found.precision, found.fp, found.panoptic_quality)
        scores |= dict(zip(LESIONS, map(float, figures), strict=True))
        wrong = ((o.fp + o.fn) / reference.size, (o.tp + o.fn) / reference.size)
        scores |= {name: 1 - share for name, share in zip(ACCURACY, wrong, strict=True)}
    if settings.cldice:
        scores["cldice"] = cldice(prediction, reference)
    return scores


def _refuse_unknown(label: np.ndarray, labels: Labels, path: Path) -> None:
    if unknown := unknown_values(label, labels):
        raise UserError(
            "A label map holds values that are no class",
            file=path,
            found=some([f"{value} ({count} voxels)" for value, count in unknown.items()]),
            expected=some([str(v) for v in sorted(labels.known)], 20),
        )


def _score_all(
    pairs: Sequence[Pair], labels: Labels, settings: Settings, maps: Mapping[str, Path], workers: int
) -> tuple[list[Score], probabilities.Pooled | None]:
    """Every case, all in one unit, and their probabilities pooled; raises all problems at once."""
    score = partial(_score_or_explain, labels=labels, settings=settings, maps=maps)
    scores, pooled = [], None
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        for s in pool.map(score, pairs):
            if s.pooled is not None:
                pooled = s.pooled if pooled is None else pooled + s.pooled
            scores.append(replace(s, pooled=None))
    scores = _in_one_unit(scores)
    _refuse_problems(scores)
    return scores, pooled


def _score_or_explain(pair: Pair, labels: Labels, settings: Settings, maps: Mapping[str, Path]) -> Score:
    try:
        return score_case(pair, labels, settings, maps)
    except UserError as error:
        return Score(pair.id, problem=str(error))


def _in_one_unit(scores: Sequence[Score]) -> list[Score]:
    """The same, but the areas of single slices in ml where other cases are thicker volumes."""
    if all(s.volume_unit != "ml" for s in scores):
        return list(scores)

    def in_ml(s: Score) -> Score:
        rows = tuple(row | {name: row[name] * s.thickness / 1000 for name in VOLUMES} for row in s.rows)
        return replace(s, rows=rows, volume_unit="ml")

    return [in_ml(s) if s.thickness else s for s in scores]


def _refuse_problems(scores: Sequence[Score]) -> None:
    problems = [s.problem for s in scores if s.problem]
    if len(problems) == 1:
        raise UserError(problems[0])
    if problems:
        shown = "\n".join(problems[:20]) + (f"\n... and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise UserError(f"{len(problems)} of {len(scores)} cases cannot be scored:\n{shown}")
    units = Counter((s.unit, s.volume_unit) for s in scores if s.rows)
    if not units:
        raise UserError("There is nothing to score", found="all voxels of all cases carry the ignore label")
    if len(units) > 1:
        raise UserError(
            "The references mix units, so that no mean would make sense",
            found=", ".join(f"{n} cases in {unit} and {volumes}" for (unit, volumes), n in units.items()),
            expected="volumes only or pictures only",
        )


# ---------------------------------------------------------------------------------------------------------------------
# All cases
# ---------------------------------------------------------------------------------------------------------------------


def summarise(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Means, spread and intervals of the rows of cases.csv (each case with each class, in one order)."""
    ids = list(dict.fromkeys(row["case"] for row in rows))
    classes = list(dict.fromkeys(row["class"] for row in rows))
    by_case = rows[:: len(classes)]
    metrics = tuple(m for m in ALL_METRICS if m in rows[0])
    named = partial(_named, metrics=metrics)
    raw = np.array([[row[m] for m in metrics] for row in rows], float)  # [cases * classes, metrics]
    scores = np.where(np.isinf(raw), np.array([row["diagonal"] for row in rows])[:, None], raw)
    scores = scores.reshape(len(ids), len(classes), len(metrics))
    empty = np.array([row["empty"] for row in rows]).reshape(len(ids), len(classes))
    patients = np.array([row["patient"] or row["case"] for row in by_case])
    domains = np.array([row["domain"] for row in by_case])
    means = np.stack([_mean_of_known(own) for own in scores])  # [cases, metrics]
    present = np.where((empty == "both")[..., None], np.nan, scores)

    def about(values: np.ndarray, groups: np.ndarray) -> dict[str, Any]:
        """Mean, interval, sd and median of values [cases, metrics]."""
        low, high = bootstrap_interval(values, groups, seed)
        known = [column[~np.isnan(column)] for column in values.T]
        return {
            "mean": named(_mean_of_known(values)),
            "ci95": named(np.stack([low, high], 1)),
            "sd": named(np.array([np.std(c, ddof=1) if len(c) > 1 else np.nan for c in known])),
            "median": named(np.array([np.median(c) if len(c) else np.nan for c in known])),
        }

    def flat(figures: dict[str, Any]) -> dict[str, Any]:
        return {**figures.pop("mean"), **figures}

    per_class = {
        name: flat(about(scores[:, k], patients))
        | {"present": named(_mean_of_known(present[:, k])), "empty": _count_empty(empty[:, k])}
        for k, name in enumerate(classes)
    }
    summary = about(means, patients) | {
        "present": named(_mean_of_known(np.stack([_mean_of_known(present[:, k]) for k in range(len(classes))]))),
        "cases": len(ids),
        "classes": per_class,
        "empty": _count_empty(empty),
        "replaced_distances": int(np.isinf(raw).any(-1).sum()),
        "undefined": {m: int(n) for m, n in zip(metrics, np.isnan(raw).sum(0), strict=True) if n},
        "worst": [ids[i] for i in np.lexsort((-means[:, METRICS.index("hd95")], means[:, 0]))[:5]],
    }
    if len(set(patients)) < len(ids):
        grouped = np.stack([_mean_of_known(means[patients == p]) for p in dict.fromkeys(patients)])
        summary["patients"] = {"patients": len(grouped), **flat(about(grouped, np.arange(len(grouped))))}
    if any(domains):
        summary["domains"] = {
            str(d): {"cases": int(sum(domains == d)), **flat(about(means[domains == d], patients[domains == d]))}
            for d in sorted(set(domains))
        }
    return summary


def bootstrap_interval(values: np.ndarray, groups: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile bootstrap interval of the mean over cases; whole groups are drawn, as their cases are alike.

    Args:
        values: [cases, ...]; NaN where a value is not known.
        groups: [cases], the patient of each case.

    Returns:
        lower and upper bound [...]; NaN where there is one group only, which says nothing about others.
    """
    names, index = np.unique(groups, return_inverse=True)
    if len(names) < 2:
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing
    known = ~np.isnan(values)
    sums, counts = np.zeros((2, len(names), *values.shape[1:]))
    np.add.at(sums, index, np.where(known, values, 0))
    np.add.at(counts, index, known)
    draws = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=BOOTSTRAP)
    drawn = np.tensordot(draws, counts, 1)
    means = np.where(drawn > 0, np.tensordot(draws, sums, 1) / np.maximum(drawn, 1), np.nan)  # [draws, ...]
    if known.all():
        low, high = np.percentile(means, (2.5, 97.5), axis=0)
        return low, high
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a metric that is known nowhere has no interval
        low, high = np.nanpercentile(means, (2.5, 97.5), axis=0)
    return low, high


def remarks(summary: Mapping[str, Any]) -> list[str]:
    """What a reader of the means must know, in sentences: decisions, lost classes, empty masks, missing predictions."""
    empty, lines = summary["empty"], list(summary["notes"])
    if lost := [name for name, figures in summary["classes"].items() if figures["dice"] == 0]:
        lines.append(f"Found in no case at all: {', '.join(lost)}.")
    if empty["both"]:
        lines.append(f"Masks empty in reference and prediction alike: {empty['both']}. They score 1.")
    if alone := empty["prediction"] + empty["reference"]:
        lines.append(
            f"Masks empty on one side only: {alone} (predictions {empty['prediction']}, "
            f"references {empty['reference']}). They score 0; in means the image's diagonal stands for their distances."
        )
    for metric, number in summary.get("undefined", {}).items():  # of an older version: none
        lines.append(f"Not defined, and left out of its mean: {metric} in {number} of the rows of cases.csv.")
    if summary["missing"]:
        lines.append(f"No prediction, scored as empty: {some(summary['missing'], 20)}.")
    if summary["extra"]:
        lines.append(f"Predictions without a reference, left out: {some(summary['extra'], 20)}.")
    return lines


def _mean_of_known(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of values [n, metrics] that are not NaN; NaN where none is."""
    known = np.isfinite(values)
    total, count = np.where(known, values, 0).sum(0), known.sum(0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _named(values: np.ndarray, metrics: Sequence[str]) -> dict[str, Any]:
    """[metrics] or [metrics, 2] -> {metric: number(s)}, None for NaN, which JSON does not know."""

    def known(value: Any) -> Any:
        return [known(v) for v in value] if isinstance(value, list) else None if math.isnan(value) else value

    return dict(zip(metrics, known(values.tolist()), strict=True))


def _count_empty(empty: np.ndarray) -> dict[str, int]:
    return {kind: int(np.count_nonzero(empty == kind)) for kind in ("both", "prediction", "reference")}


def _settings(pred: Path, ref: Path, settings: Settings, labels: Labels, seed: int) -> dict[str, Any]:
    lesions = f"components (all neighbours), optimal one-to-one matching at IoU >= {settings.lesion_iou:g}"
    return {
        "predictions": str(pred.resolve()),
        "references": str(ref.resolve()),
        "nsd_tolerance": settings.nsd_tolerance,
        **({"lesions": lesions} if settings.lesions else {}),
        "surface": "subvoxel: marching-cubes elements weighted by area (Nikolov et al. 2018; surface-distance)",
        "hd95": "larger of the two directed, area-weighted 95th percentiles",
        "assd": "mean over both surfaces together, weighted by area",
        "empty_both": "scores 1, distances 0",
        "empty_one": "scores 0, distances infinite in cases.csv and the image's diagonal in means",
        "ignore": labels.ignore,
        "labels": {name: list(values) for name, values in zip(labels.names, labels.values, strict=True)},
        "ci95": f"percentile bootstrap, {BOOTSTRAP} draws, over patients where known, else over cases",
        "seed": seed,
        "versions": {name: metadata.version(name) for name in ("numpy", "scipy")} | {"medseg_jax": __version__},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _write_rows(file: TextIO, rows: Sequence[Mapping[str, Any]]) -> None:
    columns = (*TEXTS, *(m for m in ALL_METRICS if m in rows[0]), *REST)
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def _draw_calibration(out: Path, summary: Mapping[str, Any]) -> None:
    """plots/calibration.png, or none: what an earlier evaluation left there would be of other predictions.

    In a folder of its own, since OUT may be PRED, where a picture would be taken for a prediction.
    """
    path = out / "plots" / "calibration.png"
    if "probabilities" not in summary:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(exist_ok=True)
    from medseg_jax.evaluation.charts import calibration_figure, save_png

    save_png(calibration_figure(summary["probabilities"]), path)


def _write(path: Path, content: Callable[[TextIO], None]) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as draft, draft.open("w", encoding="utf-8", newline="") as file:
        content(file)


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a cases.csv, numbers as floats."""
    texts = (*TEXTS, "empty")
    with Path(path).open(encoding="utf-8", newline="") as file:
        return [{k: v if k in texts else float(v) for k, v in row.items()} for row in csv.DictReader(file)]

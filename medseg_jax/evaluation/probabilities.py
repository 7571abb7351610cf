"""Scores of probability maps (PRED/probabilities/<case>.npz of `medseg predict --probabilities`): AUPR, ECE, Brier.

    read         one case's map, as float16 [*s, k]
    Pooled.of    histograms of one case; `+` pools cases, in constant memory
    Pooled.row   the columns of cases.csv;  Pooled.summary   what summary.json says under "probabilities"

Per class, the question is "is this voxel of the class?" (one against the rest). For exclusive classes there is also the
question "is the likeliest class, background included, the true one?".
"""

import operator
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from medseg_jax.evaluation.metrics import calibration
from medseg_jax.evaluation.metrics.pr import ScoreHistogram
from medseg_jax.types import Labels, UserError

METRICS = ("ap", "ece", "brier")
DAMAGED = (OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)
TINY = 2.0**-24  # float16's smallest number: what a probability of 0 on disk may have been


def read(path: Path, labels: Labels, shape: tuple[int, ...]) -> np.ndarray:
    """Probabilities [*shape, k] float16 of one case.

    Raises:
        UserError: the file is no such map, or has other classes or another shape than the reference.
    """
    classes, expected = read_classes(path), channels(labels)
    probabilities = _load(path, "probabilities")
    if classes != expected:
        raise UserError(
            "A probability map has other classes than the references",
            file=path,
            found=", ".join(classes),
            expected=", ".join(expected),
        )
    if probabilities.shape != (*shape, len(expected)):
        raise UserError(
            "A probability map has another shape than its reference",
            file=path,
            found=probabilities.shape,
            expected=(*shape, len(expected)),
        )
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise UserError(
            "Probabilities lie in [0, 1]", file=path, found="others, or NaN", remedy="predict this case anew"
        )
    return probabilities.astype(np.float16)


def read_classes(path: Path) -> list[str]:
    """What the channels of a map are.

    Raises:
        UserError: the file is no such map.
    """
    return [str(name) for name in _load(path, "classes").ravel()]


def channels(labels: Labels) -> list[str]:
    """What the channels of a map of these classes are."""
    return [*(["background"] if labels.exclusive else []), *labels.names]


def _load(path: Path, name: str) -> np.ndarray:
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            return file[name]
    except DAMAGED as error:
        raise UserError(
            "This is no probability map",
            file=path,
            found=error,
            expected="what medseg predict --probabilities writes",
            remedy="predict this case anew",
        ) from error


@dataclass(frozen=True, eq=False)
class Pooled:
    """All that is needed of the probabilities of any number of cases.

    Attributes:
        classes: for each class a histogram of its probability.
        present: for each class the same, of those cases alone that have it.
        having: for each class, how many those are.
        top: of the largest probability, positive where that class is the true one; None for overlapping classes.
        brier, nll: sums over voxels of the multi-class scores; 0 for overlapping classes.
    """

    classes: tuple[ScoreHistogram, ...]
    present: tuple[ScoreHistogram, ...]
    having: tuple[int, ...]
    top: ScoreHistogram | None = None
    brier: float = 0.0
    nll: float = 0.0

    @classmethod
    def of_case(cls, classes: tuple[ScoreHistogram, ...], **others: Any) -> Self:
        """Of one case's histograms."""
        having = tuple(int(h.positive.any()) for h in classes)
        present = tuple(h if n else ScoreHistogram() for h, n in zip(classes, having, strict=True))
        return cls(classes, present, having, **others)

    @classmethod
    def of(cls, probabilities: np.ndarray, member: np.ndarray) -> Self:
        """Of voxels [n, k] and their targets [n, k], one channel a class; classes may overlap."""
        classes = tuple(ScoreHistogram.of(p, m) for p, m in zip(probabilities.T, member.T > 0, strict=True))
        return cls.of_case(classes)

    @classmethod
    def of_exclusive(cls, probabilities: np.ndarray, channel: np.ndarray) -> Self:
        """Of voxels [n, k], background first, and their true channels [n]."""
        classes = tuple(ScoreHistogram.of(probabilities[:, c], channel == c) for c in range(1, probabilities.shape[1]))
        top = ScoreHistogram.of(*calibration.top_label(probabilities, channel))
        n = len(channel)
        brier = n * calibration.brier_multiclass(probabilities, channel)
        nll = n * calibration.nll(probabilities, channel, smallest=TINY)
        return cls.of_case(classes, top=top, brier=brier, nll=nll)

    def __add__(self, other: "Pooled") -> "Pooled":
        top = None if self.top is None or other.top is None else self.top + other.top
        classes, present, having = (
            tuple(map(operator.add, getattr(self, name), getattr(other, name)))
            for name in ("classes", "present", "having")
        )
        return Pooled(classes, present, having, top, self.brier + other.brier, self.nll + other.nll)

    def row(self, k: int) -> dict[str, float]:
        """The columns of cases.csv for a class."""
        histogram = self.classes[k]
        ece = calibration.reliability(histogram, mass=True).ece
        return {"ap": histogram.average_precision(), "ece": ece, "brier": calibration.histogram_brier(histogram)}

    def summary(self, names: tuple[str, ...]) -> dict[str, Any]:
        """Figures of everything pooled, with the reliability curves."""
        about: dict[str, Any] = {
            "classes": {
                name: {
                    **_areas(h),
                    "present": {"cases": cases, **(_areas(present) if cases else {})},
                    "soft_dice_pooled": _known(h.soft_dice()),
                    "prevalence": float(h.positive.sum() / h.total.sum()),
                    "brier": calibration.histogram_brier(h),
                    **_calibration(h),
                }
                for name, h, present, cases in zip(names, self.classes, self.present, self.having, strict=True)
            }
        }
        if self.top is not None:
            voxels = int(self.top.total.sum())
            about["top_label"] = {"brier": self.brier / voxels, "nll": self.nll / voxels, **_calibration(self.top)}
        return about


def score(probabilities: np.ndarray, reference: np.ndarray, labels: Labels) -> Pooled:
    """`Pooled` of one case: probabilities [*s, k], reference label map [*s]; ignored voxels take no part."""
    valid = np.ones(reference.shape, bool) if labels.ignore is None else reference != labels.ignore
    voxels, target = probabilities[valid], labels.table[reference[valid]]
    return Pooled.of_exclusive(voxels, target.argmax(-1)) if labels.exclusive else Pooled.of(voxels, target)


def _areas(histogram: ScoreHistogram) -> dict[str, float | None]:
    """Both areas under precision-recall."""
    return {"ap": _known(histogram.average_precision()), "aupr33": histogram.idrid_aupr()}


def _calibration(histogram: ScoreHistogram) -> dict[str, Any]:
    width, mass = (calibration.reliability(histogram, mass=mass) for mass in (False, True))
    return {
        "voxels": int(histogram.total.sum()),
        "ece": mass.ece,
        "ece_equal_width": width.ece,
        "mce": width.mce,
        "curve": {
            "confidence": [float(f"{v:.6g}") for v in width.confidence],
            "accuracy": [float(f"{v:.6g}") for v in width.accuracy],
            "voxels": width.count.tolist(),
        },
    }


def _known(value: float) -> float | None:
    return None if np.isnan(value) else value

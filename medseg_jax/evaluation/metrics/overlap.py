"""Overlap of two boolean masks: Dice, IoU, precision, recall, and their volumes.

With TP, FP, FN the numbers of voxels in both masks, in the prediction only and in the reference only:

    Dice = 2 TP / (2 TP + FP + FN)    IoU = TP / (TP + FP + FN)    precision = TP / (TP + FP)    recall = TP / (TP + FN)

Where a denominator is 0, the quotient says nothing. Two empty masks agree: all four score 1 (Metrics Reloaded). Where
just one mask is empty all four score 0, precision of an empty prediction and recall of an empty reference included.
That keeps every case in every mean; packages that return NaN here drop the case instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Overlap:
    """How two masks overlap. Made by `overlap`; its properties are the metrics, all in [0, 1].

    Attributes:
        tp, fp, fn: voxels in both masks, in the prediction only, in the reference only.
    """

    tp: int
    fp: int
    fn: int

    def _ratio(self, numerator: int, denominator: int) -> float:
        if denominator:
            return numerator / denominator
        return float(self.tp + self.fp + self.fn == 0)

    @property
    def dice(self) -> float:
        return self._ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        return self._ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float:
        return self._ratio(self.tp, self.tp + self.fp)

    @property
    def recall(self) -> float:
        return self._ratio(self.tp, self.tp + self.fn)


def overlap(prediction: np.ndarray, reference: np.ndarray) -> Overlap:
    """Count the voxels of two boolean masks [*s]; raises ValueError where their shapes differ."""
    prediction, reference = np.asarray(prediction, bool), np.asarray(reference, bool)
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} differ in shape")
    tp = int(np.count_nonzero(prediction & reference))
    return Overlap(tp, int(np.count_nonzero(prediction)) - tp, int(np.count_nonzero(reference)) - tp)


def volume(mask: np.ndarray, spacing: Sequence[float]) -> float:
    """Volume of a boolean mask [*s] in cubic units of the spacing (mm³; mm² or px for pictures)."""
    return float(np.count_nonzero(mask) * np.prod(spacing))


def relative_volume_error(prediction: np.ndarray, reference: np.ndarray) -> float:
    """(volume of the prediction - of the reference) / volume of the reference, of two boolean masks [*s].

    Negative: too small (MedPy's ravd; its absolute value is the relative absolute volume difference). 0 if both are
    empty, infinite if only the reference is.
    """
    o = overlap(prediction, reference)
    if o.tp + o.fn:
        return (o.fp - o.fn) / (o.tp + o.fn)
    return np.inf if o.fp else 0.0


def dice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Dice coefficient of two boolean masks [*s], in [0, 1]; 1 if both are empty."""
    return overlap(prediction, reference).dice


def iou(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Intersection over union of two boolean masks [*s], in [0, 1]; 1 if both are empty."""
    return overlap(prediction, reference).iou


def precision(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Share of the prediction [*s] that is right, in [0, 1]; 0 for an empty prediction, 1 if both are empty."""
    return overlap(prediction, reference).precision


def recall(prediction: np.ndarray, reference: np.ndarray) -> float:
    """Share of the reference [*s] that is found, in [0, 1]; 0 for an empty reference, 1 if both are empty."""
    return overlap(prediction, reference).recall

"""Are the lesions found? Connected components matched: sensitivity, precision, F1, false positives, panoptic quality.

A lesion is a connected component of a mask: voxels that touch at a face, an edge or a corner, unless told otherwise.
A predicted and a true lesion can be matched if their IoU reaches a threshold; each takes part in one match at most.
Among all such matchings one with the most pairs is taken, and of those one with the largest sum of IoU (optimal, not
greedy: a greedy choice can leave a lesion without its only partner). With TP pairs, FP predicted and FN true lesions
left over:

    sensitivity = TP / (TP + FN)    precision = TP / (TP + FP)    F1 = 2 TP / (2 TP + FP + FN)
    PQ = sum of IoU over the pairs / (TP + FP / 2 + FN / 2)          (Kirillov et al. 2019, arXiv 1801.00868)

Without any lesion on either side all are 1, false positives 0. With lesions on one side only all are 0.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.optimize import linear_sum_assignment

IOU = 0.2
"""Lesions are small and their outlines are disputed; half an overlap would be asked too much of them."""


@dataclass(frozen=True)
class Detection:
    """How the lesions of two masks match. Made by `match_lesions`; its properties are the metrics.

    Attributes:
        iou: IoU of each matched pair.
        fp, fn: lesions of the prediction and of the reference without a partner.
    """

    iou: tuple[float, ...]
    fp: int
    fn: int

    @property
    def tp(self) -> int:
        return len(self.iou)

    def _ratio(self, numerator: float, denominator: float) -> float:
        return numerator / denominator if denominator else float(self.tp + self.fp + self.fn == 0)

    @property
    def sensitivity(self) -> float:
        return self._ratio(self.tp, self.tp + self.fn)

    @property
    def precision(self) -> float:
        return self._ratio(self.tp, self.tp + self.fp)

    @property
    def f1(self) -> float:
        return self._ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def panoptic_quality(self) -> float:
        return self._ratio(sum(self.iou), self.tp + self.fp / 2 + self.fn / 2)


def match_lesions(
    prediction: np.ndarray, reference: np.ndarray, *, iou: float = IOU, connectivity: int | None = None
) -> Detection:
    """Match the lesions of two boolean masks [*s].

    Args:
        iou: least intersection over union of a pair, in (0, 1].
        connectivity: voxels belong together if they differ by one in up to this many coordinates; None: in all.
    """
    prediction, reference = np.asarray(prediction, bool), np.asarray(reference, bool)
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} differ in shape")
    if not 0 < iou <= 1:
        raise ValueError(f"iou lies in (0, 1], found {iou}")
    structure = ndimage.generate_binary_structure(prediction.ndim, connectivity or prediction.ndim)
    labelled: Any = [ndimage.label(mask, structure) for mask in (prediction, reference)]
    (p, n), (r, m) = labelled
    both = prediction & reference
    pairs, shared = np.unique(np.stack([p[both], r[both]]), axis=1, return_counts=True)  # [2, pairs], [pairs]
    sizes_p, sizes_r = np.bincount(p.ravel(), minlength=n + 1), np.bincount(r.ravel(), minlength=m + 1)
    overlap = shared / (sizes_p[pairs[0]] + sizes_r[pairs[1]] - shared)
    table = np.zeros((n, m))
    table[pairs[0] - 1, pairs[1] - 1] = np.where(overlap >= iou, overlap, 0)
    # a pair is worth more than all IoU together, so that the number of pairs comes first
    rows, columns = linear_sum_assignment(np.where(table > 0, table + min(n, m) + 1, 0), maximize=True)
    matched = table[rows, columns]
    found = tuple(float(v) for v in matched[matched > 0])
    return Detection(found, n - len(found), m - len(found))

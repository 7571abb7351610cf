"""Precision against recall from probabilities: average precision, areas over fixed thresholds, exact and streaming.

With the voxels sorted by falling score, P_t and R_t precision and recall of "score >= t" at each distinct score t:

    AP      = sum over t of (R_t - R_previous) P_t                     (scikit-learn's average_precision_score)
    AUPR_n  = trapezoid over recall of n equally spaced thresholds 0 ... 1   (IDRiD challenge: n = 33; M2MRF: n = 11)

They are different numbers: with many equal scores the trapezoid is larger (it draws a line where no operating point
is), and what precision is when nothing is predicted moves AUPR_n by up to .5 for constant scores. Name the variant.

Pooled over images, one large lesion outweighs a hundred small ones; averaged over images, each image counts the same.
Both are common, so `evaluate` reports both.

Without a positive voxel recall is 0 / 0: AP is NaN ("not defined"), never 0 or 1; AUPR_n is 0, as recall
counts as 0 there. With positives only, AP is 1.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

IDRID = np.arange(33) / 32
"""Thresholds of the IDRiD challenge's sub-task 1 (ISBI 2018): 0, 1/32, ..., 1."""


def average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Average precision, exact by sorting; NaN if no label is set.

    Args:
        scores: [*s] larger means more likely; only their order counts.
        labels: [*s] boolean.
    """
    tp, fp = _by_threshold(scores, labels)
    return _average_precision(tp, fp)


def trapezoid_area(scores: np.ndarray, labels: np.ndarray) -> float:
    """Trapezoid under the curve through every distinct score, begun at recall 0 and precision 1; NaN without positives.

    Larger than average precision where many scores are equal; for comparison with papers that report it.
    """
    tp, fp = _by_threshold(scores, labels)
    if not len(tp) or not tp[-1]:
        return np.nan
    return float(np.trapezoid(np.r_[1, tp / (tp + fp)], np.r_[0, tp / tp[-1]]))


def counts_at(scores: np.ndarray, labels: np.ndarray, thresholds: np.ndarray, *, strict: bool = False) -> np.ndarray:
    """TP, FP, FN [3, t] when a score counts as positive from each threshold on, or above it if `strict`."""
    scores, labels = np.ravel(scores).astype(np.float64), np.ravel(labels).astype(bool)
    side = "right" if strict else "left"
    positive, negative = (np.sort(scores[chosen]) for chosen in (labels, ~labels))
    tp = len(positive) - np.searchsorted(positive, thresholds, side)
    return np.stack([tp, len(negative) - np.searchsorted(negative, thresholds, side), len(positive) - tp])


def threshold_area(counts: np.ndarray, *, empty_precision: float = 1.0) -> float:
    """Area under precision against recall at fixed, rising thresholds; trapezoids over recall; in [0, 1].

    Args:
        counts: TP, FP, FN [3, t] of `counts_at` or `ScoreHistogram.counts_at`.
        empty_precision: precision where nothing is predicted.

    Recall is 0 where there is no positive voxel at all.
    """
    tp, fp, fn = np.asarray(counts, np.float64)[:, ::-1]  # from the highest threshold, so that recall rises
    precision = np.where(tp + fp > 0, tp / np.maximum(tp + fp, 1), empty_precision)
    return float(np.trapezoid(precision, tp / np.maximum(tp + fn, 1)))


def idrid_aupr(scores: np.ndarray, labels: np.ndarray) -> float:
    """AUPR of the IDRiD challenge: 33 thresholds, score > threshold, precision 1 where nothing is predicted.

    The challenge does not say whether a score at the threshold counts. It must not: scores of exactly 1 would all count
    at the highest threshold, the curve would begin at their recall, and a perfect prediction of 0 and 1 would score 0.
    """
    return threshold_area(counts_at(scores, labels, IDRID, strict=True))


def _by_threshold(scores: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """TP and FP [distinct scores] from the highest score down."""
    scores, labels = np.ravel(scores), np.ravel(labels).astype(bool)
    order = np.argsort(-scores, kind="stable")
    last = np.flatnonzero(np.diff(scores[order], append=np.nan) != 0)  # the last of each group of equal scores
    tp = np.cumsum(labels[order])[last]
    return tp, last + 1 - tp


def _average_precision(tp: np.ndarray, fp: np.ndarray) -> float:
    if not len(tp) or not tp[-1]:
        return np.nan
    return float(np.sum(np.diff(tp, prepend=0) * (tp / np.maximum(tp + fp, 1))) / tp[-1])


# ---------------------------------------------------------------------------------------------------------------------
# Streaming
# ---------------------------------------------------------------------------------------------------------------------

ONE = int(np.float16(1).view(np.uint16))
LEVELS = np.arange(ONE + 1, dtype=np.uint16).view(np.float16).astype(np.float64)
"""[15361] every float16 in [0, 1], rising: a non-negative float sorts as the integer with the same bits."""


@dataclass(frozen=True, eq=False)
class ScoreHistogram:
    """How many positive and negative voxels have each score: all that ranking and calibration metrics need of any
    number of images, in a quarter of a megabyte.

    The levels are the float16 numbers in [0, 1]. `medseg predict` writes probabilities in float16, so that nothing is
    lost there; finer scores are rounded, by at most one part in 2048. `bounds` says what rounding can do to the average
    precision at most.

    Attributes:
        positive, negative: [15361] voxels of each level.
    """

    positive: np.ndarray = field(default_factory=lambda: np.zeros(ONE + 1, np.int64))
    negative: np.ndarray = field(default_factory=lambda: np.zeros(ONE + 1, np.int64))

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray) -> "ScoreHistogram":
        """The histogram of scores [*s] in [0, 1] and boolean labels [*s]; raises ValueError outside that range."""
        scores = np.ravel(scores).astype(np.float16) + np.float16(0)  # -0.0 becomes 0.0
        codes, labels = scores.view(np.uint16), np.ravel(labels).astype(bool)
        if codes.size and int(codes.max()) > ONE:
            raise ValueError("scores must lie in [0, 1]")
        total = np.bincount(codes, minlength=ONE + 1)
        positive = np.bincount(codes[labels], minlength=ONE + 1)
        return cls(positive, total - positive)

    def __add__(self, other: "ScoreHistogram") -> "ScoreHistogram":
        return ScoreHistogram(self.positive + other.positive, self.negative + other.negative)

    @property
    def total(self) -> np.ndarray:
        """[15361] voxels of each level."""
        return self.positive + self.negative

    def average_precision(self) -> float:
        """As the function of the same name, for scores rounded to float16."""
        tp, fp = np.cumsum(self.positive[::-1]), np.cumsum(self.negative[::-1])
        return _average_precision(tp, fp)

    def bounds(self) -> tuple[float, float]:
        """Least and largest average precision that scores may have had before they were rounded; NaN, NaN without
        positives.

        Rounding keeps the order of levels and forgets the order within one. With T and F positives and negatives above
        a level of a positives and b negatives, the sum of their precisions is least if all negatives come first,
        sum_i (T + i) / (T + i + F + b), and largest if the positives are equal and come first, a (T + a) / (T + a + F).
        """
        from scipy.special import digamma

        a, b = self.positive[::-1].astype(np.float64), self.negative[::-1].astype(np.float64)
        above, wrong = np.cumsum(a) - a, np.cumsum(b) - b
        if not a.sum():
            return np.nan, np.nan
        f = wrong + b
        # sum_i f / (T + i + f) telescopes into digamma; without negatives there is nothing to subtract
        lost = np.where(f > 0, f * (digamma(above + f + a + 1) - digamma(above + f + 1)), 0)
        best = a * (above + a) / np.maximum(above + a + wrong, 1)
        return float(np.sum(a - lost) / a.sum()), float(np.sum(best) / a.sum())

    def counts_at(self, thresholds: np.ndarray, *, strict: bool = False) -> np.ndarray:
        """As the function of the same name."""
        first = np.searchsorted(LEVELS, thresholds, "right" if strict else "left")
        above: Callable[[np.ndarray], np.ndarray] = lambda n: np.r_[np.cumsum(n[::-1])[::-1], 0][first]  # noqa: E731
        tp = above(self.positive)
        return np.stack([tp, above(self.negative), self.positive.sum() - tp])

    def soft_dice(self) -> float:
        """Dice of the scores themselves, 2 Σ p y / (Σ p + Σ y) over all voxels; NaN if all of both is 0.

        What Med-2D SegNet's follow-up code prints as its Dice. It pools voxels, so that large objects weigh more, and
        it is no Dice of any mask: do not compare it with one.
        """
        size = float((LEVELS * self.total).sum() + self.positive.sum())
        return 2 * float((LEVELS * self.positive).sum()) / size if size else np.nan

    def idrid_aupr(self) -> float:
        """As the function of the same name."""
        return threshold_area(self.counts_at(IDRID, strict=True))

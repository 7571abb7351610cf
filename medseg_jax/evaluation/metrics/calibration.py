"""Do probabilities mean what they say? Reliability curve, ECE, MCE, Brier score, negative log-likelihood.

Voxels are put into bins by their confidence. With n_b voxels in bin b, conf_b their mean confidence and acc_b the share
of them that are right:

    ECE = sum_b n_b / n |acc_b - conf_b|    RMS = sqrt(sum_b n_b / n (acc_b - conf_b)^2)    MCE = max_b |acc_b - conf_b|
    Brier = mean (p - y)^2                  NLL = - mean log p(true class)

(Guo et al. 2017, arXiv 1706.04599; Naeini et al. 2015; Brier 1950.) Two questions look alike and are not:

    binary      confidence = probability of the class, right = the voxel belongs to it
    top label   confidence = largest probability, right = that class is the true one   (`top_label`)

Equal-width bins hold [lower, upper); a confidence of exactly 1 has a bin to itself, as in torchmetrics, since it is a
claim of another kind than .95. Equal-mass bins hold the same number of voxels each, equal confidences undivided, and so
do not rest on a handful of voxels where confidences crowd at 0 and 1, as they do in segmentation; prefer them there.

Over whole images most voxels are easy background, so ECE and Brier are small for any model: compare models with them,
don't praise one. Voxels with the ignore label must be left out by the caller (`evaluate` does). Without voxels
everything here is NaN.
"""

from dataclasses import dataclass

import numpy as np

from medseg_jax.evaluation.metrics.pr import LEVELS, ScoreHistogram

BINS = 15
SMALLEST = 1e-15


@dataclass(frozen=True, eq=False)
class Reliability:
    """The reliability curve: bins with voxels in them, by rising confidence.

    Attributes:
        count: [bins] voxels.
        confidence: [bins] their mean confidence.
        accuracy: [bins] share of them that are right.
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error, in [0, 1]."""
        return self._norm(1)

    @property
    def rms(self) -> float:
        """Root mean square calibration error (torchmetrics' l2 without debiasing), in [0, 1]."""
        return self._norm(2) ** 0.5

    @property
    def mce(self) -> float:
        """Maximum calibration error, in [0, 1]."""
        return float(np.max(np.abs(self.accuracy - self.confidence))) if len(self.count) else np.nan

    def _norm(self, power: int) -> float:
        if not len(self.count):
            return np.nan
        return float(np.average(np.abs(self.accuracy - self.confidence) ** power, weights=self.count))


def reliability(
    confidence: np.ndarray | ScoreHistogram, right: np.ndarray | None = None, *, bins: int = BINS, mass: bool = False
) -> Reliability:
    """The reliability curve of single voxels, or of a histogram of any number of images.

    Args:
        confidence: [*s] in [0, 1]; or a histogram whose positives are the voxels that are right.
        right: [*s] boolean.
        bins: number of bins; of equal mass there are fewer where confidences are equal.
        mass: bins with equal numbers of voxels instead of equal widths.
    """
    if isinstance(confidence, ScoreHistogram):
        used = confidence.total > 0
        level, total, hits = LEVELS[used], confidence.total[used], confidence.positive[used]
    else:
        flat = np.ravel(confidence).astype(np.float64)
        level, inverse, total = np.unique(flat, return_inverse=True, return_counts=True)
        hits = np.bincount(inverse, weights=np.asarray(right, np.float64).ravel(), minlength=len(level))
    if mass:
        before = np.cumsum(total) - total  # voxels with less confidence: they decide where a level belongs
        index = before * bins // max(int(total.sum()), 1)
    else:
        index = np.searchsorted(np.linspace(0, 1, bins + 1), level, "right") - 1
    names, index = np.unique(index, return_inverse=True)
    count, sums, hits = (np.bincount(index, weights=w, minlength=len(names)) for w in (total, total * level, hits))
    return Reliability(count.astype(np.int64), sums / count, hits / count)


def top_label(probabilities: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities [*s, k] and true channels [*s] -> confidence [*s] of the likeliest class; if it is right."""
    best = np.argmax(probabilities, -1)
    return np.take_along_axis(probabilities, best[..., None], -1)[..., 0], best == labels


def brier(probability: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared error of the probability [*s] of a class against boolean labels [*s], in [0, 1]."""
    error = np.ravel(probability).astype(np.float64) - np.ravel(labels)
    return float(np.mean(error**2)) if error.size else np.nan


def brier_multiclass(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Squared errors of probabilities [*s, k] against one-hot true channels [*s], summed over classes, in [0, 2]."""
    p = probabilities.reshape(-1, probabilities.shape[-1]).astype(np.float64)
    if not len(p):
        return np.nan
    return float(np.mean(np.sum(p**2, 1) - 2 * p[np.arange(len(p)), np.ravel(labels)] + 1))


def nll(probabilities: np.ndarray, labels: np.ndarray, *, smallest: float = SMALLEST) -> float:
    """Mean of -log of the true class's probability, in nats; probabilities [*s, k], true channels [*s].

    Args:
        smallest: probabilities below count as this, so that one zero does not make the mean infinite (for float16 on
            disk, use its smallest number, 2^-24).
    """
    p = probabilities.reshape(-1, probabilities.shape[-1]).astype(np.float64)
    if not len(p):
        return np.nan
    return float(np.mean(-np.log(np.clip(p[np.arange(len(p)), np.ravel(labels)], smallest, 1))))


def histogram_brier(histogram: ScoreHistogram) -> float:
    """`brier` of everything that a histogram holds."""
    count = int(histogram.total.sum())
    squares = histogram.positive @ (1 - LEVELS) ** 2 + histogram.negative @ LEVELS**2
    return float(squares / count) if count else np.nan

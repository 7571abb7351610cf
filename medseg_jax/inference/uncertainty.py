"""How sure a prediction is, voxel by voxel. With p_mc the probability that member m of M gives class c of k, and
p_c = mean_m p_mc what is predicted:

    entropy              H(p) = - sum_c p_c log p_c / log k                                          in [0, 1]
    variance             1/2 sum_c mean_m (p_mc - p_c)^2                                             in [0, 1/2)
    mutual information   H(p) - mean_m H(p_m)                                                        in [0, 1]

For two classes the variance is that of the foreground's probability. Classes that may overlap are binary questions of
their own: each of the three is then the mean over them (k = 2 in each). Outside what a network saw, all three are 0.

The entropy grows wherever the prediction is undecided; variance and mutual information only where members disagree.
Members are the runs of an ensemble times the scales and views of test-time augmentation. They are compared in the
image's own grid, after their windows have been blended.

Sources: Shannon entropy as predictive uncertainty and mutual information as its epistemic part: Gal, Islam &
Ghahramani (ICML 2017), after Houlsby et al. (BALD, 2011); over test-time augmentations: Wang et al. (Neurocomputing
2019); over an ensemble: Lakshminarayanan, Pritzel & Blundell (NeurIPS 2017).
"""

from collections.abc import Sequence

import numpy as np

LARGEST = {"entropy": 1.0, "variance": 0.5, "mutual_information": 1.0}
"""Every map and the value that is white in its picture."""


def entropy(probabilities: np.ndarray, exclusive: bool) -> np.ndarray:
    """Normalised entropy [*s] float32 of probabilities [*s, k], in [0, 1]."""
    p = np.clip(probabilities, 0, 1)
    if exclusive:
        return np.clip(-_xlogx(p).sum(-1) / np.log(p.shape[-1], dtype=np.float32), 0, 1)
    return np.clip(-(_xlogx(p) + _xlogx(1 - p)).mean(-1) / np.log(2, dtype=np.float32), 0, 1)


def _xlogx(p: np.ndarray) -> np.ndarray:
    return p * np.log(np.maximum(p, np.finfo(np.float32).tiny))


def maps(members: Sequence[np.ndarray], mean: np.ndarray, exclusive: bool) -> dict[str, np.ndarray]:
    """The maps [*s] float32 of some voxels; without members to compare the entropy alone.

    Args:
        members: probabilities [*s, k] of each.
        mean: of them.
        exclusive: one class a voxel (softmax), or one sigmoid a class.
    """
    total = entropy(mean, exclusive)
    if len(members) == 1:
        return {"entropy": total}
    variance, expected = np.zeros_like(total), np.zeros_like(total)
    for p in members:
        difference = np.square(p - mean)
        variance += difference.sum(-1) / 2 if exclusive else difference.mean(-1)
        expected += entropy(p, exclusive)
    information = np.maximum(total - expected / len(members), 0)  # Jensen: negative by rounding only
    return {"entropy": total, "variance": variance / len(members), "mutual_information": information}


def names(members: int) -> tuple[str, ...]:
    """Which maps there are with so many members."""
    return tuple(LARGEST) if members > 1 else ("entropy",)

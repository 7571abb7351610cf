"""Matching of lesions: optimal, one to one, symmetric, and what empty masks score."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from medseg_jax.evaluation.metrics.detection import match_lesions


def line(*ranges, size=30):
    mask = np.zeros((3, size), bool)
    for a, b in ranges:
        mask[1, a:b] = True
    return mask


def test_counts_of_a_known_case():
    reference, prediction = line((0, 4), (8, 12), (20, 24)), line((0, 4), (9, 13), (15, 17))
    found = match_lesions(prediction, reference)
    assert sorted(found.iou) == [pytest.approx(3 / 5), 1]
    assert (found.tp, found.fp, found.fn) == (2, 1, 1)
    assert found.sensitivity == found.precision == found.f1 == pytest.approx(2 / 3)
    assert found.panoptic_quality == pytest.approx(1.6 / 3)
    assert match_lesions(prediction, reference, iou=0.7).tp == 1


def test_the_matching_is_one_to_one_and_has_the_most_pairs():
    """One long prediction over two lesions matches one; greedy by IoU would strand the second prediction."""
    assert match_lesions(line((0, 10)), line((0, 4), (6, 10)), iou=0.1).tp == 1
    reference, prediction = line((0, 6), (7, 20)), line((5, 13), (14, 20))
    found = match_lesions(prediction, reference, iou=0.05)
    assert found.tp == 2


@pytest.mark.parametrize(("connectivity", "lesions"), [(1, 2), (2, 1), (None, 1)])
def test_connectivity(connectivity, lesions):
    mask = np.eye(2, dtype=bool)
    assert match_lesions(mask, mask, connectivity=connectivity).tp == lesions


def test_empty_masks():
    none, some = line(), line((0, 3), (5, 7))
    both = match_lesions(none, none)
    assert (both.f1, both.sensitivity, both.precision, both.panoptic_quality, both.fp) == (1, 1, 1, 1, 0)
    for p, r, fp in ((some, none, 2), (none, some, 0)):
        one = match_lesions(p, r)
        assert (one.f1, one.sensitivity, one.precision, one.panoptic_quality, one.fp) == (0, 0, 0, 0, fp)


def best_by_trying(prediction, reference, iou):
    (p, n), (r, m) = (ndimage.label(mask, np.ones((3, 3))) for mask in (prediction, reference))
    table = np.array(
        [[np.sum((p == i) & (r == j)) / np.sum((p == i) | (r == j)) for j in range(1, m + 1)] for i in range(1, n + 1)]
    ).reshape(n, m)
    table = np.where(table >= iou, table, 0)
    table = table if n <= m else table.T
    tries = [[table[i, j] for i, j in enumerate(order)] for order in permutations(range(max(n, m)), min(n, m))]
    return max((sum(v > 0 for v in t), round(sum(t), 9)) for t in tries)


masks = arrays(bool, (5, 7), elements=st.sampled_from([False, False, True]))


@given(masks, masks, st.sampled_from([0.05, 0.2, 0.5]))
@settings(max_examples=80, deadline=None)
def test_optimal_and_symmetric(prediction, reference, iou):
    found, mirrored = match_lesions(prediction, reference, iou=iou), match_lesions(reference, prediction, iou=iou)
    assert (found.tp, found.fp, found.fn) == (mirrored.tp, mirrored.fn, mirrored.fp)
    assert (found.tp, round(sum(found.iou), 9)) == best_by_trying(prediction, reference, iou)
    assert match_lesions(reference, reference, iou=iou).f1 == 1


@pytest.mark.parametrize("iou", [0, 1.2])
def test_bad_input(iou):
    with pytest.raises(ValueError, match="iou"):
        match_lesions(line(), line(), iou=iou)
    with pytest.raises(ValueError, match="differ in shape"):
        match_lesions(line(), line(size=5))

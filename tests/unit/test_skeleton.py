"""The skeleton keeps the topology, equals a brute-force peeling, and clDice follows its formula."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from medseg_jax.evaluation.metrics.cldice import cldice, is_simple, skeleton


def components(mask, connectivity):
    return ndimage.label(mask, ndimage.generate_binary_structure(mask.ndim, connectivity))[1]


def holes(mask):
    """Components of the background: 1 + cavities (3-D) or holes (2-D)."""
    return components(~np.pad(mask, 1), 1)


def euler(mask):
    """Euler number of the union of the closed voxels: alternating sum of their faces of each dimension."""
    doubled = np.zeros([2 * n + 1 for n in mask.shape], bool)
    for at in np.argwhere(mask):
        doubled[tuple(slice(2 * i, 2 * i + 3) for i in at)] = True
    dimension = sum(np.ix_(*(np.arange(n) % 2 for n in doubled.shape)))
    return int(np.sum(doubled * (-1) ** dimension))


def simple_by_definition(mask):
    """Of the centre of a 3 x 3 (x 3) mask: the same components, holes and tunnels with and without it."""
    without = mask.copy()
    without[(1,) * mask.ndim] = False
    same = [components(m, m.ndim) for m in (mask, without)], [holes(m) for m in (mask, without)]
    return all(a == b for a, b in same) and euler(mask) == euler(without)


def brute_force(mask):
    """The peeling of `skeleton`, one voxel after another."""
    left = np.pad(mask, 1)
    steps = [s for s in product((-1, 0, 1), repeat=mask.ndim) if any(s)]

    def removable(at):
        cut = left[tuple(slice(i - 1, i + 2) for i in at)]
        return cut.sum() > 2 and simple_by_definition(cut)

    before = None
    while before is None or (before != left).any():
        before = left.copy()
        for side in (s for s in steps if np.abs(s).sum() == 1):
            surface = [at for at in map(tuple, np.argwhere(left)) if not left[tuple(np.add(at, side))]]
            surface = [at for at in surface if removable(at)]
            for at in sorted(surface, key=lambda at: sum((i % 2) << a for a, i in enumerate(at))):
                if removable(at):
                    left[at] = False
    return left[(slice(1, -1),) * mask.ndim]


def test_simple_by_all_neighbourhoods_in_2d():
    around = (np.arange(256)[:, None] >> np.arange(8) & 1).astype(bool)
    masks = np.insert(around, 4, True, axis=1).reshape(-1, 3, 3)
    np.testing.assert_array_equal(is_simple(around, 2), [simple_by_definition(m) for m in masks])


def test_simple_by_many_neighbourhoods_in_3d():
    rng = np.random.default_rng(0)
    around = rng.random((1500, 26)) < rng.uniform(0.1, 0.9, (1500, 1))
    found = is_simple(around, 3)
    masks = np.insert(around, 13, True, axis=1).reshape(-1, 3, 3, 3)
    np.testing.assert_array_equal(found, [simple_by_definition(m) for m in masks])
    assert 50 < found.sum() < 1450


def blobs(rng, shape, level):
    return ndimage.gaussian_filter(rng.random(shape), 1.2) > level


@pytest.mark.parametrize("shape", [(14, 17), (7, 8, 9)])
def test_the_skeleton_equals_one_voxel_at_a_time(shape):
    mask = blobs(np.random.default_rng(1), shape, 0.49)
    np.testing.assert_array_equal(skeleton(mask), brute_force(mask))


@pytest.mark.parametrize("shape", [(40, 50), (14, 16, 18)])
@pytest.mark.parametrize("seed", range(3))
def test_the_skeleton_keeps_the_topology_and_is_thin(shape, seed):
    mask = blobs(np.random.default_rng(seed), shape, 0.5)
    line = skeleton(mask)
    assert not (line & ~mask).any()
    assert components(line, line.ndim) == components(mask, mask.ndim)
    assert (holes(line), euler(line)) == (holes(mask), euler(mask))
    assert 0 < line.sum() < 0.6 * mask.sum()
    np.testing.assert_array_equal(skeleton(line), line)


def test_a_thick_line_becomes_its_middle():
    mask = np.zeros((11, 40), bool)
    mask[3:8, 2:38] = True
    line = skeleton(mask)
    assert (line.sum(0) <= 1).all()
    assert line[5, 5:35].all()


@given(arrays(bool, st.tuples(st.integers(1, 9), st.integers(1, 9))))
@settings(max_examples=60, deadline=None)
def test_cldice_laws(mask):
    assert cldice(mask, mask) == 1
    other = np.roll(mask, 1, 0)
    assert 0 <= cldice(mask, other) <= 1
    assert cldice(mask, other) == pytest.approx(cldice(other, mask))
    assert cldice(mask, ~mask) == 0
    assert cldice(mask, np.zeros_like(mask)) == float(not mask.any())


def test_cldice_by_its_formula():
    reference, prediction = np.zeros((3, 20), bool), np.zeros((3, 20), bool)
    reference[1, :20] = True
    prediction[1, :5] = True  # all of it right, a quarter found
    assert cldice(prediction, reference) == pytest.approx(2 * 1 * 0.25 / 1.25)
    with pytest.raises(ValueError, match="differ in shape"):
        cldice(prediction, reference[:2])

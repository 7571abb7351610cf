"""Connected components: known pictures, laws that hold for any mask."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from medseg_jax.ops.components import fill_holes, keep_largest, remove_small

masks = arrays(bool, st.one_of(st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 5)] * 3)))


def picture(*rows: str) -> np.ndarray:
    return np.array([[c == "#" for c in row] for row in rows])


RING = picture("......", ".###..", ".#.#.#", ".###..", "......")


def test_known_pictures():
    np.testing.assert_array_equal(keep_largest(RING), picture("......", ".###..", ".#.#..", ".###..", "......"))
    np.testing.assert_array_equal(fill_holes(RING), picture("......", ".###..", ".###.#", ".###..", "......"))
    np.testing.assert_array_equal(remove_small(RING, 2), keep_largest(RING))
    np.testing.assert_array_equal(remove_small(RING, 1), RING)
    diagonal = picture("#..", ".#.", "..#")
    np.testing.assert_array_equal(keep_largest(diagonal), diagonal)
    twins = picture("#.#", "#.#")
    np.testing.assert_array_equal(keep_largest(twins), picture("#..", "#.."))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_one_voxel_thick_is_filled_as_a_picture(axis):
    np.testing.assert_array_equal(fill_holes(np.expand_dims(RING, axis)), np.expand_dims(fill_holes(RING), axis))


def test_a_shell_is_filled_and_a_tunnel_is_not():
    shell = np.ones((5, 5, 5), bool)
    shell[1:4, 1:4, 1:4] = False
    assert fill_holes(shell).all()
    shell[0, 2, 2] = False
    np.testing.assert_array_equal(fill_holes(shell), shell)


@settings(deadline=None)
@given(mask=masks, voxels=st.integers(0, 9))
def test_laws(mask, voxels):
    before = mask.copy()
    largest, filled, large = keep_largest(mask), fill_holes(mask), remove_small(mask, voxels)
    np.testing.assert_array_equal(mask, before)
    assert (largest <= mask).all()
    assert (filled >= mask).all()
    assert (large <= mask).all()
    assert largest.any() == mask.any()
    components, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    sizes = np.bincount(components.ravel())[1:]
    assert largest.sum() == (sizes.max() if count else 0)
    assert large.sum() == sizes[sizes >= voxels].sum()
    for once, again in ((largest, keep_largest), (filled, fill_holes), (large, lambda m: remove_small(m, voxels))):
        np.testing.assert_array_equal(again(once), once)

"""Connected components: known pictures, laws that hold for any mask."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from medseg_jax.methods.teacher import pseudo_target
from medseg_jax.ops.components import RANKS, fill_holes, keep_largest, label, largest_component, remove_small
from medseg_jax.types import UserError

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


# ------------------------------------------------------------------------------------------------------- on the device

HOODS = [(size, n) for size in ((7, 10), (4, 5, 6)) for n in RANKS[len(size)]]
on_device = {(size, n): [jax.jit(partial(f, neighbours=n)) for f in (label, largest_component)] for size, n in HOODS}


@pytest.mark.parametrize(("size", "neighbours"), HOODS)
def test_on_the_device_as_by_scipy(size, neighbours):
    structure = ndimage.generate_binary_structure(len(size), RANKS[len(size)][neighbours])
    find, keep = on_device[size, neighbours]

    @settings(deadline=None)
    @given(masks=arrays(bool, (2, *size)))
    def check(masks):
        labels, largest = find(masks), keep(masks)
        for mask, ours, one in zip(masks, labels, largest, strict=True):
            expected, count = ndimage.label(mask, structure)
            np.testing.assert_array_equal(ours, expected)
            best = 1 + np.bincount(expected.ravel())[1:].argmax() if count else -1
            np.testing.assert_array_equal(one, expected == best)

    check()


def test_a_path_through_the_whole_volume_is_followed_to_its_end():
    path = np.zeros((9, 9, 9), bool)
    for z in range(0, 9, 2):  # a snake in every other plane, joined at alternating ends
        path[z, ::2] = True
        path[z, 1::4, -1] = path[z, 3::4, 0] = True
    path[1::4, -1, -1] = path[3::4, 0, 0] = True
    for neighbours in RANKS[3]:
        labels = jax.jit(label, static_argnums=1)(path[None], neighbours)
        expected, count = ndimage.label(path, ndimage.generate_binary_structure(3, RANKS[3][neighbours]))
        assert count == 1
        np.testing.assert_array_equal(labels[0], expected)


def test_each_class_keeps_its_largest_component_in_a_step_that_has_no_callback():
    labels = np.array([[[1, 0, 1, 1], [0, 2, 0, 0], [2, 0, 2, 0], [0, 0, 0, 3]]] * 2, np.uint8)
    program = jax.jit(lambda labels: pseudo_target(jax.nn.one_hot(labels, 5), True, 4).argmax(-1))
    expected = [[0, 0, 1, 1], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 3]]
    np.testing.assert_array_equal(program(labels), [expected] * 2)
    assert "custom-call" not in program.lower(labels).compile().as_text()


def test_elements_of_a_batch_do_not_meet():
    masks = jnp.zeros((2, 4, 4), bool).at[0, 3].set(True).at[1, 0].set(True)
    assert jax.jit(label, static_argnums=1)(masks, 4).max() == 1
    assert jax.jit(largest_component, static_argnums=1)(masks, 4).sum() == 8


@pytest.mark.parametrize(("shape", "neighbours"), [((1, 4, 4), 6), ((1, 4, 4, 4), 8), ((1, 4), 4)])
def test_a_neighbourhood_that_does_not_exist_is_named(shape, neighbours):
    with pytest.raises(UserError, match="No such neighbourhood"):
        label(jnp.zeros(shape, bool), neighbours)

"""Sliding windows: coverage, partition of unity, any size against any patch, slabs, compiled shapes, memory."""

import tracemalloc
from math import ceil, prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_jax.inference.sliding_window import (
    axis_weights,
    gaussian,
    memory_bound,
    plan_windows,
    predict_slabs,
    predict_volume,
    slab_axis,
)
from medseg_jax.types import UserError

sizes = st.integers(1, 40)
patches = st.integers(1, 13)
overlaps = st.sampled_from([0.0, 0.25, 0.5, 0.7, 0.99])


def pointwise(image):
    """A network that sees single voxels: [b, *s, c] -> two channels."""
    first = np.asarray(image)[..., :1]
    return np.concatenate([np.tanh(first), first**2], -1)


def random_image(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


# ------------------------------------------------------------------------------------------------------------- windows


@given(size=st.integers(1, 200), patch=st.integers(1, 60), overlap=overlaps)
def test_windows_cover_everything_evenly(size, patch, overlap):
    ((*starts,),) = plan_windows([size], [patch], overlap)
    assert starts[0] == 0
    assert starts[-1] == max(size - patch, 0)
    gaps = np.diff(starts)
    assert (gaps > 0).all()
    assert (gaps <= patch).all(), "a gap between windows"
    if len(gaps):
        assert gaps.max() - gaps.min() <= 2
        assert gaps.mean() <= max(patch * (1 - overlap), 1)
    covered = np.zeros(max(size, patch), bool)
    for start in starts:
        covered[start : start + patch] = True
    assert covered.all()


@pytest.mark.parametrize(
    ("size", "patch", "expected"),
    [
        (110, 64, (0, 23, 46)),
        (64, 64, (0,)),
        (65, 64, (0, 1)),
        (30, 64, (0,)),
        (128, 64, (0, 32, 64)),
        (3, 1, (0, 1, 2)),
    ],
)
def test_windows_follow_nnunets_rule(size, patch, expected):
    assert plan_windows([size], [patch], 0.5) == (expected,)


@pytest.mark.parametrize("overlap", [-0.1, 1.0, 2.0])
def test_overlap_outside_its_range_is_refused(overlap):
    with pytest.raises(UserError, match="laid out"):
        plan_windows([10], [5], overlap)


@given(patch=st.integers(1, 300))
def test_gaussian_is_positive_symmetric_and_peaks_in_the_middle(patch):
    g = gaussian(patch)
    assert (g >= np.exp(-8)).all()
    np.testing.assert_array_equal(g, g[::-1])
    assert g.argmax() == (patch - 1) // 2
    assert g.max() <= 1


@given(size=st.integers(1, 200), patch=st.integers(1, 60), overlap=overlaps)
def test_weights_are_a_partition_of_unity(size, patch, overlap):
    (starts,) = plan_windows([size], [patch], overlap)
    weights = axis_weights(starts, patch)
    assert (weights > 0).all()
    total = np.zeros(max(size, patch))
    for start, w in zip(starts, weights, strict=True):
        total[start : start + patch] += w
    np.testing.assert_allclose(total, 1, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- prediction


@settings(max_examples=40, deadline=None)
@given(shape=st.tuples(*[st.integers(1, 17)] * 3), patch=st.tuples(*[st.integers(1, 7)] * 3), batch=st.integers(1, 5))
def test_pointwise_network_gives_the_whole_image_3d(shape, patch, batch):
    image = random_image(*shape, 1)
    result = predict_volume(pointwise, image, patch, 2, 0.5, batch)
    assert result.shape == (*shape, 2)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, pointwise(image), atol=2e-6, rtol=2e-6)


@settings(max_examples=40, deadline=None)
@given(shape=st.tuples(st.integers(1, 5), sizes, sizes), patch=st.tuples(patches, patches), overlap=overlaps)
def test_pointwise_network_gives_the_whole_image_2d(shape, patch, overlap):
    image = random_image(*shape, 3)
    if overlap == 0.99:
        image = image[:1, :12, :12]
    result = predict_volume(pointwise, image, patch, 2, overlap, 4)
    np.testing.assert_allclose(result, pointwise(image), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("patch", [(4, 6, 8), (6, 8)])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 9, 30), (2, 5, 7), (4, 6, 8), (5, 13, 9), (13, 1, 20), (12, 18, 24)])
def test_constant_network_gives_a_constant(shape, patch):
    def constant(image):
        return np.broadcast_to(np.float32([0.25, 0.75, 1]), (*image.shape[:-1], 3))

    result = predict_volume(constant, random_image(*shape, 1), patch, 3, 0.6, 2)
    np.testing.assert_allclose(result, np.broadcast_to([0.25, 0.75, 1], (*shape, 3)), atol=1e-6)


def blur(image):
    """A network that sees its neighbours, so that windows differ where they overlap."""
    image = jnp.asarray(image)
    axes = range(1, image.ndim - 1)
    return sum(jnp.roll(image, shift, axis) * (0.1 + 0.05 * axis + 0.1 * shift) for axis in axes for shift in (0, 1))


@pytest.mark.parametrize(("shape", "patch"), [((7, 11, 9), (3, 5, 4)), ((3, 11, 9), (5, 4)), ((1, 21, 9), (5, 4))])
def test_overlapping_windows_are_averaged_as_in_the_plain_whole_volume_formula(shape, patch):
    image = random_image(*shape, 1)
    window = (1, *patch)[-3:]
    starts = plan_windows(shape, window, 0.5)
    weight = np.einsum("i,j,k->ijk", *map(gaussian, window))
    total, count = np.zeros((*shape, 1)), np.zeros(shape)
    for z in starts[0]:
        for y in starts[1]:
            for x in starts[2]:
                place = np.s_[z : z + window[0], y : y + window[1], x : x + window[2]]
                p = np.asarray(blur(image[place].reshape(1, *patch, 1))).reshape(*window, 1)
                total[place] += p * weight[..., None]
                count[place] += weight
    np.testing.assert_allclose(predict_volume(blur, image, patch, 1, 0.5, 3), total / count[..., None], atol=1e-5)


@pytest.mark.parametrize(("shape", "patch"), [((20, 6, 5), (4, 4, 4)), ((6, 9, 9), (4, 4)), ((1, 40, 9), (8, 4))])
def test_slabs_come_in_order_and_hold_no_more_than_a_window(shape, patch):
    image = random_image(*shape, 1)
    axis = slab_axis(shape, patch)
    slabs = list(predict_slabs(pointwise, image, patch, 2, axis=axis))
    assert axis == (1 if shape[0] == 1 else 0)
    assert len(slabs) > 2
    position = 0
    for start, probabilities in slabs:
        assert start == position
        assert probabilities.shape[axis] <= (1, *patch)[-3:][axis]
        position += probabilities.shape[axis]
    assert position == shape[axis]
    whole = np.concatenate([p for _, p in slabs], axis)
    np.testing.assert_allclose(whole, pointwise(image), atol=2e-6)


@settings(max_examples=8, deadline=None)
@given(size=st.tuples(sizes, sizes), patch=st.tuples(patches, patches), batch=st.integers(1, 5))
def test_slabs_along_the_height_are_those_along_the_depth(size, patch, batch):
    image = random_image(1, *size, 1)
    slabs = [p for _, p in predict_slabs(blur, image, patch, 1, 0.5, batch, axis=1)]
    np.testing.assert_array_equal(np.concatenate(slabs, 1), predict_volume(blur, image, patch, 1, 0.5, batch))


@pytest.mark.parametrize(("shape", "patch"), [((2, 9, 9), (4, 4)), ((1, 9, 9), (1, 4, 4))])
def test_slabs_along_the_height_are_for_pictures_only(shape, patch):
    with pytest.raises(ValueError, match="need a picture"):
        next(predict_slabs(pointwise, random_image(*shape, 1), patch, 2, axis=1))


def test_a_slab_stays_as_it_was_when_the_next_ones_are_computed():
    image = random_image(20, 6, 5, 1)
    kept, copies = [], []
    for _, probabilities in predict_slabs(pointwise, image, (4, 4, 4), 2):
        kept.append(probabilities)
        copies.append(probabilities.copy())
    for a, b in zip(kept, copies, strict=True):
        np.testing.assert_array_equal(a, b)


# ----------------------------------------------------------------------------------------------------- batches, shapes


@pytest.mark.parametrize(("batch", "expected"), [(1, 1), (4, 4), (7, 7), (100, 32)])
def test_the_network_is_compiled_for_one_shape(batch, expected):
    seen = []

    @jax.jit
    def network(image):
        seen.append(image.shape)
        return image

    image = random_image(9, 9, 9, 1)
    windows = prod(map(len, plan_windows((9, 9, 9), (4, 6, 5))))
    assert windows == 4 * 2 * 3
    predict_volume(network, image, (4, 6, 5), 1, 0.5, batch)
    assert seen == [(expected, 4, 6, 5, 1)]


@pytest.mark.parametrize(("shape", "patch"), [((3, 5, 4), (4, 6, 5)), ((1, 30, 40), (32, 48))])
def test_a_single_window_costs_a_single_patch(shape, patch):
    seen = []
    predict_volume(lambda x: seen.append(x.shape) or x, random_image(*shape, 2), patch, 2, 0.5, batch_size=8)
    assert seen == [(1, *patch, 2)]


def test_padding_is_zero_and_on_both_sides():
    seen = []
    predict_volume(lambda x: seen.append(np.array(x)) or x, np.ones((1, 2, 3, 1), np.float32), (4, 6), 1)
    expected = np.zeros((4, 6))
    expected[1:3, 1:4] = 1
    np.testing.assert_array_equal(seen[0][0, ..., 0], expected)


def test_the_next_batch_is_dispatched_before_the_last_one_is_fetched():
    events = []

    def network(image):
        events.append("run")
        return image

    image = random_image(1, 4, 40, 1)
    for _ in predict_slabs(network, image.reshape(10, 4, 4, 1), (4, 4), 1):
        events += ["slab"]
    assert events[:3] == ["run", "run", "slab"], "the first slab must come after the following batch has been started"
    assert events.count("run") == 10


def test_a_network_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 2\); \(1, 4, 4, 3\) was expected"):
        predict_volume(pointwise, random_image(1, 4, 4, 1), (4, 4), 3)


# -------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize(
    ("shape", "patch"),
    [((60, 40, 40), (8, 16, 16)), ((40, 64, 64), (32, 32)), ((1, 600, 400), (64, 64)), ((3, 5, 6), (8, 16, 16))],
)
def test_memory_stays_below_the_printed_bound(shape, patch):
    image = random_image(*shape, 1)
    k, axis = 6, slab_axis(shape, patch)

    def network(x):
        return jnp.broadcast_to(x, (*x.shape[:-1], k))

    def run():
        for _ in predict_slabs(network, image, patch, k, 0.5, 2, axis=axis):
            pass

    run()
    tracemalloc.start()
    run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    bound = memory_bound(shape, patch, 1, k, 2, axis)
    assert peak + image.nbytes <= bound + 100_000, f"{peak + image.nbytes} > {bound}"
    if shape[0] == 60:
        assert peak < 0.75 * prod(shape) * k * 4, "the whole probability volume was held"


def test_the_bound_does_not_grow_with_depth_times_classes():
    thin, thick = (memory_bound((d, 512, 512), (64, 128, 128), 1, 20, 2) for d in (500, 1000))
    assert thick - thin == 500 * 512 * 512 * 4, "only the image grows"
    assert thick < 0.3 * 1000 * 512 * 512 * 20 * 4
    rows = ceil(2848 / 512)
    assert memory_bound((1, 2848, 4288), (512, 512), 3, 6, 1, axis=1) < 4 * 2848 * 4288 * (3 + 6 * 3 / rows * 1.5)

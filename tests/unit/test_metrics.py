"""Metrics on masks: closed forms, empty masks, borders, anisotropic spacing, symmetry."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from medseg_jax.evaluation.metrics import surface
from medseg_jax.evaluation.metrics.overlap import (
    Overlap,
    dice,
    iou,
    overlap,
    precision,
    recall,
    relative_volume_error,
    volume,
)
from medseg_jax.evaluation.metrics.surface import assd, hausdorff, nsd, surface_distances

SURFACES = ("subvoxel", "voxel")


def box(shape, *ranges):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


def masks(dims):
    shapes = hnp.array_shapes(min_dims=dims, max_dims=dims, min_side=1, max_side=6)
    return shapes.flatmap(lambda shape: st.tuples(hnp.arrays(bool, shape), hnp.arrays(bool, shape)))


SPACINGS = st.floats(0.3, 5).map(lambda s: round(s, 2))


# ---------------------------------------------------------------------------------------------------- overlap


def test_overlap_counts():
    prediction, reference = box((4, 4), (0, 2), (0, 4)), box((4, 4), (1, 3), (0, 3))
    assert (o := overlap(prediction, reference)) == Overlap(3, 5, 3)
    assert dice(prediction, reference) == o.dice == 6 / 14
    assert iou(prediction, reference) == o.iou == 3 / 11
    assert precision(prediction, reference) == o.precision == 3 / 8
    assert recall(prediction, reference) == o.recall == 3 / 6
    assert volume(prediction, (2, 0.5)) == 8


def test_overlap_of_different_shapes_is_refused():
    with pytest.raises(ValueError, match="differ in shape"):
        overlap(np.zeros((3, 3)), np.zeros((3, 4)))


# ---------------------------------------------------------------------------------------------------- empty masks


@pytest.mark.parametrize("shape", [(5, 6), (4, 5, 6)])
def test_two_empty_masks_agree(shape):
    empty = np.zeros(shape, bool)
    assert [m(empty, empty) for m in (dice, iou, precision, recall)] == [1, 1, 1, 1]
    for kind in SURFACES:
        d = surface_distances(empty, empty, (1,) * len(shape), surface=kind)
        assert (hausdorff(d), hausdorff(d, 95), hausdorff(d, 95, pooled=True), assd(d), nsd(d, 1)) == (0, 0, 0, 0, 1)


@pytest.mark.parametrize("shape", [(5, 6), (4, 5, 6)])
@pytest.mark.parametrize("swap", [False, True])
def test_one_empty_mask_scores_nothing(shape, swap):
    empty, full = np.zeros(shape, bool), np.ones(shape, bool)
    pair = (full, empty) if swap else (empty, full)
    assert [m(*pair) for m in (dice, iou, precision, recall)] == [0, 0, 0, 0]
    for kind in SURFACES:
        d = surface_distances(*pair, (1,) * len(shape), surface=kind)
        assert [hausdorff(d), hausdorff(d, 95), hausdorff(d, 95, pooled=True), assd(d)] == [math.inf] * 4
        assert nsd(d, 1e9) == 0


# ---------------------------------------------------------------------------------------------------- distances


@pytest.mark.parametrize("kind", SURFACES)
def test_shifted_voxels_are_their_distance_apart(kind):
    prediction, reference = box((9, 9, 9), (2, 3), (4, 5), (4, 5)), box((9, 9, 9), (6, 7), (4, 5), (4, 5))
    d = surface_distances(prediction, reference, (2.5, 1, 1), surface=kind)
    # subvoxel: each has corners on its near and on its far side, 3 and 4 voxels from the other's nearest corners
    assert hausdorff(d) == 4 * 2.5
    assert assd(d) == (3.5 * 2.5 if kind == "subvoxel" else 10)
    assert nsd(d, 7.5) == (0.5 if kind == "subvoxel" else 0)


@pytest.mark.parametrize("kind", SURFACES)
def test_planes_apart_and_tolerance_is_inclusive(kind):
    prediction, reference = box((20, 8, 8), (0, 10), (0, 8), (0, 8)), box((20, 8, 8), (0, 13), (0, 8), (0, 8))
    d = surface_distances(prediction, reference, (0.5, 1, 1), surface=kind)
    assert hausdorff(d) == 1.5
    assert nsd(d, 1.5) == 1 > nsd(d, 1.49)


def test_voxel_hd95_interpolates_and_pools_on_request():
    # one voxel against a row of 21: distances 0..20 one way, 0 the other
    prediction, reference = box((1, 30), (0, 1), (0, 1)), box((1, 30), (0, 1), (0, 21))
    d = surface_distances(prediction, reference, (1, 1), surface="voxel")
    assert hausdorff(d, 95) == 19
    assert hausdorff(d, 95, pooled=True) == pytest.approx(np.percentile([*range(21), 0], 95))


def test_subvoxel_hd95_weighs_by_area():
    # a box with a thin long spike: the spike is most of the corners' extent, but less than 5 % of the area
    reference = box((40, 40, 60), (0, 40), (0, 40), (0, 20))
    prediction = reference | box((40, 40, 60), (20, 21), (20, 21), (20, 50))
    d = surface_distances(prediction, reference, (1, 1, 1))
    assert hausdorff(d) > 29
    assert hausdorff(d, 95) == 0


def test_border_of_the_image_is_a_surface_unless_told_otherwise():
    full, inner = np.ones((5, 5), bool), box((5, 5), (1, 4), (1, 4))
    d = surface_distances(full, inner, (1, 1), surface="voxel")
    assert len(d.from_prediction) == 16
    open_ = surface_distances(full, inner, (1, 1), surface="voxel", outside=True)
    assert (len(open_.from_prediction), len(open_.from_reference)) == (0, 8)
    assert math.isinf(open_.from_reference.min())
    assert len(surface_distances(full, inner, (1, 1)).from_prediction) == 20


def test_connectivity_counts_corner_neighbours():
    mask = np.ones((5, 5), bool)
    mask[0, 0] = False
    one, full = (
        surface_distances(mask, mask, (1, 1), surface="voxel", connectivity=c, outside=True).from_prediction
        for c in (1, 2)
    )
    assert (len(one), len(full)) == (2, 3)


@pytest.mark.parametrize("arguments", [((3, 3), (3, 4), (1, 1)), ((3, 3), (3, 3), (1, 1, 1)), ((3,), (3,), (1,))])
def test_wrong_shapes_are_refused(arguments):
    prediction, reference, spacing = arguments
    with pytest.raises(ValueError):
        surface_distances(np.ones(prediction, bool), np.ones(reference, bool), spacing)
    with pytest.raises(ValueError, match="subvoxel"):
        surface_distances(np.ones((2, 2), bool), np.ones((2, 2), bool), (1, 1), surface="pixel")


# ---------------------------------------------------------------------------------------------------- areas


def test_areas_of_closed_forms():
    a, b, c = 0.5, 0.8, 3.0
    flat = np.zeros((6, 7, 8), bool)
    flat[:3] = True
    d = surface_distances(flat, flat, (a, b, c))
    # a slab's two large faces: (n - 1)^2 whole elements, cut at their rim by marching cubes
    assert np.sum(np.isclose(d.prediction_size, b * c)) == 2 * 6 * 7
    # one voxel is an octahedron with half axes a/2, b/2, c/2
    voxel = box((3, 3, 3), (1, 2), (1, 2), (1, 2))
    octahedron = 8 * 0.125 * np.sqrt((b * c) ** 2 + (a * c) ** 2 + (a * b) ** 2)
    assert np.sum(surface_distances(voxel, voxel, (a, b, c)).prediction_size) == pytest.approx(octahedron)
    # one pixel is a rhombus
    pixel = voxel[1]
    assert np.sum(surface_distances(pixel, pixel, (a, b)).prediction_size) == pytest.approx(2 * np.hypot(a, b))


def test_area_of_a_ball_is_near_the_true_one():
    z, y, x = np.ogrid[:60, :60, :30]
    ball = (z - 29.5) ** 2 + (y - 29.5) ** 2 + (2 * (x - 14.5)) ** 2 < 25**2
    area = np.sum(surface_distances(ball, ball, (1, 1, 2)).prediction_size)
    # the steps of a binary image make about a tenth too much
    assert area == pytest.approx(1.1 * 4 * np.pi * 25**2, rel=0.03)


def test_every_code_has_the_size_of_its_mirror_images_and_of_its_complement():
    sizes = surface.element_sizes((1.0, 1.0, 1.0))
    codes = np.arange(256)
    bits = (codes[:, None] >> np.arange(8) & 1).reshape(256, 2, 2, 2)
    for turned in (bits[:, ::-1], bits[:, :, ::-1], bits[..., ::-1], bits.transpose(0, 2, 3, 1), 1 - bits):
        other = turned.reshape(256, 8) @ 2 ** np.arange(8)
        np.testing.assert_allclose(sizes[other], sizes, rtol=1e-12)
    assert (sizes[1:255] > 0).all()
    assert sizes[0] == sizes[255] == 0


# ---------------------------------------------------------------------------------------------------- properties


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 3).flatmap(lambda n: st.tuples(masks(n), st.lists(SPACINGS, min_size=n, max_size=n))))
@example(
    ((np.array([[0, 1, 0, 1]], bool), np.array([[0, 0, 1, 0]], bool)), [1.0, 0.38])
)  # the mean of 3 x .38 rounds up
def test_properties(drawn):
    (prediction, reference), spacing = drawn
    up = 1 + 1e-12
    for kind in SURFACES:
        d = surface_distances(prediction, reference, spacing, surface=kind)
        back = surface_distances(reference, prediction, spacing, surface=kind)
        values = [hausdorff(d), hausdorff(d, 95), assd(d), nsd(d, 1)]
        np.testing.assert_allclose([hausdorff(back), hausdorff(back, 95), assd(back), nsd(back, 1)], values, rtol=1e-9)
        assert up * hausdorff(d) >= hausdorff(d, 95)
        assert up * hausdorff(d) >= assd(d) >= 0
        assert 0 <= nsd(d, 0.5) <= nsd(d, 2) <= 1
        # a wider image and other axes change nothing
        wide = [np.pad(mask, 2).T for mask in (prediction, reference)]
        e = surface_distances(*wide, spacing[::-1], surface=kind)
        np.testing.assert_allclose([hausdorff(e), assd(e), nsd(e, 1)], [values[0], *values[2:]], rtol=1e-9)
        same = surface_distances(reference, reference, spacing, surface=kind)
        assert (hausdorff(same), assd(same), nsd(same, 0)) == (0, 0, 1)


@settings(max_examples=30, deadline=None)
@given(masks(3))
def test_distances_equal_a_search_over_all_pairs(pair):
    spacing = np.array([2.0, 0.7, 1.3])
    d = surface_distances(*pair, spacing, surface="voxel", connectivity=3)
    edges = [mask & ~_inner(mask) for mask in pair]
    places = [np.argwhere(edge) * spacing for edge in edges]
    if len(places[0]) and len(places[1]):
        between = np.linalg.norm(places[0][:, None] - places[1][None], axis=-1)
        np.testing.assert_allclose(d.from_prediction, between.min(1))
        np.testing.assert_allclose(d.from_reference, between.min(0))


def _inner(mask):
    """Voxels all 26 neighbours of which are set."""
    padded = np.pad(mask, 1)
    inner = np.ones_like(mask)
    for offset in np.ndindex(3, 3, 3):
        inner &= padded[tuple(slice(o, o + n) for o, n in zip(offset, mask.shape, strict=True))]
    return inner


def test_relative_volume_error_and_empty_masks():
    none, one, two = np.zeros(4, bool), np.array([1, 0, 0, 0], bool), np.array([0, 1, 1, 0], bool)
    assert relative_volume_error(one, two) == -0.5
    assert relative_volume_error(two, one) == 1
    assert relative_volume_error(none, one) == -1
    assert relative_volume_error(none, none) == 0
    assert relative_volume_error(one, none) == np.inf

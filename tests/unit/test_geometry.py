"""Orientation (48 of them), resampling against scipy, and differences between two spaces in words."""

import itertools

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg_jax.data import io
from medseg_jax.data.geometry import (
    canonical_shape,
    from_canonical,
    low_resolution_axis,
    resample,
    resample_label,
    resample_to,
    same_space,
    spacing_canonical,
    to_canonical,
)
from medseg_jax.types import Geometry

ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]
SPACING = st.floats(0.013, 17)


def oriented(order, signs, spacing, shape=(3, 4, 5), angle=0.0) -> Geometry:
    """Array axis i runs along world axis order[i], in direction signs[i], turned by `angle` about an oblique axis."""
    matrix = np.zeros((3, 3))
    for i in range(3):
        matrix[order[i], i] = signs[i] * spacing[i]
    k = np.array([[0, -3, 2], [3, 0, -1], [-2, 1, 0]]) / np.sqrt(14)
    rotation = np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k  # Rodrigues
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = rotation @ matrix, (-11, 7.5, 300)
    return Geometry(shape, affine)


# ---------------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
@settings(max_examples=10, deadline=None)
@given(
    spacing=st.tuples(SPACING, SPACING, SPACING),
    shape=st.tuples(*[st.integers(1, 6)] * 3),
    angle=st.floats(-0.5, 0.5),
    channels=st.booleans(),
)
def test_there_and_back(order, signs, spacing, shape, angle, channels):
    geometry = oriented(order, signs, spacing, shape, angle)
    shape = (*shape, 2) if channels else shape
    array = np.arange(np.prod(shape)).reshape(shape)
    canonical = to_canonical(array, geometry, channels)
    assert canonical.shape[:3] == canonical_shape(geometry)
    np.testing.assert_array_equal(from_canonical(canonical, geometry), array)
    assert from_canonical(canonical, geometry).dtype == array.dtype


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_canonical_points_to_s_a_r(order, signs):
    """The world decides: stepping along d, h, w raises z, y, x; checked with coordinates as voxel values."""
    geometry = oriented(order, signs, (0.5, 1.5, 4))
    index = np.moveaxis(np.indices(geometry.shape), 0, -1)  # [3, 4, 5, 3]
    world = index @ geometry.affine[:3, :3].T + geometry.affine[:3, 3]
    canonical = to_canonical(world, geometry, channels=True)  # [d, h, w, xyz]
    spacing = spacing_canonical(geometry)
    for axis, coordinate in enumerate((2, 1, 0)):
        steps = np.diff(canonical, axis=axis)
        np.testing.assert_allclose(steps[..., coordinate], spacing[axis])
        others = [i for i in range(3) if i != coordinate]
        np.testing.assert_allclose(steps[..., others], 0, atol=1e-12)


def test_canonical_agrees_with_nibabel():
    for order, signs in ORIENTATIONS:
        geometry = oriented(order, signs, (0.5, 1.5, 4), angle=0.2)
        array = np.arange(60).reshape(3, 4, 5)
        closest = nib.as_closest_canonical(nib.Nifti1Image(array.astype(np.int16), geometry.affine))  # R, A, S
        np.testing.assert_array_equal(to_canonical(array, geometry, False), np.asarray(closest.dataobj).T)
        np.testing.assert_allclose(spacing_canonical(geometry), closest.header.get_zooms()[::-1], rtol=1e-5)


@pytest.mark.parametrize(("order", "signs"), ORIENTATIONS)
def test_file_to_canonical_to_file(tmp_path, order, signs):
    """D.4: read -> canonical -> inverse -> write -> read is the identity, header included, for odd spacings."""
    geometry = oriented(order, signs, (0.371, 1.93, 5.07))
    label = np.random.default_rng(0).integers(0, 4, geometry.shape).astype(np.uint8)
    io.write_label(tmp_path / "a.nii.gz", label, geometry)
    first, where = io.read_label(tmp_path / "a.nii.gz")
    back = from_canonical(to_canonical(first, where, False), where)
    io.write_label(tmp_path / "b.nii.gz", back, where)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_pictures_are_not_turned():
    geometry = Geometry((4, 5), np.diag([-2.0, 3, 1, 1]), "px")
    array = np.arange(60).reshape(4, 5, 3)
    canonical = to_canonical(array, geometry, True)
    np.testing.assert_array_equal(canonical, array[None])
    np.testing.assert_array_equal(from_canonical(canonical[..., 0], geometry), array[..., 0])
    assert spacing_canonical(geometry) == (1, 1, 1)


def test_wrong_shapes():
    geometry = Geometry((4, 5, 6))
    with pytest.raises(ValueError, match="does not lie"):
        to_canonical(np.zeros((4, 5, 7)), geometry, False)
    with pytest.raises(ValueError, match="not in canonical"):
        from_canonical(np.zeros((4, 5, 6)), geometry)


# ----------------------------------------------------------------------------------------------------------- resampling

SHAPES = st.tuples(*[st.integers(1, 9)] * 3)


def reference(volume, new_shape, order):
    """Three-dimensional interpolation at (i + 0.5) * old / new - 0.5, edges repeated, clipped."""
    points = [(np.arange(n) + 0.5) * o / n - 0.5 for o, n in zip(volume.shape, new_shape, strict=True)]
    grid = np.stack(np.meshgrid(*points, indexing="ij"))
    result = ndimage.map_coordinates(volume.astype(float), grid, order=order, mode="nearest")
    return np.clip(result, volume.min(), volume.max())


@settings(max_examples=60, deadline=None)
@given(old=SHAPES, new=SHAPES, order=st.sampled_from([1, 3]), seed=st.integers(0, 99))
def test_resample_is_interpolation(old, new, order, seed):
    array = np.random.default_rng(seed).normal(size=(*old, 2)).astype(np.float32)
    result = resample(array, new, order)
    assert result.dtype == np.float32
    for channel in range(2):
        np.testing.assert_allclose(result[..., channel], reference(array[..., channel], new, order), atol=3e-6)


def test_resample_equals_zoom():
    """The call that skimage.transform.resize and so nnU-Net make."""
    array = np.random.default_rng(0).normal(size=(13, 20, 17, 1)).astype(np.float32)
    for new in ((26, 10, 17), (5, 31, 40)):
        for order in (1, 3):
            zoom = np.array(new) / array.shape[:3]
            expected = ndimage.zoom(array[..., 0].astype(float), zoom, order=order, mode="nearest", grid_mode=True)
            expected = np.clip(expected, array.min(), array.max())
            np.testing.assert_allclose(resample(array, new, order)[..., 0], expected, atol=3e-6)


@settings(max_examples=30, deadline=None)
@given(old=SHAPES, new=SHAPES, axis=st.sampled_from([0, 1, 2, None]))
def test_low_resolution_axis_takes_the_nearest_slice(old, new, axis):
    array = np.random.default_rng(1).normal(size=(*old, 1)).astype(np.float32)
    result = resample(array, new, 3, axis)
    assert result.shape == (*new, 1)
    if axis is not None:
        position = (np.arange(new[axis]) + 0.5) * old[axis] / new[axis] - 0.5
        chosen = np.floor(position + 0.5 + 1e-9).astype(int)
        plane = [old[i] if i == axis else new[i] for i in range(3)]
        sliced = resample(array, plane, 3).take(chosen, axis)
        np.testing.assert_allclose(result, np.clip(sliced, result.min(), result.max()), atol=2e-5)


@settings(max_examples=30, deadline=None)
@given(old=SHAPES, new=SHAPES)
def test_probabilities_stay_probabilities(old, new):
    scores = np.random.default_rng(2).random((*old, 3)).astype(np.float32)
    probabilities = scores / scores.sum(-1, keepdims=True)
    result = resample(probabilities, new, 1)
    np.testing.assert_allclose(result.sum(-1), 1, atol=1e-5)
    assert result.min() >= 0
    assert result.max() <= 1 + 1e-6


@settings(max_examples=60, deadline=None)
@given(old=SHAPES, new=SHAPES, axis=st.sampled_from([0, 1, 2, None]), dtype=st.sampled_from([np.uint8, np.uint16]))
def test_labels_keep_their_values(old, new, axis, dtype):
    """No value appears that was not there: 2 never arises between 0 and 7."""
    label = np.random.default_rng(3).choice([0, 7, 200], old).astype(dtype)
    for result in (resample_label(label, new, axis), resample(label[..., None], new, "nearest")[..., 0]):
        assert (result.shape, result.dtype) == (new, dtype)
        assert set(np.unique(result)) <= set(np.unique(label))


def test_label_resampling_is_the_largest_linear_mask():
    label = np.random.default_rng(4).integers(0, 4, (6, 7, 8)).astype(np.uint8)
    new = (9, 5, 15)
    masks = np.stack([resample((label == v)[..., None], new, 1)[..., 0] for v in range(4)])
    ranked = np.sort(masks, 0)
    clear = ranked[-1] - ranked[-2] > 1e-4
    np.testing.assert_array_equal(resample_label(label, new)[clear], masks.argmax(0)[clear])
    assert clear.mean() > 0.5


def test_label_survives_a_finer_grid():
    label = np.random.default_rng(5).integers(0, 3, (4, 5, 6)).astype(np.uint8)
    fine = resample(label[..., None], (12, 15, 18), "nearest")[..., 0]
    np.testing.assert_array_equal(fine, label.repeat(3, 0).repeat(3, 1).repeat(3, 2))
    np.testing.assert_array_equal(resample(fine[..., None], (4, 5, 6), "nearest")[..., 0], label)


def test_edges_are_where_they_were():
    """Voxel volumes match: a ramp over world coordinates is the same ramp after resampling, no half-voxel shift."""
    ramp = np.broadcast_to((np.arange(40) + 0.5)[:, None, None, None], (40, 3, 3, 1)).astype(np.float32)
    fine = resample(ramp, (100, 3, 3), 1)[:, 0, 0, 0]
    inner = slice(2, -2)
    np.testing.assert_allclose(fine[inner], ((np.arange(100) + 0.5) * 0.4)[inner], atol=1e-5)


def test_input_is_left_alone():
    array = np.random.default_rng(6).integers(0, 99, (5, 6, 7, 2)).astype(np.int16)
    before = array.copy()
    assert resample(array, (5, 6, 7), 3) is array
    resample(array, (7, 6, 5), 3)
    np.testing.assert_array_equal(array, before)


def test_low_resolution_axis():
    """nnU-Net's cases: thick slices; none; two coarse axes count as none; the first anisotropic spacing decides."""
    assert low_resolution_axis((5, 1, 1)) == 0
    assert low_resolution_axis((1, 1, 3.1)) == 2
    assert low_resolution_axis((3, 1, 1)) is None
    assert low_resolution_axis((0.24, 1.25, 1.25)) is None
    assert low_resolution_axis((1, 1, 1), (1, 8, 1)) == 1
    assert low_resolution_axis((5, 1, 1), (1, 8, 1)) == 0


# ------------------------------------------------------------------------------------------------------- another's grid


@pytest.mark.parametrize("order", [1, 3])
def test_resample_to_follows_the_world(order):
    """A linear function of world coordinates, sampled on a coarse turned grid, is read off on a fine one."""
    coarse = oriented((1, 0, 2), (-1, 1, -1), (4, 3, 5), (12, 14, 10))
    centre = coarse.affine @ np.array([5.5, 6.5, 4.5, 1])
    affine = np.diag([1.1, 0.9, 1.3, 1])
    affine[:3, 3] = centre[:3] - (4, 4, 4)
    fine = Geometry((7, 8, 6), affine)

    def field(geometry):
        index = np.moveaxis(np.indices(geometry.shape), 0, -1)
        world = index @ geometry.affine[:3, :3].T + geometry.affine[:3, 3]
        return (world @ np.array([1.0, -2, 0.5]))[..., None].astype(np.float32)

    np.testing.assert_allclose(resample_to(field(coarse), coarse, fine, order), field(fine), atol=2e-2)


def test_resample_to_itself_and_beyond():
    geometry = oriented((2, 0, 1), (1, -1, 1), (1, 2, 3))
    label = np.random.default_rng(7).integers(1, 5, (3, 4, 5, 1)).astype(np.uint8)
    same = resample_to(label, geometry, geometry, "nearest")
    np.testing.assert_array_equal(same, label)
    assert same.dtype == np.uint8
    shifted = geometry.affine.copy()
    shifted[:3, 3] += geometry.affine[:3, 0]  # one voxel along the first axis
    moved = resample_to(label, geometry, Geometry((3, 4, 5), shifted), "nearest")
    np.testing.assert_array_equal(moved[:2], label[1:])
    assert not moved[2].any()
    image = resample_to(label - 9.0, geometry, Geometry((3, 4, 5), shifted), 1)
    np.testing.assert_allclose(image[2], (label - 9.0).min())


# ------------------------------------------------------------------------------------------------------------ comparing


def changed(geometry, shape=None, **kwargs):
    affine = geometry.affine.copy()
    if "shift" in kwargs:
        affine[:3, 3] += kwargs["shift"]
    if "scale" in kwargs:
        affine[:3, :3] *= kwargs["scale"]
    return Geometry(shape or geometry.shape, affine, kwargs.get("unit", "mm"))


BASE = oriented((0, 1, 2), (1, 1, 1), (0.8, 0.8, 3), (100, 90, 40))


def test_same_space_forgives_rounding():
    assert same_space(BASE, BASE) == []
    assert same_space(BASE, Geometry(BASE.shape, BASE.affine.astype(np.float32))) == []
    assert same_space(BASE, changed(BASE, shift=(0.03, 0, 0))) == []
    assert same_space(BASE, Geometry(BASE.shape, unit="px")) == []


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (changed(BASE, shape=(100, 90, 41)), ["shape 100 x 90 x 40 against 100 x 90 x 41"]),
        (changed(BASE, shift=(0, 3, 4)), ["first voxels 5 mm apart", "(-11.00, 7.50, 300.00)", "up to 5 mm"]),
        (changed(BASE, scale=1.01), ["spacing 0.8 x 0.8 x 3 against 0.808 x 0.808 x 3.03 mm", "corners"]),
        (oriented((0, 1, 2), (-1, -1, 1), (0.8, 0.8, 3), BASE.shape), ["RAS against LPS"]),
        (oriented((0, 1, 2), (1, 1, 1), (0.8, 0.8, 3), BASE.shape, 0.05), ["turned by", "degrees", "mm apart"]),
        (Geometry((100, 90), unit="px"), ["100 x 90 x 40 against 100 x 90"]),
    ],
)
def test_same_space_names_differences(other, words):
    text = "; ".join(same_space(BASE, other))
    for word in words:
        assert word in text


def test_small_turns_of_large_volumes_count():
    """0.2 degrees are 0.3 mm at the far corner: more than a tenth of a voxel, though every number looks alike."""
    turned = oriented((0, 1, 2), (1, 1, 1), (0.8, 0.8, 3), BASE.shape, 0.0035)
    assert any("mm apart" in line for line in same_space(BASE, turned))

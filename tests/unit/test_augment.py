"""Augmentation: geometry against SciPy, image and label together, rows apart, no NaN."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage as ndi
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_jax.data import augment as module
from medseg_jax.data.augment import Augment, augment, moving_axes
from medseg_jax.ops.intensity import contrast, gamma, punch, smooth
from medseg_jax.ops.warp import elastic_field, resample
from medseg_jax.types import UserError

EVERYTHING = Augment(
    **dict.fromkeys(("p_rotation", "p_scale", "p_shear", "p_translation", "p_elastic", "p_mirror"), 0.5),
    **dict.fromkeys(("p_noise", "p_blur", "p_low_resolution", "p_brightness", "p_shift", "p_contrast"), 0.5),
    **dict.fromkeys(("p_gamma", "p_gamma_inverted", "p_color", "p_holes"), 0.5),
)


def only(**steps) -> Augment:
    return replace(Augment.none(), **steps)


def jitted(config, patch_size, spacing=None):
    return jax.jit(lambda key, batch: augment(key, batch, config, patch_size, spacing))


def example(size=(14, 12), b=4, c=3, seed=0):
    rng = np.random.default_rng(seed)
    image = rng.standard_normal((b, *size, c)).astype(np.float32)
    return {"image": image, "label": rng.choice([0, 1, 3, 7], (b, *size)).astype(np.int32)}


def centre(array, patch_size):
    cut = tuple(slice((n - p) // 2, (n - p) // 2 + p) for n, p in zip(array.shape[1:], patch_size, strict=False))
    return array[:, *cut]


MANY = jitted(EVERYTHING, (10, 10))  # Compiled once: call it with `example()`'s shapes.


# ---------------------------------------------------------------------------------------------------------------------
# Geometry


@pytest.mark.parametrize(("full", "size"), [((20, 17), (12, 11)), ((11, 12, 9), (8, 9, 9))])
def test_resample_equals_scipy(full, size):
    rng = np.random.default_rng(len(full))
    n = len(full)
    image = rng.standard_normal((*full, 2)).astype(np.float32)
    label = rng.integers(0, 5, (*full, 1))
    matrix = np.eye(n) * 1.2 + 0.4 * rng.standard_normal((n, n))
    offset = rng.standard_normal(n)
    got, got_label = resample(jnp.array(image), jnp.array(label), jnp.array(matrix), jnp.array(offset), None, size)
    middle = (np.array(size) - 1) / 2
    start = np.array([(s - p) // 2 for s, p in zip(full, size, strict=True)]) + middle
    warp = partial(ndi.affine_transform, output_shape=size, mode="grid-constant")
    warp = partial(warp, matrix=matrix, offset=start + offset - matrix @ middle)
    expected = np.stack([warp(image[..., i], order=1) for i in range(2)], -1)
    np.testing.assert_allclose(got, expected, atol=2e-5)
    np.testing.assert_array_equal(got_label[..., 0], warp(label[..., 0], order=0))
    assert (expected == 0).any(), "the case should reach beyond the border"


def test_elastic_displacement_equals_scipy():
    rng = np.random.default_rng(0)
    image, size = rng.standard_normal((16, 15, 1)).astype(np.float32), (10, 9)
    displacement = 2 * rng.standard_normal((2, *size)).astype(np.float32)
    got, _ = resample(jnp.array(image), None, jnp.eye(2), jnp.zeros(2), jnp.array(displacement), size)
    at = np.indices(size) + np.array([3, 3])[:, None, None] + displacement
    np.testing.assert_allclose(
        got[..., 0], ndi.map_coordinates(image[..., 0], at, order=1, mode="grid-constant"), atol=1e-5
    )


def test_elastic_field_is_smooth_and_never_folds():
    size, cells = (33, 25), 4
    np.testing.assert_allclose(elastic_field(jnp.ones((2, cells + 3, cells + 3)), size), 1, rtol=1e-5)
    for seed in range(20):
        points = np.random.default_rng(seed).choice([-0.4, 0.4], (2, cells + 3, cells + 3)).astype(np.float32)
        distance = (np.array(size) - 1) / cells
        at = np.indices(size) + np.asarray(elastic_field(jnp.array(points), size)) * distance[:, None, None]
        (yy, yx), (xy, xx) = np.gradient(at[0]), np.gradient(at[1])
        assert (yy * xx - yx * xy).min() > 0


@pytest.mark.parametrize("patch_size", [(10, 10), (6, 8, 8)])
def test_mirror_turns_image_and_label_together(patch_size):
    batch = example(patch_size, b=16, c=1)
    batch["image"] = batch["label"][..., None].astype(np.float32)
    out = jitted(only(p_mirror=0.5), patch_size)(jax.random.key(0), batch)
    np.testing.assert_array_equal(out["image"][..., 0], out["label"])
    seen = set()
    for got, given_ in zip(np.asarray(out["label"]), batch["label"], strict=True):
        turned = [
            axes
            for axes in np.ndindex(*(2,) * len(patch_size))
            if np.array_equal(got, np.flip(given_, [i for i, a in enumerate(axes) if a]))
        ]
        assert len(turned) == 1
        seen.add(turned[0])
    assert len(seen) >= 3


def test_mirror_leaves_other_axes_alone():
    batch = example((6, 6), b=16, c=1)
    out = jitted(only(p_mirror=1.0, mirror_axes=(1,)), (6, 6))(jax.random.key(0), batch)
    np.testing.assert_array_equal(out["label"], batch["label"][:, :, ::-1])


@pytest.mark.parametrize(("full", "spacing"), [((28, 28), None), ((16, 18, 18), None), ((6, 28, 28), (5.0, 1.0, 1.0))])
def test_image_and_label_move_together(full, spacing):
    config = only(
        p_rotation=1.0, p_scale=1.0, p_shear=1.0, p_translation=1.0, p_elastic=1.0, p_mirror=0.5, scale_per_axis=True
    )
    patch_size = tuple(n - 4 if n > 10 else n for n in full)
    blobs = ndi.gaussian_filter(np.random.default_rng(0).standard_normal((4, *full)), (0, *(2,) * len(full)))
    label = (blobs > 0).astype(np.uint8)
    out = jitted(config, patch_size, spacing)(
        jax.random.key(3), {"image": label[..., None].astype(np.float32), "label": label}
    )
    image, moved = np.asarray(out["image"])[..., 0], np.asarray(out["label"])
    assert moved.dtype == np.uint8
    # Where all neighbours agree, the nearest one does too.
    assert (moved[image > 0.9999] == 1).all()
    assert (moved[image < 0.0001] == 0).all()
    assert 0.1 < moved.mean() < 0.9
    assert all((m != c).mean() > 0.05 for m, c in zip(moved, centre(label, patch_size), strict=True))


def ball(full, spacing, radius):
    place = [(np.arange(n) - (n - 1) / 2) * mm for n, mm in zip(full, spacing, strict=True)]
    return np.sqrt(sum(p**2 for p in np.meshgrid(*place, indexing="ij"))) <= radius


def test_rotation_in_millimetres_keeps_a_ball_a_ball():
    full, spacing = (17, 40, 40), (2.4, 1.0, 1.0)
    label = np.repeat(ball(full, spacing, 14)[None], 4, 0).astype(np.int32)
    batch = {"image": label[..., None].astype(np.float32), "label": label}

    def dice(spacing):
        moved = jitted(only(p_rotation=1.0, rotation=90.0), full, spacing)(jax.random.key(1), batch)["label"]
        return [2 * (m * g).sum() / (m.sum() + g.sum()) for m, g in zip(np.asarray(moved), label, strict=True)]

    assert min(dice(spacing)) > 0.95
    assert min(dice(None)) < 0.9, "the test should be able to tell"


@pytest.mark.parametrize(
    ("patch_size", "spacing", "axes"),
    [
        ((64, 64), (9.0, 1.0, 1.0), (0, 1)),
        ((40, 56, 40), None, (0, 1, 2)),
        ((40, 56, 40), (3.0, 1.0, 1.0), (0, 1, 2)),
        ((40, 56, 40), (3.1, 1.0, 1.0), (1, 2)),
        ((40, 56, 40), (1.0, 1.0, 5.0), (0, 1)),
        ((56, 16, 56), (1.0, 1.0, 1.0), (0, 2)),
    ],
)
def test_moving_axes(patch_size, spacing, axes):
    assert moving_axes(patch_size, spacing) == axes


@pytest.mark.parametrize("through", [0, 2])
def test_coarse_axis_stays(through):
    full = tuple(6 if i == through else 14 for i in range(3))
    spacing = tuple(5.0 if i == through else 1.0 for i in range(3))
    depth = np.arange(1, 7).reshape([6 if i == through else 1 for i in range(3)])
    label = np.broadcast_to(depth, (3, *full)).astype(np.int32)
    config = only(p_rotation=1.0, p_scale=1.0, p_low_resolution=1.0, p_channel=1.0)
    patch_size = tuple(n if n == 6 else 10 for n in full)
    out = jitted(config, patch_size, spacing)(
        jax.random.key(0), {"image": label[..., None].astype(np.float32), "label": label}
    )
    inner = tuple(slice(None) if i == through else slice(4, 6) for i in range(3))
    expected = np.broadcast_to(depth, [6 if i == through else 2 for i in range(3)])
    for image, moved in zip(out["image"], out["label"], strict=True):
        np.testing.assert_array_equal(moved[inner], expected)
        np.testing.assert_allclose(image[inner][..., 0], expected, rtol=1e-5)


def test_label_values_are_preserved():
    for seed in range(5):
        assert set(np.unique(MANY(jax.random.key(seed), example())["label"])) == {0, 1, 3, 7}


# ---------------------------------------------------------------------------------------------------------------------
# Intensity


def test_blur_equals_scipy():
    image = np.random.default_rng(0).standard_normal((40, 41, 2)).astype(np.float32)
    got = smooth(jnp.array(image), jnp.array([[0.8, 1.0], [0.0, 0.0]]), jnp.ones(2), (0, 1))
    expected = ndi.gaussian_filter(image[..., 0], (0.8, 1.0), truncate=6)
    np.testing.assert_allclose(got[6:-6, 6:-6, 0], expected[6:-6, 6:-6], atol=1e-5)
    np.testing.assert_array_equal(got[..., 1], image[..., 1])


def test_low_resolution_by_hand():
    image = jnp.arange(8.0)[:, None, None] ** 2 * jnp.ones((8, 5, 1))
    got = smooth(image, jnp.zeros((1, 2)), jnp.array([0.5]), (0,))
    # Voxels 1, 3, 5, 7 are kept, and stand at 0.5, 2.5, 4.5, 6.5 when interpolated back.
    expected = np.interp(np.arange(8), [0.5, 2.5, 4.5, 6.5], [1, 9, 25, 49])
    np.testing.assert_allclose(got, np.broadcast_to(expected[:, None, None], (8, 5, 1)), rtol=1e-5)


def test_gamma_restores_mean_and_deviation():
    image = jnp.array(np.random.default_rng(0).standard_normal((30, 30, 3)), jnp.float32)
    bent = gamma(image, jnp.array([0.7, 1.0, 1.5]))
    np.testing.assert_allclose(bent.mean((0, 1)), image.mean((0, 1)), atol=1e-5)
    np.testing.assert_allclose(bent.std((0, 1)), image.std((0, 1)), rtol=1e-5)
    np.testing.assert_allclose(bent[..., 1], image[..., 1], atol=1e-5)
    skew = [float(((b - b.mean()) ** 3).mean()) for b in jnp.moveaxis(bent, -1, 0)]
    assert skew[0] < skew[1] < skew[2]


def test_contrast_keeps_the_range():
    image = jnp.array(np.random.default_rng(0).standard_normal((20, 20, 2)), jnp.float32)
    out = contrast(image, jnp.array([0.5, 2.0]))
    mean = image.mean((0, 1))
    np.testing.assert_allclose(out[..., 0], mean[0] + 0.5 * (image[..., 0] - mean[0]), atol=1e-5)
    assert out.min() >= image.min()
    assert out.max() <= image.max()
    assert out[..., 1].std() > 1.2 * image[..., 1].std()


def test_colour_keeps_grey_and_brightness():
    batch = example((8, 8), b=6)
    grey = {"image": np.repeat(batch["image"][..., :1], 3, -1)}
    step = jitted(only(p_color=1.0, hue=60.0), (8, 8))
    np.testing.assert_allclose(step(jax.random.key(0), grey)["image"], grey["image"], atol=1e-5)
    out = step(jax.random.key(0), batch)["image"]
    np.testing.assert_allclose(out.mean(-1), batch["image"].mean(-1), atol=1e-5)
    assert np.abs(out - batch["image"]).max() > 0.1


def test_noise_has_the_drawn_deviation():
    out = jitted(only(p_noise=1.0, noise=(0.3, 0.3)), (32, 32))(jax.random.key(0), {"image": jnp.ones((3, 32, 32, 2))})
    np.testing.assert_allclose(np.std(out["image"], (1, 2, 3)), 0.3, rtol=0.1)
    assert not np.allclose(out["image"][0], out["image"][1])


@settings(max_examples=25, deadline=None)
@given(value=st.floats(-1e4, 1e4, width=32), outlier=st.floats(-1e4, 1e4, width=32), seed=st.integers(0, 2**31 - 1))
def test_no_nan_for_constant_and_nearly_constant_images(value, outlier, seed):
    batch = example()
    batch["image"][:] = value
    batch["image"][2:, 7, 6] = outlier
    assert np.isfinite(MANY(jax.random.key(seed), batch)["image"]).all()


# ---------------------------------------------------------------------------------------------------------------------
# The whole


@pytest.mark.parametrize("size", [(15, 12), (9, 8, 11)])
def test_none_is_the_centre_crop(size):
    batch, patch_size = example(size), tuple(n - 3 for n in size)
    out = jitted(Augment.none(), patch_size)(jax.random.key(0), batch)
    np.testing.assert_array_equal(out["image"], centre(batch["image"], patch_size))
    np.testing.assert_array_equal(out["label"], centre(batch["label"], patch_size))


def test_light_neither_moves_nor_enlarges():
    batch = example((12, 12))
    out = jitted(replace(Augment.light(), p_mirror=0.0), (12, 12))(jax.random.key(0), batch)
    np.testing.assert_array_equal(out["label"], batch["label"])
    assert Augment.light().sample_size((12, 12)) == (12, 12)
    assert Augment.light().p_mirror == Augment().p_mirror


def test_strong_changes_intensities_more_and_geometry_not():
    strong, usual = Augment.strong(p_color=0.5), Augment()
    for field in ("p_rotation", "rotation", "p_scale", "scale", "p_mirror", "p_elastic"):
        assert getattr(strong, field) == getattr(usual, field)
    batch = {"image": jax.random.normal(jax.random.key(0), (16, 12, 12, 3))}
    still = {"p_rotation": 0.0, "p_scale": 0.0, "p_mirror": 0.0}
    changes = []
    for config in (replace(strong, **still), replace(usual, **still)):
        out = jitted(config, (12, 12))(jax.random.key(1), batch)["image"]
        assert np.isfinite(out).all()
        changes.append(float(np.abs(out - batch["image"]).mean()))
    assert changes[0] > 2 * changes[1]


def test_drawn_but_not_taken_is_the_centre_crop():
    # A geometry that is compiled in and stays at rest must not resample by half a voxel, whatever the sizes' parity.
    for full in ((15, 12), (14, 13)):
        batch = example(full)
        out = jitted(only(p_rotation=1.0, rotation=0.0), (10, 10))(jax.random.key(0), batch)
        np.testing.assert_allclose(out["image"], centre(batch["image"], (10, 10)), atol=1e-5)
        np.testing.assert_array_equal(out["label"], centre(batch["label"], (10, 10)))


def test_same_key_same_bits_other_key_other_result():
    batch = example()
    first, again, other = (MANY(jax.random.key(seed), batch) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first["image"], again["image"])
    assert not np.allclose(first["image"], other["image"])
    assert first["image"].shape == (4, 10, 10, 3)


def test_rows_depend_on_their_index_alone():
    batch = example()
    out = MANY(jax.random.key(7), batch)
    changed = {k: np.concatenate([v[:1], v[:3] * 2]) for k, v in batch.items()}
    np.testing.assert_array_equal(MANY(jax.random.key(7), changed)["image"][0], out["image"][0])
    fewer = MANY(jax.random.key(7), {k: v[:2] for k, v in batch.items()})
    np.testing.assert_allclose(fewer["image"], out["image"][:2], atol=1e-5)
    np.testing.assert_array_equal(fewer["label"], out["label"][:2])
    twins = MANY(jax.random.key(7), {k: np.repeat(v[:1], 4, 0) for k, v in batch.items()})["image"]
    assert not np.allclose(twins[0], twins[1])


def test_one_step_does_not_change_what_others_draw():
    key, batch = jax.random.key(1), example((10, 10), b=8)
    alone = jitted(only(p_mirror=0.5), (10, 10))(key, batch)
    together = jitted(only(p_mirror=0.5, p_brightness=1.0, brightness=(0.99, 1.01)), (10, 10))(key, batch)
    np.testing.assert_array_equal(alone["label"], together["label"])


def test_side_by_side_equals_one_by_one(monkeypatch):
    key, batch = jax.random.key(2), example()
    expected = MANY(key, batch)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    got = jitted(EVERYTHING, (10, 10))(key, batch)
    np.testing.assert_allclose(got["image"], expected["image"], atol=2e-4)
    assert (np.asarray(got["label"]) == np.asarray(expected["label"])).mean() > 0.99


def test_keys_and_types():
    rng = np.random.default_rng(0)
    image = jnp.asarray(rng.integers(0, 255, (2, 14, 12, 3)), jnp.bfloat16)
    batch = {"image": image, "unlabelled": image, "unlabelled_case": np.arange(2), "case": np.arange(2)}
    out = augment(jax.random.key(0), batch, only(p_brightness=1.0), (10, 10))
    assert set(out) == set(batch)
    assert out["case"] is batch["case"]
    assert out["image"].dtype == out["unlabelled"].dtype == jnp.float32
    assert not np.allclose(out["image"], out["unlabelled"])
    assert batch["image"] is image, "the caller's batch must stay as it is"


DEVICES = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from medseg_jax.data.augment import Augment, augment
rng = np.random.default_rng(0)
batch = {"image": rng.standard_normal((4, 16, 16, 1)).astype("float32"), "label": rng.integers(0, 3, (4, 16, 16))}
config = Augment(p_rotation=0.7, p_noise=0.7, p_gamma=0.7)
step = jax.jit(lambda key, batch: augment(key, batch, config, (12, 12)))
alone = step(jax.random.key(0), batch)
sharding = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
shared = step(jax.random.key(0), jax.device_put(batch, sharding))
assert len(jax.devices()) == 2
np.testing.assert_allclose(shared["image"], alone["image"], atol=1e-5)
np.testing.assert_array_equal(shared["label"], alone["label"])
"""


def test_same_result_on_two_devices():
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    subprocess.run([sys.executable, "-c", DEVICES], check=True, env=environment)


def test_probabilities_and_factors_are_as_stated():
    draw = jax.jit(
        jax.vmap(partial(module._draw, config=Augment(), channels=1, patch_size=(8, 8, 8), spacing=(1.0, 1.0, 1.0)))
    )(jax.random.split(jax.random.key(0), 4000))
    share = {
        name: float(np.mean(draw[name])) for name in ("noise", "contrast", "gamma", "gamma_inverted", "move", "mirror")
    }
    expected = {"noise": 0.1, "contrast": 0.15, "gamma": 0.3, "gamma_inverted": 0.1, "move": 0.36, "mirror": 0.5}
    assert share == pytest.approx(expected, abs=0.03)
    # Only one channel: half of the selected samples are reached.
    assert float(draw["smooth"].mean()) == pytest.approx(1 - (1 - 0.1) * (1 - 0.125), abs=0.03)
    factors = np.asarray(draw["gamma_factor"])
    assert 0.7 <= factors.min() < 0.72 < 1.48 < factors.max() <= 1.5
    assert (factors < 1).mean() == pytest.approx(0.5, abs=0.03)
    size = np.cbrt(np.linalg.det(np.asarray(draw["matrix"])))
    assert size.min() == pytest.approx(0.7, abs=0.02)
    assert size.max() == pytest.approx(1.4, abs=0.02)
    assert (np.abs(size - 1) < 1e-5).mean() == pytest.approx(0.8, abs=0.03)


def test_sample_size():
    assert Augment().sample_size((128, 128)) == (154, 154)
    assert Augment().sample_size((40, 56, 40)) == (48, 68, 48)
    assert Augment().sample_size((40, 56, 40), (5.0, 1.0, 1.0)) == (40, 68, 48)
    assert Augment.none().sample_size((40, 56, 40)) == (40, 56, 40)


def test_bad_settings_and_shapes_are_named():
    with pytest.raises(UserError, match="p_noise"):
        Augment(p_noise=1.5)
    with pytest.raises(UserError, match="scale"):
        Augment(scale=(1.1, 1.4))
    with pytest.raises(UserError, match="blur"):
        Augment(blur=(1.0, 0.5))
    with pytest.raises(UserError, match="low_resolution"):
        Augment(low_resolution=(0.0, 1.0))
    batch, key = example(), jax.random.key(0)
    with pytest.raises(ValueError, match="smaller than the patch"):
        augment(key, batch, Augment(), (20, 20))
    with pytest.raises(ValueError, match="dimensions"):
        augment(key, batch, Augment(), (8, 8, 8))
    with pytest.raises(ValueError, match="integers"):
        augment(key, batch | {"label": batch["label"].astype(np.float32)}, Augment(), (8, 8))
    with pytest.raises(UserError, match="three channels"):
        augment(key, {"image": batch["image"][..., :1]}, only(p_color=1.0), (8, 8))


# ---------------------------------------------------------------------------------------------------------------------
# Holes


@pytest.mark.parametrize("size", [(10, 20), (8, 10, 6)])
def test_holes_are_the_boxes_that_were_asked_for(size):
    rng = np.random.default_rng(0)
    image = rng.uniform(1, 2, (*size, 2)).astype(np.float32)
    n = len(size)
    place, side = np.array([[0.0] * n, [1.0] * n, [0.5] * n], np.float32), np.full((3, n), 0.2, np.float32)
    expected, sides = image.copy(), [round(0.2 * s) for s in size]
    expected[tuple(slice(0, s) for s in sides)] = 0
    expected[tuple(slice(-s, None) for s in sides)] = 0
    np.testing.assert_array_equal(punch(image, place, side, 2), expected)  # the third is not counted
    np.testing.assert_array_equal(punch(image, place, side, 0), image)


def test_holes_leave_the_label_and_keep_within_their_number_and_size():
    batch = {"image": np.ones((16, 40, 40, 3), np.float32), "label": example((40, 40), 16)["label"]}
    config = only(p_holes=0.5, holes=(2, 3), hole_size=(0.1, 0.2))
    out = jitted(config, (40, 40))(jax.random.key(0), batch)
    np.testing.assert_array_equal(out["label"], batch["label"])
    black = (np.asarray(out["image"]) == 0).all(-1).sum((1, 2))
    assert set(np.unique(out["image"])) == {0, 1}
    assert 3 < (black == 0).sum() < 13
    assert black[black > 0].min() >= 16  # two boxes of 4 x 4 may coincide
    assert black.max() <= 3 * 8**2


def test_holes_of_no_number_are_refused():
    with pytest.raises(UserError, match="holes"):
        Augment(holes=(0, 0))

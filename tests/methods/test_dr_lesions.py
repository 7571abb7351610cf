"""The loss for rare lesions, and what the plan does to a fundus photograph."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medseg_jax import DRLesions, Labels, UNet, UserError, losses
from medseg_jax.data.cache import preprocess, restore
from medseg_jax.data.fingerprint import field_of_view
from medseg_jax.data.plan import Plan
from medseg_jax.methods.objective import Task
from medseg_jax.ops.clahe import clahe_lab
from medseg_jax.types import Geometry

PLAN = Plan(
    dim=2,
    spacing=None,
    patch_size=(16, 16),
    batch_size=2,
    normalization=({"scheme": "fixed", "mean": 100.0, "std": 50.0},) * 3,
    strides=((1, 1), (2, 2)),
    kernel_sizes=((3, 3), (3, 3)),
    features=(4, 8),
    crop_nonzero=False,
    steps=1,
    classes=("MA", "HE"),
    in_channels=3,
)


def bound(**options):
    return DRLesions(UNet(), **options).bind(Task(PLAN, Labels.overlapping("MA", "HE"), 3))


def batch(label):
    image = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    return {"image": image, "label": jnp.asarray(label, jnp.int32)}


@pytest.mark.parametrize("tversky", [False, True])
def test_rare_classes_weigh_more(tversky):
    label = np.zeros((2, 16, 16), int)
    label[0, :4, :4] = 1  # MA: 16 pixels; HE: one
    label[1, 0, 0] = 2
    method = bound(tversky=tversky)
    params, aux = method.init(jax.random.key(0), batch(label))
    value, _ = jax.jit(method.loss)(params, aux, {}, batch(label), jax.random.key(2))
    logits, _ = method.forward(params, aux["stats"], batch(label)["image"], jax.random.key(2))
    target = jnp.stack([label & 1, label >> 1], -1).astype(jnp.float32)
    weights = jnp.array([np.sqrt((512 - 16) / 16), 20.0])
    bce = losses.binary_cross_entropy(logits[0], target, pos_weight=weights)
    overlap = losses.tversky_loss(logits[0], target, exclusive=False, gamma=0.75)
    overlap = overlap if tversky else losses.dice_loss(logits[0], target, exclusive=False)
    np.testing.assert_allclose(value, bce + overlap, rtol=1e-5)


def test_patches_without_a_lesion_teach_not_to_see_it():
    method = bound()
    empty = batch(np.zeros((2, 16, 16)))
    params, aux = method.init(jax.random.key(0), empty)
    step = jax.jit(jax.value_and_grad(lambda p: method.loss(p, aux, {}, empty, jax.random.key(2))[0]))
    before, gradient = step(params)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(gradient))
    after, _ = step(jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient))
    assert after < before


def test_exclusive_classes_are_refused():
    method = DRLesions(UNet()).bind(Task(PLAN, Labels.simple("a", "b"), 3))
    first = batch(np.zeros((2, 16, 16)))
    params, aux = method.init(jax.random.key(0), first)
    with pytest.raises(UserError, match="may overlap"):
        method.loss(params, aux, {}, first, jax.random.key(0))


# ---------------------------------------------------------------- field of view, CLAHE


def fundus(h=120, w=200):
    y, x = np.mgrid[:h, :w]
    disc = (y - 60) ** 2 + (x - 90) ** 2 < 45**2
    rng = np.random.default_rng(0)
    retina = np.array([180, 90, 40]) + rng.integers(-20, 20, (h, w, 3))
    image = np.where(disc[..., None], retina, rng.integers(0, 9, (h, w, 3)))
    image[5, 190] = 255  # a hot pixel, and a stamp in the corner
    image[100:110, 180:195] = 200
    return image.astype(np.uint8), disc


def test_the_field_of_view_is_the_largest_lit_area():
    image, disc = fundus()
    rows, columns = field_of_view(image)
    np.testing.assert_allclose([*rows, *columns], [16, 105, 46, 135], atol=2)
    inside = np.zeros_like(disc)
    inside[slice(*rows), slice(*columns)] = True
    assert (inside | ~disc).mean() > 0.999
    assert field_of_view(np.zeros_like(image)) == ((0, 120), (0, 200))


def test_crop_and_clahe_are_part_of_preprocessing_and_are_undone():
    image, disc = fundus()
    geometry = Geometry(image.shape[:2], unit="px")
    plan = dataclasses.replace(PLAN, crop_field=True, clahe={"clip": 2.0, "grid": (4, 4)})
    done = preprocess(image, disc.astype(np.uint8), geometry, plan)
    rows, columns = field_of_view(image)
    expected = clahe_lab(image[slice(*rows), slice(*columns)], 2.0, (4, 4))
    np.testing.assert_allclose(done.image[0], (expected.astype(np.float32) - 100) / 50, rtol=1e-6)
    assert done.label is not None
    back = restore(np.eye(len(plan.classes) + 1)[done.label], done.record, geometry, plan).argmax(-1)
    outside = np.ones_like(disc)
    outside[slice(*rows), slice(*columns)] = False
    np.testing.assert_array_equal(back, disc & ~outside)


def test_the_plan_keeps_them(tmp_path):
    plan = dataclasses.replace(PLAN, crop_field=True, clahe={"clip": 2.0, "grid": (8, 8)})
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    for wrong in ({"clip": 2.0}, {"clip": 2.0, "grid": (8,)}, {"clip": "2", "grid": (8, 8)}, 2.0):
        with pytest.raises(UserError, match="clahe"):
            dataclasses.replace(PLAN, clahe=wrong)


def test_they_want_eight_bits():
    plan = dataclasses.replace(PLAN, crop_field=True)
    with pytest.raises(UserError, match="8-bit"):
        preprocess(np.zeros((32, 32, 3), np.uint16), None, Geometry((32, 32), unit="px"), plan)

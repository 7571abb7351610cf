"""Losses: hand-made values, gradients against finite differences, ignored voxels, deep supervision."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medseg_jax import losses

LOSSES = {
    "dice": losses.dice_loss,
    "dice_per_sample": partial(losses.dice_loss, batch=False, background=True),
    "dice_squared": partial(losses.dice_loss, squared=True),
    "dice_unsmoothed": partial(losses.dice_loss, smooth=0.0),
    "generalised_dice": losses.generalised_dice_loss,
    "generalised_dice_per_sample": partial(losses.generalised_dice_loss, batch=False),
    "tversky": losses.tversky_loss,
    "focal_tversky": partial(losses.tversky_loss, gamma=0.75),
    "focal": losses.focal_loss,
    "focal_alpha": partial(losses.focal_loss, gamma=0.5, alpha=[0.25, 0.5, 0.75]),
    "top_k": partial(losses.top_k_cross_entropy, fraction=0.25),
    "dice_ce": losses.dice_ce,
}
BOTH = {f"{name}-softmax": partial(f, exclusive=True) for name, f in LOSSES.items()}
BOTH |= {f"{name}-sigmoid": partial(f, exclusive=False) for name, f in LOSSES.items()}
BOTH["cross_entropy"] = losses.cross_entropy
BOTH["cross_entropy_weighted"] = partial(losses.cross_entropy, class_weights=[1.0, 20.0, 3.0])
BOTH["binary_cross_entropy"] = losses.binary_cross_entropy
BOTH["binary_cross_entropy_weighted"] = partial(losses.binary_cross_entropy, pos_weight=[1.0, 2.0, 3.0])

BOTH = {name: jax.jit(jax.value_and_grad(loss)) for name, loss in BOTH.items()}  # Compiled once for all tests.

every_loss = pytest.mark.parametrize("graded", BOTH.values(), ids=BOTH)
SOME = (
    "dice_per_sample-softmax",
    "generalised_dice_per_sample-sigmoid",
    "top_k-softmax",
    "focal-sigmoid",
    "cross_entropy",
)
one_of_each_kind = pytest.mark.parametrize("graded", [BOTH[name] for name in SOME], ids=SOME)


def example(seed=0, size=(4, 5), b=3, k=3, dtype=jnp.float32):
    """Logits, one-hot target and a weight with zeros."""
    rng = np.random.default_rng(seed)
    logits = 2 * rng.standard_normal((b, *size, k))
    target = np.eye(k)[rng.integers(0, k, (b, *size))]
    weight = (rng.random((b, *size)) < 0.7) * rng.choice([1.0, 0.5], (b, *size))
    return jnp.asarray(logits, dtype), jnp.asarray(target, dtype), jnp.asarray(weight, dtype)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---------------------------------------------------------------------------------------------------------------------
# Values


def test_dice_by_hand():
    # Two voxels, two classes; p of class 1: 0.5 and 0.75; truth: class 1, background.
    logits = jnp.log(jnp.array([[[0.5, 0.5], [0.25, 0.75]]]))
    target = jnp.array([[[0.0, 1.0], [1.0, 0.0]]])
    s = 1e-5
    np.testing.assert_allclose(losses.dice_loss(logits, target), 1 - (1 + s) / (2.25 + s), rtol=1e-6)
    with_background = 1 - ((2 * 0.25 + s) / (1.75 + s) + (1 + s) / (2.25 + s)) / 2
    np.testing.assert_allclose(losses.dice_loss(logits, target, background=True), with_background, rtol=1e-6)
    squared = 1 - (1 + s) / (0.25 + 0.5625 + 1 + s)
    np.testing.assert_allclose(losses.dice_loss(logits, target, squared=True), squared, rtol=1e-6)
    first_only = losses.dice_loss(logits, target, jnp.array([[1.0, 0.0]]))
    np.testing.assert_allclose(first_only, 1 - (1 + s) / (1.5 + s), rtol=1e-6)


def test_batch_dice_pools_and_sample_dice_averages():
    logits, target, _ = example()
    p, g = softmax(np.asarray(logits, float))[..., 1:], np.asarray(target, float)[..., 1:]

    def dice(axes):
        return (2 * (p * g).sum(axes) + 1e-5) / ((p + g).sum(axes) + 1e-5)

    np.testing.assert_allclose(losses.dice_loss(logits, target), 1 - dice((0, 1, 2)).mean(), rtol=1e-5)
    np.testing.assert_allclose(losses.dice_loss(logits, target, batch=False), 1 - dice((1, 2)).mean(), rtol=1e-5)


def test_cross_entropy_takes_soft_targets_and_weights():
    logits, _, weight = example()
    soft = softmax(np.random.default_rng(1).standard_normal(logits.shape))
    voxel = -(soft * np.log(softmax(np.asarray(logits, float)))).sum(-1)
    w = np.asarray(weight, float)
    np.testing.assert_allclose(losses.cross_entropy(logits, soft), voxel.mean(), rtol=1e-5)
    np.testing.assert_allclose(losses.cross_entropy(logits, soft, weight), (w * voxel).sum() / w.sum(), rtol=1e-5)


def test_class_weights_follow_pytorch():
    logits, target, _ = example()
    v = np.asarray(target, float) @ np.array([1, 20, 3.0])
    voxel = -(np.asarray(target) * np.log(softmax(np.asarray(logits, float)))).sum(-1)
    expected = (v * voxel).sum() / v.sum()
    got = losses.cross_entropy(logits, target, class_weights=[1.0, 20.0, 3.0])
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_binary_cross_entropy_by_hand():
    logits, target = jnp.array([[[0.0, 2.0]]]), jnp.array([[[1.0, 0.25]]])
    p = 1 / (1 + np.exp(-2))
    soft = -(0.25 * np.log(p) + 0.75 * np.log(1 - p))
    np.testing.assert_allclose(losses.binary_cross_entropy(logits, target), (np.log(2) + soft) / 2, rtol=1e-6)
    lifted = (3 * np.log(2) - (3 * 0.25 * np.log(p) + 0.75 * np.log(1 - p))) / 2
    np.testing.assert_allclose(losses.binary_cross_entropy(logits, target, pos_weight=3.0), lifted, rtol=1e-6)


@pytest.mark.parametrize("exclusive", [True, False])
def test_dice_ce_is_the_sum(exclusive):
    logits, target, weight = example()
    entropy = losses.cross_entropy if exclusive else losses.binary_cross_entropy
    expected = losses.dice_loss(logits, target, weight, exclusive=exclusive) + entropy(logits, target, weight)
    np.testing.assert_allclose(losses.dice_ce(logits, target, weight, exclusive), expected, rtol=1e-6)


def test_tversky_with_equal_weights_is_dice():
    logits, target, weight = example()
    # (TP + s) / (TP + FP / 2 + FN / 2 + s) = (2 TP + 2 s) / (P + G + 2 s).
    got = losses.tversky_loss(logits, target, weight, alpha=0.5, beta=0.5, smooth=0.5)
    np.testing.assert_allclose(got, losses.dice_loss(logits, target, weight, smooth=1.0), rtol=1e-5)


def test_tversky_punishes_misses():
    target = jnp.array([[[0.0, 1.0]] * 4 + [[1.0, 0.0]] * 4])  # [1, 8, 2]
    miss = 20 * (target.at[:, 0].set(jnp.array([1.0, 0.0])) - 0.5)
    alarm = 20 * (target.at[:, 7].set(jnp.array([0.0, 1.0])) - 0.5)
    np.testing.assert_allclose(losses.tversky_loss(miss, target), 1 - 3 / (3 + 0.7), atol=1e-4)
    np.testing.assert_allclose(losses.tversky_loss(alarm, target), 1 - 4 / (4 + 0.3), atol=1e-4)
    np.testing.assert_allclose(losses.tversky_loss(miss, target, gamma=0.75), (0.7 / 3.7) ** 0.75, atol=1e-4)


def test_generalised_dice_by_hand():
    logits, target, _ = example(b=1)
    p, g = softmax(np.asarray(logits, float)).reshape(-1, 3), np.asarray(target, float).reshape(-1, 3)
    v = 1 / g.sum(0) ** 2
    expected = 1 - 2 * (v * (p * g).sum(0)).sum() / (v * (p + g).sum(0)).sum()
    np.testing.assert_allclose(losses.generalised_dice_loss(logits, target, smooth=0.0), expected, rtol=1e-5)


def test_generalised_dice_bears_absent_classes():
    logits, target, _ = example()
    target = jnp.zeros_like(target).at[..., 0].set(1)
    assert np.isfinite(losses.generalised_dice_loss(logits, target))
    assert losses.generalised_dice_loss(50 * target - 25, target) < 1e-5


def test_focal_without_focus_is_cross_entropy():
    logits, target, weight = example()
    focal = partial(losses.focal_loss, logits, target, weight, gamma=0.0)
    np.testing.assert_allclose(focal(exclusive=True), losses.cross_entropy(logits, target, weight), rtol=1e-5)
    np.testing.assert_allclose(focal(exclusive=False), losses.binary_cross_entropy(logits, target, weight), rtol=1e-5)


def test_focal_by_hand():
    logits, target = jnp.log(jnp.array([[[0.2, 0.8]]])), jnp.array([[[0.0, 1.0]]])
    np.testing.assert_allclose(losses.focal_loss(logits, target), -(0.2**2) * np.log(0.8), rtol=1e-5)
    sigmoid = losses.focal_loss(jnp.array([[[0.0]]]), jnp.array([[[1.0]]]), exclusive=False, alpha=0.25)
    np.testing.assert_allclose(sigmoid, 0.25 * 0.25 * np.log(2), rtol=1e-5)


def test_top_k_keeps_the_hardest():
    logits, target, weight = example()
    voxel = -(np.asarray(target) * np.log(softmax(np.asarray(logits, float)))).sum(-1)
    hardest = np.sort(voxel.ravel())[::-1][: int(np.ceil(0.1 * voxel.size))]
    np.testing.assert_allclose(losses.top_k_cross_entropy(logits, target), hardest.mean(), rtol=1e-5)
    binary = jnp.where(weight > 0, 1.0, 0.0)
    counted = np.sort(voxel[np.asarray(weight) > 0])[::-1]
    expected = counted[: int(np.ceil(0.1 * counted.size))].mean()
    np.testing.assert_allclose(losses.top_k_cross_entropy(logits, target, binary), expected, rtol=1e-5)
    everything = losses.top_k_cross_entropy(logits, target, weight, fraction=1.0)
    np.testing.assert_allclose(everything, losses.cross_entropy(logits, target, weight), rtol=1e-5)


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_top_k_wants_a_fraction(fraction):
    with pytest.raises(ValueError, match="fraction"):
        losses.top_k_cross_entropy(*example(), fraction=fraction)


# ---------------------------------------------------------------------------------------------------------------------
# What holds for all


@every_loss
def test_gradient_equals_finite_differences(graded):
    with jax.enable_x64(True):
        logits, target, weight = example(seed=3, dtype=jnp.float64)
        _, gradient = graded(logits, target, weight)
        assert gradient.dtype == jnp.float64
        for direction in range(3):
            d = np.random.default_rng(direction).standard_normal(logits.shape)
            up, down = (graded(logits + step * d, target, weight)[0] for step in (1e-6, -1e-6))
            np.testing.assert_allclose((gradient * d).sum(), (up - down) / 2e-6, rtol=1e-6, atol=1e-8)


@every_loss
def test_ignored_voxels_influence_nothing(graded):
    logits, target, weight = example()
    weight = weight.at[1].set(0)
    ignored = (weight == 0)[..., None]
    value, gradient = graded(logits, target, weight)
    for garbage in (100.0, np.nan, np.inf):
        other = graded(jnp.where(ignored, garbage, logits), jnp.where(ignored, garbage, target), weight)
        np.testing.assert_array_equal(other[0], value)
        np.testing.assert_array_equal(other[1], gradient)
    assert np.isfinite(value)
    assert not np.any(np.where(ignored, gradient, 0))
    assert np.any(gradient != 0)


@one_of_each_kind
def test_ignored_samples_do_not_dilute(graded):
    logits, target, weight = example()
    value, _ = graded(logits, target, weight.at[2].set(0))
    np.testing.assert_allclose(value, graded(logits[:2], target[:2], weight[:2])[0], rtol=1e-5)


@every_loss
def test_nothing_to_learn_from_is_zero(graded):
    logits, target, weight = example()
    value, gradient = graded(logits, target, jnp.zeros_like(weight))
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@every_loss
def test_extreme_logits_stay_finite(graded):
    _, target, weight = example()
    for scale in (0.0, 1e4, -1e4):
        value, gradient = graded(scale * (target - 0.5), target, weight)
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


@every_loss
def test_better_is_lower(graded):
    _, target, weight = example()
    worse, better, best = (graded(scale * (target - 0.5), target, weight)[0] for scale in (-2, 2, 8))
    assert worse > better > best >= 0


@one_of_each_kind
def test_low_precision_is_computed_in_float32(graded):
    logits, target, weight = example()
    low = logits.astype(jnp.bfloat16)
    value, _ = graded(low, target, weight)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, graded(low.astype(jnp.float32), target, weight)[0], rtol=1e-6)


@one_of_each_kind
def test_space_may_have_three_axes_and_no_weight_is_weight_one(graded):
    logits, target, weight = example()
    volume = [x.reshape(3, 1, 4, 5, 3) for x in (logits, target)]
    value, _ = graded(logits, target, jnp.ones_like(weight))
    np.testing.assert_allclose(graded(*volume)[0], value, rtol=1e-5)


def test_shapes_are_checked():
    logits, target, weight = example()
    with pytest.raises(ValueError, match="one shape"):
        losses.dice_ce(logits, target[..., :2])
    with pytest.raises(ValueError, match="without channels"):
        losses.dice_ce(logits, target, weight[..., None])


# ---------------------------------------------------------------------------------------------------------------------
# Deep supervision


def test_deep_supervision_weights():
    assert losses.deep_supervision_weights(1) == (1.0,)
    assert losses.deep_supervision_weights(2) == (1.0, 0.0)
    np.testing.assert_allclose(losses.deep_supervision_weights(4), [4 / 7, 2 / 7, 1 / 7, 0])


def test_deep_supervision_meets_strided_targets():
    _, target, weight = example(size=(8, 7, 4))
    levels = [target, target[:, ::2, ::2], target[:, ::4, ::4, ::2], target[:, ::8, ::8, ::4]]
    seen = []

    def loss(logits, target, weight):
        seen.append((logits.shape, weight.shape))
        np.testing.assert_array_equal(logits, target)
        return jnp.float32(len(seen))

    total = losses.deep_supervision(loss, levels, target, weight)
    np.testing.assert_allclose(total, (4 * 1 + 2 * 2 + 1 * 3) / 7, rtol=1e-6)
    assert seen == [(x.shape, x.shape[:-1]) for x in levels[:3]]


def test_deep_supervision_with_one_output_is_the_loss():
    logits, target, weight = example()
    got = losses.deep_supervision(losses.dice_ce, (logits,), target, weight)
    np.testing.assert_allclose(got, losses.dice_ce(logits, target, weight), rtol=1e-6)


def test_deep_supervision_respects_ignored_voxels():
    logits, target, weight = example(size=(8, 8))
    levels = (logits, logits[:, ::2, ::2] + 1, logits[:, ::4, ::4])
    ignored = (weight == 0)[..., None]
    value = losses.deep_supervision(losses.dice_ce, levels, target, weight)
    other = losses.deep_supervision(losses.dice_ce, levels, jnp.where(ignored, jnp.nan, target), weight)
    np.testing.assert_array_equal(other, value)


def test_deep_supervision_refuses_other_shapes():
    logits, target, _ = example(size=(7, 7))
    with pytest.raises(ValueError, match="no strided reduction"):
        losses.deep_supervision(losses.dice_ce, (logits, logits[:, :5, :5], logits[:, :2, :2]), target)

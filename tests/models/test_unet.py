"""Blocks and the plain U-Net: counts against nnU-Net's, norms against their formulas, the interface, what must fail."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medseg_jax.methods.objective import Fn
from medseg_jax.models import unet
from medseg_jax.models.blocks import Conv, ConvTranspose, Norm, normalise
from medseg_jax.models.unet import UNet
from medseg_jax.types import UserError

RNG = np.random.default_rng(0)
TINY = UNet.isotropic(2, 8, 16, 16)


def image(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def run(module, x, train=False):
    graph, state = nnx.split(module)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x, train))(state, x)


def parameters(config, in_channels=1, out_channels=2):
    module = nnx.eval_shape(lambda: config.build(in_channels, out_channels, nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def nnunet_parameters(config, in_channels=1, out_channels=2):
    """Parameters of dynamic_network_architectures' PlainConvUNet, and how many of them are biases before a norm."""
    total, biases, c = 0, 0, in_channels
    for features, kernel_size, _ in config.stages():
        for _ in range(config.convs_per_stage):
            total += math.prod(kernel_size) * c * features + features + 2 * features
            biases, c = biases + features, features
    stages = config.stages()
    for i in reversed(range(len(stages) - 1)):
        features, kernel_size, _ = stages[i]
        below, _, strides = stages[i + 1]
        total += math.prod(strides) * below * features + features
        c = 2 * features
        for _ in range(config.decoder_convs):
            total += math.prod(kernel_size) * c * features + features + 2 * features
            biases, c = biases + features, features
        total += features * out_channels + out_channels
    return total, biases


# -------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("name", "count"),
    [("PLAIN_3D", 31_191_754), ("PLAIN_2D", 46_315_470), ("SMALL_3D", 1_401_478), ("SMALL_2D", 1_942_760)],
)
def test_parameter_counts_are_nnunets_without_dead_biases(name, count):
    config = getattr(unet, name)
    theirs, biases = nnunet_parameters(config)
    assert parameters(config) == count == theirs - biases
    assert f"| {name} | {count:,} | {theirs:,} |" in unet.__doc__


def test_the_published_network_has_31_2_million_parameters():
    assert round(nnunet_parameters(unet.PLAIN_3D)[0] / 1e6, 1) == 31.2


def test_anisotropic_kernels_and_strides_count_too():
    strides = ((1, 1, 1), (1, 2, 2), (2, 2, 2))
    config = UNet(3, (8, 16, 24), strides, ((1, 3, 3), (3, 3, 3), (3, 3, 3)), convs_per_stage=3, decoder_convs=1)
    theirs, biases = nnunet_parameters(config, 2, 4)
    assert parameters(config, 2, 4) == theirs - biases


# ----------------------------------------------------------------------------------------------------------- interface


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (TINY, (8, 12)),
        (UNet.isotropic(3, 8, 8), (4, 6, 2)),
        (UNet(3, (8, 8, 8), ((1, 1, 1), (1, 2, 2), (2, 2, 2)), ((1, 3, 3), (3, 3, 3), (3, 3, 3))), (2, 8, 4)),
    ],
)
def test_full_resolution_first_and_one_output_per_decoder_stage_in_training(config, size):
    module = config.build(2, 3, nnx.Rngs(0))
    x = image(2, *size, 2)
    (logits,) = run(module, x)
    assert logits.shape == (2, *size, 3)
    outputs = run(module, x, train=True)
    expected = [size]
    for _, _, strides in config.stages()[1:-1]:
        expected.append(tuple(n // s for n, s in zip(expected[-1], strides, strict=True)))
    assert [y.shape[1:-1] for y in outputs] == expected
    assert {y.dtype for y in outputs} == {jnp.dtype("float32")}
    np.testing.assert_allclose(outputs[0], logits, rtol=1e-5, atol=1e-5)

    single = replace(config, deep_supervision=False).build(2, 3, nnx.Rngs(0))
    assert len(run(single, x, train=True)) == 1
    assert len(single.decoder.heads) == 1


def test_a_strided_first_stage_still_answers_at_full_resolution():
    config = UNet(3, (8, 16, 16), ((2, 2, 2), (1, 2, 2), (2, 2, 2)), ((3, 3, 3),) * 3)
    module = config.build(1, 2, nnx.Rngs(0))
    x = image(1, 8, 8, 16, 1)
    full, below = run(module, x, train=True)
    assert full.shape == (1, 8, 8, 16, 2)
    assert below.shape == (1, 4, 2, 4, 2)
    assert module.total_strides == (4, 8, 8)


def test_parameters_are_all_the_state_there_is():
    for norm, kinds in (("instance", {nnx.Param}), ("batch", {nnx.Param, nnx.BatchStat})):
        module = replace(TINY, norm=norm, dropout=0.5).build(1, 2, nnx.Rngs(0))
        leaves = jax.tree.leaves(nnx.state(module), is_leaf=lambda v: isinstance(v, nnx.Variable))
        assert {type(leaf) for leaf in leaves} == kinds
        assert {leaf[...].dtype for leaf in leaves} == {jnp.dtype("float32")}


def test_the_engine_can_take_it_apart_and_call_it():
    fn = Fn(lambda rngs: replace(TINY, norm="batch", dropout=0.2).build(1, 2, rngs))
    params, stats = fn.init(jax.random.key(1))
    x = image(2, 8, 8, 1)

    @jax.jit
    def loss(params, stats, key):
        outputs, stats = fn.apply(params, stats, x, train=True, key=key)
        return sum((y**2).mean() for y in outputs), stats

    (value, new_stats), gradient = jax.value_and_grad(loss, has_aux=True)(params, stats, jax.random.key(2))
    assert np.isfinite(value)
    assert jax.tree.structure(new_stats) == jax.tree.structure(stats)
    assert not np.allclose(jax.tree.leaves(new_stats)[0], jax.tree.leaves(stats)[0])
    assert all(float(jnp.abs(g).max()) > 0 for g in jax.tree.leaves(gradient))
    assert loss(params, stats, jax.random.key(2))[0] == value != loss(params, stats, jax.random.key(3))[0]


def test_same_key_same_network():
    a, b, c = (jax.tree.leaves(nnx.state(TINY.build(1, 2, nnx.Rngs(seed)))) for seed in (0, 0, 1))
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert not all(np.array_equal(x, y) for x, y in zip(a, c, strict=True))


def test_it_learns():
    module = TINY.build(1, 2, nnx.Rngs(0))
    graph, params = nnx.split(module)
    x = image(4, 16, 16, 1)
    y = jax.nn.one_hot((x[..., 0] > 0).astype(int), 2)

    @jax.jit
    def step(params):
        def loss(params):
            return -(jax.nn.log_softmax(nnx.merge(graph, params)(x, train=True)[0]) * y).sum(-1).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.2 * g, params, gradient), value

    values = []
    for _ in range(40):
        params, value = step(params)
        values.append(float(value))
    assert values[-1] < 0.4 * values[0]


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_rematerialisation_changes_no_value(norm):
    plain, remat = (Fn(lambda rngs, r=r: replace(TINY, norm=norm, remat=r).build(1, 2, rngs)) for r in (False, True))
    params, stats = plain.init(jax.random.key(1))
    x = image(2, 8, 8, 1)

    def loss(params, fn):
        outputs, new = fn.apply(params, stats, x, train=True)
        return sum((y**2).mean() for y in outputs), new

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)
    assert "remat" in str(jax.make_jaxpr(loss, static_argnums=1)(params, remat))
    for a, b in zip(jax.tree.leaves(step(params, plain)), jax.tree.leaves(step(params, remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_rematerialisation_repeats_the_same_dropout(x64):
    fn = Fn(lambda rngs: replace(TINY, dropout=0.5, remat=True, dtype="float64").build(1, 2, rngs))
    params, stats = fn.init(jax.random.key(1))
    params = jax.tree.map(lambda p: p + 0.1, params)  # else all voxels of a dropped channel sit on leaky ReLU's kink
    x = jnp.array(RNG.normal(size=(2, 16, 16, 1)))

    @jax.jit
    def loss(params):
        return sum((y**2).mean() for y in fn.apply(params, stats, x, train=True, key=jax.random.key(0))[0])

    # The difference quotient along the gradient is its length, unless the backward pass drew other masks.
    gradient = jax.jit(jax.grad(loss))(params)
    length = math.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    up, down = (loss(jax.tree.map(lambda p, g, h=h: p + h * g / length, params, gradient)) for h in (1e-4, -1e-4))
    assert (float(up) - float(down)) / 2e-4 == pytest.approx(length, rel=1e-3)


def test_bfloat16_computes_roughly_the_same():
    x = image(2, 8, 8, 1)
    exact, rough = (replace(TINY, dtype=dtype).build(1, 2, nnx.Rngs(0)) for dtype in ("float32", "bfloat16"))
    (found,), (expected,) = run(rough, x), run(exact, x)
    assert found.dtype == jnp.float32
    assert not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, atol=0.1 * float(jnp.abs(expected).max()))


def test_dropout_wants_a_key_in_training_only():
    module = replace(TINY, dropout=0.5).build(1, 2, nnx.Rngs(0))
    x = image(1, 8, 8, 1)
    run(module, x)
    with pytest.raises(ValueError, match="rngs"):
        module(x, train=True)


# ---------------------------------------------------------------------------------------------------------------- norms


def reference_norm(kind, x, groups, eps=1e-5):
    b, *s, c = x.shape
    axes = {"batch": (0, 1, 2), "instance": (1, 2), "group": (1, 2, 4)}[kind]
    x = x.reshape(b, *s, groups, c // groups) if kind == "group" else x
    return ((x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)).reshape(b, *s, c)


@pytest.mark.parametrize("kind", ["instance", "batch", "group"])
@pytest.mark.parametrize("slope", [1.0, 0.01])
def test_norm_is_the_formula(kind, slope):
    x, scale, bias = RNG.normal(2, 3, size=(3, 4, 5, 8)), RNG.normal(size=8), RNG.normal(size=8)
    norm = Norm(kind, 8, groups=2, slope=slope)
    norm.scale[...], norm.bias[...] = jnp.float32(scale), jnp.float32(bias)
    expected = reference_norm(kind, x, 2) * scale + bias
    found = norm(jnp.float32(x), train=True)
    np.testing.assert_allclose(found, np.where(expected > 0, expected, slope * expected), atol=2e-5)


@pytest.mark.parametrize("slope", [1.0, 0.01])
@pytest.mark.parametrize(("axes", "channels"), [((1, 2), (4,)), ((0, 1, 2), (4,)), ((1, 2, 4), (2, 2))])
def test_norm_gradients_in_double_precision(axes, channels, slope, x64):
    x, scale, bias = (jnp.array(RNG.normal(size=s)) for s in ((2, 3, 4, *channels), channels, channels))

    def plain(x, scale, bias):
        y = (x - x.mean(axes, keepdims=True)) / jnp.sqrt(x.var(axes, keepdims=True) + 1e-5) * scale + bias
        return jnp.sin(jnp.where(y > 0, y, slope * y)).sum()

    ours = jax.grad(lambda *a: jnp.sin(normalise(*a, axes, 1e-5, slope)[0]).sum(), (0, 1, 2))(x, scale, bias)
    for a, b in zip(ours, jax.grad(plain, (0, 1, 2))(x, scale, bias), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)


def test_variance_survives_a_large_mean():
    x = RNG.normal(size=(1, 16, 16, 1))
    found = Norm("instance", 1)(jnp.float32(x + 4096))
    np.testing.assert_allclose(found, reference_norm("instance", x, 1), atol=5e-3)


def test_batch_norm_keeps_running_statistics():
    norm = Norm("batch", 2)
    x = RNG.normal((1.0, -2.0), (2.0, 0.5), size=(4, 6, 6, 2))
    for _ in range(2):
        norm(jnp.float32(x), train=True)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2), ddof=1)
    np.testing.assert_allclose(norm.mean[...], 0.19 * mean, rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.81 + 0.19 * var, rtol=1e-5)
    before = jax.tree.leaves(nnx.state(norm, nnx.BatchStat))
    expected = (x - 0.19 * mean) / np.sqrt(0.81 + 0.19 * var + 1e-5)
    np.testing.assert_allclose(norm(jnp.float32(x)), expected, atol=1e-5)
    np.testing.assert_array_equal(before, jax.tree.leaves(nnx.state(norm, nnx.BatchStat)))


def test_bfloat16_norm_has_float32_statistics():
    x = jnp.bfloat16(RNG.normal(100, 1, size=(2, 16, 16, 4)))
    norm = Norm("batch", 4)
    y = norm(x, train=True)
    assert y.dtype == jnp.bfloat16
    assert norm.mean[...].dtype == jnp.float32
    np.testing.assert_allclose(norm.mean[...], 0.1 * np.float32(x).mean((0, 1, 2)), rtol=1e-5)


# --------------------------------------------------------------------------------------------------------------- blocks


def test_kernels_have_he_variance():
    kernel = Conv(32, 64, (3, 3), rngs=nnx.Rngs(0)).kernel[...]
    assert np.std(kernel) == pytest.approx(math.sqrt(2 / (1.0001 * 9 * 32)), rel=0.02)
    up = ConvTranspose(64, 32, (2, 2), rngs=nnx.Rngs(0)).kernel[...]
    assert np.std(up) == pytest.approx(math.sqrt(2 / (1.0001 * 4 * 32)), rel=0.02)
    assert not Conv(2, 3, (1, 1), rngs=nnx.Rngs(0)).bias[...].any()


# ------------------------------------------------------------------------------------------------------ what must fail


class PlanLike:
    dim, features, strides, kernel_sizes = 2, (8, 16), ((1, 1), (2, 2)), ((3, 3), (3, 3))


def test_the_plan_fills_what_the_config_leaves_open():
    config = UNet(features=(4, 8), norm="batch").from_plan(PlanLike)
    assert config == UNet(2, (4, 8), ((1, 1), (2, 2)), ((3, 3), (3, 3)), norm="batch")
    assert UNet.isotropic(3, 4, 8).from_plan(PlanLike) == UNet.isotropic(3, 4, 8)


def test_wrong_size_is_a_user_error_with_the_remedy():
    module = TINY.build(1, 2, nnx.Rngs(0))
    for shape in ((1, 8, 10, 1), (1, 8, 8, 8, 1)):
        with pytest.raises(UserError, match="of this size") as error:
            module(jnp.zeros(shape))
        assert "(a multiple of 4) x (a multiple of 4)" in str(error.value)
        assert "plan.json" in str(error.value)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (UNet(), "dim, features, strides, kernel_sizes"),
        (UNet(dim=2, features=(8, 8)), "no strides, kernel_sizes"),
        (replace(TINY, features=(8, 16)), "one entry per stage"),
        (UNet(2, (8,), ((1, 1),), ((3, 3),)), "two stages"),
        (replace(TINY, dim=3), "3 positive integers"),
        (replace(TINY, strides=((1, 1), (2, 0), (2, 2))), "(2, 0)"),
        (replace(TINY, kernel_sizes=((3, 3), (3, 2), (3, 3))), "odd sizes"),
        (replace(TINY, norm="layer"), "layer"),
        (replace(TINY, norm="group", features=(8, 12, 16)), "multiple of 8"),
    ],
)
def test_contradictions_are_user_errors(config, words):
    with pytest.raises(UserError) as error:
        config.build(1, 2, nnx.Rngs(0))
    assert words in str(error.value)

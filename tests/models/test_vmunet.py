"""VM-UNet: counts, the four-way scan against its literal form, the interface, initial values, what must fail."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from medseg_jax import Group
from medseg_jax.methods.objective import Fn
from medseg_jax.models import vmunet
from medseg_jax.models.blocks import drop_path
from medseg_jax.models.unet import UNet
from medseg_jax.models.vmunet import NO_DECAY, SS2D, VM_UNET, VMUNet, VSSBlock
from medseg_jax.training.optim import assign_groups
from medseg_jax.types import UserError

RNG = np.random.default_rng(0)
MINI = VMUNet(features=(8, 12), depths=(1, 1), decoder_depths=(1, 1), stem=2, states=3, drop_path=0.0)


def image(*shape):
    return jnp.asarray(RNG.uniform(size=shape), jnp.float32)


def function(config, in_channels=3, out_channels=2):
    fn = Fn(lambda rngs: config.build(in_channels, out_channels, rngs))
    params, stats = fn.init(jax.random.key(1))
    assert not stats
    return fn, params


# -------------------------------------------------------------------------------------------------------------- counts


def leaves(config, out_channels):
    module = nnx.eval_shape(lambda: config.build(3, out_channels, nnx.Rngs(0)))
    return [leaf.size for leaf in jax.tree.leaves(nnx.state(module))]


@pytest.mark.parametrize("classes", [1, 2, 3])
def test_the_published_network_has_222_tensors_and_27_million_parameters(classes):
    sizes = leaves(VM_UNET, classes)
    assert (len(sizes), sum(sizes)) == (222, 27_427_536 + 25 * classes)


@pytest.mark.parametrize("name", ["VM_UNET", "SMALL", "TINY"])
def test_the_docstring_tells_the_counts(name):
    config = getattr(vmunet, name)
    scan, conv = (sum(leaves(replace(config, mixer=mixer), 3)) for mixer in ("scan", "conv"))
    assert f"| {name} | {scan:,} | {conv:,} |" in vmunet.__doc__


# ------------------------------------------------------------------------------------------------------- four-way scan


def literal_ss2d(m, x):
    """SS2D step by step in float64, with every sequence laid out, flipped and turned back (spec 1.4)."""
    p = {k: np.asarray(v, np.float64) for k, v in nnx.to_pure_dict(nnx.state(m)).items() if k != "norm"}
    silu = lambda v: v / (1 + np.exp(-v))  # noqa: E731
    x, z = np.split(x @ p["in_proj"], 2, -1)
    b, h, w, d = x.shape
    wide = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = sum(wide[:, i : i + h, j : j + w] * p["kernel"][i, j, 0] for i in range(3) for j in range(3)) + p["bias"]
    x = silu(x)
    rows, columns = x.reshape(b, h * w, d), x.transpose(0, 2, 1, 3).reshape(b, h * w, d)
    n, r = p["A_log"].shape[1], p["dt_weight"].shape[2]
    total = np.zeros((b, h, w, d))
    for k, sequence in enumerate((rows, columns, rows[:, ::-1], columns[:, ::-1])):
        own = slice(k * d, (k + 1) * d)
        dt, B, C = np.split(sequence @ p["x_proj"][k].T, (r, r + n), -1)
        delta = np.log1p(np.exp(dt @ p["dt_weight"][k].T + p["dt_bias"][k]))
        state, y = np.zeros((b, d, n)), np.empty_like(sequence)
        for t in range(h * w):
            u = sequence[:, t]
            decay = np.exp(delta[:, t, :, None] * -np.exp(p["A_log"][own]))
            state = decay * state + (delta[:, t] * u)[..., None] * B[:, t, None]
            y[:, t] = (state * C[:, t, None]).sum(-1) + p["D"][own] * u
        y = y[:, ::-1] if k >= 2 else y
        total += y.reshape(b, w, h, d).transpose(0, 2, 1, 3) if k % 2 else y.reshape(b, h, w, d)
    mean, var = total.mean(-1, keepdims=True), total.var(-1, keepdims=True)
    return ((total - mean) / np.sqrt(var + 1e-5) * silu(z)) @ p["out_proj"]


def test_flip_free_is_the_literal_form(x64):
    module = SS2D(4, replace(MINI, dtype="float64"), nnx.Rngs(0))
    for name in ("A_log", "D", "dt_bias", "in_proj", "out_proj"):
        parameter = getattr(module, name)
        parameter[...] = parameter[...] + 0.3 * jnp.asarray(RNG.normal(size=parameter.shape))
    x = RNG.normal(size=(2, 3, 5, 4))
    np.testing.assert_allclose(module(jnp.asarray(x)), literal_ss2d(module, x), rtol=1e-10, atol=1e-10)


# ----------------------------------------------------------------------------------------------------------- interface


def test_images_of_any_size_and_one_channel():
    fn, params = function(MINI, 1, 3)
    assert params["patch_embed"]["conv"]["kernel"].shape == (2, 2, 3, 8)
    call = jax.jit(lambda x: fn.apply(params, {}, x)[0])
    x = image(1, 7, 9, 1)
    (logits,) = call(x)
    assert logits.shape == (1, 7, 9, 3)
    assert logits.dtype == jnp.float32
    padded = jnp.repeat(jnp.pad(x, ((0, 0), (0, 1), (0, 3), (0, 0)), mode="edge"), 3, -1)
    np.testing.assert_allclose(call(padded)[0][:, :7, :9], logits, rtol=1e-5, atol=1e-6)


class Counting:
    """Changes the i-th features that it is shown with `change(y, i)`."""

    def __init__(self, change=lambda y, i: y):
        self.change, self.shapes = change, []

    def __call__(self, y):
        self.shapes.append(y.shape)
        return self.change(y, len(self.shapes))


def tilt(y, i):
    return y + 0.1 * i * jnp.arange(y.shape[-1])


@pytest.mark.parametrize("mixer", ["scan", "conv"])
def test_perturb_and_rematerialisation(mixer):
    """perturb sees every direction's output, row by row; the backward pass does not call it again."""
    x = image(2, 8, 12, 3)
    plain, remat = (function(replace(MINI, mixer=mixer, remat=remat)) for remat in (False, True))

    def loss(params, fn, perturb=None):
        return (fn.apply(params, {}, x, train=True, key=jax.random.key(0), perturb=perturb)[0][0] ** 2).mean()

    @jax.jit
    def values(params):
        pairs = [jax.value_and_grad(loss)(params, fn, p) for fn, p in ((plain[0], other), (remat[0], other_too))]
        return loss(params, plain[0]), loss(params, plain[0], same), *pairs

    same, other, other_too = Counting(), Counting(tilt), Counting(tilt)
    without, with_same, one, two = values(plain[1])
    each = 4 if mixer == "scan" else 1
    channels = [16, 24, 24, 16] if mixer == "scan" else [8, 12, 12, 8]
    sizes = [(4, 6), (2, 3), (2, 3), (4, 6)]
    expected = [(2, *size, c) for size, c in zip(sizes, channels, strict=True) for _ in range(each)]
    assert same.shapes == other.shapes == other_too.shapes == expected
    np.testing.assert_allclose(with_same, without, rtol=1e-5)
    assert not np.isclose(one[0], without, rtol=1e-3)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(two), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6, err_msg=str(path))
        assert float(jnp.abs(a).max()) > 0, path


def test_a_unet_is_perturbed_after_each_encoder_stage():
    fn, params = function(UNet.isotropic(2, 8, 16, 16))
    perturb = Counting(lambda y, _: 0 * y)
    x = image(1, 8, 8, 3)
    (logits,), _ = fn.apply(params, {}, x, perturb=perturb)
    assert perturb.shapes == [(1, 8, 8, 8), (1, 4, 4, 16), (1, 2, 2, 16)]
    np.testing.assert_allclose(logits, fn.apply(params, {}, 0 * x, perturb=perturb)[0][0])


def test_skips_of_the_two_kinds():
    """Nothing gets past the merging of patches but through the skips that a U-Net has and the published one has not."""
    x = image(1, 16, 16, 3)
    published, params = function(MINI)
    own, same = function(replace(MINI, skips="unet"))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, same)
    params["encoder"]["0"]["down"] = jax.tree.map(jnp.zeros_like, params["encoder"]["0"]["down"])

    def detail(fn, x):
        (logits,), _ = fn.apply(params, {}, x)
        return float(jnp.abs(logits - logits.mean((1, 2), keepdims=True)).max())

    assert detail(published, x) < 1e-5 < 1e-2 < detail(own, x)


def test_bfloat16_computes_roughly_the_same():
    x = image(1, 16, 16, 3)
    fn, params = function(MINI)
    rough, _ = function(replace(MINI, dtype="bfloat16"))
    (expected,), (found,) = (jax.jit(lambda p, f=f: f.apply(p, {}, x)[0])(params) for f in (fn, rough))
    assert found.dtype == jnp.float32
    assert not np.array_equal(found, expected)
    assert float(jnp.abs(found - expected).mean()) < 0.02 * float(jnp.abs(expected).max())


def test_it_learns():
    fn, params = function(MINI)
    x = jnp.repeat(jnp.repeat(image(4, 4, 4, 3), 4, 1), 4, 2)
    y = jax.nn.one_hot((x[..., 0] > 0.5).astype(int), 2)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            (logits,), _ = fn.apply(params, {}, x, train=True, key=key)
            return -(jax.nn.log_softmax(logits) * y).sum(-1).mean()

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = adam.update(gradient, state)
        return optax.apply_updates(params, updates), state, value

    adam = optax.adam(3e-3)
    values, state = [], adam.init(params)
    for i in range(80):
        params, state, value = step(params, state, jax.random.key(i))
        values.append(float(value))
    assert values[-1] < 0.6 * values[0]


# ----------------------------------------------------------------------------------------------- initial values, rates


def test_initial_values():
    module = SS2D(32, VM_UNET, nnx.Rngs(0))
    step = np.log1p(np.exp(module.dt_bias[...]))
    assert step.min() >= 0.99e-3
    assert step.max() <= 0.101
    assert np.median(step) == pytest.approx(1e-2, rel=0.3)  # log-uniform
    np.testing.assert_allclose(np.exp(module.A_log[...]), np.tile(np.arange(1, 17), (256, 1)), rtol=1e-6)
    assert (module.D[...] == 1).all()
    assert np.std(module.in_proj[...]) == pytest.approx(0.02, rel=0.03)
    bounds = {"kernel": 1 / 3, "bias": 1 / 3, "x_proj": 64**-0.5, "dt_weight": 2**-0.5}
    for name, bound in bounds.items():
        u = np.abs(getattr(module, name)[...])
        assert 0.9 * bound < u.max() <= bound, name
    net = replace(MINI, stem=4).build(3, 2, nnx.Rngs(0))
    assert 0.13 < np.abs(net.patch_embed.conv.kernel[...]).max() <= 48**-0.5
    assert np.abs(net.head.kernel[...]).max() <= 2**-0.5


def test_drop_path_rates_rise_and_fall():
    module = nnx.eval_shape(lambda: VM_UNET.build(3, 2, nnx.Rngs(0)))
    up, down = ([b.rate for stage in side for b in stage.blocks] for side in (module.encoder, module.decoder))
    np.testing.assert_allclose(up, np.linspace(0, 0.2, 8))
    np.testing.assert_allclose(down, np.linspace(0, 0.2, 7)[::-1])


def test_drop_path_drops_samples_and_keeps_the_mean():
    x = jnp.ones((4000, 2, 3))
    y = drop_path(x, 0.2, True, nnx.Rngs(dropout=jax.random.key(0)))
    assert set(np.unique(y)) == {0.0, 1.25}
    assert (y == y[:, :1, :1]).all()
    assert float(y.mean()) == pytest.approx(1, abs=0.03)
    assert drop_path(x, 0.2, False, None) is x
    with pytest.raises(ValueError, match="rngs"):
        drop_path(x, 0.2, True, None)


def test_a_dropped_block_is_the_identity():
    block = VSSBlock(8, 1 - 1e-6, replace(MINI, mixer="conv"), nnx.Rngs(0))
    x = image(2, 4, 4, 8)
    np.testing.assert_array_equal(block(x, True, nnx.Rngs(dropout=jax.random.key(0))), x)


def test_weight_decay_can_spare_the_recurrence():
    _, params = function(MINI)
    groups = assign_groups(params, (Group(NO_DECAY, weight_decay=0),))
    spared = {path[-1].key for path, g in jax.tree_util.tree_leaves_with_path(groups) if g.weight_decay == 0}
    assert spared == {"A_log", "dt_bias"}


# ------------------------------------------------------------------------------------------------------ what must fail


class PlanLike:
    dim = 2


def test_a_plan_must_be_two_dimensional():
    assert MINI.from_plan(PlanLike) is MINI
    solid = PlanLike()
    solid.dim = 3
    with pytest.raises(UserError, match="2-D"):
        MINI.from_plan(solid)
    with pytest.raises(UserError, match="2-D"):
        MINI.build(1, 2, nnx.Rngs(0))(jnp.zeros((1, 8, 8, 8, 1)))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (replace(MINI, depths=(1,)), "one entry per stage"),
        (VMUNet((8,), (1,), (1,)), "two stages"),
        (replace(MINI, features=(6, 12)), "multiples of 4"),
        (replace(MINI, mixer="attention"), "attention"),
        (replace(MINI, skips="none"), "none"),
        (replace(MINI, drop_path=1.0), "below 1"),
    ],
)
def test_contradictions_are_user_errors(config, words):
    with pytest.raises(UserError) as error:
        config.build(1, 2, nnx.Rngs(0))
    assert words in str(error.value)

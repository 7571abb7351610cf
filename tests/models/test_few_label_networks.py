"""XNet-Plus, V-Net and BCP's U-Net: counts, calls, gradients, statistics, dropout, what must fail."""

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medseg_jax.methods.objective import Fn
from medseg_jax.models import bcp_unet, vnet, xnet
from medseg_jax.models.bcp_unet import BCPUNet, double
from medseg_jax.models.blocks import ConvBlock, max_pool
from medseg_jax.models.vnet import VNet
from medseg_jax.models.xnet import XNET_2D, XNET_3D, XNet
from medseg_jax.types import UserError

RNG = np.random.default_rng(0)
TINY = [
    (BCPUNet(2), (16, 32)),
    (VNet(2), (16, 16, 32)),
    (XNet(2, 2), (16, 32)),
    pytest.param(XNet(3, 2), (16, 16, 32), marks=pytest.mark.slow),  # the golden test has its forward pass
]
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""Tiny networks take longer to compile than to run."""


def image(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def functions(net, classes=2):
    """The network as pure functions, with random parameters and statistics (drawn by NumPy, without compiling)."""
    fn = Fn(lambda rngs: net.build(1, classes, rngs))
    rng = np.random.default_rng(0)

    def draw(leaf):
        values = rng.uniform(0.5, 1.5, leaf.shape) if leaf.ndim == 1 else rng.normal(size=leaf.shape) / 2
        return jnp.asarray(values, jnp.float32)

    return fn, *jax.tree.map(draw, jax.eval_shape(fn.init, jax.random.key(0)))


@pytest.mark.parametrize(
    ("net", "classes", "count", "idle", "where"),
    [
        (XNET_2D, 4, 112_984_332, 22_464, xnet),
        (XNET_3D, 2, 40_757_622, 7_344, xnet),
        (BCPUNet(), 4, 1_813_764, 1_472, bcp_unet),
        (VNet(), 2, 9_448_866, 2_800, vnet),
    ],
)
def test_counts_are_the_publications(net, classes, count, idle, where):
    module = nnx.eval_shape(lambda: net.build(1, classes, nnx.Rngs(0)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))) == count
    before_norms = (layer.conv.bias for _, layer in nnx.iter_graph(module) if isinstance(layer, ConvBlock | vnet.Up))
    assert sum(math.prod(bias.shape) for bias in before_norms) == idle
    assert f"{count:,}" in where.__doc__
    assert f"{idle:,}" in where.__doc__


def test_a_narrow_xnet_costs_what_the_u_net_costs():
    counts = []
    for net in (XNet(2, 8), BCPUNet()):
        module = nnx.eval_shape(lambda net=net: net.build(1, 4, nnx.Rngs(0)))
        counts.append(sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param))))
    assert abs(counts[0] / counts[1] - 1) < 0.03


@pytest.mark.parametrize(("net", "size"), TINY)
def test_every_parameter_with_an_effect_learns(net, size):
    fn, params, stats = functions(net, 3)
    x, weights = image(2, *size, 1), image(2, *size, 3)
    bands = {"low": x, "high": x} if isinstance(net, XNet) else {}

    @jit
    def step(params, stats):
        def loss(params):
            outputs, after = fn.apply(params, stats, x, train=True, key=jax.random.key(1), **bands)
            return sum((y * weights).mean() for y in outputs), (outputs, after)

        return jax.grad(loss, has_aux=True)(params)

    gradient, (outputs, after) = step(params, stats)
    for y in outputs:
        assert y.shape == (2, *size, 3)
        assert y.dtype == jnp.float32
    for path, g in jax.tree_util.tree_leaves_with_path(gradient):
        name = jax.tree_util.keystr(path)
        idle = name.endswith("['conv']['bias']")  # a norm takes it away
        assert np.isfinite(g).all(), name
        if not idle:
            assert np.abs(g).max() > 1e-7, name
    assert jax.tree.structure(after) == jax.tree.structure(stats)
    assert all((a != b).any() for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(stats), strict=True))


@pytest.mark.parametrize(("net", "size"), TINY[2:])
def test_xnet_on_one_image_is_the_main_branch_on_three_equal_ones(net, size):
    fn, params, stats = functions(net)
    x, low, high = (image(1, *size, 1) for _ in range(3))
    run = jit(lambda x, low, high: fn.apply(params, stats, x, low=low, high=high)[0])
    (alone,) = run(x, None, None)
    np.testing.assert_allclose(alone, run(x, x, x)[0], atol=1e-6)
    first = run(x, low, high)
    assert len(first) == 3
    for second in (run(low, low, high), run(x, high, high), run(x, low, x)):  # each input reaches M
        assert np.abs(first[0] - second[0]).max() > 1e-4


@pytest.mark.slow
def test_which_branches_meet():
    """L never sees the high frequencies, nor H the low ones, except through the fused skips: none in the bottleneck."""
    fn, params, stats = functions(XNet(3, 2))
    x, low, high = (image(1, 16, 16, 16, 1) for _ in range(3))
    run = jit(lambda x, low, high: fn.apply(params, stats, x, low=low, high=high)[0])
    first = run(x, low, high)
    np.testing.assert_array_equal(run(x, low, x)[1], first[1])  # 3-D L: fused with L's deep skips only
    np.testing.assert_array_equal(run(x, x, high)[2], first[2])


@pytest.mark.slow
def test_rematerialised_it_is_the_same():
    results = []
    for remat in (False, True):
        fn, params, stats = functions(XNet(2, 2, remat=remat))
        x = jnp.cos(jnp.arange(2 * 16 * 16)).reshape(2, 16, 16, 1)

        def loss(params, fn=fn, stats=stats, x=x):
            outputs, after = fn.apply(params, stats, x, train=True, low=x, high=x)
            return sum((y**2).mean() for y in outputs), after

        results.append(jit(jax.value_and_grad(loss, has_aux=True))(params))
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_fresh_parameters_are_uniform_within_the_fan_in():
    module = VNet(8).build(1, 2, nnx.Rngs(0))
    conv, up = module.encoder[1].blocks[0].conv, module.up[3].conv
    for layer, fan in ((conv, 27 * 16), (up, 8 * 8)):
        for variable in (layer.kernel[...], layer.bias[...]):
            assert np.abs(variable).max() <= fan**-0.5
        np.testing.assert_allclose(layer.kernel[...].std(), (3 * fan) ** -0.5, rtol=0.1)


@pytest.mark.parametrize(("net", "size"), TINY[:2])
def test_dropout_wants_a_key_and_acts_in_training_only(net, size):
    fn, params, stats = functions(net)
    x = image(1, *size, 1)
    run = jit(lambda key: fn.apply(params, stats, x, train=True, key=key)[0][0])
    assert (run(jax.random.key(0)) != run(jax.random.key(1))).any()
    with pytest.raises(ValueError, match="needs rngs"):
        jax.eval_shape(lambda: fn.apply(params, stats, x, train=True))
    jax.eval_shape(lambda: fn.apply(params, stats, x))


def test_bilinear_doubling_keeps_the_corners():
    """Along each axis: value j of 2 n lies at j (n - 1) / (2 n - 1)."""
    x = RNG.normal(size=(2, 4, 6, 3)).astype(np.float32)
    expected = np.apply_along_axis(lambda v: np.interp(np.arange(8) * 3 / 7, np.arange(4), v), 1, x)
    expected = np.apply_along_axis(lambda v: np.interp(np.arange(12) * 5 / 11, np.arange(6), v), 2, expected)
    np.testing.assert_allclose(double(jnp.asarray(x)), expected, atol=1e-6)


def test_max_pool():
    x = jnp.arange(2 * 4 * 6 * 2.0).reshape(2, 4, 6, 2)
    np.testing.assert_array_equal(max_pool(x), x[:, 1::2, 1::2])
    gradient = jax.grad(lambda x: (max_pool(x) ** 2).sum())(jnp.ones((1, 2, 4, 1)))
    np.testing.assert_array_equal(gradient[0, ..., 0], [[2, 0, 2, 0], [0, 0, 0, 0]])  # of equal values the first


@pytest.mark.parametrize(("net", "size"), TINY)
def test_low_precision_changes_little(net, size):
    x, logits = image(2, *size, 1), []
    for dtype in ("float32", "bfloat16"):
        fn, params, stats = functions(replace(net, dtype=dtype))
        logits.append(jit(lambda x, fn=fn, p=params, s=stats: fn.apply(p, s, x)[0][0])(x))
    assert logits[1].dtype == jnp.float32
    error = np.abs(logits[1] - logits[0]).max() / np.abs(logits[0]).max()
    assert 0 < error < 0.1


def test_the_plan_says_2d_or_3d():
    flat, deep = SimpleNamespace(dim=2), SimpleNamespace(dim=3)
    assert XNet().from_plan(deep).dim == 3
    assert XNet(2).from_plan(deep).dim == 2
    assert BCPUNet().from_plan(flat) == BCPUNet()
    assert VNet().from_plan(deep) == VNet()
    with pytest.raises(UserError, match="BCPUNet is a 2-D"):
        BCPUNet().from_plan(deep)
    with pytest.raises(UserError, match="VNet is a 3-D"):
        VNet().from_plan(flat)
    with pytest.raises(UserError, match="XNet is 2-D or 3-D"):
        XNet().build(1, 2, nnx.Rngs(0))


@pytest.mark.parametrize(("net", "size"), TINY)
def test_sizes_are_multiples_of_16(net, size):
    module = nnx.eval_shape(lambda: net.build(1, 2, nnx.Rngs(0)))
    with pytest.raises(UserError, match="of this size"):
        module(jnp.zeros((1, *size[:-1], 24, 1)))
    with pytest.raises(UserError, match="of this size"):
        module(jnp.zeros((1, *size, 16, 1)))

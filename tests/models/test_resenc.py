"""The residual encoder U-Net: counts against nnU-Net's, the block against its definition, the shared interface."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medseg_jax.methods.objective import Fn
from medseg_jax.models import resenc
from medseg_jax.models.resenc import ResEncUNet, ResidualBlock, average_pool
from medseg_jax.types import UserError

RNG = np.random.default_rng(0)
TINY = ResEncUNet.isotropic(2, 8, 16, 16, blocks_per_stage=(1, 2, 1))


def run(module, x, train=False):
    graph, state = nnx.split(module)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x, train))(state, x)


def parameters(config, in_channels=1, out_channels=2):
    module = nnx.eval_shape(lambda: config.build(in_channels, out_channels, nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def nnunet_parameters(config, in_channels=1, out_channels=2):
    """Parameters of dynamic_network_architectures' ResidualEncoderUNet, and its biases before norms."""
    stages = config.stages()
    counts = config.blocks_per_stage or (1, 3, 4, 6, 6, 6, 6, 6)[: len(stages)]
    total, biases = 0, 0

    def conv_norm(kernel_size, c, o, bias=True):
        nonlocal total, biases
        total += math.prod(kernel_size) * c * o + 2 * o + bias * o
        biases += bias * o

    c = stages[0][0]
    conv_norm(stages[0][1], in_channels, c)
    for (features, kernel_size, _), count in zip(stages, counts, strict=True):
        for _ in range(count):
            conv_norm(kernel_size, c, features)
            conv_norm(kernel_size, features, features)
            if c != features:
                conv_norm((1,) * len(kernel_size), c, features, bias=False)
            c = features
    for i in reversed(range(len(stages) - 1)):
        features, kernel_size, _ = stages[i]
        below, _, strides = stages[i + 1]
        total += math.prod(strides) * below * features + features
        for j in range(config.decoder_convs):
            conv_norm(kernel_size, features if j else 2 * features, features)
        total += features * out_channels + out_channels
    return total, biases


@pytest.mark.parametrize(
    ("name", "count"), [("RESENC_3D", 102_336_714), ("RESENC_2D", 139_985_870), ("SMALL_3D", 2_436_358)]
)
def test_parameter_counts_are_nnunets_without_dead_biases(name, count):
    config = getattr(resenc, name)
    theirs, biases = nnunet_parameters(config)
    assert parameters(config) == count == theirs - biases
    assert f"| {name} | {count:,} | {theirs:,} |" in resenc.__doc__


def test_the_published_network_has_102_million_parameters():
    assert round(nnunet_parameters(resenc.RESENC_3D)[0] / 1e6) == 102


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
@pytest.mark.parametrize("features", [4, 8])
def test_the_block_is_two_convolutions_and_a_shortcut(features, strides):
    block = ResidualBlock(4, features, (3, 3), strides, norm="instance", dropout=0.0, dtype="float32", rngs=nnx.Rngs(0))
    x = jnp.asarray(RNG.normal(size=(2, 6, 4, 4)), jnp.float32)
    shortcut = np.asarray(x).reshape(2, 6 // strides[0], strides[0], 4 // strides[1], strides[1], 4).mean((2, 4))
    np.testing.assert_allclose(average_pool(x, strides), shortcut, atol=1e-6)
    if features != 4:
        projected = shortcut @ np.asarray(block.project.conv.kernel[0, 0])
        shortcut = (projected - projected.mean((1, 2), keepdims=True)) / np.sqrt(
            projected.var((1, 2), keepdims=True) + 1e-5
        )
    else:
        assert block.project is None
    inner = np.asarray(block.conv2.norm(block.conv2.conv(block.conv1(x))))
    assert inner.min() < -0.1  # no activation before the sum
    total = inner + shortcut
    np.testing.assert_allclose(block(x), np.where(total > 0, total, 0.01 * total), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        (TINY, (8, 12)),
        (ResEncUNet(3, (8, 8), ((1, 1, 1), (1, 2, 2)), ((1, 3, 3), (3, 3, 3)), blocks_per_stage=(1, 1)), (3, 4, 2)),
        (ResEncUNet(2, (8, 8), ((2, 2), (2, 2)), ((3, 3),) * 2), (8, 4)),
    ],
)
def test_the_interface_is_the_plain_networks(config, size):
    module = config.build(1, 3, nnx.Rngs(0))
    x = jnp.asarray(RNG.normal(size=(2, *size, 1)), jnp.float32)
    outputs = run(module, x, train=True)
    assert outputs[0].shape == (2, *size, 3)
    assert len(outputs) == len(config.stages()) - 1
    assert len(run(module, x)) == 1
    with pytest.raises(UserError, match="of this size"):
        module(jnp.zeros((1, *(n + 1 for n in size), 1)))


@pytest.mark.parametrize("remat", [False, True])
def test_every_parameter_learns(remat):
    fn = Fn(lambda rngs: replace(TINY, norm="batch", remat=remat).build(1, 2, rngs))
    params, stats = fn.init(jax.random.key(0))
    x = jnp.asarray(RNG.normal(size=(2, 8, 8, 1)), jnp.float32)

    def loss(params):
        return sum((y**2).mean() for y in fn.apply(params, stats, x, train=True)[0])

    gradient = jax.jit(jax.grad(loss))(params)
    assert all(0 < float(jnp.abs(g).max()) < np.inf for g in jax.tree.leaves(gradient))


def test_number_of_blocks_must_fit():
    with pytest.raises(UserError, match="blocks_per_stage"):
        replace(TINY, blocks_per_stage=(1, 2)).build(1, 2, nnx.Rngs(0))

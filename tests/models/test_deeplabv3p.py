"""DeepLabv3+ and its encoders: sizes, shapes, strides, interpolation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_jax.models.deeplabv3p import ENCODERS, DeepLabV3Plus, _interpolation, resize_aligned
from medseg_jax.models.efficientnet import Bottleneck
from medseg_jax.types import UserError

COUNTS = {"efficientnet-b0": 4_495_309, "efficientnet-b3": 11_087_289, "resnet50": 26_677_585, "resnet101": 45_669_713}


def shape_of(net, *size):
    """(parameters, shapes of the encoder's features, shape of the logits), abstractly."""
    module = nnx.eval_shape(lambda: net.build(3, 2, nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((2, *size, 3), jnp.float32)
    features = nnx.eval_shape(lambda m, x: m.encoder(x), module, x)
    (logits,) = nnx.eval_shape(lambda m, x: m(x), module, x)
    return [f.shape[1] for f in features], [f.shape[-1] for f in features], logits.shape


@pytest.mark.parametrize("encoder", COUNTS)
def test_parameter_counts(encoder):
    module = nnx.eval_shape(lambda: DeepLabV3Plus(encoder).build(3, 1, nnx.Rngs(0)))
    assert sum(x.size for x in jax.tree.leaves(nnx.state(module, nnx.Param))) == COUNTS[encoder]


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("stride", [8, 16])
def test_strides_become_dilations(encoder, stride):
    rows, channels, logits = shape_of(DeepLabV3Plus(encoder, output_stride=stride), 96, 64)
    assert rows == [96 // s for s in (2, 4, 8, stride, stride)]
    assert logits == (2, 96, 64, 2)
    if encoder == "efficientnet-b0":
        assert channels == [32, 24, 40, 112, 320]
    if encoder == "resnet50":
        assert channels == [64, 256, 512, 1024, 2048]


def test_what_it_cannot_do_is_said():
    with pytest.raises(UserError, match="size"):
        shape_of(DeepLabV3Plus(), 96, 72)
    with pytest.raises(UserError, match="encoder"):
        DeepLabV3Plus("vgg16").build(3, 1, nnx.Rngs(0))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="stride"):
        DeepLabV3Plus(output_stride=4).build(3, 1, nnx.Rngs(0))  # type: ignore[arg-type]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40))
def test_interpolation_keeps_lines_and_corners(n, m):
    matrix = _interpolation(n, m)
    np.testing.assert_allclose(matrix.sum(1), 1)
    line = matrix @ np.arange(n)
    np.testing.assert_allclose(line, np.linspace(0, n - 1, m) if m > 1 else [0], atol=1e-12)


def test_the_corners_lie_on_each_other():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 3, 5, 2)), jnp.float32)
    y = resize_aligned(x, (12, 20))
    np.testing.assert_allclose(y[:, ::11, ::19], x[:, ::2, ::4], rtol=1e-6)


def test_a_block_predicts_what_it_trained_after_a_hundred_steps():
    """Statistics that followed too slowly made networks that were trained for a few hundred steps predict nothing."""
    block = Bottleneck(4, 4, 3, 1, 2, dtype="float32", rngs=nnx.Rngs(0))
    x = 3 + 2 * jax.random.normal(jax.random.key(1), (4, 8, 8, 4))
    for _ in range(100):
        trained = block(x, True, 0.0, None)
    np.testing.assert_allclose(block(x, False, 0.0, None), trained, atol=0.1)

"""Convolutions against definitions written out in NumPy, and every platform's form against XLA's own."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from medseg_jax.ops.conv import WIDE, conv, conv_transpose

RNG = np.random.default_rng(0)


def by_definition(x, kernel, strides, padding, dilation, groups):
    """y[b, t, o] = sum over taps and channels of x[b, t * stride + tap * dilation - before, c] * kernel[tap, c, o]."""
    dim = kernel.ndim - 2
    x = np.pad(x, [(0, 0), *padding, (0, 0)])
    out = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[1:-1], kernel.shape[:dim], strides, dilation, strict=True)
    ]
    c, o = kernel.shape[-2], kernel.shape[-1] // groups
    y = np.zeros((len(x), *out, kernel.shape[-1]))
    for position in itertools.product(*map(range, out)):
        for tap in itertools.product(*map(range, kernel.shape[:dim])):
            at = tuple(t * s + i * d for t, s, i, d in zip(position, strides, tap, dilation, strict=True))
            for g in range(groups):
                part = x[:, *at, g * c : (g + 1) * c] @ kernel[tap][:, g * o : (g + 1) * o]
                y[:, *position, g * o : (g + 1) * o] += part
    return y


def by_xla(x, kernel, strides, padding, dilation, groups):
    space = "DHW"[-(kernel.ndim - 2) :]
    return lax.conv_general_dilated(
        x,
        kernel,
        strides,
        padding,
        rhs_dilation=dilation,
        dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
        feature_group_count=groups,
    )


@st.composite
def windows(draw, dim=None, channels=None):
    """(x shape, kernel shape, strides, padding, dilation, groups) with a non-empty output; `channels`: ungrouped."""
    dim = dim or draw(st.integers(1, 3))
    groups = 1 if channels else draw(st.sampled_from([1, 1, 1, 2, 4]))
    c = (channels or draw(st.integers(1, 3))) if groups == 1 else groups * draw(st.integers(1, 2))
    size, x_size, strides, padding, dilation = [], [], [], [], []
    for _ in range(dim):
        k, d = draw(st.integers(1, 3)), draw(st.integers(1, 2))
        before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        smallest = max(1, d * (k - 1) + 1 - before - after)
        size.append(k)
        dilation.append(d)
        padding.append((before, after))
        strides.append(draw(st.integers(1, 3)))
        x_size.append(draw(st.integers(smallest, smallest + 4)))
    kernel = (*size, c // groups, (channels or draw(st.integers(1, 2))) * groups)
    return (draw(st.integers(1, 2)), *x_size, c), kernel, tuple(strides), tuple(padding), tuple(dilation), groups


@settings(max_examples=30, deadline=None)
@given(windows())
def test_values_and_gradients_in_double_precision(window):
    check_in_double_precision(window)


@settings(max_examples=12, deadline=None)
@given(windows(dim=2, channels=WIDE))
def test_wide_two_dimensional_values_and_gradients_in_double_precision(window):
    check_in_double_precision(window)


def check_in_double_precision(window):
    x_shape, kernel_shape, strides, padding, dilation, groups = window
    with jax.enable_x64(True):
        x, kernel = RNG.normal(size=x_shape), RNG.normal(size=kernel_shape)
        expected, vjp = jax.vjp(lambda x, k: by_xla(x, k, strides, padding, dilation, groups), x, kernel)
        found, our_vjp = jax.vjp(
            lambda x, k: conv(x, k, strides, padding, dilation=dilation, groups=groups), jnp.array(x), jnp.array(kernel)
        )
        g = RNG.normal(size=expected.shape)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
        for ours, theirs in zip(our_vjp(jnp.array(g)), vjp(jnp.array(g)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "strides", "dilation", "groups"),
    [
        ((3,), (2,), (1,), 1),
        ((3, 3), (2, 2), (1, 1), 1),
        ((3, 3), (1, 1), (2, 2), 4),
        ((1, 3, 3), (1, 2, 2), (1, 1, 1), 1),
        ((3, 3, 3), (1, 1, 1), (1, 2, 1), 1),
        ((3, 3, 3), (2, 2, 2), (1, 1, 1), 1),
        ((3, 3, 3), (1, 2, 1), (1, 1, 1), 4),
        ((3, 3, 3), (1, 1, 1), (1, 1, 1), 2),
    ],
)
def test_the_definition(size, strides, dilation, groups):
    x = RNG.normal(size=(2, *(6, 5, 7)[: len(size)], 4)).astype(np.float32)
    kernel = RNG.normal(size=(*size, 4 // groups, 4)).astype(np.float32)
    padding = [(d * (k // 2),) * 2 for k, d in zip(size, dilation, strict=True)]
    expected = by_definition(x, kernel, strides, padding, dilation, groups)
    found = conv(x, kernel, strides, dilation=dilation, groups=groups)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_stride_two_pads_both_sides_alike_as_pytorch_does():
    x = jnp.arange(1.0, 5.0).reshape(1, 4, 1)
    ones = jnp.ones((3, 1, 1))
    assert conv(x, ones, 2).ravel().tolist() == [3.0, 9.0]  # 0 1 2 | 2 3 4; lax's "SAME" gives 1 2 3 | 3 4 0
    assert conv(x, ones, 2, "VALID").ravel().tolist() == [6.0]


def test_negative_padding_crops():
    x = jnp.asarray(RNG.normal(size=(1, 6, 6, 6, 2)), jnp.float32)
    kernel = jnp.asarray(RNG.normal(size=(3, 3, 3, 2, 2)), jnp.float32)
    crop = conv(x, kernel, 1, [(-1, -2)] * 3)
    np.testing.assert_allclose(crop, conv(x[:, 1:-2, 1:-2, 1:-2], kernel, 1, "VALID"), atol=1e-5)


@pytest.mark.parametrize("size", [(1, 3, 3), (3, 3, 3), (1, 1, 1)])
@pytest.mark.parametrize("stride", [1, 2])
def test_bfloat16_stays_and_is_close(size, stride):
    x, kernel = RNG.normal(size=(2, 6, 6, 6, 8)), RNG.normal(size=(*size, 8, 4))

    def loss(x, kernel):
        return (conv(x, kernel, stride).astype(jnp.float32) ** 2).mean()

    exact = jax.value_and_grad(loss, (0, 1))(jnp.float32(x), jnp.float32(kernel))
    rough = jax.value_and_grad(loss, (0, 1))(jnp.bfloat16(x), jnp.bfloat16(kernel))
    assert conv(jnp.bfloat16(x), jnp.float32(kernel), stride).dtype == jnp.bfloat16
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rough), strict=True):
        np.testing.assert_allclose(np.float32(b), a, atol=0.06 * float(jnp.abs(a).max()))


def step(x, kernel, stride):
    return jax.grad(lambda x, k: conv(x, k, stride).sum(), (0, 1))(x, kernel)


@pytest.mark.parametrize("stride", [1, 2])
def test_each_platform_gets_its_own_form(stride):
    shapes = jax.ShapeDtypeStruct((1, 8, 8, 8, 2), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 2, 2), jnp.float32)
    program = jax.jit(step, static_argnums=2)
    on_cpu = program.lower(*shapes, stride).compile().as_text()
    assert "b012f" not in on_cpu  # no 3-D convolution
    assert "while(" in on_cpu
    assert "conditional(" not in on_cpu  # the choice costs nothing when it runs
    for platform in ("tpu", "cuda"):
        text = jax.export.export(program, platforms=[platform])(*shapes, stride).mlir_module()
        assert text.count("stablehlo.convolution") == 2  # gradient of x, gradient of the kernel
        assert "stablehlo.while" not in text


@pytest.mark.parametrize("stride", [1, 2])
def test_wide_two_dimensional_kernels_have_products_on_a_cpu_only(stride):
    shapes = jax.ShapeDtypeStruct((1, 8, 8, WIDE), jnp.float32), jax.ShapeDtypeStruct((3, 3, WIDE, WIDE), jnp.float32)
    program = jax.jit(step, static_argnums=2)
    assert "while(" in program.lower(*shapes, stride).compile().as_text()
    for platform in ("tpu", "cuda"):
        text = jax.export.export(program, platforms=[platform])(*shapes, stride).mlir_module()
        assert text.count("stablehlo.convolution") == 2
        assert "stablehlo.while" not in text


def test_one_program_for_two_platforms_chooses_at_run_time():
    shapes = jax.ShapeDtypeStruct((1, 4, 4, 4, 2), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 2, 2), jnp.float32)
    exported = jax.export.export(jax.jit(step, static_argnums=2), platforms=["cpu", "tpu"])(*shapes, 2)
    x, kernel = (jnp.asarray(RNG.normal(size=s.shape), jnp.float32) for s in shapes)
    for a, b in zip(exported.call(x, kernel), step(x, kernel, 2), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_transformations_compose(x64):
    x, kernel = jnp.array(RNG.normal(size=(3, 1, 5, 4, 6, 2))), jnp.array(RNG.normal(size=(3, 3, 3, 2, 2)))

    def norm(conv):
        def loss(x, kernel):
            gradient = jax.grad(lambda k: jnp.sin(jax.checkpoint(conv)(x, k)).sum())(kernel)
            return (gradient**2).sum()

        return jax.vmap(jax.grad(loss, (0, 1)), (0, None))

    ours = norm(lambda x, k: conv(x, k, (1, 2, 1)))(x, kernel)
    theirs = norm(lambda x, k: by_xla(x, k, (1, 2, 1), [(1, 1)] * 3, (1, 1, 1), 1))(x, kernel)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9)


def transpose_by_definition(x, kernel, strides):
    dim = kernel.ndim - 2
    size = [(n - 1) * s + k for n, s, k in zip(x.shape[1:-1], strides, kernel.shape[:dim], strict=True)]
    y = np.zeros((len(x), *size, kernel.shape[-1]))
    for position in itertools.product(*map(range, x.shape[1:-1])):
        window = tuple(slice(p * s, p * s + k) for p, s, k in zip(position, strides, kernel.shape[:dim], strict=True))
        y[:, *window] += np.einsum("bc,...co->b...o", x[:, *position], kernel)
    return y


@pytest.mark.parametrize(
    ("size", "strides"),
    [
        ((2,), (2,)),
        ((2, 3), (2, 3)),
        ((1, 2, 2), (1, 2, 2)),
        ((3, 3), (2, 2)),
        ((4, 3, 2), (2, 1, 3)),
        ((1, 1), (1, 1)),
    ],
)
def test_transposed_convolution(size, strides, x64):
    x, kernel = RNG.normal(size=(2, *(3, 4, 2)[: len(size)], 3)), RNG.normal(size=(*size, 3, 2))
    found = conv_transpose(jnp.array(x), jnp.array(kernel), strides)
    np.testing.assert_allclose(found, transpose_by_definition(x, kernel, strides), atol=1e-12)
    # It is the gradient of the convolution with the same strides.
    y = jnp.zeros((*found.shape[:-1], 2))
    _, vjp = jax.vjp(lambda y: conv(y, jnp.swapaxes(jnp.array(kernel), -1, -2), strides, "VALID"), y)
    np.testing.assert_allclose(vjp(jnp.array(x))[0], found, atol=1e-12)


def test_misuse_is_named():
    x = jnp.zeros((1, 4, 4, 2))
    with pytest.raises(ValueError, match="does not fit"):
        conv(x, jnp.zeros((3, 3, 3, 2)))
    with pytest.raises(ValueError, match="does not fit"):
        conv(x, jnp.zeros((3, 3, 3, 2, 2)))
    with pytest.raises(ValueError, match="per spatial axis"):
        conv(x, jnp.zeros((3, 3, 2, 2)), (1, 2, 3))
    with pytest.raises(ValueError, match="padding is"):
        conv(x, jnp.zeros((3, 3, 2, 2)), 1, "REFLECT")

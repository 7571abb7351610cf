"""Convolution and its transpose in 1, 2 and 3 dimensions, channels-last."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

type Padding = str | Sequence[tuple[int, int]]

_LETTERS = {1: "W", 2: "HW", 3: "DHW"}


def _numbers(dim: int) -> tuple[str, str, str]:
    s = _LETTERS[dim]
    return f"N{s}C", f"{s}IO", f"N{s}C"


def per_axis(value: int | Sequence[int], dim: int) -> tuple[int, ...]:
    """One integer for all axes, or one an axis -> one an axis."""
    return (value,) * dim if isinstance(value, int) else tuple(value)


def pad_pairs(padding: Padding, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """ "SAME", "VALID" or explicit pairs -> (before, after) of each axis."""
    if padding == "SAME":
        return tuple((d * ((k - 1) // 2),) * 2 for k, d in zip(kernel, dilation, strict=True))
    if padding == "VALID":
        return ((0, 0),) * len(kernel)
    return tuple((lo, hi) for lo, hi in padding)


def conv(
    x: Float[Array, "b *s c"],
    kernel: Float[Array, "*k c_per_group o"],
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    *,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Float[Array, "b *t o"]:
    """Cross-correlation, as every deep learning library means by convolution."""
    dim = kernel.ndim - 2
    dilations = per_axis(dilation, dim)
    return lax.conv_general_dilated(
        x,
        kernel.astype(x.dtype),
        per_axis(strides, dim),
        pad_pairs(padding, kernel.shape[:dim], dilations),
        rhs_dilation=dilations,
        dimension_numbers=_numbers(dim),
        feature_group_count=groups,
    )


def conv_transpose(
    x: Float[Array, "b *s c"], kernel: Float[Array, "*k c o"], strides: int | Sequence[int]
) -> Float[Array, "b *t o"]:
    """Transposed convolution without padding: output size = (size - 1) * stride + kernel."""
    dim = kernel.ndim - 2
    steps = per_axis(strides, dim)
    kernel = kernel.astype(x.dtype)
    if kernel.shape[:dim] == steps:
        b, *s, c = x.shape
        o = kernel.shape[-1]
        y = x.reshape(-1, c) @ jnp.moveaxis(kernel, dim, 0).reshape(c, -1)
        y = y.reshape(b, *s, *steps, o)
        order = [0, *(a for i in range(dim) for a in (1 + i, 1 + dim + i)), 1 + 2 * dim]
        return y.transpose(order).reshape(b, *(n * k for n, k in zip(s, steps, strict=True)), o)
    flipped = jnp.flip(kernel, tuple(range(dim)))
    return lax.conv_general_dilated(
        x,
        flipped,
        (1,) * dim,
        [(k - 1, k - 1) for k in kernel.shape[:dim]],
        lhs_dilation=steps,
        dimension_numbers=_numbers(dim),
    )

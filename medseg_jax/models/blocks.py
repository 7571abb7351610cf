"""Building blocks of the networks: convolution, transposed convolution, normalisation, dropout, rematerialisation.

Parameters are float32; `dtype` is the compute dtype. No block holds random state: keys come in at the call through
`rngs`, a `nnx.Rngs` with a stream called "dropout".
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from medseg_jax.ops.conv import Padding, conv, conv_transpose
from medseg_jax.types import UserError

type NormKind = Literal["instance", "batch", "group"]

LEAKY_SLOPE = 0.01


def leaky_relu(x: Array) -> Array:
    """max(x, 0.01 x), nnU-Net's activation."""
    return jnp.maximum(x, LEAKY_SLOPE * x)


def he_normal(key: Array, shape: Sequence[int], fan: int) -> Array:
    """Normal with variance 2 / ((1 + slope^2) fan), for layers followed by `leaky_relu` (He et al. 2015, eq. 15)."""
    return jax.random.normal(key, shape) * math.sqrt(2 / ((1 + LEAKY_SLOPE**2) * fan))


class Conv(nnx.Module):
    """Convolution [b, *s, c] -> [b, *t, o]; kernel [*k, c / groups, o] He-normal over fan-in, bias [o] zero."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        padding: Padding = "SAME",
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        bias: bool = True,
        dtype: jnp.dtype | str = "float32",
        rngs: nnx.Rngs,
    ):
        shape = (*kernel_size, in_channels // groups, out_channels)
        self.kernel = nnx.Param(he_normal(rngs.params(), shape, math.prod(shape[:-1])))
        self.bias = nnx.Param(jnp.zeros(out_channels)) if bias else None
        self.strides, self.padding, self.dilation, self.groups = strides, padding, dilation, groups
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "b *s c"]) -> Float[Array, "b *t o"]:
        kernel = self.kernel[...].astype(self.dtype)
        y = conv(x.astype(self.dtype), kernel, self.strides, self.padding, dilation=self.dilation, groups=self.groups)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class ConvTranspose(nnx.Module):
    """Transposed convolution with kernel = stride [b, *s, c] -> [b, *(s * stride), o]; kernel [*stride, c, o].

    He-normal over o * prod(stride), which is what PyTorch calls the fan-in of a transposed convolution.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        strides: Sequence[int],
        *,
        bias: bool = True,
        dtype: jnp.dtype | str = "float32",
        rngs: nnx.Rngs,
    ):
        shape = (*strides, in_channels, out_channels)
        self.kernel = nnx.Param(he_normal(rngs.params(), shape, math.prod(strides) * out_channels))
        self.bias = nnx.Param(jnp.zeros(out_channels)) if bias else None
        self.strides = tuple(strides)
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "b *s c"]) -> Float[Array, "b *t o"]:
        y = conv_transpose(x.astype(self.dtype), self.kernel[...].astype(self.dtype), self.strides)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class Norm(nnx.Module):
    """Instance, batch or group normalisation with a learned scale and bias; statistics in float32.

    Batch normalisation keeps running statistics (`nnx.BatchStat`, momentum 0.1 as in PyTorch, unbiased variance) and
    uses them unless `train`. Under `jit` with a sharded batch its means run over the whole batch: no axis name.
    """

    def __init__(self, kind: NormKind, channels: int, *, groups: int = 8, eps: float = 1e-5):
        if kind not in ("instance", "batch", "group"):
            raise UserError("Unknown normalisation", found=kind, expected='"instance", "batch" or "group"')
        if kind == "group" and channels % groups:
            raise UserError("Channels do not divide into groups", found=channels, expected=f"a multiple of {groups}")
        self.kind, self.groups, self.eps = kind, groups, eps
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        if kind == "batch":
            self.mean, self.var = nnx.BatchStat(jnp.zeros(channels)), nnx.BatchStat(jnp.ones(channels))

    def __call__(self, x: Float[Array, "b *s c"], train: bool = False) -> Float[Array, "b *s c"]:
        if self.kind == "batch" and not train:
            return self._affine(x, self.mean[...], self.var[...])
        if self.kind == "group":
            b, *s, c = x.shape
            x32 = x.astype(jnp.float32).reshape(b, *s, self.groups, c // self.groups)  # [b, *s, g, c/g]
            axes = (*range(1, x.ndim - 1), x32.ndim - 1)
            mean = jnp.repeat(x32.mean(axes), c // self.groups, -1)  # [b, c]
            var = jnp.repeat(x32.var(axes), c // self.groups, -1)
        else:
            x32 = x.astype(jnp.float32)
            axes = tuple(range(self.kind == "instance", x.ndim - 1))
            mean, var = x32.mean(axes), x32.var(axes)  # [b, c] or [c]
        if self.kind == "batch":
            n = math.prod(x.shape[:-1])
            self.mean[...] += 0.1 * (mean - self.mean[...])
            self.var[...] += 0.1 * (var * (n / max(n - 1, 1)) - self.var[...])
        return self._affine(x, mean, var)

    def _affine(self, x, mean, var):
        scale = self.scale[...] * jax.lax.rsqrt(var + self.eps)
        bias = self.bias[...] - mean * scale
        if scale.ndim == 2:
            scale, bias = (jnp.expand_dims(v, tuple(range(1, x.ndim - 1))) for v in (scale, bias))
        return (x.astype(jnp.float32) * scale + bias).astype(x.dtype)


class ConvBlock(nnx.Module):
    """Convolution, dropout, normalisation, leaky ReLU, in nnU-Net's order."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        norm: NormKind = "instance",
        activation: bool = True,
        bias: bool = True,
        dropout: float = 0.0,
        dtype: jnp.dtype | str = "float32",
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(in_channels, out_channels, kernel_size, strides, bias=bias, dtype=dtype, rngs=rngs)
        self.norm = Norm(norm, out_channels)
        self.activation, self.dropout = activation, dropout

    def __call__(self, x: Array, train: bool = False, rngs: nnx.Rngs | None = None) -> Array:
        x = self.norm(dropout(self.conv(x), self.dropout, train, rngs), train)
        return leaky_relu(x) if self.activation else x


def dropout(x: Array, rate: float, train: bool, rngs: nnx.Rngs | None) -> Array:
    """Zeroes whole channels of a case with probability `rate` and scales the rest (PyTorch's Dropout2d and Dropout3d)."""
    if not train or rate == 0:
        return x
    if rngs is None:
        raise ValueError("dropout while training needs rngs=nnx.Rngs(dropout=key)")
    keep = jax.random.bernoulli(rngs.dropout(), 1 - rate, (len(x), *(1,) * (x.ndim - 2), x.shape[-1]))
    return jnp.where(keep, x / (1 - rate), 0)


def rematerialised(
    module: Callable[..., Array], x: Array | tuple[Array, ...], train: bool, rngs: nnx.Rngs | None
) -> Array:
    """`module(x, train, rngs)`, whose inner activations are computed again in the backward pass instead of kept."""
    graph, state = nnx.split(module)
    key = None if rngs is None or not train else rngs.dropout()

    @jax.checkpoint
    def call(state, x, key):
        inner = nnx.merge(graph, state)
        y = inner(x, train, None if key is None else nnx.Rngs(dropout=key))
        return y, nnx.state(inner, nnx.BatchStat)

    y, stats = call(state, x, key)
    nnx.update(module, stats)
    return y

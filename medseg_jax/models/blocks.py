"""Building blocks of the networks: convolutions, linear maps, normalisation, dropout, rematerialisation.

Parameters are float32; `dtype` is the compute dtype. No block holds random state: keys come in at the call through
`rngs`, a `nnx.Rngs` with a stream called "dropout".
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from medseg_jax.ops.conv import Padding, conv, conv_transpose
from medseg_jax.types import UserError

type NormKind = Literal["instance", "batch", "group"]

LEAKY_SLOPE = 0.01


def leaky_relu(x: Array) -> Array:
    """max(x, 0.01 x), nnU-Net's activation."""
    return _leaky(x, LEAKY_SLOPE)


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


class Linear(nnx.Module):
    """Linear map of the last axis, [..., c] -> [..., o]; kernel [c, o] normal with deviation 0.02, bias [o] zero."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bias: bool = True,
        dtype: jnp.dtype | str = "float32",
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(0.02 * jax.random.normal(rngs.params(), (in_channels, out_channels)))
        self.bias = nnx.Param(jnp.zeros(out_channels)) if bias else None
        self.dtype = jnp.dtype(dtype)

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... o"]:
        y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)


class LayerNorm(nnx.Module):
    """Normalisation over the last axis with a learned scale and bias; statistics are float32."""

    def __init__(self, channels: int, *, eps: float = 1e-5):
        self.scale, self.bias, self.eps = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels)), eps

    def __call__(self, x: Float[Array, "... c"]) -> Float[Array, "... c"]:
        return normalise(x, self.scale[...], self.bias[...], (x.ndim - 1,), self.eps, 1.0)[0]


class Norm(nnx.Module):
    """Instance, batch or group normalisation with a learned scale and bias, and a leaky ReLU if `slope` < 1.

    Statistics are float32. Batch normalisation keeps running ones (`nnx.BatchStat`; momentum and unbiased variance as
    in PyTorch) and uses them unless `train`. Under `jit` with a sharded batch its means run over the whole batch.
    """

    def __init__(
        self,
        kind: NormKind,
        channels: int,
        *,
        groups: int = 8,
        eps: float = 1e-5,
        slope: float = 1.0,
        momentum: float = 0.1,
    ):
        if kind not in ("instance", "batch", "group"):
            raise UserError("Unknown normalisation", found=kind, expected='"instance", "batch" or "group"')
        if kind == "group" and channels % groups:
            raise UserError("Channels do not divide into groups", found=channels, expected=f"a multiple of {groups}")
        self.kind, self.groups, self.eps, self.slope, self.momentum = kind, groups, eps, slope, momentum
        self.scale, self.bias = nnx.Param(jnp.ones(channels)), nnx.Param(jnp.zeros(channels))
        if kind == "batch":
            self.mean, self.var = nnx.BatchStat(jnp.zeros(channels)), nnx.BatchStat(jnp.ones(channels))

    def __call__(self, x: Float[Array, "b *s c"], train: bool = False) -> Float[Array, "b *s c"]:
        scale, bias = self.scale[...], self.bias[...]
        if self.kind == "instance":
            return normalise(x, scale, bias, tuple(range(1, x.ndim - 1)), self.eps, self.slope)[0]
        if self.kind == "group":
            grouped = (self.groups, x.shape[-1] // self.groups)
            axes = (*range(1, x.ndim - 1), x.ndim)
            parts = x.reshape(*x.shape[:-1], *grouped)  # [b, *s, g, c / g]
            y, *_ = normalise(parts, scale.reshape(grouped), bias.reshape(grouped), axes, self.eps, self.slope)
            return y.reshape(x.shape)
        if not train:
            rate = scale * jax.lax.rsqrt(self.var[...] + self.eps)
            return _leaky(x * rate + (bias - self.mean[...] * rate), self.slope).astype(x.dtype)
        y, mean, var = normalise(x, scale, bias, tuple(range(x.ndim - 1)), self.eps, self.slope)
        count = math.prod(x.shape[:-1])
        self.mean[...] += self.momentum * (mean.reshape(-1) - self.mean[...])
        self.var[...] += self.momentum * (var.reshape(-1) * count / max(count - 1, 1) - self.var[...])
        return y


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def normalise(
    x: Array, scale: Array, bias: Array, axes: tuple[int, ...], eps: float, slope: float
) -> tuple[Array, Array, Array]:
    """leaky_relu((x - mean) / sqrt(var + eps) * scale + bias), mean and var over `axes`, which stay with size 1.

    Norm and activation are one operation whose backward pass needs x alone, so a network keeps two arrays per layer
    instead of three or four, and the step is faster for it. The variance takes a second pass over x - mean: one pass
    over x and x^2 loses all digits where the mean is large. No gradient flows into the returned statistics.
    """
    x32 = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = x32.mean(axes, keepdims=True)
    var = jnp.square(x32 - mean).mean(axes, keepdims=True)
    y = (x32 - mean) * jax.lax.rsqrt(var + eps) * scale + bias
    return _leaky(y, slope).astype(x.dtype), mean, var


def _normalise_forward(x, scale, bias, axes, eps, slope):
    y, mean, var = normalise(x, scale, bias, axes, eps, slope)
    return (y, mean, var), (x, scale, bias, mean, var)


def _normalise_backward(axes, eps, slope, saved, cotangents):
    x, scale, bias, mean, var = saved
    rate = jax.lax.rsqrt(var + eps)
    standard = (x.astype(mean.dtype) - mean) * rate
    g = cotangents[0].astype(mean.dtype)
    if slope != 1:
        g = jnp.where(standard * scale + bias > 0, g, slope * g)
    shared = tuple(range(x.ndim - scale.ndim))
    scaled = g * scale
    dx = rate * (scaled - scaled.mean(axes, keepdims=True) - standard * (scaled * standard).mean(axes, keepdims=True))
    return dx.astype(x.dtype), (g * standard).sum(shared).astype(scale.dtype), g.sum(shared).astype(bias.dtype)


normalise.defvjp(_normalise_forward, _normalise_backward)


def _leaky(x: Array, slope: float) -> Array:
    return x if slope == 1 else jnp.maximum(x, slope * x)


def default_init(module: nnx.Module, rngs: nnx.Rngs) -> None:
    """Draws all kernels and biases anew, uniform within 1 / sqrt(fan-in): what PyTorch does unless told otherwise.

    One draw for all of them: a draw is half a second of compilation, and XNet-Plus has 160 such arrays.
    """
    todo = []
    for _, layer in nnx.iter_graph(module):
        if isinstance(layer, Conv | ConvTranspose):
            *size, c, o = layer.kernel.shape
            bound = 1 / math.sqrt(math.prod(size) * (o if isinstance(layer, ConvTranspose) else c))
            todo += [(variable, bound) for variable in (layer.kernel, layer.bias) if variable is not None]
    drawn = jax.random.uniform(rngs.params(), (sum(math.prod(v.shape) for v, _ in todo),), minval=-1.0)
    start = 0
    for variable, bound in todo:
        end = start + math.prod(variable.shape)
        variable[...] = bound * drawn[start:end].reshape(variable.shape)
        start = end


class ConvBlock(nnx.Module):
    """Convolution, dropout, normalisation, leaky ReLU, in nnU-Net's order.

    The convolution has no bias: the norm would take it away again (nnU-Net carries it along, with a gradient of zero).
    Networks whose published parameters are counted with it ask for `bias`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Sequence[int],
        strides: int | Sequence[int] = 1,
        *,
        norm: NormKind = "instance",
        activation: bool = True,
        slope: float = LEAKY_SLOPE,
        bias: bool = False,
        dropout: float = 0.0,
        dtype: jnp.dtype | str = "float32",
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(in_channels, out_channels, kernel_size, strides, bias=bias, dtype=dtype, rngs=rngs)
        self.norm = Norm(norm, out_channels, slope=slope if activation else 1.0)
        self.dropout = dropout

    def __call__(self, x: Array, train: bool = False, rngs: nnx.Rngs | None = None) -> Array:
        return self.norm(dropout(self.conv(x), self.dropout, train, rngs), train)


def max_pool(x: Float[Array, "b *s c"]) -> Float[Array, "b *t c"]:
    """Maximum of blocks of 2 voxels an axis; every size is even. Of equal values the first gets the gradient.

    Chosen by comparing neighbours: the gradient of `jnp.max` looks for the maximum among values that XLA may have
    computed again with another rounding, and divides by zero where it finds none.
    """
    for axis in range(1, x.ndim - 1):
        first, second = (lax.slice_in_dim(x, i, None, 2, axis) for i in (0, 1))
        x = jnp.where(first >= second, first, second)
    return x


def dropout(x: Array, rate: float, train: bool, rngs: nnx.Rngs | None, *, channels: bool = True) -> Array:
    """Zeroes whole channels of a case with probability `rate`, scales the rest (PyTorch's Dropout2d and Dropout3d).

    Single values instead of whole channels unless `channels`.
    """
    if not train or rate == 0:
        return x
    if rngs is None:
        raise ValueError("dropout while training needs rngs=nnx.Rngs(dropout=key)")
    shape = (len(x), *(1,) * (x.ndim - 2), x.shape[-1]) if channels else x.shape
    keep = jax.random.bernoulli(rngs.dropout(), 1 - rate, shape)
    return jnp.where(keep, x / (1 - rate), 0)


def drop_path(x: Array, rate: float, train: bool, rngs: nnx.Rngs | None) -> Array:
    """Zeroes whole samples with probability `rate` and scales the rest: the branch of a residual block is skipped
    (Huang et al. 2016, "Deep Networks with Stochastic Depth")."""
    if not train or rate == 0:
        return x
    if rngs is None:
        raise ValueError("drop path while training needs rngs=nnx.Rngs(dropout=key)")
    keep = jax.random.bernoulli(rngs.dropout(), 1 - rate, (len(x), *(1,) * (x.ndim - 1)))
    return jnp.where(keep, x / (1 - rate), 0)


def rematerialised(
    module: Callable[..., Array],
    x: Array | tuple[Array, ...],
    train: bool,
    rngs: nnx.Rngs | None,
    **options: Any,
) -> Array:
    """`module(x, train, rngs, **options)`, whose activations are computed again in the backward pass, not kept."""
    graph, state = nnx.split(module)
    key = None if rngs is None or not train else rngs.dropout()

    @jax.checkpoint
    def call(state, x, key):
        inner = nnx.merge(graph, state)
        y = inner(x, train, None if key is None else nnx.Rngs(dropout=key), **options)
        return y, nnx.state(inner, nnx.BatchStat)

    y, stats = call(state, x, key)
    nnx.update(module, stats)
    return y

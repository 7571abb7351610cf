"""Convolution and transposed convolution, channels-last, in the form that each platform runs fastest.

`conv` lowers to one `lax.conv_general_dilated` on TPU and GPU. XLA's CPU backend has fast 2-D convolutions and matrix
products, and little else, so there a convolution is rewritten into these:

* 3-D: the depth taps become output channels of one 2-D convolution over all depth slices, whose results are shifted and
  added (5 to 10 times faster than the plain form; taps as input channels, or one convolution a tap, take 0.9 to 1.4
  times as long as this). The weight gradient is one product per depth slice, in-plane taps of x times depth taps of the
  output's gradient, so that the gathered columns stay in the cache (1.0 to 1.9 times faster than XLA's gradient of the
  2-D convolution, 1.3 times faster than gathering all slices at once).
* 3-D with strides: as a convolution of unit stride over blocks of voxels laid side by side as channels ("space to
  depth"), because XLA's gradient of a strided convolution is slow.
* depthwise: shifted products summed (10 to 300 times faster forward, 2 to 20 times with gradients); the weight gradient
  row by row, else each tap would fetch the whole image again (7 x 7 taps, 48 to 96 pixels: 3 times faster).
* kernel 1: a matrix product, on every platform.

* 2-D from 16 channels on: the weight gradient is one product per image row, taps along the row of x times taps across
  rows of the output's gradient (1.0, 2.0, 2.3 and 3.2 times less CPU time than XLA's for 16, 32, 64 and 128 channels
  in and out); with strides, of the convolution over blocks, as in 3-D. All else in 2-D is left to XLA. The training
  step of a 2-D U-Net takes 0.87 (features 16 to 128) or 0.68 (32 to 256) of the CPU time of the plain form.

The step of a 3-D U-Net (features 16 to 128, patch 40 x 56 x 40) takes an eighth of the time of the plain form.

The choice is made at lowering (`lax.platform_dependent`), so a program compiled or exported for a TPU on a CPU host
gets the TPU's form, and the other form is not in it. Convolutions that have two forms have reverse-mode gradients only.
"""

import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from medseg_jax.ops.plain import plain_wanted

type Padding = str | Sequence[tuple[int, int]]


class Window(NamedTuple):
    """How a kernel moves: one entry per spatial axis, and the number of channel groups."""

    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int = 1


WIDE = 16
"""Channels in and out from which a 2-D convolution's weight gradient is taken as products of rows on a CPU."""


def per_axis(value: int | Sequence[int], dim: int) -> tuple[int, ...]:
    """One integer for all axes or one an axis -> one an axis."""
    values = (value,) * dim if isinstance(value, int) else tuple(value)
    if len(values) != dim:
        raise ValueError(f"expected one value per spatial axis ({dim}), got {values}")
    return values


def conv(
    x: Float[Array, "b *s c"],
    kernel: Float[Array, "*k c_group o"],
    strides: int | Sequence[int] = 1,
    padding: Padding = "SAME",
    *,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Float[Array, "b *t o"]:
    """Cross-correlation of x with a kernel, what deep learning calls convolution.

    Args:
        x: input with one to three spatial axes; float32, bfloat16 or float64.
        kernel: its channels are the input's divided by `groups`; cast to x's dtype.
        strides: one for all axes, or one an axis.
        padding: "SAME" pads dilation * ((k - 1) // 2) zeros on both sides, whatever the stride, as nnU-Net and PyTorch
            networks do (`lax`'s "SAME" differs for stride 2); "VALID" pads nothing; or (before, after) for each axis.
        dilation: distance between the kernel's taps.
        groups: channel groups; equal to c for a depthwise convolution.

    Returns:
        The output, of size (n + before + after - dilation * (k - 1) - 1) // stride + 1 along each axis, in x's dtype.

    Raises:
        ValueError: numbers of axes or channels do not fit.
    """
    dim = kernel.ndim - 2
    size = kernel.shape[:dim]
    if x.ndim != kernel.ndim or x.shape[-1] != kernel.shape[-2] * groups:
        raise ValueError(f"input {x.shape} does not fit kernel {kernel.shape} with {groups} groups")
    dilations = per_axis(dilation, dim)
    window = Window(per_axis(strides, dim), _pairs(padding, size, dilations), dilations, groups)
    kernel = kernel.astype(x.dtype)

    if set(size) == {1} and not any(map(any, window.padding)) and groups == 1:
        return x[:, *(slice(None, None, s) for s in window.strides)] @ kernel.reshape(kernel.shape[-2:])
    depthwise = groups > 1 and kernel.shape[-2:] == (1, groups)
    wide = dim == 2 and min(kernel.shape[2:]) >= WIDE
    foldable = (dim == 3 or wide) and groups == 1 and 1 in (max(window.strides), max(dilations))
    return (_by_platform if (depthwise or foldable) and not plain_wanted() else _plain)(x, kernel, window)


def conv_transpose(
    x: Float[Array, "b *s c"], kernel: Float[Array, "*k c o"], strides: int | Sequence[int]
) -> Float[Array, "b *t o"]:
    """Transposed convolution without padding: each voxel adds its value times the kernel to the output.

    Args:
        x: input with one to three spatial axes.
        kernel: cast to x's dtype. Where it is as large as the stride, the output is a matrix product and a reshape.
        strides: one for all axes, or one an axis.

    Returns:
        The output, of size (n - 1) * stride + k along each axis (PyTorch's with padding 0), in x's dtype.
    """
    dim = kernel.ndim - 2
    size, steps = kernel.shape[:dim], per_axis(strides, dim)
    kernel = kernel.astype(x.dtype)
    if size == steps:
        b, *s, c = x.shape
        y = x @ jnp.moveaxis(kernel, dim, 0).reshape(c, -1)  # [b, *s, *k * o]
        return _interleave(y.reshape(b, *s, *size, kernel.shape[-1]), dim)
    return lax.conv_general_dilated(
        x,
        jnp.flip(kernel, range(dim)),
        (1,) * dim,
        [(k - 1, k - 1) for k in size],
        lhs_dilation=steps,
        dimension_numbers=_layout(dim),
    )


# ---------------------------------------------------------------------------------------------- choice of the platform


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _by_platform(x: Array, kernel: Array, window: Window) -> Array:
    forms = {"cpu": _cpu_forward, "default": _plain}
    return lax.platform_dependent(x, kernel, **{k: partial(f, window=window) for k, f in forms.items()})


def _by_platform_forward(x, kernel, window):
    return _by_platform(x, kernel, window), (x, kernel)


def _by_platform_backward(window, saved, g):
    forms = {"cpu": _cpu_backward, "default": partial(_gradients, _plain)}
    return lax.platform_dependent(*saved, g, **{k: partial(f, window=window) for k, f in forms.items()})


_by_platform.defvjp(_by_platform_forward, _by_platform_backward)


def _gradients(form, x: Array, kernel: Array, g: Array, window: Window) -> tuple[Array, Array]:
    """Gradients of a form by differentiating it."""
    return jax.vjp(partial(form, window=window), x, kernel)[1](g)


def _plain(x: Array, kernel: Array, window: Window) -> Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        window.strides,
        window.padding,
        rhs_dilation=window.dilation,
        dimension_numbers=_layout(kernel.ndim - 2),
        feature_group_count=window.groups,
    )


# ----------------------------------------------------------------------------------------------------- forms for a CPU


def _cpu_forward(x: Array, kernel: Array, window: Window) -> Array:
    if window.groups > 1:
        return _depthwise(x, kernel, window)
    if kernel.ndim == 4:
        return _plain(x, kernel, window)
    if max(window.strides) > 1:
        return _fold_depth(*_space_to_depth(x, kernel, window), _unit(3))
    return _fold_depth(x, kernel, window)


def _cpu_backward(x: Array, kernel: Array, g: Array, window: Window) -> tuple[Array, Array]:
    strided = max(window.strides) > 1
    if window.groups > 1:
        if strided or kernel.ndim == 3:
            return _gradients(_depthwise, x, kernel, g, window)
        return _depthwise(g, *_transposed(kernel, window)), _depthwise_weight_gradient(x, kernel, g, window)
    if strided:
        (x, kernel), undo = jax.vjp(partial(_space_to_depth, window=window), x, kernel)
        return undo(_unit_stride_gradients(x, kernel, g, _unit(len(window.strides))))
    return _unit_stride_gradients(x, kernel, g, window)


def _unit_stride_gradients(x: Array, kernel: Array, g: Array, window: Window) -> tuple[Array, Array]:
    if kernel.ndim == 4:
        return _plain(g, *_transposed(kernel, window)), _weight_gradient_of_rows(x, kernel, g, window)
    return _fold_depth(g, *_transposed(kernel, window)), _weight_gradient(x, kernel, g, window)


def _unit(dim: int) -> Window:
    """A kernel that moves voxel by voxel over an image without padding."""
    return Window((1,) * dim, ((0, 0),) * dim, (1,) * dim)


def _fold_depth(x: Array, kernel: Array, window: Window) -> Array:
    """3-D convolution of unit stride as a 2-D one with kd * o output channels, whose kd parts are shifted and added."""
    kd, kh, kw, c, o = kernel.shape
    x = _pad(x, window.padding[:1])  # [b, d, h, w, c]
    b, d = x.shape[:2]
    planes = jnp.moveaxis(kernel, 0, 3).reshape(kh, kw, c, kd * o)
    in_plane = Window(window.strides[1:], window.padding[1:], window.dilation[1:])
    y = _plain(x.reshape(b * d, *x.shape[2:]), planes, in_plane)
    y = y.reshape(b, d, *y.shape[1:])  # [b, d, h', w', kd * o]
    step = window.dilation[0]
    out = d - (kd - 1) * step
    first, *others = (y[:, i * step : i * step + out, ..., i * o : (i + 1) * o] for i in range(kd))
    return sum(others, first)


def _weight_gradient(x: Array, kernel: Array, g: Array, window: Window) -> Array:
    """Gradient of a 3-D kernel at unit stride: per depth slice, columns of x times columns of g."""
    kd, kh, kw, c, o = kernel.shape
    (step, *steps), (_, *in_plane) = window.dilation, window.padding
    h, w = g.shape[2:4]
    reach = (kd - 1) * step
    (before, after), *_ = window.padding
    g = _pad(g, [(reach - before, reach - after)])  # slice t of x meets slices t .. t + reach of g
    taps = [(i * steps[0], j * steps[1]) for i in range(kh) for j in range(kw)]

    def add(total, t):
        xt = _pad(lax.dynamic_index_in_dim(x, t, 1, keepdims=False), in_plane)  # [b, h, w, c]
        gt = lax.dynamic_slice_in_dim(g, t, reach + 1, 1)  # [b, reach + 1, h', w', o]
        x_columns = jnp.concatenate([xt[:, i : i + h, j : j + w] for i, j in taps], -1)
        g_columns = jnp.concatenate([gt[:, i * step] for i in reversed(range(kd))], -1)
        return total + lax.dot_general(
            x_columns, g_columns, (((0, 1, 2), (0, 1, 2)), ((), ())), preferred_element_type=total.dtype
        ), None

    total = jnp.zeros((kh * kw * c, kd * o), jnp.promote_types(x.dtype, jnp.float32))
    total, _ = lax.scan(add, total, jnp.arange(x.shape[1]))
    return total.reshape(kh, kw, c, kd, o).transpose(3, 0, 1, 2, 4).astype(kernel.dtype)


def _weight_gradient_of_rows(x: Array, kernel: Array, g: Array, window: Window) -> Array:
    """The weight gradient of a 2-D convolution as that of a 3-D one whose slices are the image's rows."""
    (top, side), (step, sideways) = window.padding, window.dilation
    rows = Window((1, 1, 1), (top, (0, 0), side), (step, 1, sideways))
    return _weight_gradient(x[:, :, None], kernel[:, None], g[:, :, None], rows)[:, 0]


def _space_to_depth(x: Array, kernel: Array, window: Window) -> tuple[Array, Array]:
    """Turns a strided convolution into an unpadded one of unit stride: stride ** dim times the channels."""
    dim, strides = len(window.strides), window.strides
    size = kernel.shape[:dim]
    reach = [-(-k // s) for k, s in zip(size, strides, strict=True)]  # the kernel's size in blocks
    kernel = _pad(kernel[None], [(0, r * s - k) for r, s, k in zip(reach, strides, size, strict=True)])[0]
    counts, pads = [], []
    for n, k, s, r, (before, after) in zip(x.shape[1:-1], size, strides, reach, window.padding, strict=True):
        out = (n + before + after - k) // s + 1
        counts.append(out + r - 1)
        pads.append((before, counts[-1] * s - n - before))
    x = _pad(x, pads)
    b, c, o = x.shape[0], *kernel.shape[-2:]
    x = x.reshape(b, *(v for pair in zip(counts, strides, strict=True) for v in pair), c)  # [b, n/s, s, ..., c]
    x = x.transpose(0, *range(1, 2 * dim, 2), *range(2, 2 * dim + 1, 2), 2 * dim + 1)  # [b, n/s, ..., s, ..., c]
    kernel = kernel.reshape(*(v for pair in zip(reach, strides, strict=True) for v in pair), c, o)
    kernel = kernel.transpose(*range(0, 2 * dim, 2), *range(1, 2 * dim, 2), 2 * dim, 2 * dim + 1)
    return x.reshape(b, *counts, -1), kernel.reshape(*reach, -1, o)


def _depthwise(x: Array, kernel: Array, window: Window) -> Array:
    """Depthwise convolution: the input shifted to each tap, times the tap's weights, summed."""
    dim = kernel.ndim - 2
    x = _pad(x, window.padding)
    out = [
        (n - d * (k - 1) - 1) // s + 1
        for n, k, s, d in zip(x.shape[1:-1], kernel.shape[:dim], window.strides, window.dilation, strict=True)
    ]
    total = 0
    for tap in itertools.product(*map(range, kernel.shape[:dim])):
        shifted = tuple(
            slice(i * d, i * d + (n - 1) * s + 1, s)
            for i, d, s, n in zip(tap, window.dilation, window.strides, out, strict=True)
        )
        total += x[:, *shifted] * kernel[tap][0]
    return total  # pyright: ignore[reportReturnType]


def _depthwise_weight_gradient(x: Array, kernel: Array, g: Array, window: Window) -> Array:
    """Gradient of a depthwise kernel at unit stride: a row (3-D: slice) at a time, which its taps find in the cache."""
    dim = kernel.ndim - 2
    x = _pad(x, window.padding)
    step, *steps = window.dilation

    def add(total, t):
        xt = lax.dynamic_slice_in_dim(x, t, (kernel.shape[0] - 1) * step + 1, 1)
        gt = lax.dynamic_index_in_dim(g, t, 1, keepdims=False)  # [b, w, c] or [b, h, w, c]
        taps = []
        for i, *others in itertools.product(*map(range, kernel.shape[:dim])):
            shifted = (slice(j * d, j * d + n) for j, d, n in zip(others, steps, gt.shape[1:-1], strict=True))
            taps.append((xt[:, i * step, *shifted] * gt).sum(tuple(range(dim)), dtype=total.dtype))
        return total + jnp.stack(taps), None

    total = jnp.zeros((math.prod(kernel.shape[:dim]), x.shape[-1]), jnp.promote_types(x.dtype, jnp.float32))
    total, _ = lax.scan(add, total, jnp.arange(g.shape[1]))
    return total.reshape(kernel.shape).astype(kernel.dtype)


# ------------------------------------------------------------------------------------------------------------- helpers


def _transposed(kernel: Array, window: Window) -> tuple[Array, Window]:
    """Kernel and window of the convolution that takes the output's gradient to the input's, for unit stride."""
    dim = kernel.ndim - 2
    flipped = jnp.flip(kernel, range(dim))
    back = tuple(
        ((k - 1) * d - before, (k - 1) * d - after)
        for k, d, (before, after) in zip(kernel.shape, window.dilation, window.padding, strict=False)
    )
    return (flipped if window.groups > 1 else flipped.swapaxes(-1, -2)), window._replace(padding=back)


def _pad(x: Array, pairs: Sequence[tuple[int, int]]) -> Array:
    """Zeros before and after the axes that follow the first one; negative numbers crop."""
    rest = [(0, 0, 0)] * (x.ndim - 1 - len(pairs))
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((lo, hi, 0) for lo, hi in pairs), *rest])


def _interleave(y: Array, dim: int) -> Array:
    """[b, *s, *k, o] -> [b, *(s * k), o]."""
    b, *sizes, o = y.shape
    order = [axis for i in range(dim) for axis in (1 + i, 1 + dim + i)]
    return y.transpose(0, *order, 1 + 2 * dim).reshape(b, *(sizes[i] * sizes[dim + i] for i in range(dim)), o)


def _pairs(padding: Padding, size: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Padding in words or numbers -> (before, after) of each axis."""
    if padding == "SAME":
        halves = [d * ((k - 1) // 2) for k, d in zip(size, dilation, strict=True)]
        return tuple((half, half) for half in halves)
    if padding == "VALID":
        return ((0, 0),) * len(size)
    if isinstance(padding, str) or len(padding) != len(size):
        raise ValueError(f'padding is "SAME", "VALID" or a pair per spatial axis ({len(size)}), not {padding!r}')
    return tuple((int(before), int(after)) for before, after in padding)


def _layout(dim: int) -> tuple[str, str, str]:
    """Channels-last dimension numbers."""
    space = "DHW"[-dim:]
    return f"N{space}C", f"{space}IO", f"N{space}C"

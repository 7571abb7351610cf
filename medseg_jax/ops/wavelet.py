"""One level of the discrete wavelet transform and its inverse over the spatial axes of images, equal to PyWavelets.

Along one axis a transform is a correlation with two filters of even length L at every second sample. Here the padded
signal is split once into its even and odd samples ("phases"), and each output is a sum of shifted phases times filter
taps: L multiplications a sample, no convolution, everything differentiable and exact in float64. Taps that are zero
(eight of ten in the detail filter of bior1.5) cost nothing. Two or three axes are done one after the other.

Bands are named as in `pywt.dwtn`: one letter per spatial axis, the first axis first, "a" for approximation and "d" for
detail. In 2-D "aa" is LL, "da" LH (pywt's cH), "ad" HL (cV), "dd" HH (cD).

For Haar, with block (A B; C D) of 2 x 2 pixels: aa = (A + B + C + D) / 2, da = (A + B - C - D) / 2, and the sum of all
details is 2 A - aa; `haar_low_high` uses this closed form (in 3-D: 2 sqrt(2) A - aaa).
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from medseg_jax.types import UserError

type Wavelet = Literal["haar", "db2", "bior1.5", "coif1"]
type Extension = Literal["symmetric", "periodization"]


class Filters(NamedTuple):
    """Analysis (`dec`) and synthesis (`rec`) filters, low- and high-pass, of one even length."""

    dec_lo: tuple[float, ...]
    dec_hi: tuple[float, ...]
    rec_lo: tuple[float, ...]
    rec_hi: tuple[float, ...]


def filters(wavelet: Wavelet) -> Filters:
    """The four filters of a wavelet, in closed form (Daubechies 1992, tables 6.1, 8.1 and 8.3)."""
    if wavelet not in get_args(Wavelet.__value__):
        raise UserError("Unknown wavelet", found=wavelet, expected=", ".join(get_args(Wavelet.__value__)))
    if wavelet == "bior1.5":
        lo = _over(128 * math.sqrt(2), 3, -3, -22, 22, 128, 128, 22, -22, -3, 3)
        short = _over(math.sqrt(2), 0, 0, 0, 0, 1, 1, 0, 0, 0, 0)
        return Filters(lo, _mirror(short), short, tuple(-v for v in _mirror(lo)))
    root3, root7 = math.sqrt(3), math.sqrt(7)
    rec_lo = {
        "haar": _over(math.sqrt(2), 1, 1),
        "db2": _over(4 * math.sqrt(2), 1 + root3, 3 + root3, 3 - root3, 1 - root3),
        "coif1": _over(16 * math.sqrt(2), 1 - root7, 5 + root7, 14 + 2 * root7, 14 - 2 * root7, 1 - root7, root7 - 3),
    }[wavelet]
    rec_hi = tuple(-v for v in _mirror(rec_lo[::-1]))
    return Filters(rec_lo[::-1], rec_hi[::-1], rec_lo, rec_hi)


def dwt(
    x: Float[Array, "b *s c"], wavelet: Wavelet = "haar", mode: Extension = "symmetric"
) -> dict[str, Float[Array, "b *t c"]]:
    """One level of the transform over all spatial axes.

    Args:
        x: images or volumes; bfloat16 is computed in float32.
        wavelet: "haar", "db2", "bior1.5" or "coif1".
        mode: how the signal goes on beyond its border: "symmetric" (mirrored, the edge twice; bands have
            (n + L - 1) // 2 samples an axis) or "periodization" (repeated; ceil(n / 2) samples, and the transform of an
            even size is a basis). An odd size repeats its last sample in "periodization".

    Returns:
        {"aa": ..., "ad": ..., "da": ..., "dd": ...} in 2-D, and so on.
    """
    _check(mode)
    taps = filters(wavelet)
    bands = {"": x.astype(jnp.promote_types(x.dtype, jnp.float32))}
    for axis in range(1, x.ndim - 1):
        bands = {
            key + letter: band
            for key, value in bands.items()
            for letter, band in zip("ad", _analyse(value, taps, mode, axis), strict=True)
        }
    return bands


def idwt(
    bands: Mapping[str, Float[Array, "b *t c"]], wavelet: Wavelet = "haar", mode: Extension = "symmetric"
) -> Float[Array, "b *s c"]:
    """The inverse of `dwt`: images of even size (2 t - L + 2 or 2 t an axis); crop the last sample of an odd one.

    UserError unless the bands' names are those that `dwt` gives.
    """
    _check(mode)
    dim = next(iter(bands.values())).ndim - 2
    expected = ["".join(letters) for letters in itertools.product("ad", repeat=dim)]
    if sorted(bands) != expected:
        raise UserError("These are not the bands of a transform", found=sorted(bands), expected=expected)
    taps = filters(wavelet)
    rest = {key: band.astype(jnp.promote_types(band.dtype, jnp.float32)) for key, band in bands.items()}
    for axis in reversed(range(1, dim + 1)):
        keys = dict.fromkeys(key[:-1] for key in rest)
        rest = {key: _synthesise(rest[key + "a"], rest[key + "d"], taps, mode, axis) for key in keys}
    return rest[""]


def haar_low_high(x: Float[Array, "b *s c"]) -> tuple[Float[Array, "b *t c"], Float[Array, "b *t c"]]:
    """The Haar approximation, and the sum of all Haar details, of images of even size, without computing the details.

    UserError for an odd size.
    """
    dim = x.ndim - 2
    if any(n % 2 for n in x.shape[1:-1]):
        raise UserError("Only even sizes have a closed form", found=x.shape[1:-1], remedy="pad by one, or call dwt")
    corners = [x[:, *(slice(start, None, 2) for start in starts)] for starts in itertools.product((0, 1), repeat=dim)]
    low = sum(corners[1:], corners[0]) / 2 ** (dim / 2)
    return low, 2 ** (dim / 2) * corners[0] - low


# ------------------------------------------------------------------------------------------------------------ one axis


def _analyse(x: Array, taps: Filters, mode: Extension, axis: int) -> tuple[Array, Array]:
    """(approximation, detail) along an axis: y[k] = sum_i f[L - 1 - i] x[2 k - before + i]."""
    n, length = x.shape[axis], len(taps.dec_lo)
    if mode == "symmetric":
        count, before = (n + length - 1) // 2, length - 2
    else:
        count, before = -(-n // 2), length // 2 - 1
        if n % 2:
            x = jnp.concatenate([x, lax.slice_in_dim(x, n - 1, n, axis=axis)], axis)
    x = _extend(x, before, 2 * count - 2 + length - before - x.shape[axis], mode, axis)
    pairs = x.reshape(*x.shape[:axis], -1, 2, *x.shape[axis + 1 :])
    phases = [lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1)]
    lo, hi = (
        _sum(
            tap * lax.slice_in_dim(phases[i % 2], i // 2, i // 2 + count, axis=axis)
            for i, tap in enumerate(reversed(filter_))
            if tap
        )
        for filter_ in (taps.dec_lo, taps.dec_hi)
    )
    return lo, hi


def _synthesise(lo: Array, hi: Array, taps: Filters, mode: Extension, axis: int) -> Array:
    """x[n] = sum_k lo[k] rec_lo[n + L - 2 - 2 k] + the same of hi; even and odd n are two sums, interleaved."""
    length, count, skip = len(taps.rec_lo), 2 * lo.shape[axis], 0
    if mode == "symmetric":
        count -= length - 2
    else:  # the same sum over bands that go on periodically, moved to where the analysis began
        before = length // 4
        skip = 2 * before - (length // 2 - 1)
        after = -(-(skip + length - 2) // 2) - before
        lo, hi = (_extend(band, before, after, mode, axis) for band in (lo, hi))
    half = length // 2
    size = lo.shape[axis] - half + 1
    phases = [
        _sum(
            filter_[2 * (half - 1 - i) + phase] * lax.slice_in_dim(band, i, i + size, axis=axis)
            for band, filter_ in ((lo, taps.rec_lo), (hi, taps.rec_hi))
            for i in range(half)
            if filter_[2 * (half - 1 - i) + phase]
        )
        for phase in (0, 1)
    ]
    x = jnp.stack(phases, axis + 1).reshape(*lo.shape[:axis], 2 * size, *lo.shape[axis + 1 :])
    return lax.slice_in_dim(x, skip, skip + count, axis=axis)


def _extend(x: Array, before: int, after: int, mode: Extension, axis: int) -> Array:
    if before == after == 0:
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (before, after)
    return jnp.pad(x, widths, "symmetric" if mode == "symmetric" else "wrap")


def _sum(terms) -> Array:
    first, *others = terms
    return sum(others, first)


def _check(mode: str) -> None:
    if mode not in get_args(Extension.__value__):
        raise UserError("Unknown extension mode", found=mode, expected=", ".join(get_args(Extension.__value__)))


def _over(divisor: float, *numbers: float) -> tuple[float, ...]:
    return tuple(number / divisor for number in numbers)


def _mirror(filter_: Sequence[float]) -> tuple[float, ...]:
    """The quadrature mirror: every second sign changed, the first one included."""
    return tuple((-1) ** (i + 1) * v for i, v in enumerate(filter_))

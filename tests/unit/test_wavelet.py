"""The wavelet transform: closed forms, perfect reconstruction, adjoints, what must fail."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_jax.ops.wavelet import dwt, filters, haar_low_high, idwt
from medseg_jax.types import UserError

RNG = np.random.default_rng(0)
WAVELETS = ["haar", "db2", "bior1.5", "coif1"]
MODES = ["periodization", "symmetric"]


def test_haar_is_sums_and_differences_of_blocks(x64):
    x = jnp.array(RNG.normal(size=(2, 6, 8, 3)))
    a, b, c, d = (x[:, i::2, j::2] for i in (0, 1) for j in (0, 1))
    bands = dwt(x)
    assert list(bands) == ["aa", "ad", "da", "dd"]
    expected = {"aa": a + b + c + d, "ad": a - b + c - d, "da": a + b - c - d, "dd": a - b - c + d}
    for key, band in bands.items():
        np.testing.assert_allclose(band, expected[key] / 2, atol=1e-12)


@pytest.mark.parametrize("size", [(6, 8), (4, 6, 2)])
def test_the_sum_of_haar_details_needs_no_details(size, x64):
    x = jnp.array(RNG.normal(size=(2, *size, 2)))
    first, *details = dwt(x).values()
    low, high = haar_low_high(x)
    np.testing.assert_allclose(low, first, atol=1e-12)
    np.testing.assert_allclose(high, sum(details), atol=1e-12)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_filters_reconstruct(wavelet):
    """Cross-correlations of analysis and synthesis filters at even shifts are a unit impulse or nothing."""
    taps = filters(wavelet)
    for dec, rec, impulse in (
        (taps.dec_lo, taps.rec_lo, 1),
        (taps.dec_hi, taps.rec_hi, 1),
        (taps.dec_lo, taps.rec_hi, 0),
    ):
        product = np.convolve(dec, rec)[1::2]
        expected = np.zeros(len(product))
        expected[len(product) // 2] = impulse
        np.testing.assert_allclose(product, expected, atol=1e-15)
    np.testing.assert_allclose(sum(taps.dec_lo), np.sqrt(2))
    np.testing.assert_allclose(sum(taps.dec_hi), 0, atol=1e-15)


@settings(deadline=None, max_examples=12)
@given(
    size=st.one_of(st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(1, 5)] * 3)),
    wavelet=st.sampled_from(WAVELETS),
    mode=st.sampled_from(MODES),
    seed=st.integers(0, 9),
)
def test_there_and_back_whatever_the_size(size, wavelet, mode, seed):
    x = np.random.default_rng(seed).normal(size=(1, *size, 1)).astype(np.float32)
    back = jax.jit(lambda x: idwt(dwt(x, wavelet, mode), wavelet, mode))(x)
    np.testing.assert_allclose(back[tuple(slice(n) for n in x.shape)], x, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_gradients_are_the_adjoint(wavelet, mode, x64):
    """<dwt x, c> = <x, dwt' c>; of an orthogonal wavelet on whole periods, dwt' is the inverse."""
    x = jnp.array(RNG.normal(size=(1, 8, 12, 1)))
    bands, undo = jax.vjp(jax.jit(partial(dwt, wavelet=wavelet, mode=mode)), x)
    c = jax.tree.map(lambda band: jnp.array(RNG.normal(size=band.shape)), bands)
    (adjoint,) = undo(c)
    product = sum(jnp.vdot(bands[key], c[key]) for key in bands)
    np.testing.assert_allclose(product, jnp.vdot(x, adjoint), rtol=1e-12)
    if mode == "periodization" and wavelet != "bior1.5":
        np.testing.assert_allclose(adjoint, idwt(c, wavelet, mode), atol=1e-12)
        np.testing.assert_allclose(sum(jnp.vdot(b, b) for b in bands.values()), jnp.vdot(x, x), rtol=1e-12)
    y, undo = jax.vjp(lambda c: idwt(c, wavelet, mode), c)
    g = jnp.array(RNG.normal(size=y.shape))
    (adjoints,) = undo(g)
    np.testing.assert_allclose(sum(jnp.vdot(c[k], adjoints[k]) for k in c), jnp.vdot(y, g), rtol=1e-12)


def test_channels_and_samples_do_not_mix():
    x = jnp.asarray(RNG.normal(size=(2, 6, 5, 3)), jnp.float32)
    together = dwt(x, "db2")
    alone = dwt(x[1:, ..., 2:], "db2")
    for key, band in alone.items():
        np.testing.assert_allclose(together[key][1:, ..., 2:], band, rtol=1e-6)


def test_low_precision_is_computed_in_float32():
    x = jnp.asarray(RNG.normal(size=(1, 4, 4, 1)), jnp.bfloat16)
    assert {band.dtype for band in dwt(x).values()} == {jnp.dtype("float32")}
    np.testing.assert_allclose(dwt(x)["da"], dwt(x.astype(jnp.float32))["da"], atol=1e-6)


def test_misuse_is_named():
    x = jnp.zeros((1, 4, 4, 1))
    with pytest.raises(UserError, match="Unknown wavelet"):
        dwt(x, "db9")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="Unknown extension"):
        dwt(x, "haar", "zero")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not the bands"):
        idwt({"aa": x, "dd": x})
    with pytest.raises(UserError, match="even sizes"):
        haar_low_high(jnp.zeros((1, 4, 5, 1)))

"""The discrete wavelet transform against PyWavelets (golden/wavelet/dwt.npz)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_files
from medseg_jax.ops.wavelet import dwt, filters, idwt

WAVELETS = ["haar", "db2", "bior1.5", "coif1"]
MODES = ["periodization", "symmetric"]


@pytest.fixture(scope="module")
def reference(golden):
    return *golden_files.read(golden / "wavelet" / "dwt.npz"), golden_files.load(golden).array


def tolerance(meta, dtype):
    """What the file's text allows: "float32 abs 3e-6 on ...; float64 1e-12; ..."."""
    (found,) = re.findall(
        rf"{jnp.dtype(dtype).name}(?: abs)? ([\d.e-]+)", meta["tolerance"].partition("reconstruction")[0]
    )
    return float(found)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_filters(reference, wavelet):
    arrays, meta, _ = reference
    assert wavelet in meta["wavelets"]
    atol = tolerance(meta, jnp.float64)
    np.testing.assert_allclose(np.array(filters(wavelet)), arrays[f"filters/{wavelet}"], rtol=0, atol=atol)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_forward_and_inverse(reference, wavelet, mode, x64):
    """Bands of every size, arbitrary bands back, and the way there and back, in double and in single precision."""
    arrays, meta, array = reference
    assert mode in meta["modes"]
    images, random_bands = {}, {}
    for size in map(tuple, meta["shapes2d"] + meta["shapes3d"]):
        tag = "x".join(map(str, size))
        images[tag] = array(f"wavelet/x/{tag}", size, meta["salt"])[None, ..., None]
        prefix = f"{wavelet}/{mode}/{tag}/"
        shapes = {key.removeprefix(prefix): a.shape for key, a in arrays.items() if key.startswith(prefix)}
        if f"inverse_of_random/{wavelet}/{mode}/{tag}" in arrays:
            random_bands[tag] = {
                key: array(f"wavelet/coef/{prefix}{key}", shape, meta["salt"])[None, ..., None]
                for key, shape in shapes.items()
            }
    assert random_bands

    @jax.jit
    def run(images, random_bands):
        bands = {tag: dwt(x, wavelet, mode) for tag, x in images.items()}
        back = {tag: idwt(b, wavelet, mode) for tag, b in bands.items()}
        return bands, back, {tag: idwt(b, wavelet, mode) for tag, b in random_bands.items()}

    for dtype in (jnp.float64, jnp.float32):
        given = jax.tree.map(lambda x, dtype=dtype: jnp.asarray(x, dtype), (images, random_bands))
        bands, back, inverse = run(*given)
        close = dict(rtol=0, atol=tolerance(meta, dtype))
        for tag, x in images.items():
            for key, band in bands[tag].items():
                expected = arrays[f"{wavelet}/{mode}/{tag}/{key}"]
                np.testing.assert_allclose(band[0, ..., 0], expected, **close, err_msg=f"{tag} {key}")
            inside = tuple(slice(n) for n in x.shape)
            np.testing.assert_allclose(back[tag][inside], x, **close, err_msg=tag)
        for tag, x in inverse.items():
            # Coefficients that no transform gave: sums of as many terms as the filter is long, so of larger values.
            expected = arrays[f"inverse_of_random/{wavelet}/{mode}/{tag}"]
            np.testing.assert_allclose(x[0, ..., 0], expected, **close, err_msg=tag)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", WAVELETS)
def test_two_levels(reference, wavelet, mode, x64):
    arrays, meta, array = reference
    size = meta["shapes2d"][0]
    x = array("wavelet/x/" + "x".join(map(str, size)), tuple(size), meta["salt"])[None, ..., None]
    letters = {"A": "aa", "H": "da", "V": "ad", "D": "dd"}
    first = dwt(jnp.asarray(x, jnp.float64), wavelet, mode)
    second = dwt(first["aa"], wavelet, mode)
    prefix = f"wavedec2/{wavelet}/{mode}/c"
    kept = [key.removeprefix(prefix) for key in arrays if key.startswith(prefix)]
    assert len(kept) == 7
    atol = tolerance(meta, jnp.float64)
    for letter, level in kept:
        found = (first if level == "1" else second)[letters[letter]]
        np.testing.assert_allclose(found[0, ..., 0], arrays[f"{prefix}{letter}{level}"], rtol=0, atol=atol)

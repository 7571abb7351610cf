"""PyWavelets and SciPy, one array after the other."""

import numpy as np
import pywt
from drawing import draw_image, draw_mask, fingerprint
from scipy import ndimage
from serve import serve, timed


def label(mask: np.ndarray, axes: int, rank: int) -> list[np.ndarray]:
    structure = ndimage.generate_binary_structure(axes, rank)
    return [ndimage.label(m, structure)[0] for m in mask.reshape(-1, *mask.shape[mask.ndim - axes :])]


def largest(mask: np.ndarray, axes: int, rank: int) -> list[np.ndarray]:
    kept = []
    for labels in label(mask, axes, rank):
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        kept.append(labels == sizes.argmax() if sizes.any() else np.zeros_like(labels, bool))
    return kept


def components(what: str, kind: str, shape: list[int], axes: int, rank: int) -> dict:
    mask = draw_mask(kind, tuple(shape), axes)
    work = {"label": label, "largest": largest}[what]
    seconds = timed(lambda: work(mask, axes, rank))
    return {"seconds": seconds, "fingerprint": fingerprint(np.stack(work(mask, axes, rank)))}


def transform(shape: list[int], axes: int, wavelet: str, mode: str, inverse: bool, times: int) -> dict:
    x, spatial = draw_image(tuple(shape)), tuple(range(len(shape) - axes, len(shape)))
    bands = pywt.dwtn(x, wavelet, mode, axes=spatial)

    def work():
        for _ in range(times):
            if inverse:
                pywt.idwtn(bands, wavelet, mode, axes=spatial)
            else:
                pywt.dwtn(x, wavelet, mode, axes=spatial)

    wall, cpu = timed(work)
    return {"seconds": (wall / times, cpu / times), "norms": {k: float(np.abs(v).sum()) for k, v in bands.items()}}


if __name__ == "__main__":
    serve({"components": components, "transform": transform}, ("numpy", "scipy", "PyWavelets"))

"""Images and masks that both sides of a benchmark draw alike, with NumPy and SciPy only."""

import zlib

import numpy as np
from scipy import ndimage

KINDS = {"blobs": (4.0, 0.8), "noise": (0.0, 0.5)}
"""Name: standard deviation of the smoothing, threshold in standard deviations of the result."""


def draw_mask(kind: str, shape: tuple[int, ...], axes: int, seed: int = 0) -> np.ndarray:
    """Smoothed noise above a threshold; smoothed along the last `axes` only."""
    sigma, threshold = KINDS[kind]
    field = np.random.default_rng(seed).normal(size=shape)
    if sigma:
        field = ndimage.gaussian_filter(field, (0.0,) * (len(shape) - axes) + (sigma,) * axes)
    return field > threshold * field.std()


def draw_image(shape: tuple[int, ...]) -> np.ndarray:
    """Normal, float32."""
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def fingerprint(x: np.ndarray) -> int:
    """Of integers or truth values, as 32-bit integers."""
    return zlib.crc32(np.ascontiguousarray(x, np.int32).tobytes())

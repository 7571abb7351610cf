"""Contrast-limited adaptive histogram equalisation (Zuiderveld, Graphics Gems IV, 1994), as OpenCV computes it, and the
colour space in whose lightness it is applied (CIE 1976 L*a*b*, D65).

    tile by tile: histogram, clipped at `clip` times its mean, the excess spread evenly -> a table of grey levels
    pixel by pixel: the tables of the four nearest tiles, interpolated bilinearly

On the CPU in NumPy: it belongs to preprocessing, is done once an image, and is cached. Spec: bayes_spe_med2d_dr D4.
"""

import numpy as np
from jaxtyping import Float, UInt8

from medseg_jax.types import UserError

LEVELS = 256

STRIP = 64
"""Rows whose colours are converted at once, so that memory stays that of the picture."""


def clahe(
    image: UInt8[np.ndarray, "h w"], clip: float = 2.0, grid: tuple[int, int] = (8, 8)
) -> UInt8[np.ndarray, "h w"]:
    """Equalises one 8-bit channel, bit for bit like OpenCV's createCLAHE(clip, grid).apply(image).

    Args:
        image: grey levels 0 to 255.
        clip: limit of a histogram bin over the mean of the bins; 0 or less: no limit.
        grid: tiles along (columns, rows), in OpenCV's order.

    Raises:
        UserError: not an 8-bit image of two axes, or smaller than the grid.
    """
    image, (columns, rows) = np.asarray(image), grid
    if image.dtype != np.uint8 or image.ndim != 2 or min(grid) < 1:
        found = f"{image.dtype} of shape {image.shape}, grid {grid}"
        raise UserError("CLAHE wants one 8-bit channel", found=found, expected="uint8 [h, w], a grid of 1 x 1 or more")
    h, w = image.shape
    if h < 2 * rows or w < 2 * columns:
        raise UserError(
            "The image is too small for this grid", found=f"{h} x {w}", expected=f"twice {rows} x {columns}"
        )
    padded = image
    if h % rows or w % columns:  # a side that divides gets a whole extra tile row, as in OpenCV
        padded = np.pad(image, ((0, rows - h % rows), (0, columns - w % columns)), mode="reflect")
    th, tw = padded.shape[0] // rows, padded.shape[1] // columns
    tiles = padded.reshape(rows, th, columns, tw).swapaxes(1, 2).reshape(rows * columns, th * tw)
    tables = np.stack([_table(np.bincount(tile, minlength=LEVELS), clip, th * tw) for tile in tiles])
    return _interpolate(image, tables.reshape(rows, columns, LEVELS), th, tw)


def _table(histogram: np.ndarray, clip: float, area: int) -> np.ndarray:
    """Grey level -> equalised grey level of one tile."""
    if clip > 0:
        limit = max(int(clip * area / LEVELS), 1)
        excess = int(np.maximum(histogram - limit, 0).sum())
        share, rest = divmod(excess, LEVELS)
        histogram = np.minimum(histogram, limit) + share
        if rest:
            step = max(LEVELS // rest, 1)
            histogram[: step * rest : step] += 1
    scaled = np.cumsum(histogram).astype(np.float32) * np.float32((LEVELS - 1) / area)
    return np.clip(np.rint(scaled), 0, LEVELS - 1).astype(np.float32)


def _interpolate(image: np.ndarray, tables: np.ndarray, th: int, tw: int) -> np.ndarray:
    """Blends the tables of the four nearest tiles in float32, along rows first."""
    rows, columns, _ = tables.shape

    def neighbours(n: int, side: int, tiles: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        place = np.arange(n, dtype=np.float32) * np.float32(1 / side) - np.float32(0.5)
        before = np.floor(place).astype(int)
        return np.maximum(before, 0), np.minimum(before + 1, tiles - 1), place - before.astype(np.float32)

    top, bottom, wy = neighbours(image.shape[0], th, rows)
    left, right, wx = neighbours(image.shape[1], tw, columns)
    wx, one = wx[None], np.float32(1)
    out = np.empty_like(image)
    for y, line in enumerate(image):  # line by line: memory stays that of the image
        upper = tables[top[y], left, line] * (one - wx) + tables[top[y], right, line] * wx
        lower = tables[bottom[y], left, line] * (one - wx) + tables[bottom[y], right, line] * wx
        out[y] = np.clip(np.rint(upper * (one - wy[y]) + lower * wy[y]), 0, 255)[0]
    return out


# ---------------------------------------------------------------- colour

TO_XYZ = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
"""Linear sRGB to CIE XYZ."""

WHITE = np.array([0.950456, 1.0, 1.088754])
"""XYZ of D65 white."""

LINEAR = np.where((GREY := np.arange(LEVELS) / 255) <= 0.04045, GREY / 12.92, ((GREY + 0.055) / 1.055) ** 2.4)
"""8-bit sRGB to linear light in 0 to 1."""

KNEE, SLOPE, OFFSET = 0.008856, 7.787, 16 / 116
"""Where the cube root of L*a*b* gives way to a line, and the line."""


def rgb_to_lab(rgb: UInt8[np.ndarray, "*s 3"]) -> Float[np.ndarray, "*s 3"]:
    """8-bit sRGB -> float32 L* in 0 to 100 and a*, b*."""
    linear = LINEAR.astype(np.float32)[rgb]
    t = linear @ (TO_XYZ / WHITE[:, None]).T.astype(np.float32)
    x, y, z = np.moveaxis(np.where(t > KNEE, np.cbrt(t), np.float32(SLOPE) * t + np.float32(OFFSET)), -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def rgb_to_lab8(rgb: UInt8[np.ndarray, "*s 3"]) -> UInt8[np.ndarray, "*s 3"]:
    """8-bit sRGB -> L* 255 / 100, a* + 128, b* + 128 in the integer arithmetic of OpenCV.

    Linear light in 1/2040, matrix in 1/4096, cube roots in 1/32768, each rounded. L* equals OpenCV's in every pixel, a*
    and b* but for one level in a few pixels of ten thousand.
    """
    linear = np.rint(255 * 8 * LINEAR).astype(np.int32)
    matrix = np.rint(4096 * TO_XYZ / WHITE[:, None]).astype(np.int32)
    t = np.arange(256 * 12) / (255 * 8)
    root = np.rint(32768 * np.where(t < KNEE, SLOPE * t + OFFSET, np.cbrt(t))).astype(np.int32)
    channels = [linear[rgb[..., i]] for i in range(3)]
    x, y, z = (root[(sum(c * m for c, m in zip(channels, row, strict=True)) + 2048) >> 12] for row in matrix)
    middle = 128 << 15
    fixed = (116 * 255 + 50) // 100 * y - (16 * 255 * 32768 + 50) // 100, 500 * (x - y) + middle, 200 * (y - z) + middle
    return np.stack([np.clip((v + 16384) >> 15, 0, 255).astype(np.uint8) for v in fixed], -1)


def lab_to_rgb(lab: Float[np.ndarray, "*s 3"]) -> UInt8[np.ndarray, "*s 3"]:
    """The inverse of `rgb_to_lab`; colours that sRGB does not have are clipped."""
    lightness, a, b = np.moveaxis(np.asarray(lab, np.float32), -1, 0)
    y = (lightness + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], -1)
    cube = f * f * f
    xyz = np.where(cube > KNEE, cube, (f - np.float32(OFFSET)) / np.float32(SLOPE)) * WHITE.astype(np.float32)
    linear = xyz @ np.linalg.inv(TO_XYZ).T.astype(np.float32)
    halfway = np.where((v := GREY[:-1] + 0.5 / 255) <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)
    return np.searchsorted(halfway.astype(np.float32), linear).astype(np.uint8)  # faster than a power for each pixel


def clahe_lab(
    rgb: UInt8[np.ndarray, "h w 3"], clip: float = 2.0, grid: tuple[int, int] = (8, 8), *, eight_bit: bool = False
) -> UInt8[np.ndarray, "h w 3"]:
    """CLAHE of the lightness alone; hue and saturation (a*, b*) keep their values.

    Args:
        rgb, clip, grid: as in `clahe`.
        eight_bit: a* and b* rounded to whole numbers on the way, as OpenCV's 8-bit L*a*b* does; this loses up to 24
            levels of saturated colours.
    """
    strips = [slice(i, i + STRIP) for i in range(0, len(rgb), STRIP)]  # a picture in float64 is large
    lightness = clahe(np.concatenate([rgb_to_lab8(rgb[rows])[..., 0] for rows in strips]), clip, grid)
    out = np.empty_like(rgb)
    for rows in strips:
        lab = rgb_to_lab8(rgb[rows]) - np.array([0, 128, 128], np.float32) if eight_bit else rgb_to_lab(rgb[rows])
        lab[..., 0] = lightness[rows] / np.float32(2.55)
        out[rows] = lab_to_rgb(lab)
    return out

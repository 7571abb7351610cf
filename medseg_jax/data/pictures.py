"""Pictures (PNG, TIFF, JPEG, BMP, GIF, PPM): palettes, bits, transparency, orientation and stacks. What the arrays mean
stands in io.py, whose part this is."""

import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image, ImageOps

from medseg_jax.data.arrays import Role
from medseg_jax.data.raw import check_declared
from medseg_jax.types import Geometry, UserError

_PILLOW_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM")


def read_picture(path: Path, role: Role) -> np.ndarray:
    """Decoded picture [h, w, c], or [pages, h, w, c] for a TIFF of several pages."""
    # An open file, not its name: Pillow maps named files into memory and then gets rotated TIFFs wrong.
    with path.open("rb") as stream:
        image = _open_picture(stream, path)
        frames = getattr(image, "n_frames", 1)
        if image is None or (image.format == "TIFF" and _beyond_pillow(image, frames)):
            return _read_tifffile(path)
        if frames > 1 and image.format == "TIFF":
            pages = [_pixels(image, role, path) for _ in _pages(image, frames)]
            if len({page.shape for page in pages}) > 1:
                found = ", ".join(sorted({str(page.shape) for page in pages}))
                raise UserError("The pages of the TIFF differ in size", file=path, found=found, remedy="keep one page")
            return np.stack(pages)
        if frames > 1 and image.format != "MPO":  # the second frame of an MPO is a preview
            raise UserError(
                "The picture is animated", file=path, found=f"{frames} frames", remedy="save them one by one"
            )
        return _pixels(image, role, path)


def _open_picture(stream: IO[bytes], path: Path) -> Image.Image | None:
    """The picture's header, or None for a TIFF that is beyond Pillow."""
    with warnings.catch_warnings():
        # Pillow warns at 89 megapixels and refuses at 179; large microscopy is no reason for a warning.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            # Named formats only: Pillow's other plug-ins reach as far as calling Ghostscript.
            return Image.open(stream, formats=_PILLOW_FORMATS)
        except Image.DecompressionBombError as error:
            remedy = "cut it into tiles"
            raise UserError("The picture is too large to be safe", file=path, found=error, remedy=remedy) from error
        except Image.UnidentifiedImageError as error:
            if path.suffix.lower() in (".tif", ".tiff"):
                return None
            raise ValueError(f"not a complete {', '.join(_PILLOW_FORMATS)}") from error


def _pages(image: Image.Image, frames: int) -> Iterator[None]:
    for index in range(frames):
        yield image.seek(index)


def _pixels(image: Image.Image, role: Role, path: Path) -> np.ndarray:
    """One decoded frame -> [h, w, c]."""
    decoder, rawmode, maxval = _decoder(image)
    if ";16" in rawmode and not image.mode.startswith("I"):
        remedy = "save it as 16-bit TIFF (nothing is lost) or as 8-bit PNG"
        raise UserError(
            "16-bit colour would be cut to 8 bits", file=path, found=rawmode, expected="8 bits", remedy=remedy
        )
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "P":
        return _palette(image, role)
    if image.mode in ("CMYK", "YCbCr"):
        image = image.convert("RGB")
    if image.mode not in ("1", "L", "LA", "RGB", "RGBA", "I", "F") and not image.mode.startswith("I;16"):
        raise UserError(
            "Unknown kind of picture", file=path, found=f"mode {image.mode}", remedy="save it as RGB or grey"
        )
    pixels = np.atleast_3d(np.array(image))  # [h, w, c]
    if image.mode in ("LA", "RGBA"):
        pixels, alpha = pixels[..., :-1], pixels[..., -1]
        if role == "label" and np.ptp(alpha) > 0 and np.ptp(pixels.reshape(-1, pixels.shape[-1]), axis=0).max() == 0:
            found, remedy = "one colour, several degrees of transparency", "save the mask as black and white"
            raise UserError("The mask is drawn in transparency", file=path, found=found, remedy=remedy)
    if decoder.startswith("ppm") and maxval:
        # Pillow stretches PNM values to its own full range; the file's numbers come back exactly.
        pixels = np.rint(pixels * (maxval / (65535 if image.mode == "I" else 255))).astype(np.uint16)
        pixels = pixels.astype(np.uint8) if maxval < 256 else pixels
    return pixels.astype(np.uint16) if rawmode == "I;16B" else pixels


def _decoder(image: Image.Image) -> tuple[str, str, int]:
    """Pillow's decoder, its raw pixel layout and, for PNM files, the largest value: known only before decoding."""
    tiles = getattr(image, "tile", [])
    if not tiles:
        return "", "", 0
    decoder, _, _, args = tiles[0]
    parts = args if isinstance(args, tuple) else (args,)
    return decoder, str(parts[0] if parts else ""), int(parts[1]) if decoder.startswith("ppm") and len(parts) > 1 else 0


def _palette(image: Image.Image, role: Role) -> np.ndarray:
    """Palette picture -> colours [h, w, 3], brightness [h, w, 1] if the palette is grey, or the index (labels)."""
    palette = np.zeros((256, 3), np.uint8)
    stored = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)  # [n, 3]
    palette[: len(stored)] = stored
    index = np.array(image)  # [h, w]
    grey = bool((palette == palette[:, :1]).all())
    inverted = grey and palette[0, 0] == palette[:, 0].max() and palette[0, 0] > palette[: len(stored), 0].min()
    if role == "label" and not inverted:
        return index[..., None]
    return palette[index][..., : 1 if grey else 3]


def _beyond_pillow(image: Image.Image, frames: int) -> bool:
    """TIFFs that Pillow would cut to 8 bits, or whose pages mean more than depth."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    bits = np.atleast_1d(tags.get(258, 8))
    kinds = np.atleast_1d(tags.get(339, 1))
    text = str(tags.get(270, ""))
    several_axes = frames > 1 and (text.lstrip().endswith("OME>") or re.search(r"^channels=", text, re.MULTILINE))
    return bool(
        (bits.max() > 8 and len(bits) > 1) or (bits.max() > 32) or (bits.max() == 32 and 1 in kinds) or several_axes
    )


def _read_tifffile(path: Path) -> np.ndarray:
    """The TIFFs that Pillow cannot read: 16-bit and float colour, float64, uint32, BigTIFF, OME, ImageJ hyperstacks."""
    try:
        import tifffile
    except ImportError as error:
        remedy = "pip install 'medseg-jax[io]', or save it as 8-bit colour, 16-bit grey or NIfTI"
        raise UserError("This kind of TIFF needs tifffile", file=path, remedy=remedy) from error
    with tifffile.TiffFile(path) as tiff:
        series = tiff.series[0]
        orientation = int(tiff.pages.first.tags.valueof("Orientation", 1))
        if orientation != 1:
            raise UserError("Rotated TIFF of an unusual kind", file=path, found=f"orientation {orientation}")
        check_declared(path, int(np.prod(series.shape, dtype=object)) * series.dtype.itemsize, zipped=True)
        array, axes = series.asarray(), series.axes
    channel = next((i for i, axis in enumerate(axes) if axis in "SC" and array.shape[i] > 1), None)
    if channel is not None:
        array = np.moveaxis(array, channel, -1)
    shape = [n for i, n in enumerate(series.shape) if i != channel and (n > 1 or axes[i] in "YX")]
    if len(shape) not in (2, 3):
        raise UserError("Too many axes", file=path, found=f"{axes} {series.shape}", expected="(z,) y, x and channels")
    array = array.reshape(*shape, -1)  # [*s, c]
    alpha = axes[-1:] == "S" and array.shape[-1] in (2, 4)
    return array[..., :-1] if alpha else array


def picture_pages(path: Path, array: np.ndarray, geometry: Geometry) -> list[Image.Image]:
    """[*s] or [*s, c] as one picture, or one per slice of a volume (TIFF); an error where values would be lost."""
    ending = path.suffix.lower()
    colour = array.ndim > len(geometry.shape)
    if colour and array.shape[-1] == 1:
        array, colour = array[..., 0], False  # [*s]
    wide = array.dtype == np.uint16 and not colour and ending in (".png", ".tif", ".tiff", ".ppm", ".pgm")
    real = array.dtype == np.float32 and not colour and ending in (".tif", ".tiff")
    stack = len(geometry.shape) == 3
    fits = (array.dtype == np.uint8 or wide or real) and not (colour and array.shape[-1] != 3)
    if not fits or (stack and ending not in (".tif", ".tiff")):
        found = f"{array.dtype} {list(array.shape)}"
        expected = "a uint8 (grey or RGB) or uint16 (grey) picture"
        remedy = "write .nii.gz for volumes, .npz for anything else"
        raise UserError(f"{ending} cannot hold this array", file=path, found=found, expected=expected, remedy=remedy)
    return [Image.fromarray(page) for page in (array if stack else array[None])]


def write_picture(path: Path, pages: list[Image.Image]) -> None:
    """Writes one picture, or the pages of a TIFF (deflated); JPEG at a quality of 95."""
    options: dict[str, Any] = {}
    if path.suffix.lower() in (".jpg", ".jpeg"):
        options = {"quality": 95, "subsampling": 0}
    if path.suffix.lower() in (".tif", ".tiff"):
        options = {"compression": "tiff_adobe_deflate", "save_all": True, "append_images": pages[1:]}
    pages[0].save(path, **options)

"""Reading and writing images and label maps: NIfTI, NRRD, MetaImage, pictures (PNG, TIFF, JPEG ...), NPY, NPZ, HDF5.

What an array means:

* An image is [*s, c], a label map [*s]; *s is (rows, columns) for a picture and the file's own axis order for a volume.
  NIfTI, NRRD and MetaImage are read as stored, [i, j, k]; a fourth axis holds channels. NPY, NPZ, HDF5 and multi-page
  TIFF hold [h, w], [d, h, w], [d, h, w, c], or [h, w, c] if the last of three axes is at most 4 and the shortest.
* The affine maps array index to RAS+ millimetres. Bare arrays may carry `affine` (4 x 4) or `spacing`; without either a
  volume [d, h, w] is taken to point S, A, R (canonical order, so nothing is turned) and the unit is "px".
* Pictures are read as a person sees them: EXIF rotation is applied, palettes become colour, transparency is dropped
  (the colour underneath is kept, composited on nothing). A 1-bit picture holds 0 and 1.
* Label maps hold raw numbers. In a palette file that is the palette's index, whatever colour it is painted in; except
  in an inverted grey palette (grey throughout, index 0 the brightest), where it is the brightness a person sees. Grey
  stored as RGB is one channel; real colours are refused: only the user knows which colour is which class.

Each file is checked before memory is set aside for what it declares. Nothing in a file is ever executed: no pickles, no
external links, no format but the ones above. What cannot be read raises `UserError` with the file's name.
"""

import os
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal

import h5py
import numpy as np
from PIL import Image, ImageOps

from medseg_jax.data.dicom import is_dicom, read_series
from medseg_jax.data.metaimage import read_metaimage, write_metaimage
from medseg_jax.data.nifti import read_nifti, write_nifti
from medseg_jax.data.nrrd import read_nrrd, write_nrrd
from medseg_jax.data.raw import LARGEST_RATIO, check_declared
from medseg_jax.types import Geometry, UserError

SUFFIXES: dict[str, str] = {
    ".nii": "nifti",
    ".nii.gz": "nifti",
    ".nrrd": "nrrd",
    ".nhdr": "nrrd",
    ".mha": "metaimage",
    ".mhd": "metaimage",
    ".png": "picture",
    ".jpg": "picture",
    ".jpeg": "picture",
    ".tif": "picture",
    ".tiff": "picture",
    ".bmp": "picture",
    ".gif": "picture",
    ".ppm": "picture",
    ".pgm": "picture",
    ".npy": "npy",
    ".npz": "npz",
    ".h5": "hdf5",
    ".hdf5": "hdf5",
}
"""Readable suffixes (lower case) and the reader behind each."""

PLACED = ("nifti", "nrrd", "metaimage", "dicom")
"""Readers of files that say where their voxels lie."""

DETACHED = {".nhdr": ".nrrd", ".mhd": ".mha"}
"""Headers whose voxels lie in a file beside them -> what is written instead: one file is there as a whole or not."""

_PILLOW_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "PPM")

type Role = Literal["image", "label"]


# ---------------------------------------------------------------------------------------------------------------- names


def suffix(path: str | Path) -> str:
    """The file's suffix in lower case, ".nii.gz" counted as one."""
    name = Path(path).name.lower()
    return ".nii.gz" if name.endswith(".nii.gz") else Path(name).suffix


def stem(path: str | Path) -> str:
    """The file's name without folder and suffix: "a/im0001.vk.ppm" -> "im0001.vk", "b.nii.gz" -> "b"."""
    name = Path(path).name
    return name[: len(name) - len(suffix(path))]


def kind(path: str | Path) -> str | None:
    """The reader behind a path: that of its suffix, "dicom" for a series (its folder, or one of its files), or None."""
    path = Path(path)
    known = None if path.is_dir() else SUFFIXES.get(suffix(path))
    return known or ("dicom" if is_dicom(path) else None)


def list_files(folder: str | Path) -> list[Path]:
    """The readable, visible files (but not DICOM, whose files are slices) directly in `folder`, sorted by name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("No such folder", file=folder, remedy="check the path")
    return sorted(p for p in folder.iterdir() if suffix(p) in SUFFIXES and not p.name.startswith(".") and p.is_file())


# --------------------------------------------------------------------------------------------------- the four functions


def read_image(path: str | Path, key: str | None = None) -> tuple[np.ndarray, Geometry]:
    """Image [*s, c] in the file's integer type, or float32 if it holds fractions or a NIfTI scale factor.

    Args:
        path: a file; for a DICOM series its folder or one of its files.
        key: name of the array in an NPZ or HDF5 file; by default "image", or the file's only array.

    NaN and infinity are passed on as they are: `data.verify` reports them.
    """
    return _read(Path(path), "image", key)


def read_label(path: str | Path, key: str | None = None) -> tuple[np.ndarray, Geometry]:
    """Label map [*s], uint8 (or uint16 if a value exceeds 255).

    Args:
        key: name of the array in an NPZ or HDF5 file; by default "label", or the file's only array.

    Raises:
        UserError: also for fractions, negative or non-finite values, values above 65535 and colours.
    """
    values, geometry = _read(Path(path), "label", key)
    return _label_values(_grey(values, Path(path)), Path(path)), geometry


def _read(path: Path, role: Role, key: str | None) -> tuple[np.ndarray, Geometry]:
    """Any file -> array [*s, c] of numbers in this machine's byte order, and where it lies."""
    if role == "image" and kind(path) == "dicom":
        return read_series(path)
    with _reading(path), np.errstate(over="ignore", invalid="ignore"):
        match SUFFIXES[suffix(path)]:
            case "nifti":
                array, geometry = read_nifti(path)
            case "nrrd":
                array, geometry = read_nrrd(path)
            case "metaimage":
                array, geometry = read_metaimage(path)
            case "picture":
                array, geometry = _bare_geometry(_read_picture(path, role), None)
            case "npy":
                array, geometry = _bare_geometry(*_read_npy(path, role))
            case "npz":
                array, geometry = _bare_geometry(*_read_npz(path, role, key))
            case _:
                array, geometry = _bare_geometry(*_read_hdf5(path, role, key))
        return _native(array, path), geometry


def write_image(path: str | Path, image: np.ndarray, geometry: Geometry) -> None:
    """Write [*s, c] without loss (JPEG excepted), completely or not at all.

    NIfTI, NRRD, MetaImage, NPZ and HDF5 keep the affine; pictures, TIFF stacks and NPY have no place for it.
    """
    path = Path(path)
    if image.shape[:-1] != tuple(geometry.shape):
        raise ValueError(f"image {image.shape} does not lie in a space of shape {geometry.shape}")
    image = image.astype(np.uint8) if image.dtype == bool else image
    image = image.astype(np.float32, copy=False) if image.dtype.kind == "f" else image
    _write(path, image, geometry, "image")


def write_label(path: str | Path, label: np.ndarray, geometry: Geometry) -> None:
    """Write a label map [*s] as uint8, or uint16 if a value exceeds 255, completely or not at all.

    A file of the format that `geometry` was read from gets the header that came with it. In NIfTI, sform, qform and
    their codes, spacing, units and description stay; data type and scale factors become the label map's.
    """
    path = Path(path)
    if label.shape != tuple(geometry.shape):
        raise ValueError(f"label map {label.shape} does not lie in a space of shape {geometry.shape}")
    if suffix(path) in (".jpg", ".jpeg"):
        raise UserError("JPEG changes label values", file=path, expected="a lossless format", remedy="write .png")
    _write(path, _label_values(label, path), geometry, "label")


def _write(path: Path, array: np.ndarray, geometry: Geometry, role: Role) -> None:
    if suffix(path) not in SUFFIXES:
        raise UserError("Unknown file format", file=path, found=suffix(path), expected=", ".join(SUFFIXES))
    if whole := DETACHED.get(suffix(path)):
        raise UserError("Header and voxels are written into one file", file=path, remedy=f"write {whole}")
    temporary = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        match SUFFIXES[suffix(path)]:
            case "nifti":
                write_nifti(temporary, array, geometry)
            case "nrrd":
                write_nrrd(temporary, array, geometry)
            case "metaimage":
                write_metaimage(temporary, array, geometry)
            case "picture":
                _write_picture(temporary, _picture_pages(path, array, geometry))
            case "npy":
                np.save(temporary, array, allow_pickle=False)
            case "npz":
                np.savez_compressed(temporary, allow_pickle=False, **_named(array, geometry, role))
            case _:
                with h5py.File(temporary, "w") as file:
                    for name, value in _named(array, geometry, role).items():
                        file.create_dataset(name, data=value, compression="gzip")
        os.replace(temporary, path)
    except OSError as error:
        remedy = "check the disk's free space and the folder's permissions"
        raise UserError("Cannot write the file", file=path, found=error, remedy=remedy) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a decoder throws at a damaged file into one `UserError` that names it."""
    if suffix(path) not in SUFFIXES:
        raise UserError("Unknown file format", file=path, found=suffix(path), expected=", ".join(SUFFIXES))
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise UserError("No such file", file=path, found=found, remedy="check the path")
    if path.stat().st_size == 0:
        raise UserError("The file is empty", file=path, found="0 bytes", remedy="copy or download it again")
    try:
        yield
    except UserError:
        raise
    # Decoders signal damage with a dozen undocumented types (SyntaxError, EOFError, struct.error, KeyError ...).
    except Exception as error:
        raise UserError(
            "The file cannot be read",
            file=path,
            found=f"{type(error).__name__}: {error}",
            expected=f"a complete {suffix(path)} file",
            remedy="copy or download it again; if it opens elsewhere, save it anew",
        ) from error


# -------------------------------------------------------------------------------------------------------- label values


def _grey(values: np.ndarray, path: Path) -> np.ndarray:
    """[*s, c] -> [*s]: all channels must say the same."""
    first = values[..., 0]
    if all(np.array_equal(first, values[..., i]) for i in range(1, values.shape[-1])):
        return first
    flat = values.reshape(-1, values.shape[-1])  # [n, c]
    flat = flat[(flat != flat[:, :1]).any(1)][:50_000]
    colours, counts = np.unique(flat, axis=0, return_counts=True)
    common = ", ".join(str(tuple(colours[i].tolist())) for i in np.argsort(-counts, kind="stable")[:6])
    raise UserError(
        "The label map has several channels that differ",
        file=path,
        found=f"colours such as {common}",
        expected="one number per voxel",
        remedy="medseg data convert SRC DST turns colours into classes",
    )


def _label_values(values: np.ndarray, path: Path) -> np.ndarray:
    """Any numeric array -> uint8 or uint16 if it holds labels, else an error that names what it holds."""
    remedy = "round or renumber the values, or read the file as an image"
    if values.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = np.rint(values)
            bad = ~(np.abs(values - whole) <= 1e-4)  # a float32 scale factor leaves 1e-7 of each value
        if bad.any():
            found = ", ".join(f"{v:g}" for v in np.unique(values[bad])[:5])
            raise UserError(
                "Labels must be whole numbers", file=path, found=found, expected="0, 1, 2, ...", remedy=remedy
            )
        values = whole
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        found = f"values {low} to {high}"
        raise UserError("Labels out of range", file=path, found=found, expected="0 to 65535", remedy=remedy)
    return np.ascontiguousarray(values, np.uint8 if high < 256 else np.uint16)


# ------------------------------------------------------------------------------------------------------------- pictures


def _read_picture(path: Path, role: Role) -> np.ndarray:
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
            if suffix(path) in (".tif", ".tiff"):
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


def _picture_pages(path: Path, array: np.ndarray, geometry: Geometry) -> list[Image.Image]:
    """[*s] or [*s, c] as one picture, or one per slice of a volume (TIFF); an error where values would be lost."""
    ending = suffix(path)
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


def _write_picture(path: Path, pages: list[Image.Image]) -> None:
    options: dict[str, Any] = {}
    if suffix(path) in (".jpg", ".jpeg"):
        options = {"quality": 95, "subsampling": 0}
    if suffix(path) in (".tif", ".tiff"):
        options = {"compression": "tiff_adobe_deflate", "save_all": True, "append_images": pages[1:]}
    pages[0].save(path, **options)


# ------------------------------------------------------------------------------------------------- NPY, NPZ and HDF5


def _read_npy(path: Path, role: Role) -> tuple[np.ndarray, None]:
    # A memory map fails on a file shorter than its header says, before anything is allocated.
    array = np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=10_000)
    return _with_channels(array, role, path), None


def _read_npz(path: Path, role: Role, key: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename[:-4]: entry for entry in archive.infolist() if entry.filename.endswith(".npy")}
        shapes = {}
        for name, entry in entries.items():
            with archive.open(entry) as stream:
                shape, dtype = _npy_header(stream, path)
            size = int(np.prod(shape, dtype=object)) * dtype.itemsize
            if dtype.hasobject or size > entry.file_size or size > 4096 + LARGEST_RATIO * entry.compress_size:
                _refuse_array(path, name, shape, dtype)
            shapes[name] = shape

        def load(name: str) -> np.ndarray:
            with archive.open(entries[name]) as stream:
                return np.lib.format.read_array(stream, allow_pickle=False)

        array = load(_choose(shapes, role, key, path))
        placed = _placement({name: load(name) for name in ("affine", "spacing") if name in shapes}, path)
    return _with_channels(array, role, path), placed


def _npy_header(stream: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise UserError("Not a plain array", file=path, found=f"npy version {version}", expected="numbers")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def _read_hdf5(path: Path, role: Role, key: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    with h5py.File(path, "r") as file:
        # Hard links only: soft and external ones may lead to other files of this machine.
        hard = [name for name in file if isinstance(file.get(name, getlink=True), h5py.HardLink)]
        found: dict[str, Any] = {str(name): file[name] for name in hard if isinstance(file[name], h5py.Dataset)}
        for name, data in found.items():
            size = int(np.prod(data.shape or (), dtype=object)) * data.dtype.itemsize
            bomb = size > (1 << 20) + LARGEST_RATIO * data.id.get_storage_size()
            if data.shape is None or data.dtype.hasobject or data.external or data.is_virtual or bomb:
                _refuse_array(path, name, data.shape, data.dtype)
        array = found[_choose({name: data.shape for name, data in found.items()}, role, key, path)][()]
        placed = _placement({name: found[name][()] for name in ("affine", "spacing") if name in found}, path)
    return _with_channels(array, role, path), placed


def _refuse_array(path: Path, name: str, shape: object, dtype: np.dtype) -> None:
    raise UserError(
        f"The array '{name}' is not plain numbers stored in this file",
        file=path,
        found=f"{dtype} {shape}",
        expected="integers or floats; no objects (they can run code), no links, nothing larger than the file can hold",
        remedy="save it anew with np.savez_compressed(file, image=..., label=...)",
    )


def _choose(shapes: Mapping[str, tuple[int, ...]], role: Role, key: str | None, path: Path) -> str:
    """The name of the array that is meant: the key, else the role's name, else the only array with two axes or more."""
    other = "label" if role == "image" else "image"
    arrays = [name for name, shape in shapes.items() if len(shape) >= 2 and name not in ("affine", "spacing")]
    wanted = key or (role if role in arrays or len(arrays) != 1 else arrays[0])
    if wanted not in arrays or (key is None and wanted == other):
        found = ", ".join(f"{name} {list(shapes[name])}" for name in arrays) or "no array"
        remedy = "name the arrays 'image' and 'label', or give the key"
        raise UserError(
            f"No array '{key or role}' in the file", file=path, found=found, expected=key or role, remedy=remedy
        )
    return wanted


def _with_channels(array: np.ndarray, role: Role, path: Path) -> np.ndarray:
    """Bare array -> [*s, c]; see the top of this file for which axis is which."""
    shape = array.shape
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3:
        limit = 4 if role == "image" else 1  # a label map has no channels; a thin volume is still one
        array = array if shape[-1] <= limit and shape[-1] < min(shape[:2]) else array[..., None]
    elif array.ndim != 4 or shape[-1] > min(shape[1:3]):
        expected = "[h, w], [h, w, c], [d, h, w] or [d, h, w, c]"
        remedy = "move the channels to the end (np.moveaxis)"
        raise UserError("Axes cannot be told apart", file=path, found=list(shape), expected=expected, remedy=remedy)
    return array


def _placement(found: Mapping[str, np.ndarray], path: Path) -> np.ndarray | None:
    """`affine` [4, 4] or `spacing` [n] as stored beside an array, checked."""
    for name, value in found.items():
        value = np.asarray(value, np.float64)
        valid = np.isfinite(value).all() and (
            (value.shape == (4, 4) and abs(np.linalg.det(value[:3, :3])) > 1e-9)
            if name == "affine"
            else (value.shape in ((2,), (3,)) and (value > 0).all())
        )
        if not valid:
            expected = "an invertible 4 x 4 matrix" if name == "affine" else "2 or 3 positive numbers"
            raise UserError(f"The {name} makes no sense", file=path, found=value.tolist(), expected=expected)
        return value
    return None


def _bare_geometry(array: np.ndarray, placed: np.ndarray | None) -> tuple[np.ndarray, Geometry]:
    """Array [*s, c] with the affine of a file that is not NIfTI: given, from the spacing, or one unit per voxel."""
    rank = array.ndim - 1
    if placed is not None and placed.ndim == 2:
        return array, Geometry(array.shape[:-1], placed, "mm")
    spacing = np.ones(rank) if placed is None or len(placed) != rank else placed
    affine = np.eye(4)
    affine[:rank, :rank] = np.diag(spacing) if rank == 2 else np.diag(spacing)[::-1]
    return array, Geometry(array.shape[:-1], affine, "px" if placed is None else "mm")


def _named(array: np.ndarray, geometry: Geometry, role: Role) -> dict[str, np.ndarray]:
    return {role: array} | ({"affine": geometry.affine} if geometry.unit == "mm" else {})


def _native(array: np.ndarray, path: Path) -> np.ndarray:
    """Numbers in this machine's byte order: integers as they are, bool as uint8, every float as float32."""
    if array.dtype.kind not in "biuf" or array.size == 0:
        found = f"{array.dtype} {list(array.shape)}"
        raise UserError("Not an array of numbers", file=path, found=found, expected="at least one integer or float")
    kind = (
        np.uint8
        if array.dtype.kind == "b"
        else np.float32
        if array.dtype.kind == "f"
        else array.dtype.newbyteorder("=")
    )
    return np.asarray(array.astype(kind, copy=isinstance(array, np.memmap)))

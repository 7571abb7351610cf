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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import h5py
import numpy as np

from medseg_jax.data.arrays import Role, bare_geometry, named, read_hdf5, read_npy, read_npz
from medseg_jax.data.dicom import is_dicom, read_series
from medseg_jax.data.metaimage import read_metaimage, write_metaimage
from medseg_jax.data.nifti import read_nifti, write_nifti
from medseg_jax.data.nrrd import read_nrrd, write_nrrd
from medseg_jax.data.pictures import picture_pages, read_picture, write_picture
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
                array, geometry = bare_geometry(read_picture(path, role), None)
            case "npy":
                array, geometry = bare_geometry(*read_npy(path, role))
            case "npz":
                array, geometry = bare_geometry(*read_npz(path, role, key))
            case _:
                array, geometry = bare_geometry(*read_hdf5(path, role, key))
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
                write_picture(temporary, picture_pages(path, array, geometry))
            case "npy":
                np.save(temporary, array, allow_pickle=False)
            case "npz":
                np.savez_compressed(temporary, allow_pickle=False, **named(array, geometry, role))
            case _:
                with h5py.File(temporary, "w") as file:
                    for name, value in named(array, geometry, role).items():
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

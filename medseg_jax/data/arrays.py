"""Arrays in NPY, NPZ and HDF5 files: which one is meant, which axis is which, where it lies. Part of io.py."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, Literal

import h5py
import numpy as np

from medseg_jax.data.raw import LARGEST_RATIO
from medseg_jax.types import Geometry, UserError

type Role = Literal["image", "label"]


def read_npy(path: Path, role: Role) -> tuple[np.ndarray, None]:
    """Array [*s, c]; such a file says nothing of where it lies."""
    # A memory map fails on a file shorter than its header says, before anything is allocated.
    array = np.load(path, mmap_mode="r", allow_pickle=False, max_header_size=10_000)
    return _with_channels(array, role, path), None


def read_npz(path: Path, role: Role, key: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Array [*s, c] of that key or role, and the `affine` [4, 4] or `spacing` [n] beside it."""
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
    return _placed(_with_channels(array, role, path), placed, path)


def _npy_header(stream: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    if version not in ((1, 0), (2, 0)):
        raise UserError("Not a plain array", file=path, found=f"npy version {version}", expected="numbers")
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(stream)
    return shape, dtype


def read_hdf5(path: Path, role: Role, key: str | None) -> tuple[np.ndarray, np.ndarray | None]:
    """As `read_npz`; links out of the file are not followed."""
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
    return _placed(_with_channels(array, role, path), placed, path)


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
    """Bare array -> [*s, c]; see io.py for which axis is which."""
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


def _placed(array: np.ndarray, placed: np.ndarray | None, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Both as they are; refuses a spacing that has not one number for each axis of [*s, c]: which is whose?"""
    rank = array.ndim - 1
    if placed is not None and placed.ndim == 1 and len(placed) != rank:
        raise UserError(
            "The spacing does not fit the array",
            file=path,
            found=f"spacing {placed.tolist()}, array {list(array.shape[:-1])}",
            expected=f"{rank} numbers",
            remedy="store one number for each axis, in their order (channels have none)",
        )
    return array, placed


def bare_geometry(array: np.ndarray, placed: np.ndarray | None) -> tuple[np.ndarray, Geometry]:
    """Array [*s, c] with the affine of a file that is not NIfTI: given, from the spacing, or one unit per voxel."""
    rank = array.ndim - 1
    if placed is not None and placed.ndim == 2:
        return array, Geometry(array.shape[:-1], placed, "mm")
    spacing = np.ones(rank) if placed is None else placed
    affine = np.eye(4)
    affine[:rank, :rank] = np.diag(spacing) if rank == 2 else np.diag(spacing)[::-1]
    return array, Geometry(array.shape[:-1], affine, "px" if placed is None else "mm")


def named(array: np.ndarray, geometry: Geometry, role: Role) -> dict[str, np.ndarray]:
    """What an NPZ or HDF5 file holds: the array under its role's name, and the affine if it is in millimetres."""
    return {role: array} | ({"affine": geometry.affine} if geometry.unit == "mm" else {})

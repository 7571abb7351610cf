"""What the readers of volume files share: how much a file can hold, reading it, its detached data file, its affine."""

from io import BufferedIOBase
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import BinaryIO

import numpy as np

from medseg_jax.types import UserError

LARGEST_RATIO = 1032
"""Deflate cannot shrink data further: a file that declares more than this times its own size is damaged or hostile."""

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def check_declared(path: Path, declared: int, zipped: bool) -> None:
    """Refuse a header that promises more than the file can hold, before any memory is set aside."""
    held = path.stat().st_size
    if declared > held * (LARGEST_RATIO if zipped else 1):
        raise UserError(
            "The file is cut short, or its header is damaged",
            file=path,
            found=f"{held:,} bytes",
            expected=f"{declared:,} bytes{' after unpacking' if zipped else ''}, from the header",
            remedy="copy or download it again",
        )


def read_exactly(stream: BufferedIOBase | BinaryIO, size: int, path: Path) -> np.ndarray:
    """`size` bytes as uint8; memory is touched only as data arrives."""
    data = np.empty(size, np.uint8)
    done, view = 0, memoryview(data)
    while done < size:
        count = stream.readinto(view[done : done + (1 << 22)])  # pyright: ignore[reportAttributeAccessIssue]
        if not count:
            raise cut_short(path, done, size)
        done += count
    while stream.read(1 << 20):  # to the end: gzip compares its checksum only there
        pass
    return data


def cut_short(path: Path, found: int, expected: int) -> UserError:
    """The error for a file with fewer voxels than its header declares."""
    remedy = "copy or download it again"
    text = f"{found:,} bytes of voxels"
    return UserError("The file is cut short", file=path, found=text, expected=f"{expected:,} bytes", remedy=remedy)


def next_line(file: BinaryIO, path: Path) -> str | None:
    """The next line of a text header, or None at the end of the file; a header ends within 16 MiB."""
    line = file.readline(1 << 20)
    if len(line) == 1 << 20 or file.tell() > 1 << 24:
        raise UserError("The header has no end", file=path, expected="a text header of at most 16 MiB")
    return line.decode("utf-8", "replace").rstrip("\r\n") if line else None


def detached(header: Path, name: str) -> Path:
    """The data file that a header names; it must lie in the header's folder or below.

    Raises:
        UserError: an absolute path, one with "..", or no such file.
    """
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or PureWindowsPath(name).drive or ".." in path.parts or "\0" in name:
        raise UserError(
            "The header points to a data file outside its folder",
            file=header,
            found=name[:200],
            expected="the name of a file beside the header",
            remedy="put header and data into one folder and write the bare name into the header",
        )
    file = header.parent / path
    if not file.is_file():
        remedy = "copy the data file beside its header"
        raise UserError("The data file is not there", file=header, found=name[:200], expected=file, remedy=remedy)
    return file


def check_sizes(sizes: list[int], path: Path) -> None:
    """Refuse axes that no image has."""
    if not 2 <= len(sizes) <= 5 or min(sizes) < 1:
        expected = "2 to 5 axes of at least one voxel"
        raise UserError("The header declares impossible dimensions", file=path, found=sizes, expected=expected)


def check_affine(affine: np.ndarray, rank: int, path: Path, used: str) -> None:
    """Refuse an affine whose first `rank` columns do not span a space."""
    columns = affine[:3, :rank]
    length = np.linalg.norm(columns, axis=0)
    if not np.isfinite(affine).all() or length.min() < 1e-6 or np.linalg.svd(columns / length)[1].min() < 1e-3:
        found = np.array2string(affine[:3], precision=3, separator=", ").replace("\n", "")
        remedy = "repair it, for instance with `nib.Nifti1Image(data, affine).to_filename(...)`"
        raise UserError(
            "The affine is singular", file=path, found=found, expected=f"an invertible {used}", remedy=remedy
        )


def placed(columns: np.ndarray, origin: np.ndarray) -> np.ndarray:
    """4 x 4 affine of the directions [3 or 2, rank] and origin; a plane in space gets its normal as third column."""
    affine = np.eye(4)
    dimension, rank = columns.shape
    affine[:dimension, :rank] = columns
    affine[:dimension, 3] = origin
    if (dimension, rank) == (3, 2):
        normal = np.cross(columns[:, 0], columns[:, 1])
        affine[:3, 2] = normal / max(float(np.linalg.norm(normal)), 1e-12)
    return affine


def channels_last(data: np.ndarray, rank: int, channel: int | None, path: Path) -> np.ndarray:
    """Array with its axis `channel` moved to the end (added if None) -> [*s, c] with `rank` axes in s."""
    data = data[..., None] if channel is None else np.moveaxis(data, channel, -1)
    if data.ndim - 1 != rank or rank not in (2, 3):
        expected, remedy = "[x, y], [x, y, z] and one axis of channels at most", "split the file"
        raise UserError("Too many axes", file=path, found=list(data.shape), expected=expected, remedy=remedy)
    return data

"""NRRD: .nrrd, and .nhdr with its data in a file beside it. The writer keeps the fields that the reader found.

Format: teem.sourceforge.net/nrrd/format.html. The first axis is the fastest: an array is [i, j, k] as in NIfTI. The one
axis without a direction in space (or with a kind such as "vector") holds the channels, wherever it stands.

Where it lies: RAS, LAS and LPS are brought to RAS. "scanner-xyz" and files that name no space count as LPS, which is
what ITK (and so 3D Slicer, which writes most NRRD files) takes them for.
"""

import gzip
import re
from collections.abc import Mapping
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from medseg_jax.data.raw import (
    channels_last,
    check_affine,
    check_declared,
    check_sizes,
    cut_short,
    detached,
    next_line,
    placed,
    read_exactly,
)
from medseg_jax.types import Geometry, UserError

TYPES = {
    name: kind
    for kind, names in {
        "i1": ("signed char", "int8", "int8_t"),
        "u1": ("uchar", "unsigned char", "uint8", "uint8_t"),
        "i2": ("short", "short int", "signed short", "signed short int", "int16", "int16_t"),
        "u2": ("ushort", "unsigned short", "unsigned short int", "uint16", "uint16_t"),
        "i4": ("int", "signed int", "int32", "int32_t"),
        "u4": ("uint", "unsigned int", "uint32", "uint32_t"),
        "i8": ("longlong", "long long", "long long int", "signed long long", "int64", "int64_t"),
        "u8": ("ulonglong", "unsigned long long", "unsigned long long int", "uint64", "uint64_t"),
        "f4": ("float",),
        "f8": ("double",),
    }.items()
    for name in names
}

SPACES = {
    "right-anterior-superior": (1, 1, 1),
    "ras": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "las": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
    "lps": (-1, -1, 1),
    "scanner-xyz": (-1, -1, 1),
    "3d-right-handed": (-1, -1, 1),
    "3d-left-handed": (-1, -1, 1),
    "": (-1, -1, 1),
}
"""Signs that bring each space's axes to R, A, S."""

SPATIAL_KINDS = ("domain", "space", "???", "none")
PER_AXIS = (
    *("sizes", "spacings", "thicknesses", "axis mins", "axismins", "axis maxs", "axismaxs", "centers", "centerings"),
    *("kinds", "labels", "units", "space directions"),
)
OF_THE_DATA = (
    *("type", "dimension", "sizes", "endian", "encoding", "data file", "datafile", "block size", "blocksize"),
    *("line skip", "lineskip", "byte skip", "byteskip", "min", "max", "old min", "oldmin", "old max", "oldmax"),
)


@dataclass(frozen=True)
class NrrdHeader:
    """What a file says beside its voxels.

    Attributes:
        fields: name in lower case -> text, in the file's order.
        pairs: lines "key:=value".
        channel: the axis that holds the channels, or None.
        affine: of the geometry that the fields describe.
    """

    fields: Mapping[str, str]
    pairs: tuple[str, ...]
    channel: int | None
    affine: np.ndarray


# -------------------------------------------------------------------------------------------------------------- reading


def read_nrrd(path: Path) -> tuple[np.ndarray, Geometry]:
    """Voxels [*s, c] as stored and where they lie.

    Raises:
        UserError: whatever is wrong with header, length or affine; decoders' own errors on damaged gzip data pass.
    """
    with path.open("rb") as file:
        fields, pairs = _read_fields(file, path)
        sizes = [int(size) for size in _field(fields, "sizes", path).split()]
        check_sizes(sizes, path)
        if len(sizes) != int(fields.get("dimension", len(sizes))):
            raise UserError("The header contradicts itself", file=path, found=f"dimension, sizes {sizes}")
        name = fields.get("data file", fields.get("datafile"))
        if name is None:
            flat = _read_voxels(file, fields, sizes, path)
        else:
            if name.split()[0] == "LIST" or re.search(r"%\d*d", name):
                remedy = "save it as one .nrrd"
                raise UserError("The data lie in several files", file=path, found=name[:200], remedy=remedy)
            beside = detached(path, name)
            with beside.open("rb") as stream:
                flat = _read_voxels(stream, fields, sizes, beside)
    channel = _channel_axis(fields, len(sizes), path)
    rank = len(sizes) - (channel is not None)
    data = channels_last(flat.reshape(sizes, order="F"), rank, channel, path)
    affine, unit = _affine(fields, rank, path)
    return data, Geometry(data.shape[:-1], affine, unit, NrrdHeader(fields, tuple(pairs), channel, affine))


def _read_fields(file: BinaryIO, path: Path) -> tuple[dict[str, str], list[str]]:
    """Header fields and key/value lines; leaves the file where its data begin."""
    if not re.fullmatch(r"NRRD000[1-5]", (next_line(file, path) or "").strip()):
        raise UserError("Not a NRRD file", file=path, found="another first line", expected="NRRD0001 to NRRD0005")
    fields: dict[str, str] = {}
    pairs: list[str] = []
    while line := next_line(file, path):
        if ":=" in line and ": " not in line.partition(":=")[0]:
            pairs.append(line)
        elif not line.startswith("#"):
            name, _, text = line.partition(":")
            fields[name.strip().lower()] = text.strip()
    return fields, pairs


def _field(fields: Mapping[str, str], name: str, path: Path) -> str:
    if not fields.get(name):
        raise UserError("The header lacks a field", file=path, found=", ".join(fields)[:300], expected=name)
    return fields[name]


def _read_voxels(file: BinaryIO, fields: Mapping[str, str], sizes: list[int], path: Path) -> np.ndarray:
    """The numbers in the file's order; `file` stands where they begin."""
    kind = TYPES.get(_field(fields, "type", path).lower())
    encoding = _field(fields, "encoding", path).lower()
    if kind is None or encoding not in ("raw", "gzip", "gz", "ascii", "text", "txt"):
        found = f"type {fields['type']}, encoding {encoding}"
        expected = "integers, float or double, in encoding raw, gzip or ascii"
        raise UserError("Unusual kind of NRRD", file=path, found=found, expected=expected, remedy="save it anew")
    dtype = np.dtype(kind)
    size = int(np.prod(sizes, dtype=object)) * dtype.itemsize
    for _ in range(_whole(fields, "line skip", path)):
        if not file.readline(1 << 20):
            raise cut_short(path, 0, size)
    skip = _whole(fields, "byte skip", path)
    if encoding in ("ascii", "text", "txt"):
        check_declared(path, 2 * (size // dtype.itemsize) - 1, zipped=False)  # a digit and a space each
        words = file.read().split()
        if len(words) < size // dtype.itemsize:
            raise cut_short(path, len(words) * dtype.itemsize, size)
        return np.array(words[: size // dtype.itemsize]).astype(dtype)
    if dtype.itemsize > 1:
        orders = {"little": "<", "big": ">"}
        dtype = np.dtype(orders[_field(fields, "endian", path).lower()] + kind)
    zipped = encoding in ("gzip", "gz")
    check_declared(path, max(skip, 0) + size, zipped)
    if skip < 0 and zipped:
        raise UserError("Unusual kind of NRRD", file=path, found="byte skip -1 with gzip", remedy="save it anew")
    if skip < 0:
        file.seek(-size, 2)
    stream = cast(BufferedIOBase, gzip.GzipFile(fileobj=file) if zipped else file)
    left = max(skip, 0)
    while left:
        if not (passed := stream.read(min(left, 1 << 20))):
            raise cut_short(path, 0, size)
        left -= len(passed)
    return read_exactly(stream, size, path).view(dtype)


def _whole(fields: Mapping[str, str], name: str, path: Path) -> int:
    number = int(fields.get(name, fields.get(name.replace(" ", ""), "0")))
    if not -1 <= number < 2**31 or (number < 0 and name == "line skip"):
        raise UserError(f"The header's {name} makes no sense", file=path, found=number)
    return number


def _tokens(text: str) -> list[str]:
    """Parts of a per-axis field: words, "quoted words" and (vectors)."""
    return re.findall(r'"(?:[^"\\]|\\.)*"|\([^)]*\)|[^\s()"]+', text)


def _vector(text: str, path: Path) -> list[float]:
    try:
        return [float(number) for number in text.strip("() ").split(",")]
    except ValueError as error:
        raise UserError("Not a vector", file=path, found=text[:80], expected="(x,y,z)") from error


def _channel_axis(fields: Mapping[str, str], rank: int, path: Path) -> int | None:
    """The axis that is none of space; without a word on that, the fourth axis as in NIfTI."""
    directions, kinds = _tokens(fields.get("space directions", "")), _tokens(fields.get("kinds", ""))
    for name, words in (("space directions", directions), ("kinds", kinds)):
        if words and len(words) != rank:
            raise UserError(f"{name} has not one entry for each axis", file=path, found=fields[name][:200])
    if directions:
        found = [axis for axis, word in enumerate(directions) if word == "none"]
    else:
        found = [axis for axis, word in enumerate(kinds) if word.lower() not in SPATIAL_KINDS]
    if len(found) > 1:
        raise UserError(
            "Too many axes that are not space", file=path, found=fields.get("kinds", "")[:200], expected="one at most"
        )
    return found[0] if found else 3 if rank == 4 else None


def _affine(fields: Mapping[str, str], rank: int, path: Path) -> tuple[np.ndarray, str]:
    """4 x 4 index -> RAS millimetres, and the unit ("px" where nothing is said about size)."""
    space = fields.get("space", "").lower()
    if space not in SPACES:
        expected = "right-anterior-superior, left-anterior-superior or left-posterior-superior"
        raise UserError("Unknown space", file=path, found=space[:80], expected=expected, remedy="save it as NIfTI")
    vectors = [_vector(word, path) for word in _tokens(fields.get("space directions", "")) if word != "none"]
    if vectors:
        if len(vectors) != rank or len({len(vector) for vector in vectors}) != 1 or len(vectors[0]) not in (2, 3):
            raise UserError("The directions make no sense", file=path, found=fields["space directions"][:200])
        columns = np.array(vectors).T  # [3 or 2, rank]
    else:
        words = [float(word) for word in _tokens(fields.get("spacings", ""))]
        sizes = [word for word in words if not np.isnan(word)] if len(words) > rank else words
        if sizes and (len(sizes) != rank or not min(sizes) > 0):
            raise UserError("Impossible voxel size", file=path, found=fields["spacings"][:80], expected="positive")
        columns = np.diag(sizes or [1.0] * rank)
    origin = np.zeros(len(columns))
    if "space origin" in fields:
        origin = np.array(_vector(fields["space origin"], path))
        if origin.shape != (len(columns),):
            raise UserError("The origin makes no sense", file=path, found=fields["space origin"][:80])
    signs = np.array(SPACES[space][: len(columns)])
    affine = placed(columns * signs[:, None], origin * signs)
    units = {word.strip('"').lower() for word in _tokens(fields.get("space units", ""))}
    affine[:3] *= {"m": 1000.0, "cm": 10.0, "um": 1e-3, "µm": 1e-3}.get(units.pop(), 1.0) if len(units) == 1 else 1.0
    check_affine(affine, rank, path, "matrix of space directions")
    return affine, "mm" if vectors or fields.get("spacings") else "px"


# -------------------------------------------------------------------------------------------------------------- writing


def write_nrrd(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write a label map [*s] or an image [*s, c] under the header that came with `geometry`."""
    rank, header = len(geometry.shape), geometry.header
    channels = array.ndim > rank and array.shape[-1] > 1
    array = array if array.ndim == rank or channels else array[..., 0]
    kept = isinstance(header, NrrdHeader) and np.allclose(header.affine, geometry.affine, rtol=1e-6, atol=1e-6)
    if not (isinstance(header, NrrdHeader) and kept):
        header = _new_header(geometry)
    axis = header.channel or 0
    fields = _fit_axes(header, rank, axis if channels else None)
    array = np.moveaxis(array, -1, axis) if channels else array  # [.., c, ..] as in the file
    array = array.astype(np.dtype(array.dtype.str.replace(">", "<")))
    names = {"<" + kind: name for name, kind in reversed(TYPES.items())}
    lines = [
        "NRRD0005",
        f"type: {names[array.dtype.str.replace('|', '<')]}",
        f"dimension: {array.ndim}",
        f"sizes: {' '.join(map(str, array.shape))}",
        "endian: little",
        "encoding: gzip",
        *(f"{name}: {text}" for name, text in fields.items() if name not in OF_THE_DATA),
        *header.pairs,
    ]
    with path.open("wb") as file:
        file.write(("\n".join(lines) + "\n\n").encode())
        _write_zipped(file, array)


def _write_zipped(file: BinaryIO, array: np.ndarray) -> None:
    # No name, no time, so that equal arrays give equal files.
    with gzip.GzipFile("", "wb", 3, file, mtime=0) as stream:
        for i in range(array.shape[-1]):  # in the file the last axis is the slowest
            stream.write(array[..., i].tobytes(order="F"))


def _new_header(geometry: Geometry) -> NrrdHeader:
    """LPS, as ITK and 3D Slicer write it."""
    rank = len(geometry.shape)
    lps = np.diag([-1.0, -1, 1, 1]) @ geometry.affine + 0.0  # no negative zeros
    vectors = [f"({','.join(repr(float(v)) for v in lps[:3, axis])})" for axis in range(rank)]
    fields: dict[str, Any] = {
        "space": "left-posterior-superior",
        "space directions": " ".join(vectors),
        "kinds": " ".join(["domain"] * rank),
        "space origin": f"({','.join(repr(float(v)) for v in lps[:3, 3])})",
    }
    if geometry.unit == "mm":
        fields["space units"] = '"mm" "mm" "mm"'
    return NrrdHeader(fields, (), None, geometry.affine)


def _fit_axes(header: NrrdHeader, rank: int, channel: int | None) -> dict[str, str]:
    """The fields with one entry per axis of the array to be written; one that cannot be fitted is left out."""
    blank = {"space directions": "none", "kinds": "vector", "labels": '""', "units": '""'}
    fields = dict(header.fields)
    for name in PER_AXIS:
        if name not in fields or name in OF_THE_DATA:
            continue
        words = _tokens(fields[name])
        if len(words) != rank + (header.channel is not None):
            del fields[name]
            continue
        if channel is None and header.channel is not None:
            del words[header.channel]
        elif channel is not None and header.channel is None:
            words.insert(channel, blank.get(name, "???" if name.startswith("center") else "NaN"))
        else:
            continue  # the text stays as it was
        fields[name] = " ".join(words)
    return fields

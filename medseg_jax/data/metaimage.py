"""MetaImage: .mha, and .mhd with its data in a file beside it. The writer keeps the fields that the reader found.

Format: itk.org/Wiki/MetaIO/Documentation. The first axis is the fastest: an array is [i, j, k] as in NIfTI. A file's
world is LPS; row i of TransformMatrix is the direction of axis i (ITK reads it so). Channels are a pixel's components
(ElementNumberOfChannels) or the fourth axis.
"""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from medseg_jax.data.raw import (
    LPS_TO_RAS,
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
    "MET_CHAR": "i1",
    "MET_UCHAR": "u1",
    "MET_SHORT": "i2",
    "MET_USHORT": "u2",
    "MET_INT": "i4",
    "MET_UINT": "u4",
    "MET_LONG": "i4",
    "MET_ULONG": "u4",
    "MET_LONG_LONG": "i8",
    "MET_ULONG_LONG": "u8",
    "MET_FLOAT": "f4",
    "MET_DOUBLE": "f8",
}

OF_THE_DATA = {
    *("objecttype", "ndims", "dimsize", "elementtype", "elementnumberofchannels", "binarydata", "headersize"),
    *("binarydatabyteordermsb", "elementbyteordermsb", "compresseddata", "compresseddatasize", "elementdatafile"),
    *("elementmin", "elementmax"),
}
PER_AXIS = {"offset", "position", "origin", "centerofrotation", "elementspacing", "elementsize"}
MATRIX = ("transformmatrix", "rotation", "orientation")


@dataclass(frozen=True)
class MetaHeader:
    """What a file says beside its voxels: (name, text) in its order, and the affine that these describe."""

    fields: tuple[tuple[str, str], ...]
    affine: np.ndarray


# -------------------------------------------------------------------------------------------------------------- reading


def read_metaimage(path: Path) -> tuple[np.ndarray, Geometry]:
    """Voxels [*s, c] as stored and where they lie.

    Raises:
        UserError: whatever is wrong with header, length or affine; zlib's own errors on damaged data pass.
    """
    with path.open("rb") as file:
        lines = _read_fields(file, path)
        fields = {name.lower(): text for name, text in lines}
        sizes = [int(size) for size in _field(fields, "dimsize", path).split()]
        check_sizes(sizes, path)
        if len(sizes) != int(_field(fields, "ndims", path)):
            raise UserError("The header contradicts itself", file=path, found=f"NDims, DimSize {sizes}")
        components = int(fields.get("elementnumberofchannels", "1"))
        if not 1 <= components <= 65535:
            raise UserError("The header declares impossible channels", file=path, found=components)
        sizes = [components, *sizes] if components > 1 else sizes
        name = fields["elementdatafile"]
        if name.upper() == "LOCAL":
            flat = _read_voxels(file, fields, sizes, path)
        elif name.split()[0].upper() == "LIST" or "%" in name:
            remedy = "save it as one .mha"
            raise UserError("The data lie in several files", file=path, found=name[:200], remedy=remedy)
        else:
            beside = detached(path, name)
            with beside.open("rb") as stream:
                flat = _read_voxels(stream, fields, sizes, beside)
    channel = 0 if components > 1 else 3 if len(sizes) == 4 else None
    rank = len(sizes) - (channel is not None)
    data = channels_last(flat.reshape(sizes, order="F"), rank, channel, path)
    affine, unit = _affine(fields, rank, path)
    return data, Geometry(data.shape[:-1], affine, unit, MetaHeader(tuple(lines), affine))


def _read_fields(file: BinaryIO, path: Path) -> list[tuple[str, str]]:
    """(name, text) up to ElementDataFile, after which the data begin."""
    fields = []
    while (line := next_line(file, path)) is not None:
        name, equals, text = line.partition("=")
        if not equals and line.strip():
            raise UserError("Not a MetaImage file", file=path, found=line[:60], expected="lines 'Name = value'")
        if equals:
            fields.append((name.strip(), text.strip()))
        if name.strip().lower() == "elementdatafile" and text.strip():
            return fields
    expected = "a header that ends in 'ElementDataFile = ...'"
    raise UserError("Not a MetaImage file", file=path, found="no ElementDataFile", expected=expected)


def _field(fields: Mapping[str, str], name: str, path: Path) -> str:
    if not fields.get(name):
        raise UserError("The header lacks a field", file=path, found=", ".join(fields)[:300], expected=name)
    return fields[name]


def _true(fields: Mapping[str, str], *names: str) -> bool:
    return any(fields.get(name, "").lower() in ("true", "1", "t") for name in names)


def _read_voxels(file: BinaryIO, fields: Mapping[str, str], sizes: list[int], path: Path) -> np.ndarray:
    """The numbers in the file's order; `file` stands where they begin."""
    kind = TYPES.get(_field(fields, "elementtype", path).upper().removesuffix("_ARRAY"))
    if kind is None or fields.get("binarydata", "True").lower() in ("false", "0", "f"):
        found = f"{fields['elementtype']}, BinaryData {fields.get('binarydata', 'True')}"
        expected = "binary integers, floats or doubles"
        raise UserError("Unusual kind of MetaImage", file=path, found=found, expected=expected, remedy="save it anew")
    big = _true(fields, "binarydatabyteordermsb", "elementbyteordermsb")
    dtype = np.dtype(kind).newbyteorder(">" if big else "<")
    size = int(np.prod(sizes, dtype=object)) * dtype.itemsize
    zipped = _true(fields, "compresseddata")
    check_declared(path, size, zipped)
    skip = int(fields.get("headersize", "0"))
    if not -1 <= skip < 2**40 or (zipped and skip < 0):
        raise UserError("The header's HeaderSize makes no sense", file=path, found=skip)
    if skip:
        file.seek(*((-size, 2) if skip < 0 else (skip, 0)))
    return (_inflate(file, size, path) if zipped else read_exactly(file, size, path)).view(dtype)


def _inflate(file: BinaryIO, size: int, path: Path) -> np.ndarray:
    """`size` bytes of a zlib stream as uint8; its checksum is compared."""
    data, done, stream = np.empty(size, np.uint8), 0, zlib.decompressobj()
    while not stream.eof:
        packed = stream.unconsumed_tail or file.read(1 << 16)
        part = stream.decompress(packed, 1 << 20)
        if not packed or done + len(part) > size:
            break
        data[done : done + len(part)] = np.frombuffer(part, np.uint8)
        done += len(part)
    if done < size or not stream.eof:
        raise cut_short(path, done, size)
    return data


def _numbers(fields: Mapping[str, str], names: tuple[str, ...], count: int, path: Path) -> np.ndarray | None:
    for name in names:
        if name in fields:
            numbers = np.array([float(word) for word in fields[name].split()])
            if len(numbers) != count:
                raise UserError(f"{name} has not {count} numbers", file=path, found=fields[name][:200])
            return numbers
    return None


def _affine(fields: Mapping[str, str], rank: int, path: Path) -> tuple[np.ndarray, str]:
    """4 x 4 index -> RAS millimetres, and the unit ("px" where nothing is said about size)."""
    axes = int(fields["ndims"])  # one more than `rank` where the fourth holds channels
    spacing = _numbers(fields, ("elementspacing", "elementsize"), axes, path)
    matrix = _numbers(fields, MATRIX, axes * axes, path)
    origin = _numbers(fields, ("offset", "position", "origin"), axes, path)
    if spacing is not None and not (np.isfinite(spacing).all() and spacing[:rank].min() > 0):
        raise UserError("Impossible voxel size", file=path, found=spacing.tolist(), expected="positive numbers")
    rows = np.eye(axes) if matrix is None else matrix.reshape(axes, axes)  # row i: direction of axis i
    columns = rows[:rank, :rank].T * (1.0 if spacing is None else spacing[:rank])
    affine = LPS_TO_RAS @ placed(columns, np.zeros(rank) if origin is None else origin[:rank])
    check_affine(affine, rank, path, "TransformMatrix")
    return affine, "px" if spacing is None else "mm"


# -------------------------------------------------------------------------------------------------------------- writing


def write_metaimage(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write a label map [*s] or an image [*s, c] under the header that came with `geometry`."""
    rank, header = len(geometry.shape), geometry.header
    components = array.shape[-1] if array.ndim > rank else 1
    array = array if array.ndim == rank else array[..., 0] if components == 1 else np.moveaxis(array, -1, 0)
    kept: list[tuple[str, str]] = []
    if isinstance(header, MetaHeader) and np.allclose(header.affine, geometry.affine, rtol=1e-6, atol=1e-6):
        kept = [(name, text) for name, text in header.fields if name.lower() not in OF_THE_DATA]
    counts = {name.lower(): len(text.split()) for name, text in kept}
    fits = all(counts[n] == (rank if n in PER_AXIS else rank * rank) for n in counts if n in PER_AXIS or n in MATRIX)
    if not kept or not fits:  # another file's place, or one that counts the channels as an axis
        kept = [(n, t) for n, t in kept if n.lower() not in PER_AXIS and n.lower() not in MATRIX] + _place(geometry)
    names = {"<" + kind: name for name, kind in reversed(TYPES.items())}
    array = array.astype(np.dtype(array.dtype.str.replace(">", "<")))
    packed = zlib.compressobj(3)
    blocks = [packed.compress(array[..., i].tobytes(order="F")) for i in range(array.shape[-1])]  # last axis: slowest
    blocks.append(packed.flush())
    lines = [
        ("ObjectType", "Image"),
        ("NDims", str(rank)),
        ("BinaryData", "True"),
        ("BinaryDataByteOrderMSB", "False"),
        ("CompressedData", "True"),
        ("CompressedDataSize", str(sum(map(len, blocks)))),
        *kept,
        ("DimSize", " ".join(map(str, geometry.shape))),
        *([("ElementNumberOfChannels", str(components))] if components > 1 else []),
        ("ElementType", names[array.dtype.str.replace("|", "<")]),
        ("ElementDataFile", "LOCAL"),
    ]
    with path.open("wb") as file:
        file.write("".join(f"{name} = {text}\n" for name, text in lines).encode())
        file.writelines(blocks)


def _place(geometry: Geometry) -> list[tuple[str, str]]:
    """The fields that say where an image lies."""
    rank = len(geometry.shape)
    lps = LPS_TO_RAS @ geometry.affine + 0.0  # no negative zeros
    spacing = geometry.spacing
    rows = [float(lps[i, axis] / spacing[axis]) for axis in range(rank) for i in range(rank)]
    placing = [
        ("TransformMatrix", " ".join(map(repr, rows))),
        ("Offset", " ".join(repr(float(v)) for v in lps[:rank, 3])),
        ("CenterOfRotation", " ".join(["0"] * rank)),
    ]
    return placing + ([("ElementSpacing", " ".join(map(repr, spacing)))] if geometry.unit == "mm" else [])

"""NIfTI-1 and NIfTI-2 single files, plain or gzipped. The writer keeps the header that the reader found.

nibabel parses the header; voxels are read here, so that nothing is allocated before the header has been compared with
the file's size, gzip's checksum is verified, and scale factors are applied in float32.
"""

import gzip
from contextlib import nullcontext
from io import BufferedIOBase
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from nibabel.spatialimages import HeaderDataError

from medseg_jax.data.geometry import SPACING_TOLERANCE, same_space
from medseg_jax.data.raw import check_affine, check_declared, read_exactly
from medseg_jax.types import Geometry, UserError


def read_nifti(path: Path) -> tuple[np.ndarray, Geometry]:
    """Voxels [*s, c] as stored (float32 where the header scales them) and where they lie.

    Raises:
        UserError: whatever is wrong with header, length or affine; decoders' own errors on damaged gzip data pass.
    """
    with path.open("rb") as raw:
        zipped = raw.read(2) == b"\x1f\x8b"  # judged by content: names lie
    with cast(BufferedIOBase, gzip.open(path) if zipped else path.open("rb")) as stream:
        header = _nifti_header(stream.read(540), path)
        dims = [int(n) for n in header["dim"][1 : 1 + int(header["dim"][0])]]
        dtype = header.get_data_dtype()
        start = max(_data_offset(header, path), header.sizeof_hdr + 4)
        check_declared(path, start + np.prod(dims, dtype=object) * dtype.itemsize, zipped)
        stream.seek(start)
        data = read_exactly(stream, int(np.prod(dims)) * dtype.itemsize, path)
    data = data.view(dtype).reshape(dims, order="F")
    data = _nifti_channels(data, path)  # [*s, c]
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    # The standard: a slope of 0 means no scaling; NaN is what nibabel leaves behind for the same purpose.
    if np.isfinite([slope, inter]).all() and slope != 0 and (slope, inter) != (1, 0):
        data = data.astype(np.float32)
        data *= np.float32(slope)
        data += np.float32(inter)
    affine = _nifti_affine(header, data.ndim - 1, path)
    return data, Geometry(data.shape[:-1], affine, "mm", header)


def _nifti_header(block: bytes, path: Path) -> Any:
    """The first 540 bytes -> a nibabel header whose sizes, type and magic make sense."""
    sizes = {int.from_bytes(block[:4], order) for order in ("little", "big")}
    kind = nib.Nifti1Header if 348 in sizes else nib.Nifti2Header if 540 in sizes else None
    magic = block[344:348] if kind is nib.Nifti1Header else block[4:8]
    expected = "a NIfTI-1 or NIfTI-2 single file"
    if kind is None or magic not in (b"n+1\0", b"n+2\0") or len(block) < kind.sizeof_hdr:
        found = "half of a .hdr/.img pair" if magic in (b"ni1\0", b"ni2\0") else "another kind of file"
        remedy = "convert it with dcm2niix, ITK-SNAP or nibabel"
        raise UserError("Not a NIfTI file", file=path, found=found, expected=expected, remedy=remedy)
    header = kind(block[: kind.sizeof_hdr], check=False)
    rank = int(header["dim"][0])
    dims = header["dim"][1 : 1 + rank].tolist()
    if not 2 <= rank <= 7 or min(dims) < 1:
        expected = "2 to 7 axes of at least one voxel"
        raise UserError("The header declares impossible dimensions", file=path, found=dims, expected=expected)
    try:
        header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        code = int(header["datatype"])
        raise UserError(
            "Unknown NIfTI data type", file=path, found=f"code {code}", expected="integers or floats"
        ) from error
    return header


def _data_offset(header: Any, path: Path) -> int:
    offset = float(header["vox_offset"])
    if not 0 <= offset < 2**40:
        raise UserError("The header's vox_offset makes no sense", file=path, found=offset, expected="352 or more")
    return int(offset)


def _nifti_channels(data: np.ndarray, path: Path) -> np.ndarray:
    """Stored array -> [*s, c]: RGB fields and the fourth axis are channels; further axes must have length 1."""
    spatial, extra = data.shape[:3], [n for n in data.shape[3:] if n > 1]
    colours = [name for name in data.dtype.names or () if name in ("R", "G", "B")]
    if len(extra) + bool(colours) > 1:
        expected = "[x, y, z] or [x, y, z, channels]"
        raise UserError("Too many axes", file=path, found=list(data.shape), expected=expected, remedy="split the file")
    if colours:
        return np.stack([data[name].reshape(spatial, order="F") for name in colours], -1)
    return data.reshape((*spatial, extra[0] if extra else 1), order="F")


def _nifti_affine(header: Any, rank: int, path: Path) -> np.ndarray:
    """The sform if it has a code, else the qform, else the spacing alone (nibabel's rule), in millimetres."""
    remedy = "repair it, for instance with `nib.Nifti1Image(data, affine).to_filename(...)`"
    used = "sform" if header["sform_code"] > 0 else "qform" if header["qform_code"] > 0 else "pixdim"
    pixdim = header["pixdim"][1 : 1 + rank]
    if used != "sform" and not (np.isfinite(pixdim).all() and (pixdim > 0).all()):
        expected = "positive voxel sizes (the file has no sform)"
        raise UserError("Impossible voxel size", file=path, found=pixdim.tolist(), expected=expected, remedy=remedy)
    tidy = header.copy()
    if rank == 2:
        tidy["pixdim"][3] = 1  # planar files leave it empty
    if abs(tidy["pixdim"][0]) != 1:
        tidy["pixdim"][0] = 1  # the standard: anything else counts as 1
    affine = np.array(tidy.get_best_affine(), np.float64)
    check_affine(affine, rank, path, used)
    # Unit codes 1 and 3; anything else is millimetres, by convention also where no unit is given.
    affine[:3] *= {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)
    return affine


def write_nifti(path: Path, array: np.ndarray, geometry: Geometry) -> None:
    """Write a label map [*s] or an image [*s, c] (c > 1 as fourth axis) under the header that came with `geometry`."""
    rank = len(geometry.shape)
    if array.ndim > rank:
        extra = array.shape[-1:] if array.shape[-1] > 1 else ()
        array = array.reshape((*geometry.shape, *(1,) * (3 - rank if extra else 0), *extra))
    header = _nifti_header_for(geometry)
    pixdim = header["pixdim"].copy()
    header.set_data_shape(array.shape)  # resets the spacing of axes beyond the array's
    header["pixdim"] = pixdim
    header.set_data_dtype(array.dtype)
    header["scl_slope"], header["scl_inter"], header["vox_offset"] = 1, 0, header.sizeof_hdr + 4
    header["cal_min"] = header["cal_max"] = 0
    header.set_intent("none")
    little = array.dtype.newbyteorder("<")
    with path.open("wb") as file:
        # No name, no time, so that equal arrays give equal files.
        zipped = gzip.GzipFile("", "wb", 3, file, mtime=0) if path.name.lower().endswith(".gz") else nullcontext(file)
        with zipped as stream:
            stream.write(header.binaryblock + bytes(4))
            for i in range(array.shape[-1]):  # in the file the last axis is the slowest
                stream.write(array[..., i].astype(little).tobytes(order="F"))


def contradictions(geometry: Geometry) -> list[str]:
    """Where a NIfTI header contradicts itself, in words: ITK or FSL may place such a file elsewhere than we do."""
    header: Any = geometry.header
    if not isinstance(geometry.header, nib.Nifti1Header) or header["sform_code"] <= 0:
        return []
    rank = len(geometry.shape)
    if header["qform_code"] <= 0:
        pixdim, used = header["pixdim"][1 : 1 + rank], np.linalg.norm(header.get_sform()[:3, :rank], axis=0)
        if np.allclose(pixdim, used, rtol=SPACING_TOLERANCE, atol=0):
            return []
        words = [" x ".join(f"{size:.4g}" for size in sizes) for sizes in (used, pixdim)]
        return [f"spacing {words[0]} in the sform against {words[1]} in pixdim; the sform is used"]
    other = header.copy()
    other["sform_code"] = 0
    try:
        qform = _nifti_affine(other, rank, Path("header"))
    except (UserError, HeaderDataError) as error:
        return [f"the qform makes no sense ({str(error).splitlines()[0]}); the sform is used"]
    differences = same_space(geometry, Geometry(geometry.shape, qform))
    return [f"sform against qform: {text}; the sform is used" for text in differences]


def _nifti_header_for(geometry: Geometry) -> Any:
    """The header that came with the geometry if it still describes it, else a new one."""
    if isinstance(geometry.header, nib.Nifti1Header):
        header = geometry.header.as_byteswapped("<")  # a copy, also where nothing is swapped
        try:
            known = _nifti_affine(header, len(geometry.shape), Path("header"))
        except UserError:
            known = None
        if known is not None and np.allclose(known, geometry.affine, rtol=1e-5, atol=1e-5):
            return header
    header = nib.Nifti1Header(endianness="<")
    header.set_data_shape(geometry.shape)
    header["pixdim"][1 : 1 + len(geometry.shape)] = geometry.spacing
    header.set_sform(geometry.affine, code=1)
    header.set_qform(geometry.affine, code=1)
    header.set_xyzt_units("mm" if geometry.unit == "mm" else 0)
    return header

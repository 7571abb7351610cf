"""DICOM series: a folder of slices is one image.

    find     which files are DICOM, which series they form, a name for each
    headers  of every file of the folder, before any pixel; sizes are compared with the files'
    stack    slices in the order of their positions along the normal (never instance numbers); no grid is an error
    read     pixels, rescale slope and intercept of each slice

A series is named by its folder, or, where a folder holds several, by one of its files. The image is [i, j, k, c]: i
counts columns, j rows, k slices along the normal (row direction x column direction). DICOM's axes point to the
patient's left and back (LPS), ours to the right and front (RAS+): the first two rows of the affine change sign.

Integers stay integers if all slopes and intercepts are whole (CT), else values are float32 (PET). MONOCHROME1 says how
to show numbers, not what they are: it changes nothing. pydicom does the parsing (extra `dicom`).
"""

import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from medseg_jax.data.raw import check_declared
from medseg_jax.types import Geometry, UserError

TAGS = [
    *("SOPClassUID", "SOPInstanceUID", "SeriesInstanceUID", "PatientID", "SeriesDescription", "Modality"),
    *("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "PixelRepresentation", "PhotometricInterpretation"),
    *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
    *("NumberOfFrames", "RescaleSlope", "RescaleIntercept", "ModalityLUTSequence", "GantryDetectorTilt"),
    *("TemporalPositionIdentifier", "EchoTime", "DiffusionBValue", "TriggerTime", "AcquisitionNumber"),
]

SUFFIXES = (".dcm", ".dicom", ".ima")
"""What DICOM files are called, if they have a suffix at all."""

BESIDE = ("dicomdir", "readme", "license", "version", "lockfile")
"""Files without suffix that lie beside slices."""

NO_IMAGES = ("1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7", "1.2.840.10008.1.3.10")
"""Segmentations and directories: made from images, but none."""

DEFLATED = "1.2.840.10008.1.2.1.99"

LARGEST_TILT = 0.1
"""Degrees between normal and line of positions; more is an error where it shifts by over a tenth of a pixel."""

UNEVEN = 0.1
"""How far from its place on an even grid a slice may lie, in slices."""


class Series(NamedTuple):
    """A series that was found.

    Attributes:
        path: its folder, or one of its files where the folder holds several series.
        id: of PatientID and SeriesDescription, else of its UID; unique among those found with it; fit for a file name.
        patient: PatientID, fit for a file name; "" where it is empty.
    """

    path: Path
    id: str
    patient: str


@dataclass(frozen=True)
class Header:
    """All of a file but its pixels.

    Attributes:
        values: pydicom data set with `TAGS`.
        pixels: offset of the pixel data in the file; None if it has none.
    """

    file: Path
    values: Any
    pixels: int | None

    @property
    def series(self) -> str:
        return str(self.values.get("SeriesInstanceUID", ""))

    @property
    def is_image(self) -> bool:
        return self.pixels is not None and self.values.get("SOPClassUID", "") not in NO_IMAGES


def load_pydicom() -> Any:
    """The package, or what to install."""
    try:
        import pydicom
    except ImportError as error:
        raise UserError(
            "DICOM files need a package that is not installed", found=error, remedy="pip install 'medseg-jax[dicom]'"
        ) from error
    return pydicom


# ----------------------------------------------------------------------------------------------------------------- find


def is_dicom(path: Path) -> bool:
    """True for a file that begins as DICOM does, or is called so, and for a folder that holds one. Needs no pydicom."""
    if path.is_dir():
        return any(is_dicom(file) for file in path.iterdir() if file.is_file())
    if path.name.startswith(".") or path.name.lower() in BESIDE or not path.is_file():
        return False
    return path.suffix.lower() in SUFFIXES or _is_marked(path)


def _is_marked(file: Path) -> bool:
    try:
        with file.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def find_series(root: Path) -> tuple[Series, ...]:
    """All series of images in a folder and the folders below it, sorted by id; broken ones, too: reading says why.

    Reports, plans and segmentations are no images, and left out.
    """
    visible = (p for p in root.rglob("*") if not any(part.startswith(".") for part in p.relative_to(root).parts))
    folders = sorted({file.parent for file in visible if file.is_file() and is_dicom(file)})
    if folders:
        load_pydicom()
    found: list[tuple[Path, Header | None]] = []
    for folder in folders:
        series: dict[str, list[Header]] = defaultdict(list)
        for file in sorted(p for p in folder.iterdir() if is_dicom(p) and p.is_file()):
            try:
                header = _header(file)
            except UserError:
                continue
            series[header.series].append(header)
        images = [headers for headers in series.values() if any(header.is_image for header in headers)]
        found += [(folder if len(images) == 1 else headers[0].file, headers[0]) for headers in images]
        if not series:
            found.append((folder, None))
    return _named(found)


def _named(found: Sequence[tuple[Path, Header | None]]) -> tuple[Series, ...]:
    """Unique ids: those that meet get the end of their UIDs, and a number if these meet, too."""
    patients = [_clean(header.values.get("PatientID")) if header else "" for _, header in found]
    texts = [_clean(header.values.get("SeriesDescription")) if header else "" for _, header in found]
    ids = ["_".join(filter(None, words)) for words in zip(patients, texts, strict=True)]
    tails = [_clean(header.series.rpartition(".")[2] if header else path.name) for path, header in found]
    twice = {id for id, count in Counter(id.lower() for id in ids).items() if count > 1 or not id}
    ids = [
        "_".join(filter(None, (id, tail))) or "series" if id.lower() in twice else id
        for id, tail in zip(ids, tails, strict=True)
    ]
    seen: Counter[str] = Counter()
    unique = []
    for id in ids:
        seen[id.lower()] += 1
        unique.append(id if seen[id.lower()] == 1 else f"{id}_{seen[id.lower()]}")
    if len(set(map(str.lower, unique))) < len(unique):
        unique = [f"{id}_{number}" for number, id in enumerate(unique)]
    series = (Series(path, id, who) for (path, _), id, who in zip(found, unique, patients, strict=True))
    return tuple(sorted(series, key=lambda one: one.id))


def series_of(path: Path) -> Series:
    """The series that one of its files, or its folder, stands for."""
    header = _header(path) if path.is_file() else stack(path)[0][0]
    return _named([(path, header)])[0]


def _clean(text: object) -> str:
    """A tag as part of a file name: whoever wrote it, it leads to no other folder. At most 80 bytes."""
    name = re.sub(r"[^\w.+-]+", "_", str(text or "")).strip("_.-")
    return name.encode()[:80].decode(errors="ignore")


# -------------------------------------------------------------------------------------------------------------- headers


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Whatever pydicom or a codec throws at a damaged file becomes a `UserError` naming it; warnings are dropped."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            "The DICOM file cannot be read",
            file=file,
            found=f"{type(error).__name__}: {error}",
            expected="a complete DICOM file",
            remedy="copy or download it again",
        ) from error


def _header(file: Path) -> Header:
    pydicom = load_pydicom()
    if not _is_marked(file):
        size = file.stat().st_size
        raise UserError(
            "Not a DICOM file, though it is called like the others of its folder",
            file=file,
            found=f"{size:,} bytes" + (" without the mark DICM at byte 128" if size >= 132 else ""),
            expected="a DICOM Part 10 file",
            remedy="copy it again if it is a slice; move it elsewhere if it is none",
        )
    with _reading(file), file.open("rb") as stream:
        meta = pydicom.filereader.read_file_meta_info(file)
        if meta.get("TransferSyntaxUID") == DEFLATED:
            raise UserError(
                "A deflated DICOM file is not read",
                file=file,
                found=f"transfer syntax {DEFLATED}",
                remedy="save it uncompressed, for instance with dcmconv +te",
            )
        values = pydicom.dcmread(stream, stop_before_pixels=True, specific_tags=TAGS)
        at, size = stream.tell(), file.stat().st_size
        if at > size:
            raise UserError(
                "The file is cut short",
                file=file,
                found=f"{size:,} bytes",
                expected=f"at least {at:,}",
                remedy="copy or download it again",
            )
        for tag in TAGS:  # pydicom converts on access; numbers that are none show here
            values.get(tag)
        return Header(file, values, at if size - at >= 8 else None)


def _folder_headers(folder: Path) -> list[Header]:
    """Of all DICOM files of a folder. A damaged slice must not vanish: a name like theirs must be DICOM, too."""
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    marked = {file for file in files if is_dicom(file)}
    alike = {_kind_of_name(file) for file in marked}
    chosen = [f for f in files if f in marked or (_kind_of_name(f) in alike and f.name.lower() not in BESIDE)]
    return [_header(file) for file in chosen]


def _kind_of_name(file: Path) -> str:
    """Suffix; "" for none and for numbers (1.2.840.10008.1, IM.0001)."""
    return "" if file.suffix[1:].isdigit() else file.suffix.lower()


def _select(path: Path) -> list[Header]:
    """The files of one series."""
    folder = path if path.is_dir() else path.parent
    headers = _folder_headers(folder)
    if path.is_file():
        own = _header(path).series
        return [header for header in headers if header.series == own]
    headers = [header for header in headers if header.is_image] or headers
    if not headers:
        raise UserError("The folder holds no DICOM file", file=folder, remedy="check the path")
    series: dict[str, list[Header]] = defaultdict(list)
    for header in headers:
        series[header.series].append(header)
    if len(series) > 1:
        raise UserError(
            "The folder holds several DICOM series",
            file=folder,
            found="; ".join(
                f"{uid} ({h[0].values.get('SeriesDescription') or 'no description'}, {len(h)} files, "
                f"e.g. {h[0].file.name})"
                for uid, h in series.items()
            ),
            expected="one series",
            remedy="give one of a series' files instead of the folder, or move each series to a folder of its own",
        )
    return headers


# ---------------------------------------------------------------------------------------------------------------- stack


def _numbers(header: Header, tag: str, count: int, default: Sequence[float] | None = None) -> np.ndarray:
    """A tag as `count` finite numbers."""
    value = header.values.get(tag)
    found = [] if value is None or value == "" else [value] if np.ndim(value) == 0 else list(value)
    if not found and default is not None:
        return np.array(default, float)
    with _reading(header.file):
        numbers = np.array([float(number) for number in found])
    if len(numbers) != count or not np.isfinite(numbers).all():
        remedy = "projections and photographs have no place in space: export them as PNG or TIFF"
        raise UserError(
            f"The slice has no usable {tag}",
            file=header.file,
            found="nothing" if not found else ", ".join(map(str, found)),
            expected=f"{count} numbers",
            remedy=remedy if not found else "repair the tag, or export the series again",
        )
    return numbers


def _whole(header: Header, tag: str, default: int | None = None) -> int:
    value = header.values.get(tag)
    if value is None or value == "":
        value = default
    if not isinstance(value, int) or value < 0:
        raise UserError(f"The slice has no usable {tag}", file=header.file, found=value, expected="a whole number")
    return int(value)


def _check_pixels(header: Header) -> None:
    """That there are pixels of a kind that is read, as many as declared, and a codec for them."""
    file, values = header.file, header.values
    if header.pixels is None:
        raise UserError(
            "The DICOM file has no pixel data",
            file=file,
            found=f"modality {values.get('Modality', 'unknown')}",
            expected="an image",
            remedy="move it elsewhere: reports, plans and presentation states are no slices",
        )
    if (frames := _whole(header, "NumberOfFrames", 1)) != 1:
        raise UserError(
            "Multi-frame DICOM is not read",
            file=file,
            found=f"{frames} frames in a file",
            expected="one slice a file",
            remedy="convert it to NIfTI, for instance with dcm2niix",
        )
    if "ModalityLUTSequence" in values:
        raise UserError(
            "The slice maps its values by a table", file=file, found="ModalityLUTSequence", expected="RescaleSlope"
        )
    rows, columns, bits = (_whole(header, tag) for tag in ("Rows", "Columns", "BitsAllocated"))
    samples = _whole(header, "SamplesPerPixel", 1)
    shown = str(values.get("PhotometricInterpretation", ""))
    grey = samples == 1 and shown.startswith("MONOCHROME")
    if rows * columns == 0 or bits not in (8, 16, 32) or not (grey or (samples == 3 and shown[:3] in ("RGB", "YBR"))):
        raise UserError(
            "Pixels of this kind are not read",
            file=file,
            found=f"{columns} x {rows} pixels of {samples} x {bits} bits, {shown or 'of no stated kind'}",
            expected="8, 16 or 32 bits, MONOCHROME1, MONOCHROME2 or RGB",
            remedy="export the series anew, as MONOCHROME2 or RGB",
        )
    with _reading(file):
        syntax = values.file_meta.get("TransferSyntaxUID")
        if syntax is None:
            raise UserError("The DICOM file does not say how it is encoded", file=file, expected="TransferSyntaxUID")
        compressed = syntax.is_compressed if syntax.is_transfer_syntax else True
    # 4:2:2 colour without compression shares two of three samples between two pixels.
    stored = 2 if shown == "YBR_FULL_422" else samples
    check_declared(file, header.pixels + rows * columns * stored * bits // 8, zipped=compressed)
    if compressed:
        with _reading(file):
            _require_codec(file, syntax)


def _require_codec(file: Path, syntax: Any) -> None:
    from pydicom.pixels.decoders.base import get_decoder

    try:
        able = get_decoder(syntax).is_available
    except NotImplementedError:
        able = False
    if not able:
        raise UserError(
            "The slice is compressed in a way that no installed codec reads",
            file=file,
            found=f"{syntax.name} ({syntax})",
            remedy="pip install python-gdcm pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg, "
            "or decompress the series with gdcmconv --raw or dcmdjpeg",
        )


def stack(path: Path) -> tuple[list[Header], np.ndarray]:
    """The slices of a series in the order of their positions along the normal, and the affine to RAS+ mm.

    Args:
        path: folder of the series, or one of its files.

    Raises:
        UserError: the slices are no regular grid: several series, sizes or orientations, duplicated or missing
            positions, uneven spacing, gantry tilt; or one of them has no pixels that can be read.
    """
    headers = _select(path)
    for header in headers:
        _check_pixels(header)
    _require_alike(path, headers)
    axes = _numbers(headers[0], "ImageOrientationPatient", 6).reshape(2, 3)
    if np.abs(axes @ axes.T - np.eye(2)).max() > 1e-3:
        found = ", ".join(f"{v:g}" for v in axes.ravel())
        raise UserError(
            "ImageOrientationPatient is not two perpendicular unit vectors", file=headers[0].file, found=found
        )
    row_spacing, column_spacing = _numbers(headers[0], "PixelSpacing", 2)
    if min(row_spacing, column_spacing) <= 0:
        found = f"{row_spacing:g}, {column_spacing:g}"
        raise UserError("PixelSpacing must be positive", file=headers[0].file, found=found, expected="millimetres")
    normal = np.cross(axes[0], axes[1])
    positions = np.array([_numbers(header, "ImagePositionPatient", 3) for header in headers])  # [k, 3] LPS mm
    order = np.argsort(positions @ normal, kind="stable")
    headers, positions = [headers[i] for i in order], positions[order]
    if len(headers) > 1:
        _require_even(path, headers, positions @ normal)
        _require_straight(path, headers, positions, normal, min(row_spacing, column_spacing))
        step = (positions[-1] - positions[0]) / (len(headers) - 1)
    else:
        step = normal * _single_thickness(headers[0])
    affine = np.eye(4)
    affine[:3] = np.stack([axes[0] * column_spacing, axes[1] * row_spacing, step, positions[0]], 1)
    affine[:2] *= -1  # LPS -> RAS
    return headers, affine


def _require_alike(path: Path, headers: Sequence[Header]) -> None:
    """Same size, orientation, pixel spacing and kind of pixels."""
    groups: dict[tuple, list[Header]] = defaultdict(list)
    for header in headers:
        size = f"{_whole(header, 'Columns')} x {_whole(header, 'Rows')} pixels"
        kind = f"{_whole(header, 'SamplesPerPixel', 1)} x {_whole(header, 'BitsAllocated')} bits"
        spacing = [f"{v:.4g}" for v in _numbers(header, "PixelSpacing", 2)]
        axes = [f"{v:.3f}" for v in _numbers(header, "ImageOrientationPatient", 6).round(3) + 0.0]
        groups[size, kind, f"{' x '.join(spacing)} mm", f"orientation {', '.join(axes)}"].append(header)
    if len(groups) > 1:
        differing = [i for i, values in enumerate(zip(*groups, strict=True)) if len(set(values)) > 1]
        found = "; ".join(
            f"{', '.join(key[i] for i in differing)}: {_count(members)}, e.g. {members[0].file.name}"
            for key, members in groups.items()
        )
        raise UserError(
            "The slices of the series differ in size, orientation or kind",
            file=path,
            found=found,
            expected="one grid",
            remedy="move slices that do not belong (localisers, other stacks) to a folder of their own",
        )


def _require_even(path: Path, headers: Sequence[Header], places: np.ndarray) -> None:
    """`places` [k] in mm, ascending: no two equal, no gap, no drift."""
    gaps = np.diff(places)
    if same := np.flatnonzero(gaps < 0.001).tolist():
        pairs = ", ".join(f"{headers[i].file.name} and {headers[i + 1].file.name}" for i in same[:3])
        raise UserError(
            "Several slices of the series lie at the same position",
            file=path,
            found=f"{len(same)} of {_count(headers)}, such as {pairs}; {_what_differs(headers, same)}",
            expected="each position once",
            remedy="move copies away; put each time, echo or phase into a folder of its own",
        )
    usual = float(np.median(gaps))
    steps = gaps / usual
    wide = np.flatnonzero(steps > 1 + UNEVEN).tolist()
    if wide and np.abs(steps - steps.round()).max() <= UNEVEN and steps.round().min() == 1:
        missing = int(steps.round().sum()) - len(gaps)
        between = ", ".join(
            f"{gaps[i]:.4g} mm between {headers[i].file.name} and {headers[i + 1].file.name}" for i in wide[:5]
        )
        raise UserError(
            "Slices of the series are missing",
            file=path,
            found=f"{between}; {usual:.4g} mm elsewhere: {missing} of {len(headers) + missing} slices",
            remedy="export the series again, completely",
        )
    even = places[0] + np.arange(len(places)) * (places[-1] - places[0]) / len(gaps)
    if np.abs(steps - 1).max() > UNEVEN or np.abs(places - even).max() > UNEVEN * usual:
        raise UserError(
            "The slices of the series are not evenly spaced",
            file=path,
            found=f"{gaps.min():.4g} to {gaps.max():.4g} mm apart, usually {usual:.4g} mm; widest gap between "
            f"{headers[int(gaps.argmax())].file.name} and {headers[int(gaps.argmax()) + 1].file.name}",
            expected=f"each within {UNEVEN:g} of a slice of its place on an even grid",
            remedy="split it where the spacing changes, or resample it to an even grid first",
        )


def _what_differs(headers: Sequence[Header], same: Sequence[int]) -> str:
    """Which tag tells slices at one position apart."""
    pairs = [(headers[i].values, headers[i + 1].values) for i in same]
    if all(a.get("SOPInstanceUID") == b.get("SOPInstanceUID") for a, b in pairs):
        return "they are copies (equal SOPInstanceUID)"
    for tag in ("TemporalPositionIdentifier", "EchoTime", "DiffusionBValue", "TriggerTime", "AcquisitionNumber"):
        if all(a.get(tag) != b.get(tag) for a, b in pairs):
            return f"they differ in {tag}, such as {pairs[0][0].get(tag)} and {pairs[0][1].get(tag)}"
    return "no time, echo or acquisition number tells them apart"


def _require_straight(
    path: Path, headers: Sequence[Header], positions: np.ndarray, normal: np.ndarray, pixel: float
) -> None:
    """Positions must follow the normal: a tilted gantry gives a sheared stack, which is no voxel grid."""
    whole = positions[-1] - positions[0]
    aside = np.linalg.norm(positions - positions[0] - np.outer((positions - positions[0]) @ normal, normal), axis=1)
    angle = float(np.degrees(np.arctan2(aside[-1], whole @ normal)))
    off_line = positions - positions[0] - np.outer(np.linspace(0, 1, len(positions)), whole)
    crooked = float((np.linalg.norm(off_line - np.outer(off_line @ normal, normal), axis=1)).max())
    if (angle > LARGEST_TILT and aside.max() > 0.1 * pixel) or crooked > 0.5 * pixel:
        tilt = headers[0].values.get("GantryDetectorTilt")
        stated = f"; GantryDetectorTilt says {tilt}" if tilt not in (None, "") else ""
        raise UserError(
            "The slices are not stacked along their normal (gantry tilt)",
            file=path,
            found=f"{angle:.3g} degrees, up to {aside.max():.4g} mm sideways{stated}",
            expected=f"at most {LARGEST_TILT:g} degrees",
            remedy="correct the tilt first: dcm2niix writes a resampled volume *_Tilt_1.nii.gz",
        )


def _single_thickness(header: Header) -> float:
    for tag in ("SpacingBetweenSlices", "SliceThickness"):
        (size,) = _numbers(header, tag, 1, default=(0.0,))
        if size > 0:
            return float(size)
    raise UserError(
        "A single slice does not say how thick it is",
        file=header.file,
        expected="SliceThickness",
        remedy="give the folder with all slices of the series",
    )


def _count(headers: Sequence[Header]) -> str:
    return f"{len(headers)} file{'' if len(headers) == 1 else 's'}"


# ----------------------------------------------------------------------------------------------------------------- read


def read_series(path: str | Path) -> tuple[np.ndarray, Geometry]:
    """Image [i, j, k, c] of a series, rescaled, and where it lies.

    Args:
        path: folder of the series, or one of its files.

    Returns:
        The stored integers if nothing scales them; int16 or int32 if slopes and intercepts are whole; else float32.

    Raises:
        UserError: as `stack`; or a slice cannot be decoded.
    """
    headers, affine = stack(Path(path))
    rescale = np.array(
        [(*_numbers(h, "RescaleSlope", 1, (1.0,)), *_numbers(h, "RescaleIntercept", 1, (0.0,))) for h in headers]
    )  # [k, 2]
    volume: np.ndarray | None = None
    for k, (header, (slope, intercept)) in enumerate(zip(headers, rescale, strict=True)):
        pixels = _pixels(header)  # [rows, columns, c]
        if (rescale != (1, 0)).any():
            pixels = _scaled(pixels, slope, intercept, whole=not (rescale % 1).any())
        if volume is None:
            volume = np.empty((len(headers), *pixels.shape), pixels.dtype)
        volume = volume.astype(np.promote_types(volume.dtype, pixels.dtype), copy=False)
        volume[k] = pixels
    assert volume is not None  # stack() gives at least one slice
    image = volume.transpose(2, 1, 0, 3)  # [i, j, k, c]
    return image, Geometry(image.shape[:3], affine)


def _scaled(pixels: np.ndarray, slope: float, intercept: float, whole: bool) -> np.ndarray:
    """slope * pixels + intercept, as int16 or int32 where all is whole and fits, else float32."""
    low, high = sorted((int(pixels.min()) * slope + intercept, int(pixels.max()) * slope + intercept))
    if whole and -(2**31) <= low <= high < 2**31:
        fitting = np.int16 if -(2**15) <= low <= high < 2**15 else np.int32
        return (pixels.astype(np.int64) * int(slope) + int(intercept)).astype(fitting)
    with np.errstate(over="ignore"):
        return (pixels * slope + intercept).astype(np.float32)


def _pixels(header: Header) -> np.ndarray:
    """Decoded pixels of a slice [rows, columns, c], colour as RGB."""
    pydicom = load_pydicom()
    with _reading(header.file):
        pixels = np.atleast_3d(pydicom.dcmread(header.file).pixel_array)
    expected = tuple(_whole(header, tag, 1) for tag in ("Rows", "Columns", "SamplesPerPixel"))
    if pixels.shape != expected:
        raise UserError(
            "The pixels are not those that the header declares",
            file=header.file,
            found=" x ".join(map(str, pixels.shape)),
            expected=" x ".join(map(str, expected)),
            remedy="copy or download it again",
        )
    return pixels


def source_headers(path: str | Path) -> list[Any]:
    """All tags but the pixels of each slice, in the order of the image's third axis: what derived objects refer to."""
    pydicom = load_pydicom()
    headers, _ = stack(Path(path))
    full = []
    for header in headers:
        with _reading(header.file):
            full.append(pydicom.dcmread(header.file, stop_before_pixels=True))
    return full

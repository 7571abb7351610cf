"""Writes tiny DICOM series, tag by tag, for the tests."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

AXIAL = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
OBLIQUE = ((0.8, 0.6, 0.0), (-0.48, 0.64, 0.6))


def volume(seed: int = 0) -> np.ndarray:
    """[i, j, k] int16: 8 x 10 x 6."""
    return np.random.default_rng(seed).integers(0, 31, (8, 10, 6)).astype(np.int16)


def affine_of(axes=AXIAL, spacing=(0.5, 0.75, 2.5), origin=(-10.0, 20.0, 30.0)) -> np.ndarray:
    """RAS+ affine of the series that `write_series` writes."""
    lps = np.eye(4)
    lps[:3, :3] = np.stack([*map(np.array, axes), np.cross(*axes)], 1) * spacing
    lps[:3, 3] = origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ lps


def write_series(
    folder: Path,
    array: np.ndarray,
    axes=AXIAL,
    spacing=(0.5, 0.75, 2.5),
    origin=(-10.0, 20.0, 30.0),
    reverse: bool = False,
    uid: str | None = None,
    intercept: int = -1024,
    **tags: Any,
) -> list[Path]:
    """One file a slice; array [i, j, k] holds the values after rescaling. `reverse`: instance 1 is the last slice."""
    folder.mkdir(parents=True, exist_ok=True)
    series, study, frame = uid or generate_uid(), generate_uid(), generate_uid()
    normal, files = np.cross(*axes), []
    count = array.shape[2]
    for k in range(count):
        number = count - k if reverse else k + 1
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file = folder / f"IM{number:04d}.dcm"
        ds = FileDataset(file, {}, file_meta=meta, preamble=bytes(128))
        ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = study, series, frame
        ds.PatientID, ds.PatientName, ds.PatientBirthDate, ds.PatientSex = "P1", "Doe^Jane", "", ""
        ds.StudyID, ds.StudyDate, ds.StudyTime, ds.AccessionNumber, ds.ReferringPhysicianName = "1", "", "", "", ""
        ds.Modality, ds.SeriesDescription, ds.SeriesNumber, ds.InstanceNumber = "CT", "thorax", 3, number
        ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = *array.shape[1::-1], 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 0
        ds.RescaleSlope, ds.RescaleIntercept = 1, intercept
        ds.PixelSpacing, ds.SliceThickness = [spacing[1], spacing[0]], spacing[2]
        ds.ImageOrientationPatient = [float(v) for axis in axes for v in axis]
        ds.ImagePositionPatient = [round(float(v), 6) for v in np.array(origin) + normal * spacing[2] * k]
        ds.PixelData = (array[:, :, k].T.astype(np.int32) - intercept).astype("<u2").tobytes()
        for tag, value in tags.items():
            setattr(ds, tag, value)
        ds.save_as(file)
        files.append(file)
    return files


def edit(file: Path, **tags: Any) -> None:
    """Changes tags of a file; None deletes."""
    ds = pydicom.dcmread(file)
    for tag, value in tags.items():
        if value is None:
            delattr(ds, tag)
        else:
            setattr(ds, tag, value)
    ds.save_as(file)

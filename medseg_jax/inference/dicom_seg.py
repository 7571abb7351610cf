"""Label maps as DICOM-SEG: one binary segment a class, each frame referring to the slice of the series it lies on.

The classes of a run are words, not codes. Each segment therefore carries the class's name as its label and, as coded
category and type, the most general concept there is for what is in a body: 85756007 |Tissue| of SNOMED CT. Whoever
knows better edits SegmentedPropertyCategory and SegmentedPropertyTypeCodeSequence. highdicom writes the file
(extra `dicom`).
"""

import os
import warnings
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from medseg_jax.data import dicom, io
from medseg_jax.types import Case, Labels, UserError


def load_highdicom() -> Any:
    """The package, or what to install."""
    try:
        import highdicom
    except ImportError as error:
        raise UserError(
            "DICOM-SEG needs a package that is not installed", found=error, remedy="pip install 'medseg-jax[dicom]'"
        ) from error
    return highdicom


def require_dicom(cases: Iterable[Case]) -> None:
    """DICOM-SEG refers to slices: without them there is nothing to refer to.

    Raises:
        UserError: a case is no DICOM series, or highdicom is missing.
    """
    load_highdicom()
    for case in cases:
        if io.kind(case.images[0]) != "dicom":
            raise UserError(
                "DICOM-SEG can only be written for DICOM series",
                file=case.images[0],
                found=f"case {case.id} from {io.kind(case.images[0])}",
                expected="a folder with a DICOM series",
                remedy="leave the option out, or give the DICOM series as input",
            )


def write(path: Path, label: np.ndarray, labels: Labels, source: Path) -> None:
    """Writes a label map [i, j, k] of a series as DICOM-SEG, completely or not at all.

    Args:
        labels: one segment for each of its names; classes that overlap overlap in the file.
        source: the series, as `read_series` takes it.
    """
    from medseg_jax import __version__

    highdicom = load_highdicom()
    from pydicom.sr.codedict import codes

    algorithm = highdicom.AlgorithmIdentificationSequence(
        name="medseg_jax", version=__version__, family=codes.cid7162.ArtificialIntelligence
    )
    segments = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.Tissue,
            segmented_property_type=codes.SCT.Tissue,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=algorithm,
        )
        for number, name in enumerate(labels.names, start=1)
    ]
    frames = labels.masks(label).transpose(3, 2, 1, 0)  # [k, rows, columns, classes]
    headers = dicom.source_headers(source)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # highdicom echoes pydicom on every odd tag of the source
        try:
            segmentation = highdicom.seg.Segmentation(
                source_images=headers,
                pixel_array=np.ascontiguousarray(frames),
                segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
                segment_descriptions=segments,
                series_instance_uid=highdicom.UID(),
                series_number=900,
                sop_instance_uid=highdicom.UID(),
                instance_number=1,
                manufacturer="medseg_jax",
                manufacturer_model_name="medseg_jax",
                software_versions=__version__,
                device_serial_number="0",
                series_description="medseg_jax segmentation",
            )
        except (ValueError, TypeError, AttributeError, KeyError) as error:  # what it says of tags that it needs
            raise UserError(
                "No DICOM-SEG can refer to this series",
                file=source,
                found=f"{type(error).__name__}: {error}",
                remedy="repair these tags of the series, or leave the option out: the NIfTI file needs none of them",
            ) from error
    draft = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        segmentation.save_as(draft)
        os.replace(draft, path)
    finally:
        with suppress(OSError):
            draft.unlink()

"""A NIfTI file to read, and what a refused one has to say."""

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg_jax.data import io
from medseg_jax.types import UserError

AFFINE = np.array([[0, 0, -3.5, 10], [0.7, 0, 0, -20], [0, 1.2, 0, 5], [0, 0, 0, 1.0]])


def nifti(path: Path, shape=(4, 5, 6), dtype=np.int16, change=None, affine=AFFINE) -> np.ndarray:
    """Write a NIfTI file with nibabel; `change(header structure)` then damages the header's bytes."""
    data = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    image = nib.Nifti1Image(data, affine)
    raw = image.to_bytes()
    if change:
        header = nib.Nifti1Header(raw[:348], check=False)
        change(header)
        raw = header.structarr.tobytes() + raw[348:]
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return data


def refused(path: Path, *words: str, read=io.read_image) -> None:
    with pytest.raises(UserError) as caught:
        read(path)
    text = str(caught.value)
    assert path.name in text
    for word in words:
        assert word in text

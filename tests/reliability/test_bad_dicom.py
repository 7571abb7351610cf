"""Series that are no image, or not a whole one: each is found, and named with what to do."""

import time

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dicom_series import edit, volume, write_series
from medseg_jax.data.dicom import find_series, read_series
from medseg_jax.types import UserError


def refused(folder, *words):
    with pytest.raises(UserError) as error:
        read_series(folder)
    text = str(error.value)
    for word in (folder.name, *words):
        assert word in text, text


@pytest.fixture
def files(tmp_path):
    return write_series(tmp_path / "series", volume())


@pytest.fixture
def series(files):
    return files[0].parent


def test_missing_slices(series, files):
    files[2].unlink()
    refused(series, "missing", "5 mm between IM0002.dcm and IM0004.dcm", "1 of 6 slices", "completely")


def test_duplicated_positions(series, files):
    (series / "copy.dcm").write_bytes(files[1].read_bytes())
    refused(series, "same position", "copies (equal SOPInstanceUID)")


def test_two_times_in_one_series(series, files):
    later = write_series(series.parent / "later", volume(1), uid=pydicom.dcmread(files[0]).SeriesInstanceUID)
    for number, file in enumerate(files):
        edit(file, AcquisitionNumber=1)
        edit(later[number], AcquisitionNumber=2)
        later[number].rename(series / f"late{number}.dcm")
    refused(series, "same position", "AcquisitionNumber")


def test_mixed_series(series):
    write_series(series.parent / "other", volume(), SeriesDescription="scout")
    for file in (series.parent / "other").iterdir():
        file.rename(series / f"b{file.name}")
    refused(series, "several DICOM series", "thorax", "scout", "6 files")
    found = find_series(series.parent)
    assert len(found) == 2
    for one in found:
        assert read_series(one.path)[0].shape == (8, 10, 6, 1)


def test_uneven_spacing(series, files):
    edit(files[3], ImagePositionPatient=[-10.0, 20.0, 30.0 + 2.5 * 3 + 0.9])
    refused(series, "not evenly spaced", "mm apart")


def test_gantry_tilt(series, files):
    for k, file in enumerate(files):
        edit(file, ImagePositionPatient=[-10.0, 20.0 + 0.5 * k, 30.0 + 2.5 * k], GantryDetectorTilt=11)
    refused(series, "gantry tilt", "11.3 degrees", "GantryDetectorTilt says 11", "dcm2niix")


def test_other_size_and_orientation(series, files):
    edit(files[0], ImageOrientationPatient=[0.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    refused(series, "differ in size, orientation or kind", "IM0001.dcm")
    edit(files[0], ImageOrientationPatient=[1.0, 0.0, 0.0, 0.0, 1.0, 0.0], Rows=5, PixelData=bytes(8 * 5 * 2))
    refused(series, "differ in size", "8 x 5 pixels")


@pytest.mark.parametrize(
    ("tags", "words"),
    [
        ({"PixelData": None}, ["no pixel data"]),
        ({"ImagePositionPatient": None}, ["no usable ImagePositionPatient", "nothing"]),
        ({"ImageOrientationPatient": [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]}, ["orientation"]),
        ({"PixelSpacing": [0.0, 0.5]}, ["PixelSpacing must be positive"]),
        ({"NumberOfFrames": 3}, ["Multi-frame", "dcm2niix"]),
        ({"BitsAllocated": 64}, ["bits"]),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, ["PALETTE COLOR"]),
        ({"Rows": 60000, "Columns": 60000}, ["cut short", "7,200,000"]),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_one_slice_that_cannot_be_used(files, tags, words):
    for file in files:
        edit(file, **tags)
    with pytest.raises(UserError) as error:
        read_series(files[0].parent)
    for word in words:
        assert word.lower() in str(error.value).lower(), str(error.value)


def test_a_compressed_syntax_without_a_codec(series, files, monkeypatch):
    from pydicom.uid import JPEG2000Lossless

    for file in files:
        ds = pydicom.dcmread(file)
        ds.file_meta.TransferSyntaxUID = JPEG2000Lossless
        ds.PixelData = pydicom.encaps.encapsulate([b"no picture at all, just bytes"])
        ds["PixelData"].is_undefined_length = True
        ds.save_as(file)
    with pytest.raises(UserError) as error:
        read_series(series)
    assert "IM000" in str(error.value)


def test_cut_short(series, files):
    raw = files[4].read_bytes()
    for size in (0, 100, 200, len(raw) // 2, len(raw) - 10):
        files[4].write_bytes(raw[:size])
        with pytest.raises(UserError) as error:  # what is left of it may be no image: then one is missing
            read_series(series)
        assert "IM0005.dcm" in str(error.value) or "between IM0004.dcm and IM0006.dcm" in str(error.value)


def test_tags_that_look_like_paths(tmp_path):
    write_series(tmp_path / "a", volume(), PatientID="../../etc", SeriesDescription="/root\\x")
    (found,) = find_series(tmp_path)
    assert not set(found.id) & set("/\\")
    assert ".." not in found.id


def mutated(raw: bytes, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    data = bytearray(raw)
    for _ in range(rng.integers(1, 8)):
        data[rng.integers(len(data))] = rng.integers(256)
    return bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.2 else data)


def fuzz(folder, seed):
    files = sorted(folder.iterdir())
    raw = files[2].read_bytes()
    try:
        files[2].write_bytes(mutated(raw, seed))
        began = time.perf_counter()
        try:
            image, geometry = read_series(folder)
        except UserError as error:
            named = folder.name in str(error) or files[2].name in str(error)
        else:
            named = image.shape[:3] == geometry.shape and bool(np.isfinite(geometry.affine).all())
        assert named
        assert time.perf_counter() - began < 20
    finally:
        files[2].write_bytes(raw)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "series"
    write_series(folder, volume()[:, :, :4])
    return folder


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_fuzzed_slices_raise_only_user_errors(small, seed):
    fuzz(small, seed)


@pytest.mark.slow
def test_fuzzed_slices_long(small):
    for seed in range(2000):
        fuzz(small, seed)

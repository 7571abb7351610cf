"""Readers and writers: round trips, traps of real files, and files that are damaged or hostile."""

import gzip
import os
import pickle
import resource
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from medseg_jax.data import io
from medseg_jax.data.nifti import contradictions
from medseg_jax.types import Geometry, UserError

AFFINE = np.array([[0, 0, -3.5, 10], [0.7, 0, 0, -20], [0, 1.2, 0, 5], [0, 0, 0, 1.0]])
SLOW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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


# ---------------------------------------------------------------------------------------------------------------- names


def test_names():
    assert (io.stem("a/im0001.vk.ppm"), io.suffix("a/im0001.vk.ppm")) == ("im0001.vk", ".ppm")
    assert (io.stem("b.x.NII.GZ"), io.suffix("b.x.NII.GZ")) == ("b.x", ".nii.gz")
    assert io.suffix("c") == ""


def test_list_files(tmp_path):
    for name in ("b.PNG", "a.nii.gz", ".c.png", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "d.png").mkdir()
    assert [p.name for p in io.list_files(tmp_path)] == ["a.nii.gz", "b.PNG"]
    with pytest.raises(UserError):
        io.list_files(tmp_path / "absent")


def test_missing_empty_unknown(tmp_path):
    refused(tmp_path / "no.png", "No such file")
    (tmp_path / "folder.png").mkdir()
    refused(tmp_path / "folder.png", "a folder")
    for ending in io.SUFFIXES:
        (tmp_path / f"zero{ending}").touch()
        refused(tmp_path / f"zero{ending}", "empty", "0 bytes")
    (tmp_path / "x.xyz").write_bytes(b"DICM")
    refused(tmp_path / "x.xyz", "Unknown file format", ".nii.gz")


# ---------------------------------------------------------------------------------------------------------- round trips

LOSSLESS = [".nii", ".nii.gz", ".nrrd", ".mha", ".npy", ".npz", ".h5", ".tif"]


@SLOW
@given(
    shape=st.tuples(*[st.integers(5, 8)] * 3),
    dtype=st.sampled_from([np.uint8, np.uint16, np.float32]),
    ending=st.sampled_from(LOSSLESS),
    seed=st.integers(0, 99),
)
def test_volume_round_trip(tmp_path, shape, dtype, ending, seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 255, (*shape, 1)).astype(dtype)
    geometry = Geometry(shape, AFFINE)
    io.write_image(tmp_path / f"i{ending}", image, geometry)
    back, where = io.read_image(tmp_path / f"i{ending}")
    np.testing.assert_array_equal(back, image)
    assert back.dtype == dtype
    label = rng.integers(0, 1000, shape)
    io.write_label(tmp_path / f"l{ending}", label, geometry)
    again, where = io.read_label(tmp_path / f"l{ending}")
    np.testing.assert_array_equal(again, label)
    assert again.dtype == np.uint16
    assert where.shape == shape
    if ending not in (".npy", ".tif"):
        np.testing.assert_allclose(where.affine, AFFINE, atol=1e-6)
        assert where.unit == "mm"


@SLOW
@given(
    shape=st.tuples(st.integers(5, 40), st.integers(5, 40)),
    channels=st.sampled_from([1, 3]),
    ending=st.sampled_from([".png", ".tif", ".bmp", ".ppm", ".npy", ".npz", ".hdf5"]),
    top=st.sampled_from([1, 2, 255]),
)
def test_picture_round_trip(tmp_path, shape, channels, ending, top):
    image = np.random.default_rng(0).integers(0, top + 1, (*shape, channels)).astype(np.uint8)
    geometry = Geometry(shape, unit="px")
    io.write_image(tmp_path / f"i{ending}", image, geometry)
    back, where = io.read_image(tmp_path / f"i{ending}")
    np.testing.assert_array_equal(back, image)
    assert (where.shape, where.unit) == (shape, "px")
    np.testing.assert_array_equal(where.affine, np.eye(4))
    io.write_label(tmp_path / f"l{ending}", image[..., 0], geometry)
    np.testing.assert_array_equal(io.read_label(tmp_path / f"l{ending}")[0], image[..., 0])


@pytest.mark.parametrize("ending", [".png", ".tif", ".pgm", ".nii.gz"])
def test_16_bit_picture(tmp_path, ending):
    label = np.array([[0, 300, 65535], [1, 2, 40000]], np.uint16)
    path = tmp_path / f"a{ending}"
    io.write_label(path, label, Geometry((2, 3), unit="px"))
    np.testing.assert_array_equal(io.read_label(path)[0], label)
    image, _ = io.read_image(path)
    np.testing.assert_array_equal(image[..., 0], label)
    assert image.dtype == np.uint16


@pytest.mark.parametrize("channels", [2, 4])
def test_channels_of_a_volume(tmp_path, channels):
    image = np.random.default_rng(0).normal(size=(5, 6, 7, channels)).astype(np.float32)
    for ending in (".nii.gz", ".npz", ".h5", ".npy"):
        io.write_image(tmp_path / f"a{ending}", image, Geometry((5, 6, 7), AFFINE))
        np.testing.assert_array_equal(io.read_image(tmp_path / f"a{ending}")[0], image)
    refused(tmp_path / "a.nii.gz", "channels that differ", read=io.read_label)
    assert nib.load(tmp_path / "a.nii.gz").shape == image.shape


def test_jpeg(tmp_path):
    image = np.full((16, 16, 3), (200, 100, 50), np.uint8)
    io.write_image(tmp_path / "a.jpg", image, Geometry((16, 16), unit="px"))
    assert np.abs(io.read_image(tmp_path / "a.jpg")[0].astype(int) - image).max() <= 3
    with pytest.raises(UserError, match="JPEG changes label values"):
        io.write_label(tmp_path / "b.jpg", image[..., 0], Geometry((16, 16)))


def test_label_keeps_the_header(tmp_path):
    """Whatever wrote the image: sform, qform, codes, spacing, units and description come back; nothing else does."""
    image = nib.Nifti1Image(np.zeros((4, 5, 6), np.int16), AFFINE)
    turned = AFFINE.copy()
    turned[:3, 3] = (1, 2, 3)
    image.set_sform(AFFINE, 4)
    image.set_qform(turned, 2)
    image.header.set_xyzt_units("mm", "sec")
    image.header["descrip"] = b"scanner 7"
    image.header["cal_max"] = 300
    image.header.set_slope_inter(2, -1000)
    raw = image.to_bytes()
    (tmp_path / "i.nii").write_bytes(raw)
    data, geometry = io.read_image(tmp_path / "i.nii")
    io.write_label(tmp_path / "l.nii.gz", (data[..., 0] < 0) * 300, geometry)
    written = nib.load(tmp_path / "l.nii.gz")
    np.testing.assert_array_equal(written.get_sform(coded=True)[0], image.get_sform())
    np.testing.assert_array_equal(written.header["qoffset_x"], image.header["qoffset_x"])
    assert (int(written.header["sform_code"]), int(written.header["qform_code"])) == (4, 2)
    np.testing.assert_array_equal(written.header["pixdim"], image.header["pixdim"])
    assert written.header.get_xyzt_units() == ("mm", "sec")
    assert written.header["descrip"].item() == b"scanner 7"
    assert written.header.get_data_dtype() == np.uint16
    assert float(written.header["cal_max"]) == 0
    assert (written.dataobj.slope, written.dataobj.inter) == (1, 0)
    np.testing.assert_array_equal(np.asarray(written.dataobj), 300)


def test_header_gives_way_to_a_changed_affine(tmp_path):
    nifti(tmp_path / "i.nii")
    _, geometry = io.read_image(tmp_path / "i.nii")
    moved = geometry.affine + np.array([[0, 0, 0, 50.0]] * 3 + [[0] * 4])
    io.write_label(tmp_path / "l.nii", np.ones((4, 5, 6)), Geometry(geometry.shape, moved, "mm", geometry.header))
    np.testing.assert_allclose(nib.load(tmp_path / "l.nii").affine, moved, atol=1e-5)


def test_equal_labels_give_equal_bytes(tmp_path):
    label = np.ones((4, 5, 6), np.uint8)
    for name in ("a", "b"):
        io.write_label(tmp_path / f"{name}.nii.gz", label, Geometry(label.shape, AFFINE))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    label = np.ones((4, 5, 6), np.uint8)
    geometry = Geometry(label.shape, AFFINE)
    io.write_label(tmp_path / "a.nii.gz", label, geometry)

    def full(path, array, geometry):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(io, "write_nifti", full)
    with pytest.raises(UserError, match="Cannot write") as caught:
        io.write_label(tmp_path / "a.nii.gz", label * 2, geometry)
    assert "No space left" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]
    np.testing.assert_array_equal(io.read_label(tmp_path / "a.nii.gz")[0], label)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("a.png", np.zeros((4, 5, 1), np.float32)),
        ("a.png", np.zeros((4, 5, 2), np.uint8)),
        ("a.png", np.zeros((4, 5, 6, 1), np.uint8)),
        ("a.jpg", np.zeros((4, 5, 1), np.uint16)),
    ],
)
def test_writer_refuses_what_would_be_lost(tmp_path, name, array):
    with pytest.raises(UserError, match="cannot hold") as caught:
        io.write_image(tmp_path / name, array, Geometry(array.shape[:-1]))
    assert str(tmp_path / name) in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_writer_checks_shape(tmp_path):
    with pytest.raises(ValueError, match="does not lie"):
        io.write_label(tmp_path / "a.nii", np.zeros((4, 5, 6)), Geometry((4, 5, 7)))
    with pytest.raises(UserError, match="Unknown file format"):
        io.write_label(tmp_path / "a.xyz", np.zeros((4, 5)), Geometry((4, 5)))


# --------------------------------------------------------------------------------------------------------- label values


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint64, np.int8, ">i2", bool])
def test_label_types(tmp_path, dtype):
    label = np.array([[0, 1, 1, 0, 1, 1]] * 5).astype(dtype)
    np.save(tmp_path / "l.npy", label)
    back, _ = io.read_label(tmp_path / "l.npy")
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, label)


@pytest.mark.parametrize(
    ("value", "word"),
    [(0.5, "0.5"), (np.nan, "nan"), (np.inf, "inf"), (-1, "-1"), (65536, "65536"), (1e300, "whole")],
)
def test_bad_label_values(tmp_path, value, word):
    label = np.zeros((5, 6))
    label[2, 3] = value
    np.save(tmp_path / "l.npy", label)
    refused(tmp_path / "l.npy", word, read=io.read_label)


def test_scaled_nifti_label(tmp_path):
    """Labels 0, 51, 102 stored as 0, 1, 2 with a float32 slope come out whole."""
    path = tmp_path / "l.nii"
    nifti(path, (1, 1, 3), np.uint8, lambda h: h.structarr.__setitem__("scl_slope", 51))
    assert io.read_label(path)[0].ravel().tolist() == [0, 51, 102]


# --------------------------------------------------------------------------------------------------------------- NIfTI


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.float32, np.float64])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_nifti_types(tmp_path, dtype, name):
    data = nifti(tmp_path / name, dtype=dtype)
    image, geometry = io.read_image(tmp_path / name)
    np.testing.assert_array_equal(image[..., 0], data)
    assert image.dtype == (np.float32 if np.dtype(dtype).kind == "f" else dtype)
    np.testing.assert_allclose(geometry.affine, AFFINE, atol=1e-6)
    np.testing.assert_allclose(geometry.spacing, (0.7, 1.2, 3.5), rtol=1e-6)


def test_nifti_2_big_endian_and_misnamed(tmp_path):
    data = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    second = nib.Nifti2Image(data, AFFINE)
    second.to_filename(tmp_path / "two.nii.gz")
    big = nib.Nifti1Image(data, AFFINE, nib.Nifti1Header(endianness=">"))
    big.to_filename(tmp_path / "big.nii")
    (tmp_path / "zipped.nii").write_bytes((tmp_path / "two.nii.gz").read_bytes())
    (tmp_path / "plain.nii.gz").write_bytes((tmp_path / "big.nii").read_bytes())
    for name in ("two.nii.gz", "big.nii", "zipped.nii", "plain.nii.gz"):
        image, geometry = io.read_image(tmp_path / name)
        np.testing.assert_array_equal(image[..., 0], data)
        assert image.dtype.isnative
        io.write_label(tmp_path / "out.nii.gz", image[..., 0], geometry)
        again = nib.load(tmp_path / "out.nii.gz")
        np.testing.assert_array_equal(np.asarray(again.dataobj), data)
        np.testing.assert_allclose(again.affine, AFFINE, atol=1e-6)


@pytest.mark.parametrize("slope", [0, np.nan, 1])
def test_no_scaling(tmp_path, slope):
    data = nifti(tmp_path / "a.nii", change=lambda h: h.structarr.__setitem__("scl_slope", slope))
    image, _ = io.read_image(tmp_path / "a.nii")
    assert image.dtype == np.int16
    np.testing.assert_array_equal(image[..., 0], data)


def test_scaling_does_not_overflow(tmp_path):
    def change(header):
        header.structarr["scl_slope"], header.structarr["scl_inter"] = 1000, -1024

    data = nifti(tmp_path / "a.nii", change=change)
    image, _ = io.read_image(tmp_path / "a.nii")
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[..., 0], data.astype(float) * 1000 - 1024)


def test_four_five_and_two_axes(tmp_path):
    assert nifti(tmp_path / "four.nii", (3, 4, 5, 2)).shape == io.read_image(tmp_path / "four.nii")[0].shape
    nifti(tmp_path / "one.nii", (3, 4, 5, 1))
    assert io.read_label(tmp_path / "one.nii")[0].shape == (3, 4, 5)
    nifti(tmp_path / "vector.nii", (3, 4, 5, 1, 2))
    assert io.read_image(tmp_path / "vector.nii")[0].shape == (3, 4, 5, 2)
    nifti(tmp_path / "five.nii", (3, 4, 5, 2, 2))
    refused(tmp_path / "five.nii", "Too many axes", "[3, 4, 5, 2, 2]")
    nifti(tmp_path / "plane.nii", (3, 4))
    image, geometry = io.read_image(tmp_path / "plane.nii")
    assert (image.shape, geometry.shape) == ((3, 4, 1), (3, 4))


def test_rgb(tmp_path):
    for names in ("RGB", "RGBA"):
        data = np.zeros((3, 4, 5), [(name, "u1") for name in names])
        data["G"] = np.arange(60).reshape(3, 4, 5)
        nib.Nifti1Image(data, AFFINE).to_filename(tmp_path / "a.nii")
        image, _ = io.read_image(tmp_path / "a.nii")
        assert image.shape == (3, 4, 5, 3)
        np.testing.assert_array_equal(image[..., 1], data["G"])


def test_nan_voxels_pass(tmp_path):
    image = np.full((5, 5, 5, 1), np.nan, np.float32)
    io.write_image(tmp_path / "a.nii.gz", image, Geometry((5, 5, 5), AFFINE))
    assert np.isnan(io.read_image(tmp_path / "a.nii.gz")[0]).all()


def test_sform_before_qform_before_pixdim(tmp_path):
    other = np.diag([2.0, 2, 2, 1])

    def forms(sform, qform):
        def change(header):
            header.set_sform(AFFINE, sform)
            header.set_qform(other, qform)

        nifti(tmp_path / "a.nii", change=change)
        return io.read_image(tmp_path / "a.nii")[1]

    np.testing.assert_allclose(forms(1, 1).affine, AFFINE, atol=1e-6)
    np.testing.assert_allclose(forms(0, 1).affine, other, atol=1e-6)
    np.testing.assert_allclose(forms(0, 0).spacing, (2, 2, 2))


def test_contradictions(tmp_path):
    def words(sform, qform, pixdim=None):
        def change(header):
            header.set_sform(sform, 1)
            header.set_qform(*((AFFINE, 0) if qform is None else (qform, 1)))
            if pixdim:
                header.structarr["pixdim"][1:4] = pixdim

        nifti(tmp_path / "a.nii", change=change)
        return "; ".join(contradictions(io.read_image(tmp_path / "a.nii")[1]))

    moved = AFFINE + np.array([[0, 0, 0, 3.0], [0, 0, 0, 4], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert words(AFFINE, AFFINE) == words(AFFINE, None) == ""
    assert "first voxels 5 mm apart" in words(AFFINE, moved)
    assert "the sform is used" in words(AFFINE, moved)
    assert "0.7 x 1.2 x 3.5 in the sform against 2 x 1.2 x 3.5 in pixdim" in words(AFFINE, None, (2, 1.2, 3.5))
    assert "qform makes no sense" in words(AFFINE, AFFINE, (0, 1.2, 3.5))
    assert contradictions(Geometry((4, 5))) == []


@pytest.mark.parametrize(("code", "scale"), [(1, 1000), (2, 1), (3, 0.001), (0, 1), (7, 1)])
def test_units(tmp_path, code, scale):
    nifti(tmp_path / "a.nii", change=lambda h: h.structarr.__setitem__("xyzt_units", code))
    _, geometry = io.read_image(tmp_path / "a.nii")
    np.testing.assert_allclose(geometry.affine[:3], AFFINE[:3] * scale, rtol=1e-6)
    io.write_label(tmp_path / "b.nii", np.zeros((4, 5, 6)), geometry)
    np.testing.assert_allclose(io.read_label(tmp_path / "b.nii")[1].affine, geometry.affine)


def test_oblique_affine_survives(tmp_path):
    c, s = np.cos(0.3), np.sin(0.3)
    oblique = np.array([[c, -s, 0, 1], [s, c, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]]) @ np.diag([0.9, 1.1, 4, 1])
    io.write_label(tmp_path / "a.nii.gz", np.zeros((4, 5, 6)), Geometry((4, 5, 6), oblique))
    np.testing.assert_allclose(io.read_label(tmp_path / "a.nii.gz")[1].affine, oblique, atol=1e-5)
    np.testing.assert_allclose(nib.load(tmp_path / "a.nii.gz").get_qform(), oblique, atol=1e-5)


def header_field(name, value, index=None):
    def change(header):
        if index is None:
            header.structarr[name] = value
        else:
            header.structarr[name][index] = value

    return change


def without_sform(name, value, index):
    def change(header):
        header.structarr["sform_code"] = 0
        header.structarr["qform_code"] = 1
        header.structarr[name][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (header_field("magic", b"n+9"), ["Not a NIfTI file"]),
        (header_field("magic", b"ni1"), [".hdr/.img"]),
        (header_field("sizeof_hdr", 999), ["Not a NIfTI file"]),
        (header_field("dim", 0, 2), ["impossible dimensions", "[4, 0, 6]"]),
        (header_field("dim", -5, 1), ["impossible dimensions"]),
        (header_field("dim", 1, 0), ["impossible dimensions"]),
        (header_field("dim", 30000, slice(1, 4)), ["cut short", "54,000,000,000,352 bytes"]),
        (header_field("datatype", 999), ["data type", "999"]),
        (header_field("vox_offset", np.nan), ["vox_offset"]),
        (header_field("vox_offset", 1e6), ["cut short"]),
        (header_field("srow_x", 0), ["affine is singular"]),
        (header_field("srow_y", np.nan), ["affine is singular"]),
        (without_sform("pixdim", 0, 2), ["Impossible voxel size"]),
        (without_sform("pixdim", -1, 3), ["Impossible voxel size"]),
        (without_sform("pixdim", np.inf, 3), ["Impossible voxel size"]),
    ],
)
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_bad_headers(tmp_path, change, words, name):
    nifti(tmp_path / name, change=change)
    refused(tmp_path / name, *words)


def test_complex_voxels(tmp_path):
    nifti(tmp_path / "a.nii", dtype=np.complex64)
    refused(tmp_path / "a.nii", "Not an array of numbers", "complex64")


def test_qfac_of_zero_counts_as_one(tmp_path):
    def change(header):
        header.structarr["sform_code"], header.structarr["qform_code"] = 0, 1
        header.structarr["pixdim"][0] = 0

    nifti(tmp_path / "a.nii", change=change, affine=np.diag([1.0, 2, 3, 1]))
    np.testing.assert_allclose(io.read_image(tmp_path / "a.nii")[1].affine, np.diag([1.0, 2, 3, 1]))


def test_truncation_and_bit_flips(tmp_path):
    rng = np.random.default_rng(0)
    io.write_image(
        tmp_path / "a.nii.gz", rng.integers(0, 99, (9, 9, 9, 1)).astype(np.uint8), Geometry((9, 9, 9), AFFINE)
    )
    raw = (tmp_path / "a.nii.gz").read_bytes()
    for keep in (1, 5, 30, len(raw) // 2, len(raw) - 9, len(raw) - 1):
        (tmp_path / "b.nii.gz").write_bytes(raw[:keep])
        refused(tmp_path / "b.nii.gz", "try:")
    for at in (len(raw) - 6, len(raw) // 2, len(raw) - 20):  # the first lies in the checksum
        damaged = bytearray(raw)
        damaged[at] ^= 16
        (tmp_path / "b.nii.gz").write_bytes(damaged)
        refused(tmp_path / "b.nii.gz")
    plain = gzip.decompress(raw)
    for keep in (100, 348, 352, len(plain) - 1):
        (tmp_path / "b.nii").write_bytes(plain[:keep])
        refused(tmp_path / "b.nii")


def test_huge_declared_size_allocates_nothing(tmp_path):
    """A 200-byte gzip that declares 27 GB, and one that declares just less than gzip's limit, cost no memory."""
    nifti(tmp_path / "a.nii.gz", change=header_field("dim", 3000, slice(1, 4)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "a.nii.gz", "after unpacking")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


# ------------------------------------------------------------------------------------------------------------- pictures


def palette_file(path: Path, index, colours) -> None:
    image = Image.fromarray(np.asarray(index, np.uint8), "L").convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette([v for colour in colours for v in colour])
    image.save(path)


INDEX = np.array([[0, 1, 2], [2, 1, 0]])


@pytest.mark.parametrize("ending", [".png", ".gif", ".tif", ".bmp"])
def test_palette_colours(tmp_path, ending):
    """A painted label map: the index is the class; as an image it is what a person sees."""
    colours = [(0, 0, 0), (255, 0, 0), (0, 0, 255)]
    palette_file(tmp_path / f"a{ending}", INDEX, colours)
    np.testing.assert_array_equal(io.read_label(tmp_path / f"a{ending}")[0], INDEX)
    np.testing.assert_array_equal(io.read_image(tmp_path / f"a{ending}")[0], np.array(colours)[INDEX])


def test_palette_grey_and_inverted(tmp_path):
    palette_file(tmp_path / "grey.png", INDEX, [(0, 0, 0), (128, 128, 128), (255, 255, 255)])
    np.testing.assert_array_equal(io.read_label(tmp_path / "grey.png")[0], INDEX)
    assert io.read_image(tmp_path / "grey.png")[0].ravel().tolist() == [0, 128, 255, 255, 128, 0]
    palette_file(tmp_path / "inverted.gif", INDEX.clip(0, 1), [(255, 255, 255), (0, 0, 0)])
    np.testing.assert_array_equal(io.read_label(tmp_path / "inverted.gif")[0], (INDEX == 0) * 255)
    palette_file(tmp_path / "white.gif", INDEX * 0, [(255, 255, 255), (0, 0, 0)])  # the rule looks at no pixels
    assert set(io.read_label(tmp_path / "white.gif")[0].ravel()) == {255}


def test_one_bit(tmp_path):
    mask = INDEX > 0
    for ending in (".png", ".tif", ".bmp"):
        Image.fromarray(mask).save(tmp_path / f"a{ending}")
        np.testing.assert_array_equal(io.read_label(tmp_path / f"a{ending}")[0], mask)


def test_transparency(tmp_path):
    rgba = np.zeros((4, 5, 4), np.uint8)
    rgba[..., :3] = np.arange(20).reshape(4, 5, 1) * 10
    rgba[..., 3] = 128
    Image.fromarray(rgba).save(tmp_path / "a.png")
    np.testing.assert_array_equal(io.read_image(tmp_path / "a.png")[0], rgba[..., :3])
    np.testing.assert_array_equal(io.read_label(tmp_path / "a.png")[0], rgba[..., 0])
    Image.fromarray(rgba).convert("LA").save(tmp_path / "la.png")
    assert io.read_image(tmp_path / "la.png")[0].shape == (4, 5, 1)
    rgba[..., :3], rgba[:2, :, 3] = 0, 0
    Image.fromarray(rgba).save(tmp_path / "drawn.png")
    refused(tmp_path / "drawn.png", "transparency", read=io.read_label)


def test_colour_masks_are_refused_by_name(tmp_path):
    rgb = np.zeros((4, 5, 3), np.uint8)
    rgb[1] = (255, 0, 0)
    Image.fromarray(rgb).save(tmp_path / "a.png")
    refused(tmp_path / "a.png", "colours such as (255, 0, 0)", "medseg data convert", read=io.read_label)


def test_exif_rotation(tmp_path):
    pixels = np.arange(24, dtype=np.uint8).reshape(4, 6)
    for orientation, expected in ((6, np.rot90(pixels, -1)), (3, pixels[::-1, ::-1]), (1, pixels)):
        exif = Image.Exif()
        exif[274] = orientation
        for ending in (".png", ".tif"):
            Image.fromarray(pixels).save(tmp_path / f"a{ending}", exif=exif)
            np.testing.assert_array_equal(io.read_image(tmp_path / f"a{ending}")[0][..., 0], expected)
            np.testing.assert_array_equal(io.read_label(tmp_path / f"a{ending}")[0], expected)


def png_16_bit_colour(path: Path) -> None:
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    rows = b"".join(b"\0" + bytes(range(12)) for _ in range(2))  # 2 x 2 pixels of 3 x 2 bytes
    header = struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def test_16_bit_colour(tmp_path):
    png_16_bit_colour(tmp_path / "a.png")
    refused(tmp_path / "a.png", "16-bit colour")
    tifffile = pytest.importorskip("tifffile")
    colour = np.arange(5 * 6 * 3, dtype=np.uint16).reshape(5, 6, 3) * 700
    tifffile.imwrite(tmp_path / "a.tif", colour, photometric="rgb")
    np.testing.assert_array_equal(io.read_image(tmp_path / "a.tif")[0], colour)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.uint32, np.int16, np.int8])
def test_unusual_tiffs(tmp_path, dtype):
    tifffile = pytest.importorskip("tifffile")
    picture = np.arange(30).reshape(5, 6).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", picture)
    np.testing.assert_array_equal(io.read_image(tmp_path / "a.tif")[0][..., 0], picture)
    np.testing.assert_array_equal(io.read_label(tmp_path / "a.tif")[0], picture)


def test_tiff_stacks(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    volume = np.arange(7 * 5 * 6, dtype=np.uint8).reshape(7, 5, 6)
    io.write_label(tmp_path / "a.tif", volume, Geometry(volume.shape))
    np.testing.assert_array_equal(io.read_label(tmp_path / "a.tif")[0], volume)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tif"), volume)
    two = np.stack([volume, volume[::-1]], 1)  # z, c, y, x as ImageJ stores it
    tifffile.imwrite(tmp_path / "b.tif", two, imagej=True, metadata={"axes": "ZCYX"})
    np.testing.assert_array_equal(io.read_image(tmp_path / "b.tif")[0], np.moveaxis(two, 1, -1))
    pages = [Image.fromarray(volume[0]), Image.fromarray(volume[0, :3])]
    pages[0].save(tmp_path / "c.tif", save_all=True, append_images=pages[1:])
    refused(tmp_path / "c.tif", "pages", "differ")


def test_tiff_without_tifffile(tmp_path, monkeypatch):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 6)))
    monkeypatch.setitem(sys.modules, "tifffile", None)
    refused(tmp_path / "a.tif", "medseg-jax[io]")


def test_pnm_values_are_not_stretched(tmp_path):
    """Pillow stretches PGM to the full range: 0, 1, 2 of maxval 2 would become 0, 128, 255."""
    for maxval, kind in ((2, np.uint8), (200, np.uint8), (4095, np.uint16)):
        values = np.array([[0, 1, 2], [2, maxval, maxval - 1]], kind)
        body = values.astype(">u2" if maxval > 255 else "u1").tobytes()
        (tmp_path / "a.pgm").write_bytes(b"P5\n# note\n3 2\n%d\n" % maxval + body)
        image = io.read_image(tmp_path / "a.pgm")[0]
        np.testing.assert_array_equal(image[..., 0], values)
        assert image.dtype == kind
        (tmp_path / "b.pgm").write_text(f"P2 3 2 {maxval} " + " ".join(map(str, values.ravel())))
        np.testing.assert_array_equal(io.read_label(tmp_path / "b.pgm")[0], values)


def test_animation_and_foreign_formats(tmp_path):
    frames = [Image.fromarray(np.full((4, 5), v, np.uint8)) for v in (0, 200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    refused(tmp_path / "a.gif", "animated", "2 frames")
    frames[0].save(tmp_path / "b.eps")
    (tmp_path / "b.eps").rename(tmp_path / "b.png")
    refused(tmp_path / "b.png", "cannot be read")
    frames[0].save(tmp_path / "c.jpg")
    (tmp_path / "c.jpg").rename(tmp_path / "c.png")  # a wrong name alone is no harm
    assert io.read_image(tmp_path / "c.png")[0].shape == (4, 5, 1)


def test_decompression_bomb(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((60, 60), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    assert io.read_image(tmp_path / "a.png")[0].shape == (60, 60, 1)  # Pillow's warning zone is no error
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    refused(tmp_path / "a.png", "too large", "3600 pixels")


def test_truncated_pictures(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3)).astype(np.uint8)
    for ending in (".png", ".jpg", ".tif", ".bmp", ".ppm"):
        Image.fromarray(noise).save(tmp_path / f"a{ending}")
        raw = (tmp_path / f"a{ending}").read_bytes()
        (tmp_path / f"a{ending}").write_bytes(raw[: len(raw) // 2])
        refused(tmp_path / f"a{ending}", "try:")


# --------------------------------------------------------------------------------------------------- arrays in archives


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_objects_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = np.array([Evil(), None], object)
    np.save("a.npy", evil, allow_pickle=True)
    np.savez("a.npz", image=evil)
    Path("b.npy").write_bytes(pickle.dumps(Evil()))
    for name in ("a.npy", "a.npz", "b.npy"):
        refused(tmp_path / name)
    with h5py.File("a.h5", "w") as file:
        file.create_dataset("image", data=["text", "more"], dtype=h5py.string_dtype())
    refused(tmp_path / "a.h5", "not plain numbers")
    assert not Path("executed").exists()


@pytest.mark.parametrize("ending", [".npz", ".h5"])
def test_which_array(tmp_path, ending):
    path = tmp_path / f"a{ending}"

    def save(**arrays):
        if ending == ".npz":
            np.savez(path, **arrays)
        else:
            with h5py.File(path, "w") as file:
                for name, value in arrays.items():
                    file[name] = value

    one, two = np.zeros((7, 8), np.float32), np.ones((7, 8), np.uint8)
    save(image=one, label=two, native_shape=np.array([1, 2]), scribble=two * 3)
    assert io.read_image(path)[0].max() == 0
    assert io.read_label(path)[0].max() == 1
    assert io.read_label(path, key="scribble")[0].max() == 3
    refused(path, "scribbles", "image [7, 8]", read=lambda p: io.read_label(p, key="scribbles"))
    save(data=two)
    assert io.read_image(path)[0].max() == io.read_label(path)[0].max() == 1
    save(label=two)
    refused(path, "No array 'image'")
    save(first=one, second=two)
    refused(path, "first [7, 8], second [7, 8]", "name the arrays")
    save(image=np.zeros((5, 6, 7)), spacing=np.array([3.0, 1, 2]))
    _, geometry = io.read_image(path)
    assert (geometry.unit, geometry.spacing) == ("mm", (3, 1, 2))
    save(image=np.zeros((5, 6, 7)), affine=np.zeros((4, 4)))
    refused(path, "affine makes no sense")


def test_axes_of_bare_arrays(tmp_path):
    def shape(*axes, read=io.read_image):
        np.save(tmp_path / "a.npy", np.zeros(axes, np.uint8))
        return read(tmp_path / "a.npy")[0].shape

    assert shape(8, 9) == (8, 9, 1)
    assert shape(8, 9, 3) == (8, 9, 3)
    assert shape(8, 9, 10) == (8, 9, 10, 1)
    assert shape(3, 9, 10) == (3, 9, 10, 1)
    assert shape(8, 9, 10, 2) == (8, 9, 10, 2)
    assert shape(8, 9, 3, read=io.read_label) == (8, 9, 3)
    assert shape(8, 9, 1, read=io.read_label) == (8, 9)
    for axes in ((5,), (2, 8, 9, 10), (2, 2, 2, 2, 2), (0, 5)):
        with pytest.raises(UserError):
            shape(*axes)


def test_bare_volumes_are_canonical(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((5, 6, 7)))
    _, geometry = io.read_image(tmp_path / "a.npy")
    assert nib.aff2axcodes(geometry.affine) == ("S", "A", "R")
    assert geometry.unit == "px"


def test_npz_that_declares_more_than_it_holds(tmp_path):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (100000, 100000, 100), }"
    header += b" " * (118 - len(header) - 1) + b"\n"
    body = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("image.npy", body)
    refused(tmp_path / "a.npz", "(100000, 100000, 100)")
    (tmp_path / "a.npy").write_bytes(body)
    refused(tmp_path / "a.npy")


def test_hdf5_links_and_bombs(tmp_path):
    with h5py.File(tmp_path / "secret.h5", "w") as file:
        file["image"] = np.ones((7, 8))
    with h5py.File(tmp_path / "link.h5", "w") as file:
        file["image"] = h5py.ExternalLink(str(tmp_path / "secret.h5"), "/image")
    refused(tmp_path / "link.h5", "No array 'image'")
    (tmp_path / "raw").write_bytes(bytes(56))
    with h5py.File(tmp_path / "external.h5", "w") as file:
        file.create_dataset("image", (7, 8), "u1", external=[(str(tmp_path / "raw"), 0, 56)])
    refused(tmp_path / "external.h5", "no links")
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        file.create_dataset("image", (10**5, 10**5, 10), "f4", chunks=True, compression="gzip")
    refused(tmp_path / "bomb.h5", "nothing larger than the file")


# ------------------------------------------------------------------------------------------------------------- fuzzing


@pytest.fixture(scope="module")
def samples(tmp_path_factory) -> dict[str, bytes]:
    """A small valid file of every kind."""
    folder = tmp_path_factory.mktemp("samples")
    label = np.random.default_rng(0).integers(0, 3, (9, 9, 9)).astype(np.uint8)
    files = {}
    for ending, kind in io.SUFFIXES.items():
        if ending in io.DETACHED:  # the header of the attached form, and its voxels in a file of their own
            whole = files[io.DETACHED[ending]]
            mark, line = (
                (b"\n\n", b"\ndata file: fuzzed.raw\n\n") if ending == ".nhdr" else (b"LOCAL\n", b"fuzzed.raw\n")
            )
            files[ending], files[f"{ending} voxels"] = (
                whole.replace(mark, line, 1).split(line)[0] + line,
                whole.split(mark, 1)[1],
            )
            continue
        array = label[0] if kind == "picture" else label
        image = array[..., None]
        io.write_image(folder / f"a{ending}", image, Geometry(array.shape, AFFINE if kind != "picture" else np.eye(4)))
        files[ending] = (folder / f"a{ending}").read_bytes()
    return files


def mutate(raw: bytes, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    data = bytearray(raw)
    for _ in range(rng.integers(1, 6)):
        # Headers are where the interesting bytes are.
        data[rng.integers(len(data) if rng.random() < 0.5 else min(len(data), 128))] = rng.integers(256)
    return bytes(data[: rng.integers(1, len(data))] if rng.random() < 0.2 else data)


def fuzz(samples, folder, ending, seed):
    path = folder / f"fuzzed{ending}"
    path.write_bytes(mutate(samples[ending], seed))
    (folder / "fuzzed.raw").write_bytes(samples.get(f"{ending} voxels", b""))
    for read in (io.read_image, io.read_label):
        try:
            array, geometry = read(path)
        except UserError:
            continue
        assert array.shape[: len(geometry.shape)] == geometry.shape
        assert np.isfinite(geometry.affine).all()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ending=st.sampled_from(sorted(io.SUFFIXES)), seed=st.integers(0, 2**32))
def test_fuzzed_files_raise_only_user_errors(samples, tmp_path, ending, seed):
    fuzz(samples, tmp_path, ending, seed)


@pytest.mark.slow
@pytest.mark.parametrize("ending", sorted(io.SUFFIXES))
def test_fuzzed_files_long(samples, tmp_path, ending):
    for seed in range(2000):
        fuzz(samples, tmp_path, ending, seed)

"""Readers and writers: names, round trips, what must not be lost, label values."""

import nibabel as nib
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from files import AFFINE, nifti, refused
from medseg_jax.data import io
from medseg_jax.types import Geometry, UserError

SLOW = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


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

"""NIfTI: numbers, scaling, spaces, and headers that contradict themselves or are damaged."""

import gzip
import resource

import nibabel as nib
import numpy as np
import pytest

from files import AFFINE, nifti, refused
from medseg_jax.data import io
from medseg_jax.data.nifti import contradictions
from medseg_jax.types import Geometry


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

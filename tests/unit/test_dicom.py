"""DICOM series against NIfTI files of the same volume, from reading to prediction, conversion and DICOM-SEG."""

import highdicom
import nibabel as nib
import numpy as np
import pytest

import dicom_series as made
from medseg_jax.data import dicom, io
from medseg_jax.data.convert import convert
from medseg_jax.data.geometry import same_space
from medseg_jax.inference import dicom_seg
from medseg_jax.inference.cases import find_cases, load_case
from medseg_jax.types import Case, Labels, UserError

PLACES = [(made.AXIAL, False), (made.OBLIQUE, False), (made.AXIAL, True), (made.OBLIQUE, True)]


@pytest.mark.parametrize(("axes", "reverse"), PLACES)
def test_a_series_equals_the_nifti_of_the_same_volume(tmp_path, axes, reverse):
    array = made.volume() - 1000
    made.write_series(tmp_path / "s", array, axes, reverse=reverse)
    nib.save(nib.Nifti1Image(array, made.affine_of(axes)), tmp_path / "v.nii.gz")
    image, geometry = io.read_image(tmp_path / "s")
    expected, place = io.read_image(tmp_path / "v.nii.gz")
    np.testing.assert_array_equal(image, expected)
    assert image.dtype == np.int16
    assert not same_space(geometry, place)
    np.testing.assert_allclose(geometry.affine, made.affine_of(axes), atol=1e-5)


def test_a_series_without_suffixes_among_others_by_one_of_its_files(tmp_path):
    one = made.write_series(tmp_path, made.volume(1), uid="1.2.3")
    one = [file.rename(tmp_path / f"a{i}") for i, file in enumerate(one)]
    made.write_series(tmp_path, made.volume(2), uid="1.2.4")
    np.testing.assert_array_equal(io.read_image(one[2])[0][..., 0], made.volume(1))
    assert [case.id for case in find_cases(tmp_path, ("CT",))] == ["P1_thorax_3", "P1_thorax_4"]


def test_rescaling_by_fractions_gives_float32(tmp_path):
    made.write_series(tmp_path, made.volume(), intercept=0, RescaleSlope="0.5")
    image, _ = io.read_image(tmp_path)
    assert image.dtype == np.float32
    np.testing.assert_allclose(image[..., 0], made.volume() * 0.5)


def test_ids_lead_nowhere_and_are_unique(tmp_path):
    for name in "abc":
        made.write_series(tmp_path / name, made.volume(), PatientID="../../etc/passwd", SeriesDescription="x/y:z")
    found = dicom.find_series(tmp_path)
    assert len({one.id for one in found}) == 3
    assert all("/" not in one.id and not one.id.startswith(".") for one in found)


def test_a_mask_beside_the_series_is_not_predicted(tmp_path):
    made.write_series(tmp_path, made.volume())
    nib.save(nib.Nifti1Image(made.volume(), np.eye(4)), tmp_path / "mask.nii.gz")
    with pytest.raises(UserError, match="DICOM series and other images"):
        find_cases(tmp_path, ("CT",))


def test_load_case_through_the_shared_functions(tmp_path):
    made.write_series(tmp_path / "x" / "y", made.volume())
    (case,) = find_cases(tmp_path, ("CT",))
    np.testing.assert_array_equal(load_case(case, ("CT",))[0][..., 0], made.volume())


def test_convert_case_folders_with_masks(tmp_path):
    for name in "ab":
        made.write_series(tmp_path / "src" / name, made.volume(), made.OBLIQUE, PatientID=name)
        mask = (made.volume() > 10).astype(np.uint8)
        nib.save(nib.Nifti1Image(mask, made.affine_of(made.OBLIQUE)), tmp_path / "src" / name / "mask.nii.gz")
    dataset = convert(tmp_path / "src", tmp_path / "dst", quiet=True)
    assert [case.patient for case in dataset.cases] == ["a", "b"]
    image, label, geometry = dataset.load(dataset.cases[0])
    np.testing.assert_array_equal(image[..., 0], made.volume())
    np.testing.assert_array_equal(label, made.volume() > 10)
    np.testing.assert_allclose(geometry.affine, made.affine_of(made.OBLIQUE), atol=1e-4)


def test_convert_unlabelled_series(tmp_path):
    made.write_series(tmp_path / "src" / "one", made.volume())
    with pytest.raises(UserError, match="No masks found"):
        convert(tmp_path / "src", tmp_path / "dst", quiet=True)
    assert len(convert(tmp_path / "src", tmp_path / "dst", quiet=True, unlabelled=True).cases) == 1


@pytest.mark.parametrize(("axes", "reverse"), PLACES)
@pytest.mark.parametrize("labels", [Labels.simple("low", "high"), Labels.overlapping("low", "high")])
def test_dicom_seg_lies_where_the_nifti_lies(tmp_path, axes, reverse, labels):
    made.write_series(tmp_path / "s", made.volume(), axes, reverse=reverse)
    label = (made.volume() % (3 if labels.exclusive else 4)).astype(np.uint8)
    label[:, :, 0] = 0  # a frame with nothing on it is left out of the file
    dicom_seg.write(tmp_path / "seg.dcm", label, labels, tmp_path / "s")
    seg = highdicom.seg.segread(tmp_path / "seg.dcm")
    assert [seg.get_segment_description(n).segment_label for n in seg.segment_numbers] == ["low", "high"]
    found = seg.get_volume()
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    for channel, mask in enumerate(labels.masks(label)):
        voxels = np.argwhere(found.array[..., channel])
        theirs = (to_ras @ found.affine @ np.c_[voxels, np.ones(len(voxels))].T)[:3].T
        inside = np.argwhere(mask)
        ours = (made.affine_of(axes) @ np.c_[inside, np.ones(len(inside))].T)[:3].T
        assert len(theirs) == len(ours) > 0
        np.testing.assert_allclose(*(p[np.lexsort(p.round(2).T)] for p in (theirs, ours)), atol=1e-3)


def test_dicom_seg_needs_a_series(tmp_path):
    nib.save(nib.Nifti1Image(made.volume(), np.eye(4)), tmp_path / "v.nii.gz")
    with pytest.raises(UserError, match="only be written for DICOM"):
        dicom_seg.require_dicom([Case("v", (tmp_path / "v.nii.gz",))])


def test_predict_walks_from_series_to_nifti_and_dicom_seg(tmp_path):
    """A run trained on NIfTI predicts a DICOM series as it predicts the NIfTI of the same volume; then it resumes."""
    import medseg_jax as ms

    data = ms.make_phantoms(tmp_path / "data", dim=3, cases=6, sites=1, size=16, seed=0)
    stage = ms.Stage(
        ms.Supervised(ms.UNet(features=(4, 8), strides=((1,) * 3, (2,) * 3), kernel_sizes=((3,) * 3,) * 2)), steps=2
    )
    run = ms.train(ms.Config(data=str(data.root), stages=(stage,), cache=str(tmp_path / "cache")), tmp_path / "run")
    array = made.volume() * 10
    files = made.write_series(tmp_path / "in" / "series", array, reverse=True)
    nib.save(nib.Nifti1Image(array, made.affine_of()), tmp_path / "same.nii.gz")
    out = tmp_path / "out"
    (label,) = ms.predict(run, tmp_path / "in", out, save_dicom_seg=True, progress=False)
    (same,) = ms.predict(run, tmp_path / "same.nii.gz", tmp_path / "out2", progress=False)
    found, expected = nib.load(label), nib.load(same)
    np.testing.assert_array_equal(found.get_fdata(), expected.get_fdata())
    np.testing.assert_allclose(found.affine, expected.affine, atol=1e-5)
    segments = highdicom.seg.segread(next(out.glob("*.dcm")))
    assert [segments.get_segment_description(n).segment_label for n in segments.segment_numbers] == [*data.labels.names]
    stamp = label.stat().st_mtime_ns
    assert ms.predict(run, tmp_path / "in", out, save_dicom_seg=True, progress=False) == [label]
    assert label.stat().st_mtime_ns == stamp
    assert len(files) == len(list((tmp_path / "in" / "series").iterdir()))
    with pytest.raises(UserError, match="DICOM"):
        ms.predict(run, tmp_path / "same.nii.gz", tmp_path / "out3", save_dicom_seg=True, progress=False)

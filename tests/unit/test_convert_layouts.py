"""Folders with dataset.json, arrays, a folder a case, probability maps, fields of view."""

import json
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest

from making import SIZE, blob, convert, hashes, label_of, pairs, photo, save, save_palette
from medseg_jax.data.convert import Ambiguous
from medseg_jax.data.geometry import canonical_shape
from medseg_jax.types import Labels, UserError

# -------------------------------------------------------------------------------------------- folders with dataset.json


def volume(path: Path, array: np.ndarray, affine=None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.diag([1, 1, 2.5, 1]) if affine is None else affine), path)
    return path


def msd(root: Path, channels: int = 1) -> Path:
    rng = np.random.default_rng(0)
    entries = []
    for i in range(6):
        shape = (8, 9, 5) if channels == 1 else (8, 9, 5, channels)
        volume(root / "imagesTr" / f"t_{i}.nii.gz", rng.normal(size=shape).astype(np.float32))
        label = rng.integers(0, 3, (8, 9, 5)).astype(np.float32 if i == 0 else np.uint8)
        volume(root / "labelsTr" / f"t_{i}.nii.gz", label)
        entries.append({"image": f"./imagesTr/t_{i}.nii.gz", "label": f"./labelsTr/t_{i}.nii.gz"})
    volume(root / "imagesTs" / "t_9.nii.gz", rng.normal(size=shape).astype(np.float32))
    described = {
        "name": "Task",
        "modality": {str(i): f"M{i}" for i in range(channels)},
        "labels": {"0": "background", "1": "front", "2": "back"},
        "training": entries,
        "test": ["./imagesTs/t_9.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(described))
    return root


@pytest.mark.parametrize("channels", [1, 2])
def test_msd(src, dst, channels):
    dataset = convert(msd(src, channels), dst)
    assert dataset.labels == Labels.simple("front", "back")
    assert dataset.channels == tuple(f"M{i}" for i in range(channels))
    assert dataset.unit == "mm"
    assert [case.id for case in dataset.subset("val")] == ["t_0", "t_5"]
    assert [case.id for case in dataset.subset("test", labelled=None)] == ["t_9"]
    image, label, geometry = dataset.load(dataset.case("t_0"))
    assert image.shape == (8, 9, 5, channels)
    np.testing.assert_array_equal(label, nib.load(src / "labelsTr" / "t_0.nii.gz").get_fdata())
    np.testing.assert_array_equal(geometry.spacing, (1, 1, 2.5))
    assert label.dtype == np.uint8
    if channels == 1:
        copied, original = dst / "imagesTr" / "t_1_0000.nii.gz", src / "imagesTr" / "t_1.nii.gz"
        assert copied.read_bytes() == original.read_bytes()
        assert not copied.is_symlink()


def test_msd_values_must_be_named(src, dst):
    msd(src)
    volume(src / "labelsTr" / "t_3.nii.gz", np.full((8, 9, 5), 7, np.uint8))
    with pytest.raises(UserError) as error:
        convert(src, dst)
    assert "7 (360 voxels)" in str(error.value)
    assert "t_3" in str(error.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"training": [{"image": "../../x.nii.gz", "label": "y"}]}, "outside its folder|not there"),
        ({"training": [{"image": "imagesTr/t_0.nii.gz"}]}, "lacks image or label"),
        ({"training": [{"image": "imagesTr/t_0.nii.gz", "label": "labelsTr/no.nii.gz"}]}, "not there"),
        ({"training": [], "test": []}, "no case"),
    ],
)
def test_msd_that_lies(src, dst, change, words):
    described = json.loads((msd(src) / "dataset.json").read_text()) | change
    (src / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=words):
        convert(src, dst)


def test_broken_description(src, dst):
    pairs(src)
    (src / "dataset.json").write_text("{")
    with pytest.raises(UserError, match="JSON"):
        convert(src, dst)
    (src / "dataset.json").write_text("{}")
    with pytest.raises(UserError, match="neither"):
        convert(src, dst)
    assert len(convert(src, dst, layout="pairs").cases) == 3


def test_an_nnunet_folder_is_taken_as_it_is(phantoms, dst, tmp_path):
    dataset = convert(phantoms.root, dst)
    assert dataset.labels == phantoms.labels
    assert [(c.id, c.split, c.domain, c.patient) for c in dataset.cases] == [
        (c.id, c.split, c.domain, c.patient) for c in phantoms.cases
    ]
    for case in phantoms.cases:
        for one, other in zip(dataset.load(dataset.case(case.id))[:2], phantoms.load(case)[:2], strict=True):
            np.testing.assert_array_equal(one, other)
    again = convert(dst, tmp_path / "again")
    assert hashes(dst / "labelsTr") == hashes(tmp_path / "again" / "labelsTr")
    assert again.labels == dataset.labels


# ------------------------------------------------------------------------------------------------------------- arrays


def arrays(path: Path, shape=(5, 12, 14), **more: np.ndarray) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.stem))
    content = {"image": rng.random(shape, np.float32), "label": rng.integers(0, 4, shape, np.uint8), **more}
    if path.suffix == ".npz":
        np.savez(path, **content)
    else:
        with h5py.File(path, "w") as file:
            for key, value in content.items():
                file[key] = value
    return content["label"]


@pytest.mark.parametrize("ending", [".h5", ".npz"])
@pytest.mark.parametrize(("shape", "axes"), [((5, 12, 14), None), ((12, 14, 5), None), ((5, 12, 14), "xyz")])
def test_volumes_in_arrays(src, dst, ending, shape, axes):
    """The slice axis comes first in what is written, whichever axis it was."""
    label = arrays(src / f"p1{ending}", shape)
    arrays(src / f"p2{ending}", shape)
    dataset = convert(src, dst, classes="rv,myo,lv", spacing="5,1.5,1", **({"axes": axes} if axes else {}))
    assert dataset.labels == Labels.simple("rv", "myo", "lv")
    assert (dataset.file_ending, dataset.unit) == (".nii.gz", "mm")
    turned = label.transpose(2, 1, 0) if axes == "xyz" or shape[0] != 5 else label
    found = label_of(dataset, "p1")
    np.testing.assert_array_equal(found, turned)
    assert dataset.load(dataset.case("p1"))[2].spacing == (5, 1.5, 1)


@pytest.mark.parametrize("axes", [None, "zyx"])
def test_a_stored_spacing_turns_with_its_volume(src, dst, axes):
    arrays(src / "p1.npz", (14, 12, 5), spacing=np.array([0.5, 0.6, 5]))
    arrays(src / "p2.npz", (14, 12, 5), spacing=np.array([0.5, 0.6, 5]))
    dataset = convert(src, dst, classes="rv,myo,lv", **({"axes": axes} if axes else {}))
    image, _, geometry = dataset.load(dataset.case("p1"))
    shape, spacing = ((14, 12, 5), (0.5, 0.6, 5)) if axes else ((5, 12, 14), (5, 0.6, 0.5))
    assert image.shape[:3] == canonical_shape(geometry) == shape  # the slice axis stays the first
    assert dataset.unit == "mm"
    np.testing.assert_allclose(geometry.spacing, spacing, rtol=1e-6)


def test_a_stored_affine_turns_with_its_volume(src, dst):
    """A voxel lies where it lay."""
    affine = np.array([[0, -0.6, 0, 10], [-0.5, 0, 0, 20], [0, 0, 5, -30], [0, 0, 0, 1]])
    arrays(src / "p1.npz", (14, 12, 5), affine=affine)
    arrays(src / "p2.npz", (14, 12, 5), affine=affine)
    dataset = convert(src, dst, classes="rv,myo,lv")
    image, label, geometry = dataset.load(dataset.case("p1"))
    assert image.shape[:3] == (5, 12, 14)
    np.testing.assert_allclose(geometry.spacing, (5, 0.6, 0.5), rtol=1e-6)
    np.testing.assert_allclose(geometry.affine @ (3, 2, 1, 1), affine @ (1, 2, 3, 1), rtol=1e-6)
    with np.load(src / "p1.npz") as stored:
        assert label[3, 2, 1] == stored["label"][1, 2, 3]


def test_a_threshold_keeps_no_single_channel(src, dst):
    """One class for each channel is not one class."""
    for name in "ab":
        volume(src / "images" / f"{name}.nii.gz", np.ones((8, 9, 10), np.float32))
        hot = np.zeros((8, 9, 10, 2), np.float32)
        hot[2:4, ..., 0], hot[5:7, ..., 1] = 1, 1
        volume(src / "masks" / f"{name}.nii.gz", hot)
    with pytest.raises(UserError, match="channels that differ"):
        convert(src, dst, threshold=0.5)


def test_slices_in_arrays_belong_to_their_patient(src, dst):
    for patient in (1, 2, 3):
        for z in range(3):
            arrays(src / f"patient{patient:03d}_frame01_slice_{z}.h5", (12, 14))
    dataset = convert(src, dst)
    assert dataset.file_ending == ".tif"
    assert {case.patient for case in dataset.cases} == {"patient001", "patient002", "patient003"}
    assert {case.patient for case in dataset.subset("val")} == {"patient001"}
    image, _, _ = dataset.load(dataset.case("patient002_frame01_slice_1"))
    with h5py.File(src / "patient002_frame01_slice_1.h5") as file:
        np.testing.assert_array_equal(image[..., 0], file["image"][()])


def test_arrays_of_another_key(src, dst):
    scribble = np.full((5, 12, 14), 4, np.uint16)
    scribble[:, 2:4] = 1
    scribble[:, 6] = 0
    for name in ("a", "b"):
        arrays(src / name / "volume.h5", scribble=scribble)
    dataset = convert(src, dst, masks="scribble", ignore=4, classes="rv")
    assert [case.id for case in dataset.cases] == ["a", "b"]
    assert dataset.labels == Labels.simple("rv", ignore=2)
    label = label_of(dataset, "a")
    assert (label[:, 2:4] == 1).all()
    assert (label[:, 6] == 0).all()
    assert (label[:, 7:] == 2).all()
    with pytest.raises(UserError, match="No such array"):
        convert(src, dst, overwrite=True, masks="scribbel")


def test_arrays_that_do_not_fit_together(src, dst):
    arrays(src / "slices" / "a.h5", (12, 14))
    arrays(src / "volumes" / "b.h5", (5, 12, 14))
    with pytest.raises(UserError, match="Slices and volumes") as error:
        convert(src, dst)
    assert f"convert {src / 'slices'}" in str(error.value)
    with h5py.File(src / "slices" / "c.h5", "w") as file:
        file["image"] = np.zeros((12, 14))
    with pytest.raises(UserError) as error:
        convert(src / "slices", dst)
    assert "c.h5" in str(error.value)
    (src / "volumes" / "c.h5").write_bytes(b"not hdf5")
    with pytest.raises(UserError) as error:
        convert(src / "volumes", dst)
    assert "c.h5" in str(error.value)


# --------------------------------------------------------------------------------------------------- a folder each case


def test_channels_on_two_grids(src, dst, tmp_path):
    rng = np.random.default_rng(0)
    fine = np.diag([-1.0, -1, 3, 1])
    coarse = np.diag([-4.0, -4, 3, 1])
    coarse[:2, 3] = -1.5  # the faces of both grids coincide
    for i in range(3):
        ramp = np.broadcast_to(np.arange(4, dtype=np.float32)[:, None, None], (4, 4, 6)).copy()
        volume(src / f"P{i}" / "CT_image.nii.gz", rng.normal(size=(16, 16, 6)).astype(np.float32), fine)
        volume(src / f"P{i}" / "PET_image.nii.gz", ramp, coarse)
        volume(src / f"P{i}" / "CT_mask.nii.gz", rng.integers(0, 2, (16, 16, 6), np.uint8), fine)
        volume(src / f"P{i}" / "PET_mask.nii.gz", rng.integers(0, 2, (4, 4, 6), np.uint8), coarse)
    with pytest.raises(Ambiguous) as error:
        convert(src, dst)
    assert "--reference CT " in str(error.value)
    assert "--reference PET " in str(error.value)
    dataset = convert(src, dst, reference="CT", classes="tumour")
    assert dataset.channels == ("CT", "PET")
    image, label, geometry = dataset.load(dataset.case("P1"))
    assert image.shape == (16, 16, 6, 2)
    np.testing.assert_array_equal(geometry.affine, fine)
    np.testing.assert_array_equal(label, nib.load(src / "P1" / "CT_mask.nii.gz").get_fdata())
    # PET voxel 1 has its centre at x = -(1.5 + 4) mm: between CT voxels 5 and 6.
    np.testing.assert_allclose(image[5:7, 3, 3, 1].mean(), 1, atol=1e-4)
    other = convert(src, tmp_path / "pet", reference="pet")
    assert other.channels == ("CT", "PET")
    assert other.load(other.case("P1"))[0].shape == (4, 4, 6, 2)
    with pytest.raises(UserError, match="no channel"):
        convert(src, tmp_path / "x", reference="MR")


def test_probability_maps(src, dst):
    rng = np.random.default_rng(0)
    maps = rng.random((6, 8, 8)).astype(np.float32)
    for name in "ab":
        volume(src / "images" / f"{name}.nii.gz", maps)
        volume(src / "masks" / f"{name}.nii.gz", maps)
    with pytest.raises(UserError, match="whole numbers"):
        convert(src, dst)
    np.testing.assert_array_equal(label_of(convert(src, dst, threshold=0.5), "a"), maps > 0.5)


def test_a_mask_that_lies_elsewhere(src, dst):
    """Same shape, other place: shifted by two voxels, or a header that is wrong."""
    rng = np.random.default_rng(0)
    moved = np.eye(4)
    moved[0, 3] = 2
    label = rng.integers(0, 2, (8, 8, 8), np.uint8)
    for name in "ab":
        volume(src / "images" / f"{name}.nii.gz", rng.normal(size=(8, 8, 8)).astype(np.float32), np.eye(4))
        volume(src / "masks" / f"{name}.nii.gz", label, moved if name == "b" else np.eye(4))
    with pytest.raises(Ambiguous) as error:
        convert(src, dst)
    for words in ("2 mm", "masks/b.nii.gz", "--resize-labels", "--same-grid"):
        assert words in str(error.value)
    np.testing.assert_array_equal(label_of(convert(src, dst, same_grid=True), "b"), label)
    resampled = label_of(convert(src, dst, resize_labels=True, overwrite=True), "b")
    np.testing.assert_array_equal(resampled[2:], label[:-2])
    assert not resampled[:2].any()


def test_brats_like_folders(src, dst):
    for i in range(3):
        for name in ("flair", "t1"):
            volume(
                src / f"B_{i}" / f"B_{i}_{name}.nii.gz", np.random.default_rng(i).normal(size=(6, 6, 6)).astype("f4")
            )
        volume(src / f"B_{i}" / f"B_{i}_seg.nii.gz", np.random.default_rng(i).integers(0, 4, (6, 6, 6), np.uint8))
    dataset = convert(src, dst, classes="necrosis,edema,enhancing")
    assert dataset.channels == ("flair", "t1")
    assert [case.id for case in dataset.cases] == ["B_0", "B_1", "B_2"]
    (src / "B_1" / "B_1_t1.nii.gz").unlink()
    with pytest.raises(UserError, match="lacks a channel") as error:
        convert(src, dst, overwrite=True)
    assert "B_1" in str(error.value)


# ------------------------------------------------------------------------------------------------------ fields of view


def test_outside_the_field_of_view_is_ignored(src, dst, tmp_path):
    """Site y stores its field with an inverted palette, site z has none."""
    field = np.zeros(SIZE, np.uint8)
    field[4:20, 4:28] = 1
    for site in "xyz":
        pairs(src / site, names=("1", "2"))
    for name in ("1", "2"):
        save(src / "x" / "fov" / f"{name}_mask.png", field * 255)
        save_palette(src / "y" / "fov" / f"{name}.gif", 1 - field, [255, 255, 255, 0, 0, 0])
    plain = convert(src, tmp_path / "plain")
    assert plain.labels.ignore is None
    dataset = convert(src, dst, roi="fov")
    assert dataset.labels == Labels.simple("foreground", ignore=2)
    for site in "xy":
        expected = np.where(field, blob(0), 2)
        np.testing.assert_array_equal(label_of(dataset, f"{site}_1"), expected)
    np.testing.assert_array_equal(label_of(dataset, "z_1"), blob(0))


def test_fields_of_view_must_be_there(src, dst):
    with pytest.raises(UserError, match="--roi names no folder"):
        convert(pairs(src), dst, roi="fov")


@pytest.mark.parametrize("given", [{"images": "photos"}, {"masks": "outlines"}, {"masks": "gt/*.png"}])
def test_a_name_that_fits_nothing_is_never_left_aside(src, dst, given):
    with pytest.raises(UserError, match=f"--{next(iter(given))} names no folder and fits no file") as error:
        convert(pairs(src), dst, unlabelled=True, **given)
    assert "images, masks" in str(error.value)
    assert not dst.exists()


def test_drive_as_it_is_published(src, dst):
    """Here `mask` is the field of view and `1st_manual` the vessels."""
    for seed, name in enumerate(("21", "22")):
        save(src / "training" / "images" / f"{name}_training.tif", photo(seed))
        save(src / "training" / "1st_manual" / f"{name}_manual1.gif", blob(seed) * 255)
        save(src / "training" / "mask" / f"{name}_training_mask.gif", np.full(SIZE, 255, np.uint8))
    dataset = convert(src, dst, classes="vessel")
    np.testing.assert_array_equal(label_of(dataset, "22_training"), blob(1))

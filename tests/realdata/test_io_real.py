"""Real files of the data folder (MEDSEG_DATA): every set reads, and each trap of its README is met."""

import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medseg_jax.data import io
from medseg_jax.data.geometry import from_canonical, resample_to, same_space, spacing_canonical, to_canonical
from medseg_jax.types import UserError

if "MEDSEG_DATA" not in os.environ:
    pytest.skip("MEDSEG_DATA is not set", allow_module_level=True)
DATA = Path(os.environ["MEDSEG_DATA"])
LABEL_WORDS = ("mask", "label", "fov")


def folders() -> list[Path]:
    """Folders that hold readable files; the hundreds of dsb2018 are represented by two."""
    found = sorted({p.parent for p in DATA.rglob("*") if io.suffix(p) in io.SUFFIXES})
    nuclei = [f for f in found if "stage1_train" in f.parts]
    return [f for f in found if f not in nuclei] + nuclei[:2]


def values(path: Path) -> list[int]:
    return np.unique(io.read_label(path)[0]).tolist()


def first(pattern: str) -> Path:
    return min(DATA.glob(pattern))


@pytest.mark.parametrize("folder", folders(), ids=lambda f: str(f.relative_to(DATA))[:60])
def test_every_folder_reads(folder):
    for path in io.list_files(folder)[:3]:
        image, geometry = io.read_image(path)
        assert image.shape[:-1] == geometry.shape
        assert np.isfinite(image).all()
        name = str(path.relative_to(DATA))
        if any(word in name for word in LABEL_WORDS) and "bkai" not in name:
            label, _ = io.read_label(path)
            assert label.shape == geometry.shape
            assert label.any()


def test_hippocampus_geometry_and_header():
    for path in io.list_files(DATA / "hippocampus_msd04/imagesTr")[:10]:
        image, geometry = io.read_image(path)
        reference = nib.load(path)
        np.testing.assert_array_equal(image[..., 0], np.asarray(reference.dataobj).astype(image.dtype))
        np.testing.assert_array_equal(geometry.affine, reference.affine)
        label, other = io.read_label(path.parent.parent / "labelsTr" / path.name)
        assert same_space(geometry, other) == []
        assert set(np.unique(label)) == {0, 1, 2}
        assert to_canonical(image, geometry, True).shape == (*image.shape[2::-1], 1)


def test_written_prediction_lies_over_its_image(tmp_path):
    for path in (first("hippocampus_msd04/imagesTr/*"), first("sts_ctpet/*/CT_image.nii.gz")):
        image, geometry = io.read_image(path)
        bright = (to_canonical(image, geometry, True)[..., 0] > image.mean()).astype(np.uint8)
        io.write_label(tmp_path / "p.nii.gz", from_canonical(bright, geometry), geometry)
        written, source = nib.load(tmp_path / "p.nii.gz"), nib.load(path)
        np.testing.assert_array_equal(np.asarray(written.dataobj), image[..., 0] > image.mean())
        for field in ("qform_code", "sform_code", "pixdim", "srow_x", "quatern_b", "qoffset_z", "xyzt_units"):
            np.testing.assert_array_equal(written.header[field], source.header[field])


def test_pet_and_ct_on_different_grids():
    ct, ct_space = io.read_image(first("sts_ctpet/*/CT_image.nii.gz"))
    pet, pet_space = io.read_image(first("sts_ctpet/*/PET_image.nii.gz"))
    assert any("spacing 0.9766" in line for line in same_space(ct_space, pet_space))
    moved = resample_to(pet, pet_space, ct_space, 1)
    assert moved.shape == ct.shape
    assert abs(moved.mean() / pet.mean() - 1) < 0.1
    ct_mask, _ = io.read_label(first("sts_ctpet/*/CT_mask.nii.gz"))
    pet_mask, where = io.read_label(first("sts_ctpet/*/PET_mask.nii.gz"))
    moved_mask = resample_to(pet_mask[..., None], where, ct_space, "nearest")[..., 0]
    overlap = 2 * np.logical_and(moved_mask, ct_mask).sum() / (moved_mask.sum() + ct_mask.sum())
    assert overlap > 0.8
    assert spacing_canonical(ct_space)[0] == pytest.approx(3.27)


def test_inverted_palette_of_chasedb1():
    """The field of view is a bright disc: index 0 is painted white, so the index says the contrary of the picture."""
    for path in io.list_files(DATA / "vessels/CHASEDB1/training/fov")[:5]:
        label, _ = io.read_label(path)
        assert np.unique(label).tolist() == [0, 255]
        assert label[label.shape[0] // 2, label.shape[1] // 2] == 255
        assert label[0, 0] == 0


def test_inverted_palette_of_native_jsrt():
    image, _ = io.read_image(first("jsrt/native/images/*.png"))
    assert image.shape[-1] == 1
    assert image[-100:, 900:1100].mean() > image[800:1200, 500:700].mean()  # abdomen brighter than lung


def test_red_palette_of_idrid_is_the_index():
    for lesion in ("MA", "HE", "EX", "OD"):
        native = io.read_label(first(f"idrid/masks_tif_native/{lesion}/*.tif"))[0]
        np.testing.assert_array_equal(native, io.read_label(first(f"idrid/masks/{lesion}/IDRiD_01_*.png"))[0])
        assert io.read_image(first(f"idrid/masks_tif_native/{lesion}/*.tif"))[0].shape[-1] == 3


def test_encodings():
    """One class stored as 1 here and 255 there, instances, soft maps, JPEG ringing: all come raw."""
    assert values(first("wound_fuseg/medetec_224/train/masks/*")) == [0, 1]
    assert values(first("wound_fuseg/fuseg/train/masks/*")) == [0, 255]
    assert values(first("jsrt/derived_256/masks/heart/*")) == [0, 1]
    assert values(first("glas/Train_Folder/masks/*")) == list(range(8))
    assert values(first("optic_disc/derived_roi256/drishti_gs/masks_od/*")) == [0, 64, 128, 191, 255]
    assert len(values(first("polyp/kvasir_seg/masks/*"))) > 10
    assert io.read_image(first("dsb2018/stage1_train/*/images/*"))[0].shape[-1] == 3


def test_coloured_masks_of_bkai_are_refused():
    with pytest.raises(UserError, match="several channels that differ") as caught:
        io.read_label(first("polyp/bkai_igh_neopolyp/masks/*"))
    assert "(254, 0, 0)" in str(caught.value)


def test_acdc_and_left_atrium_archives():
    path = first("acdc/train_slices/*.h5")
    assert io.read_image(path)[0].dtype == np.float32
    assert set(values(path)) <= {0, 1, 2, 3}
    assert set(np.unique(io.read_label(path, key="scribble")[0])) <= {0, 1, 2, 3, 4}
    image, geometry = io.read_image(first("acdc/derived_128/*.npz"))
    assert (image.dtype, image.shape[1:], geometry.unit) == (np.uint8, (128, 128, 1), "px")
    assert to_canonical(image, geometry, True).shape == image.shape
    assert io.read_image(first("la2018/*/*.h5"))[0].shape[3] == 1

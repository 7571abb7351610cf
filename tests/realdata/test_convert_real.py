"""The call that converts each real data set, what comes out of it, and each trap of the data's README.

Expected pixels are read here with Pillow, nibabel and h5py directly, not with the project's readers.
"""

from collections import Counter
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg_jax import cli
from medseg_jax.data import convert as package
from medseg_jax.data.convert import Ambiguous
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.verify import check_dataset
from medseg_jax.types import Labels, UserError


@pytest.fixture
def dst(tmp_path) -> Path:
    return tmp_path / "dst"


def convert(src: Path, dst: Path, **options) -> Dataset:
    dataset = package.convert(src, dst, quiet=True, **options)
    errors = [problem for problem in check_dataset(dataset) if problem.severity == "error"]
    assert not errors, errors[:3]
    return dataset


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.array(image)


def load(dataset: Dataset, id: str) -> tuple[np.ndarray, np.ndarray]:
    image, label, _ = dataset.load(dataset.case(id))
    assert label is not None
    return image, label


def ids(dataset: Dataset, split: str) -> list[str]:
    return [case.id for case in dataset.subset(split)]


def splits(dataset: Dataset) -> dict[str, int]:
    return dict(Counter(case.split for case in dataset.cases))


def decisions(dst: Path) -> str:
    return "\n".join(Dataset.open(dst).extra["converted"])


# ------------------------------------------------------------------------------------------------------------ volumes


def test_hippocampus(real_data, dst):
    """MSD; images from uint8 to a maximum of 1.7 million; one label stored as float."""
    src = real_data / "hippocampus_msd04"
    dataset = convert(src, dst)
    assert (dataset.labels, dataset.channels, dataset.unit) == (Labels.simple("Anterior", "Posterior"), ("MRI",), "mm")
    files = sorted(io_stem(path) for path in (src / "imagesTr").iterdir())
    assert len(files) == 120
    assert ids(dataset, "val") == files[::5]
    assert len(ids(dataset, "train")) == 96
    largest, floats = 0.0, 0
    for case in dataset.cases:
        original = nib.load(src / "labelsTr" / f"{case.id}.nii.gz")
        written = nib.load(case.label)
        floats += original.get_data_dtype().kind == "f"
        assert written.get_data_dtype() == np.uint8
        np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(original.dataobj))
        np.testing.assert_array_equal(written.affine, original.affine)
        assert case.images[0].read_bytes() == (src / "imagesTr" / f"{case.id}.nii.gz").read_bytes()
        largest = max(largest, float(np.asarray(nib.load(case.images[0]).dataobj).max()))
    assert floats == 1
    assert largest > 1_000_000


def io_stem(path: Path) -> str:
    return path.name.removesuffix(".nii.gz")


def test_acdc_volumes(real_data, dst):
    """The lists lie in a folder beside; both phases of a patient stay together."""
    src = real_data / "acdc" / "derived_128"
    dataset = convert(src, dst, classes="RV,MYO,LV")
    assert dataset.labels == Labels.simple("RV", "MYO", "LV")
    assert splits(dataset) == {"train": 60, "val": 16}
    lists = real_data / "acdc" / "lists"
    train, val = ((lists / f"{name}.list").read_text().split() for name in ("train", "val"))
    assert set(ids(dataset, "train")) == set(train[:60])
    assert set(ids(dataset, "val")) == set(val[:16])
    assert len({case.patient for case in dataset.cases}) == 38
    for id in ("patient004_frame01", "patient099_frame02"):
        with np.load(src / f"{id}.npz") as stored:
            image, label = load(dataset, id)
            np.testing.assert_array_equal(image[..., 0], stored["image"])
            np.testing.assert_array_equal(label, stored["label"])


def test_acdc_slices_have_other_frame_numbers_than_the_list(real_data, dst):
    """Also: scribbles in which 4 is unlabelled."""
    src = real_data / "acdc" / "train_slices"
    dataset = convert(src, dst, classes="RV,MYO,LV")
    assert splits(dataset) == {"train": 20}
    assert {case.patient for case in dataset.cases} == {"patient003"}
    assert "11 cases that no list names went where their patient is" in decisions(dst)
    scribbles = convert(src, dst, classes="RV,MYO,LV", masks="scribble", ignore=4, overwrite=True)
    assert scribbles.labels == Labels.simple("RV", "MYO", "LV", ignore=4)
    image, label = load(scribbles, "patient003_frame15_slice_3")
    with h5py.File(src / "patient003_frame15_slice_3.h5") as stored:
        np.testing.assert_array_equal(image[..., 0], stored["image"][()])
        np.testing.assert_array_equal(label, stored["scribble"][()])


def test_acdc_as_a_whole_is_three_data_sets(real_data, dst):
    with pytest.raises(UserError, match="Slices and volumes") as error:
        convert(real_data / "acdc", dst)
    assert "acdc/derived_128 DST" in str(error.value)


def test_la2018(real_data, dst):
    """Stored as x, y, z: the slice axis is the last, and is written first."""
    src = real_data / "la2018"
    dataset = convert(src, dst, split="last-2", classes="atrium", spacing="0.625,0.625,0.625")
    assert splits(dataset) == {"train": 2, "val": 2}
    assert dataset.unit == "mm"
    image, label = load(dataset, "06SR5RBREL16DQ6M8LWS")
    with h5py.File(src / "06SR5RBREL16DQ6M8LWS" / "mri_norm2.h5") as stored:
        np.testing.assert_array_equal(image[..., 0], stored["image"][()].transpose(2, 1, 0))
        np.testing.assert_array_equal(label, stored["label"][()].transpose(2, 1, 0))


def test_sts_ctpet(real_data, dst):
    """PET lies on its own, coarser grid, and each grid has its mask."""
    src = real_data / "sts_ctpet"
    with pytest.raises(Ambiguous, match="grids"):
        convert(src, dst)
    dataset = convert(src, dst, reference="CT", classes="tumour", split="last-1")
    assert (dataset.channels, dataset.unit) == (("CT", "PET"), "mm")
    assert ids(dataset, "val") == ["STS_008"]
    image, label = load(dataset, "STS_003")
    ct, pet, mask = (nib.load(src / "STS_003" / f"{name}.nii.gz") for name in ("CT_image", "PET_image", "CT_mask"))
    np.testing.assert_array_equal(image[..., 0], ct.get_fdata(dtype=np.float32))
    np.testing.assert_array_equal(label, mask.get_fdata())
    # The mean uptake of the same tumour, drawn on either grid, must agree if the PET is in its place.
    drawn = nib.load(src / "STS_003" / "PET_mask.nii.gz").get_fdata() > 0
    np.testing.assert_allclose(image[..., 1][label > 0].mean(), pet.get_fdata()[drawn].mean(), rtol=0.1)
    assert image[..., 1].max() <= pet.get_fdata().max()
    on_pet = convert(src, dst, reference="PET", overwrite=True)
    assert load(on_pet, "STS_003")[0].shape == (29, 30, 51, 2)


# ------------------------------------------------------------------------------------------------- pictures, one class


def test_isic(real_data, dst):
    src = real_data / "isic2018_256"
    dataset = convert(src, dst, classes="lesion", limit=20)
    assert splits(dataset) == {"train": 20, "val": 20}
    folders = {split: {p.stem for p in (src / split / "images").iterdir()} for split in ("train", "val")}
    assert all(case.id in folders[case.split] for case in dataset.cases)
    image, label = load(dataset, "ISIC_0000000")
    np.testing.assert_array_equal(image, pixels(src / "train" / "images" / "ISIC_0000000.jpg"))
    np.testing.assert_array_equal(label * 255, pixels(src / "train" / "masks" / "ISIC_0000000_segmentation.png"))
    assert "masks: 600 by" in decisions(dst)


def test_wounds_are_0_255_here_and_0_1_there(real_data, dst):
    src = real_data / "wound_fuseg"
    dataset = convert(src, dst, classes="wound")
    assert Counter(case.domain for case in dataset.cases) == {"fuseg": 30, "medetec_224": 60}
    for site, name, scale in (("fuseg", "0011", 255), ("medetec_224", "foot-ulcer-0001", 1)):
        mask = pixels(src / site / "train" / "masks" / f"{name}.png")[..., 0]
        np.testing.assert_array_equal(load(dataset, f"{site}_{name}")[1] * scale, mask)
        assert mask.any()
    names = sorted(p.stem for p in (src / "fuseg" / "train" / "images").iterdir())
    assert [id for id in ids(dataset, "val") if id.startswith("fuseg")] == [f"fuseg_{name}" for name in names[::5]]
    # foot-ulcer-0001_1 ... are further photographs of the ulcer in foot-ulcer-0001: they stay together.
    by_patient: dict[str, set[str]] = {}
    for case in dataset.cases:
        by_patient.setdefault(case.patient or case.id, set()).add(case.split)
    assert all(len(found) == 1 for found in by_patient.values())
    assert dataset.case("medetec_224_foot-ulcer-0001_2").patient == "medetec_224_foot-ulcer-0001"


def test_polyps_of_four_centres(real_data, dst):
    """JPEG masks, soft edges, coloured masks, frames of one video."""
    src = real_data / "polyp"
    with pytest.raises(Ambiguous, match="black and white") as error:
        convert(src, dst, limit=1)
    assert "--classes NAME" in str(error.value)
    dataset = convert(src, dst, classes="polyp", limit=1)
    assert dataset.domains == ("bkai_igh_neopolyp", "cvc_clinicdb", "etis_larib", "kvasir_seg")
    assert dataset.labels == Labels.simple("polyp")
    names = sorted(p.stem for p in (src / "kvasir_seg" / "images").iterdir())
    assert [id for id in ids(dataset, "val") if "kvasir" in id] == [f"kvasir_seg_{names[0]}"]
    assert [id for id in ids(dataset, "val") if "cvc" in id] == ["cvc_clinicdb_33"]  # the last 8 of 40 frames validate
    assert "cvc_clinicdb: neighbouring images are alike" in decisions(dst)
    for case in dataset.cases:
        name = case.id.removeprefix(f"{case.domain}_")
        original = next((src / case.domain / "masks").glob(f"{name}.*"))
        mask = pixels(original)
        mask = mask if mask.ndim == 2 else mask.max(-1)
        image, label = load(dataset, case.id)
        # JPEG's colour noise moves single pixels across the threshold.
        assert ((mask > 127) != label).mean() < 1e-3, original
        picture = next((src / case.domain / "images").glob(f"{name}.*"))
        np.testing.assert_array_equal(image, pixels(picture))


def test_coloured_polyps(real_data, dst):
    src = real_data / "polyp" / "bkai_igh_neopolyp"
    with pytest.raises(Ambiguous) as error:
        convert(src, dst)
    assert "--classes NAME=red,NAME=green" in str(error.value)
    dataset = convert(src, dst, classes="neoplastic=red,benign=green", limit=3)
    assert dataset.labels == Labels.simple("neoplastic", "benign")
    for case in dataset.cases:
        mask = pixels(src / "masks" / f"{case.id}.jpeg").astype(int)
        red = mask[..., 0] > mask[..., 1]
        expected = np.where(mask.max(-1) > 127, np.where(red, 1, 2), 0)
        assert (expected != load(dataset, case.id)[1]).mean() < 1e-3


def test_membranes_are_dark_and_slices_consecutive(real_data, dst):
    src = real_data / "em_isbi2012"
    dataset = convert(src, dst, classes="membrane", invert=True)
    numbers = sorted(int(p.stem) for p in (src / "images").iterdir())
    assert sorted(map(int, ids(dataset, "train"))) == numbers[:14]
    assert sorted(map(int, ids(dataset, "val"))) == numbers[-4:]
    _, label = load(dataset, "10")
    np.testing.assert_array_equal(label == 1, pixels(src / "masks" / "10.png") == 0)
    convert(src, dst, overwrite=True)
    assert "--invert if the dark part is meant" in decisions(dst)


# -------------------------------------------------------------------------------------------------- objects, one by one


def test_glands_are_numbered(real_data, dst):
    src = real_data / "glas"
    with pytest.raises(Ambiguous, match="numbers of objects"):
        convert(src, dst)
    dataset = convert(src, dst, instances=True, classes="gland")
    assert len(dataset.cases) == 5
    mask = pixels(src / "Train_Folder" / "masks" / "3.png")
    assert mask.max() == 19
    np.testing.assert_array_equal(load(dataset, "3")[1], mask > 0)


def test_nuclei_have_a_file_each(real_data, dst):
    """RGBA images; one mask file per nucleus."""
    src = real_data / "dsb2018"
    dataset = convert(src, dst, classes="nucleus", limit=6)
    folders = sorted(p.name for p in (src / "stage1_train").iterdir())
    assert len(folders) == 60
    assert len(ids(dataset, "val")) == 6
    assert set(ids(dataset, "val")) <= set(folders[::5])
    assert not set(ids(dataset, "train")) & set(folders[::5])
    assert dataset.labels == Labels.simple("nucleus")
    for case in dataset.cases:
        image, label = load(dataset, case.id)
        folder = src / "stage1_train" / case.id
        np.testing.assert_array_equal(image, pixels(folder / "images" / f"{case.id}.png")[..., :3])
        nuclei = [pixels(path) > 0 for path in (folder / "masks").iterdir()]
        np.testing.assert_array_equal(label, np.any(nuclei, 0))


# ---------------------------------------------------------------------------------------------------- several classes


def test_chest_organs_overlap(real_data, dst):
    src = real_data / "jsrt" / "derived_256"
    dataset = convert(src, dst)
    organs = ("heart", "left_clavicle", "left_lung", "right_clavicle", "right_lung")
    assert dataset.labels == Labels.overlapping(*organs)
    names = sorted(p.stem for p in (src / "images").iterdir())
    assert len(names) == 124
    assert ids(dataset, "val") == names[::5]
    _, label = load(dataset, "JPCLN001")
    for organ, mask in zip(organs, dataset.labels.masks(label), strict=True):
        np.testing.assert_array_equal(mask, pixels(src / "masks" / organ / "JPCLN001.png"), err_msg=organ)


def test_native_chest_images_have_an_inverted_palette_and_no_masks(real_data, dst):
    src = real_data / "jsrt" / "native"
    with pytest.raises(Ambiguous, match="No masks found") as error:
        convert(src, dst)
    assert "--unlabelled" in str(error.value)
    with pytest.raises(Ambiguous, match="2 of 126 images"):
        convert(real_data / "jsrt", dst)


def test_masks_of_half_the_size(real_data, dst, tmp_path):
    """The copy holds no native masks, so a native image is paired with the masks of 256 pixels."""
    src = tmp_path / "src"
    (src / "images").mkdir(parents=True)
    (src / "masks").mkdir()
    jsrt = real_data / "jsrt"
    for name in ("JPCLN001", "JPCLN003"):
        (src / "images" / f"{name}.png").write_bytes((jsrt / "native" / "images" / f"{name}.IMG.png").read_bytes())
        (src / "masks" / f"{name}.png").write_bytes((jsrt / "derived_256/masks/heart" / f"{name}.png").read_bytes())
    with pytest.raises(UserError) as error:
        convert(src, dst)
    assert "mask 256 x 256, image 2048 x 2048" in str(error.value)
    assert "--resize-labels" in str(error.value)
    dataset = convert(src, dst, resize_labels=True, classes="heart")
    image, label = load(dataset, "JPCLN001")
    mask = pixels(src / "masks" / "JPCLN001.png")
    np.testing.assert_array_equal(label, np.kron(mask, np.ones((8, 8), bool)))
    # The palette runs from white to black: the brightness is what a person sees, not the index.
    np.testing.assert_array_equal(image[..., 0], 255 - pixels(src / "images" / "JPCLN001.png").astype(int))


def test_lesions_of_which_some_are_absent(real_data, dst):
    """One file per lesion, none where it is absent; a second folder holds some of the same masks as palette TIFFs."""
    src = real_data / "idrid"
    dataset = convert(src, dst, split="last-5", limit=1)
    assert dataset.labels == Labels.overlapping("EX", "HE", "MA", "OD", "SE")
    assert (ids(dataset, "train"), ids(dataset, "val")) == (["IDRiD_01"], ["IDRiD_20"])
    assert "masks_tif_native (4 of 105 masks)" in decisions(dst)
    for id in ("IDRiD_01", "IDRiD_20"):
        label = load(dataset, id)[1]
        for lesion, mask in zip(dataset.labels.names, dataset.labels.masks(label), strict=True):
            file = src / "masks" / lesion / f"{id}_{lesion}.png"
            assert file.is_file() or lesion == "SE"
            np.testing.assert_array_equal(mask, pixels(file) if file.is_file() else np.zeros_like(mask))


def test_the_palette_of_native_lesion_masks_does_not_become_grey(real_data):
    """0 is black, 1 is red, which is 76 once turned to grey: the index counts."""
    from medseg_jax.data.convert.masks import likely_foreground, read_mask

    src = real_data / "idrid"
    options = package.Options()
    values, _ = read_mask(src / "masks_tif_native" / "EX" / "IDRiD_01_EX.tif", None, options)
    assert set(np.unique(values)) == {0, 1}
    np.testing.assert_array_equal(likely_foreground(values, options), pixels(src / "masks" / "EX" / "IDRiD_01_EX.png"))


def test_optic_disc_and_cup(real_data, dst):
    """Soft maps of four experts; one of two domains has no cup."""
    src = real_data / "optic_disc"
    with pytest.raises(Ambiguous, match="Nobody outlined cup in the domain idrid"):
        convert(src, dst)
    dataset = convert(src, dst, classes="disc=od")
    assert dataset.labels == Labels.simple("disc")
    assert Counter(case.domain for case in dataset.cases) == {"drishti_gs": 50, "idrid": 54}
    folder = src / "derived_roi256" / "drishti_gs"
    _, label = load(dataset, "drishti_gs_drishtiGS_002")
    np.testing.assert_array_equal(label == 1, pixels(folder / "masks_od" / "drishtiGS_002.png") >= 128)
    both = convert(folder, dst, overwrite=True, limit=5)
    assert both.labels == Labels.overlapping("cup", "od")
    masks = both.labels.masks(load(both, "drishtiGS_002")[1])
    np.testing.assert_array_equal(masks[0], pixels(folder / "masks_cup" / "drishtiGS_002.png") >= 128)


def test_vessels_of_four_domains(real_data, dst):
    """Four formats, four ways of naming masks; a field of view whose palette is inverted (CHASEDB1)."""
    src = real_data / "vessels"
    dataset = convert(src, dst, classes="vessel", roi="fov", limit=1, test_domain="HRF")
    assert dataset.domains == ("CHASEDB1", "DRIVE", "HRF", "STARE")
    assert dataset.labels == Labels.simple("vessel", ignore=2)
    assert {case.domain for case in dataset.subset("test")} == {"HRF"}
    expected = {
        "DRIVE_21_training": "DRIVE/training/masks/21_manual1.gif",
        "CHASEDB1_Image_01L": "CHASEDB1/training/masks/Image_01L_1stHO.png",
        "STARE_im0001": "STARE/training/masks/im0001.vk.ppm",
        "HRF_01_dr": "HRF/training/masks/01_dr.tif",
    }
    for id, mask in expected.items():
        image, label = load(dataset, id)
        np.testing.assert_array_equal((label == 1) | (label == 2), (pixels(src / mask) > 0) | (label == 2), err_msg=id)
        assert (label == 1).any()
        if id.startswith(("STARE", "HRF")):
            assert not (label == 2).any()  # these have no field of view
        else:
            assert image[label != 2].mean() > 5 * image[label == 2].mean()  # inside is bright
            assert 0.05 < (label == 2).mean() < 0.5
    assert dataset.case("CHASEDB1_Image_01L").patient == "CHASEDB1_Image_01"


# ------------------------------------------------------------------------------------------------------- command line


def test_command_line(real_data, dst, capsys):
    argv = ["data", "convert", str(real_data / "glas"), str(dst)]
    assert cli.main(argv) == 1
    assert "--instances" in capsys.readouterr().err
    assert cli.main([*argv, "--instances", "--classes", "gland"]) == 0
    assert "classes: 1 gland" in capsys.readouterr().out
    assert cli.main(["data", "check", str(dst)]) == 0
    assert cli.main(["data", "preview", str(dst), "--n", "2"]) == 0

"""What does not match, domains, patients and splits: nothing is dropped in silence, and no patient is torn apart."""

import numpy as np
import pytest

from making import blob, convert, label_of, pairs, photo, save
from medseg_jax.data.convert import Ambiguous
from medseg_jax.data.dataset import Dataset
from medseg_jax.types import Labels, UserError

# ----------------------------------------------------------------------------------------------- what does not match


def test_images_without_masks_are_listed(src, dst, tmp_path):
    pairs(src)
    save(src / "images" / "z.png", photo(9))
    with pytest.raises(Ambiguous) as error:
        convert(src, dst)
    for words in ("1 of 4 images have no mask", "images/z.png", "--unlabelled", "--empty"):
        assert words in str(error.value)
    dataset = convert(src, dst, unlabelled=True)
    assert dataset.case("z").label is None
    assert dataset.case("z").images[0].parent.name == "imagesUn"
    empty = convert(src, tmp_path / "empty", empty=True)
    assert label_of(empty, "z").max() == 0


def test_images_alone_make_an_unlabelled_data_set(src, dst):
    for seed in range(3):
        save(src / f"{seed}.png", photo(seed))
    dataset = convert(src, dst, unlabelled=True, classes="polyp")
    assert len(dataset.subset("train", labelled=False)) == 3


def test_masks_without_images_are_listed(src, dst):
    pairs(src)
    save(src / "masks" / "qqq.png", blob(0) * 255)
    with pytest.raises(UserError, match="1 of 4 masks belong to no image") as error:
        convert(src, dst)
    assert "qqq" in str(error.value)


def test_no_masks_no_images_no_folder(src, dst):
    with pytest.raises(UserError, match="must be a folder"):
        convert(src, dst)
    src.mkdir()
    (src / "notes.txt").write_text("nothing")
    with pytest.raises(UserError, match="No image found"):
        convert(src, dst)
    save(src / "images" / "a.png", photo(0))
    save(src / "outlines" / "a.png", blob(0) * 255)
    with pytest.raises(Ambiguous) as error:
        convert(src, dst)
    assert "outlines" in str(error.value)
    save(src / "images" / "b.png", photo(1))
    save(src / "outlines" / "b.png", blob(1) * 255)
    assert len(convert(src, dst, masks="outlines").cases) == 2


def test_a_damaged_file_is_named_and_nothing_is_left(src, dst):
    pairs(src)
    (src / "images" / "b.png").write_bytes((src / "images" / "b.png").read_bytes()[:200])
    with pytest.raises(UserError) as error:
        convert(src, dst)
    assert "b.png" in str(error.value)
    assert not dst.exists()
    assert not dst.with_name("dst.tmp").exists()


# ------------------------------------------------------------------------------------- domains, patients and splits


def test_split_folders(src, dst):
    pairs(src / "train", names=("a", "b"))
    pairs(src / "val", names=("c",))
    pairs(src / "test", names=("d",))
    dataset = convert(src, dst)
    assert {case.id: case.split for case in dataset.cases} == {"a": "train", "b": "train", "c": "val", "d": "test"}
    assert dataset.case("d").images[0].parent.name == "imagesTs"


def test_equal_names_in_two_splits(src, dst):
    pairs(src / "train", names=("1", "2"))
    pairs(src / "val", names=("1",))
    assert [case.id for case in convert(src, dst).cases] == ["train_1", "train_2", "val_1"]


def test_domains_each_get_validation_cases(src, dst):
    pairs(src / "x", names="abcdef")
    pairs(src / "y", names="abcdef")
    dataset = convert(src, dst)
    assert [c.id for c in dataset.cases if c.split == "val"] == ["x_a", "x_f", "y_a", "y_f"]
    held_out = convert(src, dst, overwrite=True, test_domain="y")
    assert {c.domain for c in held_out.subset("test")} == {"y"}
    assert len(held_out.subset("test")) == 6
    with pytest.raises(UserError, match="no domain"):
        convert(src, dst, overwrite=True, test_domain="z")


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        # IDRiD, ISIC 2018, BUSI and REFUGE as they are published.
        (
            "A. Segmentation/1. Original Images/a. Training Set/IDRiD_0{}.jpg",
            "A. Segmentation/2. All Segmentation Groundtruths/a. Training Set/3. Hard Exudates/IDRiD_0{}_EX.tif",
        ),
        (
            "ISIC2018_Task1-2_Training_Input/ISIC_000000{}.jpg",
            "ISIC2018_Task1_Training_GroundTruth/ISIC_000000{}_segmentation.png",
        ),
        ("Dataset_BUSI_with_GT/benign ({}).png", "Dataset_BUSI_with_GT/benign ({})_mask.png"),
        ("Training400/g000{}.jpg", "Annotation-Training400/Disc_Cup_Masks/g000{}.bmp"),
        ("images/{}.npy", "labels/{}.npy"),
    ],
)
def test_published_layouts(src, dst, image, mask):
    for seed in range(6):
        for name, array in ((image, photo(seed)), (mask, blob(seed) * 255)):
            path = src / name.format(seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, array) if path.suffix == ".npy" else save(path, array)
    dataset = convert(src, dst)
    assert len(dataset.cases) == 6
    for seed, case in enumerate(dataset.cases):
        assert str(seed) in case.id
        np.testing.assert_array_equal(label_of(dataset, case.id), blob(seed))
    assert splits_of(dataset) == {"train": 4, "val": 2}
    assert dataset.domains == ("",)


def splits_of(dataset: Dataset) -> dict[str, int]:
    return {split: len(dataset.subset(split)) for split in ("train", "val", "test") if dataset.subset(split)}


def test_published_idrid_with_two_sets_and_two_lesions(src, dst):
    for part, numbers in (("a. Training Set", (1, 2, 3)), ("b. Testing Set", (4, 5))):
        for n in numbers:
            save(src / "1. Original Images" / part / f"IDRiD_{n:02d}.jpg", photo(n))
            for folder, lesion in (("1. Microaneurysms", "MA"), ("3. Hard Exudates", "EX")):
                if (n, lesion) != (2, "EX"):
                    path = src / "2. All Segmentation Groundtruths" / part / folder / f"IDRiD_{n:02d}_{lesion}.tif"
                    save(path, blob(n + (lesion == "EX")) * 255)
    dataset = convert(src, dst, classes="MA=Microaneurysms,EX=Hard_Exudates")
    assert dataset.labels == Labels.overlapping("MA", "EX")
    assert splits_of(dataset) == {"train": 2, "val": 1, "test": 2}
    np.testing.assert_array_equal(label_of(dataset, "IDRiD_02"), blob(2))
    np.testing.assert_array_equal(label_of(dataset, "IDRiD_05"), blob(5) + 2 * blob(6))


def test_patterns_for_domain_and_patient(src, dst):
    pairs(src, names=("a-p1-1", "a-p1-2", "b-p2-1", "b-p3-1"))
    dataset = convert(src, dst, domain_from=r"/(\w)-", patient_from=r"-(p\d)-")
    assert dataset.domains == ("a", "b")
    assert {c.id: c.patient for c in dataset.cases}["a_a-p1-2"] == "a_p1"
    with pytest.raises(UserError, match="does not fit"):
        convert(src, dst, overwrite=True, domain_from="(nothing)")
    with pytest.raises(UserError, match="regular expression"):
        convert(src, dst, overwrite=True, domain_from="(")


@pytest.mark.parametrize(
    ("names", "patients"),
    [
        (("patient1_frame01", "patient1_frame02", "patient2_frame01"), {"patient1", ""}),
        (("x_01L", "x_01R", "x_02L", "x_02R"), {"x_01", "x_02"}),
        (("ulcer-1", "ulcer-1_1", "ulcer-1_2", "ulcer-2"), {"ulcer-1", ""}),
        (("sub-A01_ses-1", "sub-A01_ses-2", "sub-B02_ses-1"), {"sub-A01", ""}),
        (("BraTS-GLI-00001-000", "BraTS-GLI-00001-001", "BraTS-GLI-00002-000"), {"BraTS-GLI-00001", ""}),
        (("im_01", "im_02", "im_03"), {""}),
        (("case_01", "case_02"), {""}),
    ],
)
def test_patients_are_told_from_names(src, dst, capsys, monkeypatch, names, patients):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as in a notebook, which gets plain lines all the same
    dataset = convert(pairs(src, names=names), dst, quiet=False)
    said = capsys.readouterr().out
    assert ("patients: every case counts as one" in said) == (set(patients) == {""})
    assert "\x1b" not in said
    assert {case.patient for case in dataset.cases} == set(patients)
    splits = {}
    for case in dataset.cases:
        splits.setdefault(case.patient or case.id, set()).add(case.split)
    assert all(len(found) == 1 for found in splits.values())


def test_lists_beside_the_data(src, dst):
    pairs(src / "data", names=("patient1_frame01", "patient1_frame09", "patient2_frame01", "patient3_frame01"))
    (src / "lists").mkdir()
    # As in ACDC: the list counts frames 01, 02 while the files carry the true numbers.
    (src / "lists" / "train.list").write_text(
        "patient1_frame01\npatient1_frame02\npatient2_frame01\npatient7_frame01\n"
    )
    (src / "lists" / "val.list").write_text("patient3_frame01\n")
    dataset = convert(src / "data", dst)
    assert [case.split for case in dataset.cases] == ["train", "train", "train", "val"]
    assert "went where their patient is" in (dst / "dataset.json").read_text()


def test_lists_by_option(src, dst, tmp_path):
    pairs(src, names="abc")
    (tmp_path / "tr.txt").write_text("images/a.png\nb.png 1\n")
    (tmp_path / "va.txt").write_text("c\n")
    given = f"train={tmp_path / 'tr.txt'},val={tmp_path / 'va.txt'}"
    assert [case.split for case in convert(src, dst, split=given).cases] == ["train", "train", "val"]
    with pytest.raises(UserError, match="no such file"):
        convert(src, dst, overwrite=True, split="train=nowhere.txt")
    with pytest.raises(UserError, match="1 of 3 cases are in no list"):
        convert(src, dst, overwrite=True, split=f"train={tmp_path / 'tr.txt'}")
    (tmp_path / "va.txt").write_text("c\na\n")
    with pytest.raises(UserError, match="Two lists"):
        convert(src, dst, overwrite=True, split=given)


def test_lists_that_tear_a_patient_apart(src, dst, tmp_path):
    pairs(src, names=("patient1_a", "patient1_b", "patient2_a"))
    (tmp_path / "t.list").write_text("patient1_a\npatient2_a")
    (tmp_path / "v.list").write_text("patient1_b")
    with pytest.raises(UserError, match="tear a patient apart"):
        convert(src, dst, split=f"train={tmp_path / 't.list'},val={tmp_path / 'v.list'}")


@pytest.mark.parametrize(
    ("rule", "validating"), [("every-2", ["1", "11", "3"]), ("every-5th", ["1"]), ("last-2", ["10", "11"])]
)
def test_split_rules(src, dst, rule, validating):
    dataset = convert(pairs(src, names=("1", "2", "3", "10", "11")), dst, split=rule)
    assert [case.id for case in dataset.subset("val")] == validating


@pytest.mark.parametrize("rule", ["evry-5", "last-0", "last-5", "folders"])
def test_impossible_splits(src, dst, rule):
    with pytest.raises(UserError):
        convert(pairs(src, names=("1", "2", "3", "10", "11")), dst, split=rule)


@pytest.mark.parametrize("frames", [True, False])
def test_consecutive_frames_are_not_torn_apart(src, dst, frames):
    rng = np.random.default_rng(0)
    scene = rng.normal(128, 40, (15, 64, 64))
    smooth = [scene[i : i + 4].mean(0) if frames else scene[i] for i in range(12)]
    for i, picture in enumerate(smooth):
        save(src / "images" / f"{i}.png", np.clip(picture, 0, 255).astype(np.uint8))
        save(src / "masks" / f"{i}.png", blob(i, (64, 64)) * 255)
    dataset = convert(src, dst)
    expected = ["10", "11"] if frames else ["0", "3", "8"]  # as text: 0, 1, 10, 11, 2, 3, ...
    assert [case.id for case in dataset.subset("val")] == expected
    assert ("neighbouring images are alike" in (dst / "dataset.json").read_text()) == frames


def test_limit_keeps_every_domain_and_split(src, dst):
    for site in "xy":
        pairs(src / site / "train", names="abcd")
        pairs(src / site / "val", names="ef")
    dataset = convert(src, dst, limit=1)
    assert [case.id for case in dataset.cases] == ["x_a", "x_e", "y_a", "y_e"]

"""Several classes and objects: values, colours, folders and files for each; what is ambiguous is asked about."""

import numpy as np
import pytest
from PIL import Image

from making import SIZE, blob, convert, label_of, pairs, photo, save
from medseg_jax.data.convert import Ambiguous
from medseg_jax.data.convert.options import COLOURS
from medseg_jax.types import Labels, UserError

# ------------------------------------------------------------------------------------------------- several classes


def test_values_are_renumbered_and_named(src, dst):
    for seed, name in enumerate("abc"):
        save(src / "images" / f"{name}.png", photo(seed))
        mask = blob(seed) * 10
        mask[6:9, 8:12] = 20
        save(src / "masks" / f"{name}.png", mask)
    dataset = convert(src, dst, classes="core=20,edema=10")
    assert dataset.labels == Labels.simple("core", "edema")
    expected = np.asarray(Image.open(src / "masks" / "a.png"))
    np.testing.assert_array_equal(label_of(dataset, "a"), np.array([0, 2, 1])[expected // 10])


def test_unknown_and_ignored_values(src, dst, tmp_path):
    pairs(src, scale=1)
    mask = blob(0)
    mask[4:6, 5:9] = 2
    mask[20:, :] = 4
    save(src / "masks" / "a.png", mask)
    with pytest.raises(UserError) as error:
        convert(src, dst, classes="x=1,y=2")
    assert "4 (128 voxels)" in str(error.value)
    assert "--ignore 4" in str(error.value)
    dataset = convert(src, dst, classes="x=1,y=2", ignore=4)
    assert dataset.labels.ignore == 3
    np.testing.assert_array_equal(label_of(dataset, "a")[20:], 3)
    joined = convert(src, tmp_path / "joined", classes="x=1+2", ignore=4)
    assert set(np.unique(label_of(joined, "a"))) == {0, 1, 2}
    assert joined.labels == Labels.simple("x", ignore=2)


def test_background_may_have_another_value(src, dst):
    """REFUGE: cup 0, disc 128, background 255."""
    for seed, name in enumerate("abc"):
        save(src / "images" / f"{name}.png", photo(seed))
        mask = np.where(blob(seed), 128, 255).astype(np.uint8)
        mask[8:11, 10:13] = 0
        save(src / "masks" / f"{name}.bmp", mask)
    dataset = convert(src, dst, classes="cup=0,disc=128,background=255")
    assert dataset.labels == Labels.simple("cup", "disc")
    expected = blob(0) * 2
    expected[8:11, 10:13] = 1
    np.testing.assert_array_equal(label_of(dataset, "a"), expected)


@pytest.mark.parametrize("names", ["x", "x,y", "x,y,z", "x,y,z,u"])
def test_number_of_names(src, dst, names):
    """Values 10, 20: two names fit, one joins everything."""
    pairs(src, scale=10)
    save(src / "masks" / "a.png", blob(0) * 20)
    if len(names) <= 3:
        assert convert(src, dst, classes=names).labels == Labels.simple(*names.split(","))
    else:
        with pytest.raises(UserError, match="more classes"):
            convert(src, dst, classes=names)


def test_values_without_names_are_numbered(src, dst):
    pairs(src, scale=1)
    save(src / "masks" / "a.png", blob(0) * 2)
    dataset = convert(src, dst)
    assert dataset.labels.names == ("class_1", "class_2")
    assert "--classes NAME=1,NAME=2" in (dst / "dataset.json").read_text()


def test_a_class_folder_each_absent_files_and_overlap(src, dst, tmp_path):
    for seed, name in enumerate(("s_01", "s_02", "s_03")):
        save(src / "images" / f"{name}.png", photo(seed))
        save(src / "masks" / "EX" / f"{name}_EX.png", blob(seed) * 255)
        if name != "s_02":
            save(src / "masks" / "MA" / f"{name}_MA.png", blob(seed + 1).astype(bool))
    dataset = convert(src, dst)
    assert dataset.labels == Labels.overlapping("EX", "MA")
    np.testing.assert_array_equal(label_of(dataset, "s_01"), blob(0) + 2 * blob(1))
    np.testing.assert_array_equal(label_of(dataset, "s_02"), blob(1))
    exclusive = convert(src, tmp_path / "exclusive", exclusive=True)
    assert exclusive.labels == Labels.simple("EX", "MA")
    np.testing.assert_array_equal(label_of(exclusive, "s_01"), np.where(blob(1), 2, blob(0)))
    renamed = convert(src, tmp_path / "renamed", classes="exudate=EX")
    assert renamed.labels == Labels.simple("exudate")
    merged = convert(src, tmp_path / "merged", classes="lesion")
    np.testing.assert_array_equal(label_of(merged, "s_01"), blob(0) | blob(1))
    with pytest.raises(UserError, match="EX, MA"):
        convert(src, tmp_path / "x", classes="exudate=EXX,b=MA")


def test_classes_that_do_not_overlap_are_exclusive_unless_told(src, dst, tmp_path):
    for seed, name in enumerate("abc"):
        save(src / "images" / f"{name}.png", photo(seed))
        save(src / "masks" / "left" / f"{name}.png", blob(seed) * (np.arange(32) < 10).astype(np.uint8))
        save(src / "masks" / "right" / f"{name}.png", blob(seed) * (np.arange(32) >= 10).astype(np.uint8))
    assert convert(src, dst).labels == Labels.simple("left", "right")
    assert convert(src, tmp_path / "multi", multilabel=True).labels == Labels.overlapping("left", "right")


def test_a_name_ending_each_class(src, dst):
    for seed, name in enumerate("abc"):
        save(src / "images" / f"{name}.png", photo(seed))
        save(src / "masks" / f"{name}_lung.png", blob(seed) * 255)
        save(src / "masks" / f"{name}_heart.png", blob(seed + 2) * 255)
    dataset = convert(src, dst)
    assert dataset.labels == Labels.overlapping("heart", "lung")
    np.testing.assert_array_equal(label_of(dataset, "a"), blob(2) + 2 * blob(0))


def test_mask_folders_named_by_class_and_a_domain_without_one(src, dst):
    for seed, name in enumerate("abc"):
        for site in ("x", "y"):
            save(src / site / "images" / f"{name}.png", photo(seed + 5 * (site == "y")))
            save(src / site / "masks_disc" / f"{name}.png", blob(seed) * 255)
        save(src / "x" / "masks_cup" / f"{name}.png", blob(seed) * 255)
    with pytest.raises(Ambiguous) as error:
        convert(src, dst)
    assert "Nobody outlined cup in the domain y" in str(error.value)
    assert "--classes disc " in str(error.value)
    assert "--domains x " in str(error.value)
    dataset = convert(src, dst, classes="disc")
    assert dataset.labels == Labels.simple("disc")
    assert dataset.domains == ("x", "y")
    alone = convert(src, dst, overwrite=True, domains="x")
    assert alone.labels == Labels.overlapping("cup", "disc")
    assert len(alone.cases) == 3


def test_two_raters_are_asked_about(src, dst):
    for seed, name in enumerate("abc"):
        save(src / "images" / f"{name}.png", photo(seed))
        save(src / "masks" / f"{name}_1stHO.png", blob(seed) * 255)
        save(src / "masks" / f"{name}_2ndHO.png", blob(seed + 1) * 255)
    with pytest.raises(Ambiguous) as error:
        convert(src, dst)
    assert '--masks "*1stHO*"' in str(error.value)
    dataset = convert(src, dst, masks="*1stHO*")
    np.testing.assert_array_equal(label_of(dataset, "b"), blob(1))


def test_two_mask_folders_are_asked_about(src, dst):
    pairs(src)
    pairs(src, masks="labels", scale=1)
    with pytest.raises(Ambiguous) as error:
        convert(src, dst)
    assert "--masks labels " in str(error.value)
    assert "--masks masks " in str(error.value)
    assert "options: --masks labels" in convert(src, dst, masks="labels").extra["converted"]


def test_a_second_folder_with_some_of_the_same_masks_is_left_out(src, dst):
    for seed, name in enumerate("abc"):
        save(src / "images" / f"{name}.png", photo(seed))
        for kind in ("EX", "MA"):
            save(src / "masks" / kind / f"{name}.png", blob(seed) * 255)
    save(src / "masks_tif_native" / "EX" / "a.tif", blob(4) * 255)
    dataset = convert(src, dst)
    assert dataset.labels.names == ("EX", "MA")
    np.testing.assert_array_equal(label_of(dataset, "a"), 3 * blob(0))
    assert "masks_tif_native (1 of 6 masks)" in (dst / "dataset.json").read_text()


@pytest.mark.parametrize("jpeg", [False, True])
def test_coloured_masks_need_names(src, dst, tmp_path, jpeg):
    ending, options = (".jpg", {"quality": 90, "subsampling": 0}) if jpeg else (".png", {})
    for seed, name in enumerate("abc"):
        save(src / "images" / f"{name}.png", photo(seed))
        colours = np.zeros((*SIZE, 3), np.uint8)
        colours[blob(seed) > 0] = COLOURS["green" if name == "b" else "red"]
        save(src / "masks" / f"{name}{ending}", colours, **options)
    with pytest.raises(Ambiguous) as error:
        convert(src, dst)
    assert "--classes NAME=red,NAME=green" in str(error.value)
    dataset = convert(src, dst, classes="bad=red,good=green")
    assert (label_of(dataset, "a") == blob(0)).mean() > (0.97 if jpeg else 0.999999)
    assert (label_of(dataset, "b") == 2 * blob(1)).mean() > (0.97 if jpeg else 0.999999)
    merged = convert(src, tmp_path / "merged", classes="polyp")
    assert merged.labels == Labels.simple("polyp")
    assert (label_of(merged, "b") == blob(1)).mean() > (0.97 if jpeg else 0.999999)
    with pytest.raises(UserError, match="no class stands for") as error:
        convert(src, tmp_path / "x", classes="bad=red,good=blue")
    assert "green" in str(error.value)


def test_coloured_masks_in_one_domain_only(src, dst):
    pairs(src / "x")
    pairs(src / "y")
    colours = np.zeros((*SIZE, 3), np.uint8)
    colours[blob(0) > 0] = COLOURS["red"]
    save(src / "y" / "masks" / "a.png", colours)
    with pytest.raises(Ambiguous, match="x are black and white"):
        convert(src, dst)
    dataset = convert(src, dst, classes="polyp")
    np.testing.assert_array_equal(label_of(dataset, "y_a"), blob(0))
    np.testing.assert_array_equal(label_of(dataset, "x_a"), blob(0))


# ------------------------------------------------------------------------------------------------- objects, one by one


def test_a_file_for_each_object(src, dst):
    for seed in range(6):
        name = f"{seed:x}f{seed}"
        save(src / "stage1_train" / name / "images" / f"{name}.png", photo(seed))
        for k in range(3):
            part = np.zeros(SIZE, np.uint8)
            part[2 + 6 * k : 6 + 6 * k, 4 : 9 + seed] = 255
            save(src / "stage1_train" / name / "masks" / f"{seed}{k}e7.png", part)
    dataset = convert(src, dst, classes="nucleus")
    assert len(dataset.cases) == 6
    assert dataset.labels == Labels.simple("nucleus")
    assert label_of(dataset, "3f3").sum() == 3 * 4 * 8
    assert "one per object: joined" in (dst / "dataset.json").read_text()


def numbered(objects: int) -> np.ndarray:
    mask = np.zeros((40, 60), np.uint8)
    for k in range(objects):
        row, column = divmod(k, 6)
        mask[row * 8 + 1 : row * 8 + 6, column * 9 + 1 : column * 9 + 7] = k + 1
    return mask


def test_values_that_number_objects_are_asked_about(src, dst):
    for seed, objects in enumerate((5, 12, 7, 20)):
        save(src / "images" / f"{seed}.png", photo(seed, (40, 60)))
        save(src / "masks" / f"{seed}.png", numbered(objects))
    with pytest.raises(Ambiguous) as error:
        convert(src, dst)
    assert "--instances" in str(error.value)
    dataset = convert(src, dst, instances=True, classes="gland")
    assert dataset.labels == Labels.simple("gland")
    np.testing.assert_array_equal(label_of(dataset, "3"), numbered(20) > 0)


def test_a_case_folder_with_a_file_for_each_class(src, dst):
    for seed in range(6):
        save(src / f"p{seed}" / "images" / f"p{seed}.png", photo(seed))
        save(src / f"p{seed}" / "masks" / "lung.png", blob(seed) * 255)
        save(src / f"p{seed}" / "masks" / "heart.png", blob(seed + 1) * 255)
    dataset = convert(src, dst)
    assert dataset.labels == Labels.overlapping("heart", "lung")

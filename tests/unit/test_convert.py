"""Every layout and every trap in small: what is recognised, what is decided, what is refused, and with which words."""

import hashlib
import json
import os
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medseg_jax import cli
from medseg_jax.cli import data as verbs
from medseg_jax.data import convert as package
from medseg_jax.data import io
from medseg_jax.data.convert import Ambiguous
from medseg_jax.data.convert.options import COLOURS, name_colour, parse_classes, parse_colour
from medseg_jax.data.convert.words import match, natural, read_name
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.verify import check_dataset
from medseg_jax.types import Labels, UserError

SIZE = (24, 32)


def convert(src, dst, **options) -> Dataset:
    return package.convert(src, dst, quiet=True, **options)


def photo(seed: int = 0, size=SIZE) -> np.ndarray:
    """RGB noise [h, w, 3]: no two alike."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def blob(seed: int = 0, size=SIZE) -> np.ndarray:
    """A rectangle [h, w] of 0 and 1 that lies elsewhere for each seed."""
    mask = np.zeros(size, np.uint8)
    top, left = 2 + seed % 5, 3 + seed % 7
    mask[top : top + 12, left : left + 14] = 1
    return mask


def save(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def pairs(root: Path, names=("a", "b", "c"), images="images", masks="masks", scale=255) -> Path:
    for seed, name in enumerate(names):
        save(root / images / f"{name}.png", photo(seed))
        save(root / masks / f"{name}.png", blob(seed) * np.uint8(scale))
    return root


def label_of(dataset: Dataset, id: str) -> np.ndarray:
    label = dataset.load(dataset.case(id))[1]
    assert label is not None
    return label


def hashes(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def no_errors(dataset: Dataset) -> bool:
    return not [p for p in check_dataset(dataset) if p.severity == "error"]


@pytest.fixture
def src(tmp_path) -> Path:
    return tmp_path / "src"


@pytest.fixture
def dst(tmp_path) -> Path:
    return tmp_path / "dst"


# ------------------------------------------------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("name", "role", "split", "rest"),
    [
        ("images", "image", None, ()),
        ("imagesTr", "image", "train", ()),
        ("labelsTs", "mask", "test", ()),
        ("GroundTruth", "mask", None, ()),
        ("Ground_truth", "mask", None, ()),
        ("TrainImages", "image", "train", ()),
        ("a. Training Set", None, "train", ("a", "Set")),
        ("masks_od", "mask", None, ("od",)),
        ("fov", "roi", None, ()),
        ("stage1_train", None, "train", ("stage1",)),
        ("img001", "image", None, ("001",)),
        ("CT_mask", "mask", None, ("CT",)),
        ("drishti_gs", None, None, ("drishti", "gs")),
        ("1GU15S0GJ6PFNARO469W", None, None, ("1GU15S0GJ6PFNARO469W",)),
        ("0a7d30b252359a10fd29", None, None, ("0a7d30b252359a10fd29",)),
    ],
)
def test_names_are_read(name, role, split, rest):
    words = read_name(name)
    assert (words.role, words.split, words.rest) == (role, split, rest)


@pytest.mark.parametrize(
    ("images", "masks", "expected"),
    [
        (["1", "10", "2"], ["2", "1", "10"], {0: 2, 1: 0, 2: 1}),
        (["ISIC_1", "ISIC_2"], ["ISIC_1_segmentation", "ISIC_2_segmentation"], {0: 0, 1: 1}),
        (["21_training", "22_training"], ["22_manual1", "21_manual1"], {0: 1, 1: 0}),
        (["im0001", "im0002"], ["im0001.vk", "im0002.vk"], {0: 0, 1: 1}),
        (["Image_01L", "Image_01R"], ["Image_01R_1stHO", "Image_01L_1stHO"], {0: 1, 1: 0}),
        (["IMG_01", "IMG_02"], ["img_01", "img_02"], {0: 0, 1: 1}),
        (["frame7", "frame8"], ["polyp8", "polyp7"], {0: 1, 1: 0}),
        # The longest image name wins: case_1_EX must not go to case.
        (["case", "case_1"], ["case_1_EX", "case_EX"], {0: 1, 1: 0}),
    ],
)
def test_masks_find_their_images(images, masks, expected):
    found = match(images, masks, [""] * len(masks)).found
    assert {mask: image for mask, (image, _) in found.items()} == expected


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.text("abcxyz0123456789_", min_size=1, max_size=8), min_size=1, max_size=20, unique=True),
    st.sampled_from(["", "_mask", "_segmentation", "_1stHO", "-EX"]),
    st.randoms(),
)
def test_any_common_ending_matches_every_mask(names, ending, random):
    shuffled = list(range(len(names)))
    random.shuffle(shuffled)
    found = match(names, [names[i] + ending for i in shuffled], [""] * len(names)).found
    assert {mask: image for mask, (image, _) in found.items()} == dict(enumerate(shuffled))


def test_natural_order():
    assert sorted(["im10", "im2", "im1", "a3"], key=natural) == ["a3", "im1", "im2", "im10"]


def test_classes_and_colours_are_parsed():
    assert parse_classes("rv=1,myo=2+3") == [("rv", ("1",)), ("myo", ("2", "3"))]
    assert parse_classes("a, b") == [("a", ()), ("b", ())]
    for wrong in ("a,a", "background", "a=1,b", "=1"):
        with pytest.raises(UserError):
            parse_classes(wrong)
    assert parse_colour("#FF8000") == (255, 128, 0)
    assert all(name_colour(colour) == name for name, colour in COLOURS.items())
    with pytest.raises(UserError, match="colour"):
        parse_colour("rde")


def test_a_mistyped_option_is_answered_with_its_neighbour(src, dst):
    with pytest.raises(UserError) as error:
        convert(pairs(src), dst, class_="x", clases="y")
    assert "classes" in str(error.value)


# ----------------------------------------------------------------------------------------------- one mask for one class


@pytest.mark.parametrize(("images", "masks"), [("images", "masks"), ("img", "gt"), ("Input", "GroundTruth")])
@pytest.mark.parametrize("scale", [1, 255, 200])
def test_image_and_mask_folders(src, dst, images, masks, scale):
    dataset = convert(pairs(src, images=images, masks=masks, scale=scale), dst)
    assert [case.id for case in dataset.cases] == ["a", "b", "c"]
    assert dataset.labels == Labels.simple("foreground")
    assert dataset.channels == ("R", "G", "B")
    assert [case.split for case in dataset.cases] == ["val", "train", "train"]
    for seed, case in enumerate(dataset.cases):
        image, label, _ = dataset.load(case)
        np.testing.assert_array_equal(image, photo(seed))
        np.testing.assert_array_equal(label, blob(seed))
    assert no_errors(dataset)


def test_masks_beside_images_in_one_folder(src, dst):
    for seed, name in enumerate("abc"):
        save(src / f"{name}.png", photo(seed))
        save(src / f"{name}_mask.png", blob(seed) * 255)
    dataset = convert(src, dst, classes="wound")
    assert [case.id for case in dataset.cases] == ["a", "b", "c"]
    assert dataset.labels.names == ("wound",)
    np.testing.assert_array_equal(label_of(dataset, "b"), blob(1))


def test_jpeg_images_become_png_and_jpeg_masks_binary(src, dst):
    for seed, name in enumerate("abc"):
        save(src / "images" / f"{name}.jpg", photo(seed))
        save(src / "masks" / f"{name}.jpg", blob(seed) * 255, quality=60)
    dataset = convert(src, dst)
    assert dataset.file_ending == ".png"
    for seed, case in enumerate(dataset.cases):
        image, label, _ = dataset.load(case)
        np.testing.assert_array_equal(image, np.asarray(Image.open(src / "images" / f"{case.id}.jpg")))
        np.testing.assert_array_equal(label, blob(seed))
    assert "JPEG ringing" in (dst / "dataset.json").read_text()


def test_soft_edges_are_cut_at_127_and_said(src, dst):
    for seed, name in enumerate("abc"):
        save(src / "images" / f"{name}.png", photo(seed))
        distance = np.hypot(*(np.indices(SIZE) - np.array([[[11]], [[12 + seed]]])))
        save(src / "masks" / f"{name}.png", np.clip(128 + 50 * (8 - distance), 0, 255).astype(np.uint8))
    dataset = convert(src, dst)
    expected = np.asarray(Image.open(src / "masks" / "b.png")) > 127
    np.testing.assert_array_equal(label_of(dataset, "b") == 1, expected)
    assert "above 127 is foreground" in (dst / "dataset.json").read_text()


def test_threshold_and_invert(src, dst, tmp_path):
    for seed, name in enumerate("abc"):
        save(src / "images" / f"{name}.png", photo(seed))
        save(src / "masks" / f"{name}.png", blob(seed) * 40 + 30)
    dark = convert(src, dst, threshold=50, invert=True, classes="membrane")
    np.testing.assert_array_equal(label_of(dark, "a"), 1 - blob(0))
    bright = convert(src, tmp_path / "other", threshold=50)
    np.testing.assert_array_equal(label_of(bright, "a"), blob(0))


def test_grey_levels_are_asked_about(src, dst):
    pairs(src)
    level = blob(0) * 255
    level[8:12, 8:12] = 128
    save(src / "masks" / "a.png", level)
    with pytest.raises(Ambiguous) as error:
        convert(src, dst)
    assert "--threshold 127" in str(error.value)
    assert "NAME=128,NAME=255" in str(error.value)
    assert not dst.exists()
    dataset = convert(src, dst, classes="cup=128,disc=255")
    assert set(np.unique(label_of(dataset, "a"))) == {0, 1, 2}


def test_01_and_0255_in_one_folder_are_asked_about_but_two_domains_are_fine(src, dst, tmp_path):
    pairs(src, names=("a", "b"))
    save(src / "masks" / "a.png", blob(0))
    with pytest.raises(Ambiguous) as error:
        convert(src, dst)
    assert "--threshold 0 " in str(error.value)
    sites = tmp_path / "sites"
    pairs(sites / "here", scale=1)
    pairs(sites / "there", scale=255)
    dataset = convert(sites, dst)
    assert dataset.domains == ("here", "there")
    np.testing.assert_array_equal(label_of(dataset, "here_b"), label_of(dataset, "there_b"))


def test_images_as_masks_are_refused(src, dst):
    for seed, name in enumerate("abc"):
        save(src / "images" / f"{name}.png", photo(seed))
        save(src / "masks" / f"{name}.png", photo(seed)[..., 0])
    with pytest.raises(UserError, match="ordinary images"):
        convert(src, dst)


def test_transparency_is_dropped_and_grey_joins_colour(src, dst):
    pairs(src)
    save(src / "images" / "a.png", np.dstack([photo(0), np.full(SIZE, 255, np.uint8)]))
    save(src / "images" / "b.png", photo(1)[..., 0])
    dataset = convert(src, dst)
    np.testing.assert_array_equal(dataset.load(dataset.case("a"))[0], photo(0))
    np.testing.assert_array_equal(dataset.load(dataset.case("b"))[0], np.repeat(photo(1)[..., :1], 3, -1))


def save_palette(path: Path, index: np.ndarray, palette: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(index, "L").convert("P") if False else Image.fromarray(index)
    image = Image.frombytes("P", image.size, index.tobytes())
    image.putpalette(palette)
    image.save(path)


@pytest.mark.parametrize(
    ("palette", "inverted"),
    [([0, 0, 0, 255, 0, 0], False), ([0, 0, 0, 255, 255, 255], False), ([255, 255, 255, 0, 0, 0], True)],
)
def test_palette_masks(src, dst, palette, inverted):
    """IDRiD: 0 black, 1 red must not become grey 76; CHASEDB1: index 0 is white."""
    for seed, name in enumerate("abc"):
        save(src / "images" / f"{name}.png", photo(seed))
        index = 1 - blob(seed) if inverted else blob(seed)
        save_palette(src / "masks" / f"{name}.png", index, palette)
    dataset = convert(src, dst)
    np.testing.assert_array_equal(label_of(dataset, "c"), blob(2))


def test_masks_of_another_size(src, dst):
    pairs(src)
    half = blob(1, (12, 16))
    save(src / "masks" / "b.png", half * 255)
    with pytest.raises(UserError) as error:
        convert(src, dst)
    assert "12 x 16" in str(error.value)
    assert "24 x 32" in str(error.value)
    assert "--resize-labels" in str(error.value)
    assert "b.png" in str(error.value)
    assert not dst.exists()
    dataset = convert(src, dst, resize_labels=True)
    np.testing.assert_array_equal(label_of(dataset, "b"), np.kron(half, np.ones((2, 2), np.uint8)))
    assert "1 mask, by nearest neighbour" in (dst / "dataset.json").read_text()


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
        (("im_01", "im_02", "im_03"), {""}),
        (("case_01", "case_02"), {""}),
    ],
)
def test_patients_are_told_from_names(src, dst, names, patients):
    dataset = convert(pairs(src, names=names), dst)
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


def test_drive_as_it_is_published(src, dst):
    """Here `mask` is the field of view and `1st_manual` the vessels."""
    for seed, name in enumerate(("21", "22")):
        save(src / "training" / "images" / f"{name}_training.tif", photo(seed))
        save(src / "training" / "1st_manual" / f"{name}_manual1.gif", blob(seed) * 255)
        save(src / "training" / "mask" / f"{name}_training_mask.gif", np.full(SIZE, 255, np.uint8))
    dataset = convert(src, dst, classes="vessel")
    np.testing.assert_array_equal(label_of(dataset, "22_training"), blob(1))


# ---------------------------------------------------------------------------------------------- the target and its fate


def test_the_source_is_untouched_and_the_result_is_repeatable(src, dst, tmp_path):
    pairs(src)
    before = hashes(src)
    convert(src, dst)
    convert(src, tmp_path / "again")
    assert hashes(src) == before
    assert hashes(dst) == hashes(tmp_path / "again")
    assert not [path for path in dst.rglob("*") if path.is_symlink()]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "dst", "src"]


def test_an_existing_target_is_kept_unless_told(src, dst):
    convert(pairs(src), dst)
    before = hashes(dst)
    with pytest.raises(UserError, match="exists"):
        convert(src, dst)
    (src / "images" / "b.png").write_bytes(b"broken")
    with pytest.raises(UserError):
        convert(src, dst, overwrite=True)
    assert hashes(dst) == before
    pairs(src)
    convert(src, dst, overwrite=True, classes="new")
    assert Dataset.open(dst).labels.names == ("new",)
    assert not dst.with_name("dst.old").exists()


def test_nothing_that_is_not_ours_is_removed(src, dst):
    pairs(src)
    dst.mkdir()
    (dst / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="no data set"):
        convert(src, dst, overwrite=True)
    (dst / "thesis.txt").unlink()
    leftover = dst.with_name("dst.tmp")
    leftover.mkdir()
    (leftover / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="in the way"):
        convert(src, dst)
    assert (leftover / "thesis.txt").read_text() == "precious"
    (leftover / ".medseg-convert").touch()  # what a killed conversion leaves behind
    convert(src, dst)
    assert not leftover.exists()


def test_the_target_may_not_lie_in_the_source(src):
    pairs(src)
    for place in (src, src / "out", src.parent):
        with pytest.raises(UserError, match="lies in the"):
            convert(src, place)
    assert sorted(os.listdir(src)) == ["images", "masks"]


def test_options_that_contradict_or_do_not_apply(src, dst):
    pairs(src)
    for options in (
        {"spacing": "1,1,1"},
        {"reference": "CT"},
        {"domains": "x"},
        {"multilabel": True, "exclusive": True},
        {"empty": True, "unlabelled": True},
        {"limit": 0},
    ):
        with pytest.raises(UserError):
            convert(src, dst, **options)


# ------------------------------------------------------------------------------------------------------- command line


def test_command_line(src, dst, capsys):
    pairs(src)
    assert verbs.main(["convert", str(src), str(dst), "--classes", "wound", "--split", "last-1"]) == 0
    out = capsys.readouterr().out
    for line in ("images: 3 cases (3 .png)", "classes: 1 wound", "cases: 2 train, 1 val", "next: medseg data check"):
        assert line in out
    assert verbs.main(["check", str(dst)]) == 0
    assert "no problem found" in capsys.readouterr().out
    assert verbs.main(["check", str(dst), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"cases": 3, "errors": 0, "warnings": 0, "problems": []}
    io.write_label(dst / "labelsTr" / "a.png", np.full(SIZE, 9, np.uint8), io.read_image(src / "images" / "a.png")[1])
    assert verbs.main(["check", str(dst), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["errors"] == 1
    assert found["problems"][0]["file"] == "labelsTr/a.png"


def test_command_line_plan_and_preview(src, dst, capsys):
    convert(pairs(src), dst)
    assert verbs.main(["plan", str(dst), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dim"] == 2
    assert (dst / "plan.json").is_file()
    assert cli.main(["data", "plan", str(dst)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert verbs.main(["plan", str(dst), "--overwrite"]) == 0
    assert "patch_size: " in capsys.readouterr().out
    assert verbs.main(["preview", str(dst), "--n", "2", "--json"]) == 0
    picture = Path(json.loads(capsys.readouterr().out)["written"])
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 100


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 2, "usage"),
        (["--help"], 0, "convert SRC DST"),
        (["chekc"], 2, "Did you mean check?"),
        (["convert", "only-one"], 2, "DST"),
        (["convert", "nowhere", "out"], 1, "must be a folder"),
        (["check", "nowhere"], 1, "dataset.json"),
    ],
)
def test_exit_codes(argv, code, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", *argv]) == code
    captured = capsys.readouterr()
    assert words in captured.out + captured.err


def test_a_question_is_asked_on_a_terminal(src, dst, monkeypatch, capsys):
    pairs(src)
    save(src / "images" / "z.png", photo(9))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    answers = iter(["x", "7", "1"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    assert verbs.main(["convert", str(src), str(dst)]) == 0
    assert Dataset.open(dst).case("z").label is None
    assert "images/z.png" in capsys.readouterr().out

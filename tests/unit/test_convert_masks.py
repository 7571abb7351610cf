"""Pairs of images and masks of one class: which belong together, which grey is foreground, and what is asked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from making import SIZE, blob, convert, label_of, no_errors, pairs, photo, save, save_palette
from medseg_jax.data.convert import Ambiguous
from medseg_jax.data.convert.options import COLOURS, name_colour, parse_classes, parse_colour
from medseg_jax.data.convert.words import match, natural, read_name
from medseg_jax.types import Labels, UserError

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


@pytest.mark.parametrize("numbers", [(1,), (1, 2), (2,), (128,)])
@pytest.mark.parametrize("classes", [None, "lesion"])
def test_a_void_of_255_is_asked_about_not_read_as_the_foreground(src, dst, numbers, classes):
    """VOC: class numbers, and 255 where nothing is known; the numbers may be rare."""
    pairs(src, names=("a", "b"))
    mask = blob(0) * 255
    for i, number in enumerate(numbers):
        mask[4, 6 + i] = number  # few enough to pass for noise
    save(src / "masks" / "a.png", mask)
    options = {"classes": classes} if classes else {}
    with pytest.raises(Ambiguous) as error:
        convert(src, dst, **options)
    assert {"threshold": 0} in [choice for _, choice in error.value.choices]
    assert {"ignore": 255} in [choice for _, choice in error.value.choices]
    if len(numbers) == 1 or classes:
        dataset = convert(src, dst, ignore=255, **options)
        assert dataset.labels == Labels.simple(classes or "foreground", ignore=2)
        expected = np.where(mask == 255, 2, mask > 0)
    else:
        dataset = convert(src, dst, ignore=255)
        assert dataset.labels == Labels.simple("class_1", "class_2", ignore=3)
        expected = np.where(mask == 255, 3, mask)
    np.testing.assert_array_equal(label_of(dataset, "a"), expected)
    cut = convert(src, dst, threshold=127, overwrite=True, **options)
    np.testing.assert_array_equal(label_of(cut, "a"), mask > 127)


def test_a_few_levels_in_a_folder_of_one_class_are_asked_about(src, dst):
    pairs(src, masks="masks_cup")
    pairs(src, masks="masks_disc")
    save(src / "masks_cup" / "a.png", np.where(blob(1), 2, blob(0) * 255).astype(np.uint8))
    with pytest.raises(Ambiguous) as error:
        convert(src, dst)
    assert "--threshold 127" in str(error.value)
    assert "NAME" not in str(error.value)
    convert(src, dst, threshold=127)
    save(src / "masks_cup" / "a.png", np.where(blob(1), 64, blob(0) * 255).astype(np.uint8))  # one expert of four
    convert(src, dst, overwrite=True)


def test_small_numbers_beside_soft_edges_are_asked_about(src, dst):
    for seed, name in enumerate("abc"):
        save(src / "images" / f"{name}.png", photo(seed))
        distance = np.hypot(*(np.indices(SIZE) - np.array([[[11]], [[12 + seed]]])))
        save(src / "masks" / f"{name}.png", np.clip(128 + 50 * (8 - distance), 0, 255).astype(np.uint8))
    save(src / "masks" / "b.png", blob(1) * 2)
    with pytest.raises(Ambiguous, match="small numbers") as error:
        convert(src, dst)
    assert "b.png" in str(error.value)
    assert "--threshold 0 " in str(error.value)
    save(src / "masks" / "b.png", blob(1) * 0)
    convert(src, dst)


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

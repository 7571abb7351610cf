"""Outlines, radiological display, aspect ratio, and the contact sheet."""

import os
import subprocess
import sys
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg_jax.data import geometry as space
from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.preview import (
    IGNORE_COLOR,
    busiest_slice,
    case_picture,
    class_colors,
    outline,
    overlay,
    preview,
    scale,
    view,
    window,
)
from medseg_jax.data.synthetic import make_phantoms
from medseg_jax.types import Case, Geometry, Labels, UserError


def square(shape=(9, 9), rows=slice(2, 7), columns=slice(2, 7)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[rows, columns] = True
    return mask


# ------------------------------------------------------------------------------------------------------------ outlines


def test_outline_is_the_inner_border():
    inside = square(rows=slice(3, 6), columns=slice(3, 6))
    assert (outline(square()) == (square() & ~inside)).all()
    assert (outline(square(), width=2) == (square() & ~square(rows=slice(4, 5), columns=slice(4, 5)))).all()


def test_outline_of_a_point_of_nothing_and_at_the_edge():
    point = square(rows=slice(4, 5), columns=slice(4, 5))
    assert (outline(point) == point).all()
    assert not outline(np.zeros((5, 5), bool)).any()
    full = outline(np.ones((5, 6), bool))
    assert full[0].all()
    assert full[:, -1].all()
    assert not full[1:-1, 1:-1].any()


def test_overlay_colours_the_border_and_nothing_else():
    image = np.random.default_rng(0).integers(0, 255, (9, 9, 3)).astype(np.uint8)
    before = image.copy()
    masks = np.stack([square(), square(rows=slice(2, 4))])
    picture = overlay(image, masks, [(255, 0, 0), (0, 255, 0)])
    assert picture.dtype == np.uint8
    assert (image == before).all()
    second, first = outline(masks[1]), outline(masks[0]) & ~outline(masks[1])
    assert (picture[second] == (0, 255, 0)).all()
    assert (picture[first] == (255, 0, 0)).all()
    assert (picture[~first & ~second] == image[~first & ~second]).all()


def test_overlay_of_grey_and_of_no_masks():
    picture = overlay(np.linspace(-5, 5, 81).reshape(9, 9), np.zeros((0, 9, 9), bool), [])
    assert picture.shape == (9, 9, 3)
    assert picture.min() == 0
    assert picture.max() == 255
    with pytest.raises(ValueError):
        overlay(np.zeros((9, 9)), square()[None], [])


def test_window_bears_anything():
    image = np.array([[np.nan, np.inf], [-np.inf, 3.0]])
    assert window(image).dtype == np.uint8
    assert (window(np.full((3, 3), np.nan)) == 0).all()
    assert (window(np.full((3, 3), 7.0)) == 0).all()


def test_colours_are_the_same_everywhere():
    assert (class_colors(3) == class_colors(5)[:3]).all()
    assert class_colors(0).shape == (0, 3)
    assert len({tuple(color) for color in [*class_colors(7), np.array(IGNORE_COLOR)]}) == 8


# --------------------------------------------------------------------------------------------------------------- slices


ORIENTATIONS = [
    tuple(("LR", "PA", "IS")[i][flip[i]] for i in order)
    for order in permutations(range(3))
    for flip in product((0, 1), repeat=3)
]


@pytest.mark.parametrize("codes", ORIENTATIONS, ids="".join)
def test_radiological_display(codes):
    """Whatever the file's orientation: front up, the patient's right on the left."""
    reference = np.zeros((4, 5, 6), np.uint8)  # [i, j, k] pointing R, A, S
    reference[3, 4, 2] = 1  # right, front
    reference[0, 0, 2] = 2  # left, back
    turn = nib.orientations.axcodes2ornt(codes)
    back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), turn)
    label = nib.orientations.apply_orientation(reference, back)
    affine = nib.orientations.inv_ornt_aff(back, reference.shape)
    geometry = Geometry(label.shape, affine)
    canonical = space.to_canonical(label, geometry, channels=False)
    image = space.to_canonical(label[..., None], geometry, channels=True)
    flat, masks, index = view(image, canonical, Labels.simple("a", "b"), volume=True)
    assert index == 2
    assert flat.shape == (5, 4)
    assert np.argwhere(masks[0]).tolist() == [[0, 0]]
    assert np.argwhere(masks[1]).tolist() == [[4, 3]]
    assert flat[0, 0] == 1


def test_pictures_are_not_turned():
    image = np.arange(24).reshape(1, 4, 2, 3)
    flat, masks, _ = view(image, None, Labels.simple("a"), volume=False)
    assert (flat == image[0]).all()
    assert not masks.any()
    assert masks.shape == (1, 4, 2)


def test_two_channels_show_the_first():
    image = np.stack([np.ones((3, 4, 5)), np.zeros((3, 4, 5))], -1)
    assert view(image, None, Labels.simple("a"), volume=True)[0].tolist() == np.ones((4, 5)).tolist()


def test_busiest_slice_does_not_count_what_is_ignored():
    label = np.zeros((5, 4, 4), np.uint8)
    label[1, :2] = 1
    label[3] = 2
    assert busiest_slice(label, Labels.simple("a", "b")) == 3
    assert busiest_slice(label, Labels.simple("a", ignore=2)) == 1
    assert busiest_slice(label * 0, Labels.simple("a")) == 2
    masks = view(label[..., None], label, Labels.simple("a", ignore=2), volume=True, slice_index=3)[1]
    assert masks.shape == (2, 4, 4)
    assert masks[1].all()


# ---------------------------------------------------------------------------------------------------------------- scale


def test_aspect_ratio_follows_spacing():
    image, masks = scale(np.zeros((20, 30), np.uint8), square((20, 30))[None], (3.0, 1.0), 120)
    assert image.shape == (120, 60)
    assert masks.shape == (1, 120, 60)


def test_a_growing_mask_keeps_its_edges():
    masks = scale(np.zeros((9, 9)), square()[None], (1, 1), 90)[1]
    assert (masks[0] == np.kron(square(), np.ones((10, 10)))).all()


def test_a_shrinking_mask_keeps_its_smallest_part():
    point = np.zeros((1, 1000, 800), bool)
    point[0, 503, 307] = True
    image, masks = scale(np.zeros((1000, 800, 3), np.uint8), point, (1, 1), 100)
    assert image.shape == (100, 80, 3)
    assert np.argwhere(masks[0]).tolist() == [[50, 30]]


def test_no_masks():
    assert scale(np.zeros((4, 4)), np.zeros((0, 4, 4), bool), (1, 1), 8)[1].shape == (0, 8, 8)


# -------------------------------------------------------------------------------------------------------- contact sheet


def test_contact_sheet(tmp_path):
    dataset = make_phantoms(tmp_path / "2d", cases=6, unlabelled=2, size=20)
    out = preview(dataset, tmp_path / "new" / "sheet.png", size=100)
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB"))
    for color in class_colors(3):
        assert (pixels == color).all(-1).sum() > 50, "each class has its outline and its place in the legend"
    # 6 cases in 2 rows of 3; one case is one row.
    one = preview(dataset, tmp_path / "one.png", cases=["phantom_0007"], size=100)
    with Image.open(one) as picture:
        assert picture.width < pixels.shape[1] / 2
        assert picture.height < pixels.shape[0]


def test_sheet_of_more_cases_than_there_are_and_of_unknown_ones(tmp_path):
    dataset = make_phantoms(tmp_path / "3d", dim=3, cases=3, size=16)
    assert preview(dataset, tmp_path / "sheet.png", n=50, size=60).stat().st_size > 1000
    with pytest.raises(UserError, match="No such case"):
        preview(dataset, tmp_path / "sheet.png", cases=["phantom_9999"])


def test_title_says_what_is_shown(tmp_path):
    dataset = make_phantoms(tmp_path / "3d", dim=3, cases=4, sites=2, unlabelled=1, size=16)
    picture, title = case_picture(dataset, dataset.subset("test")[0], 120)
    assert max(picture.shape[:2]) == 120
    assert title.startswith("phantom_0002\ntest, site1, slice ")
    assert "no label" in case_picture(dataset, dataset.subset("train", labelled=False)[0], 50)[1]


def test_overlapping_classes_and_ignored_voxels(tmp_path):
    geometry = Geometry((20, 24), unit="px")
    label = np.zeros((20, 24), np.uint8)
    label[2:12, 2:12] = 1
    label[8:18, 8:18] = 2
    label[8:12, 8:12] = 3
    label[:, 20:] = 4
    cases = []
    for id in ("a", "b"):
        images = (tmp_path / "imagesTr" / f"{id}_0000.png",)
        io.write_image(images[0], np.full((20, 24, 1), 60, np.uint8), geometry)
        io.write_label(tmp_path / "labelsTr" / f"{id}.png", label, geometry)
        cases.append(Case(id, images, tmp_path / "labelsTr" / f"{id}.png"))
    labels = Labels(("lung", "heart"), ((1, 3), (2, 3)), ignore=4, exclusive=False, order=(1, 2))
    Dataset(tmp_path, "X", ("X-ray",), labels, tuple(cases), ".png", "px").save()
    dataset = Dataset.open(tmp_path)
    picture, _ = case_picture(dataset, dataset.cases[0], 24)
    lung, heart = class_colors(2)
    assert (picture[2, 2:12] == lung).all()
    assert (picture[11, 2:8] == lung).all()
    assert (picture[8, 8:18] == heart).all(), "the later class lies on top where both have an edge"
    assert (picture[5, 20] == IGNORE_COLOR).all()


def test_no_display_and_no_pyplot_are_needed(tmp_path):
    script = (
        "import sys; from medseg_jax.data.synthetic import make_phantoms; from medseg_jax.data.preview import preview;"
        f"preview(make_phantoms({str(tmp_path / 'd')!r}, cases=3, size=16), {str(tmp_path / 'x.png')!r}, size=40);"
        "assert 'matplotlib.pyplot' not in sys.modules; assert 'jax' not in sys.modules"
    )
    env = os.environ | {"MPLBACKEND": "TkAgg", "PYTHONPATH": str(Path(__file__).parents[2])}
    env.pop("DISPLAY", None)
    subprocess.run([sys.executable, "-c", script], check=True, env=env)
    assert (tmp_path / "x.png").exists()

"""CLAHE and 8-bit lightness equal OpenCV's bit for bit; the other channels and the way back within one level."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from medseg_jax.ops.clahe import clahe, clahe_lab, lab_to_rgb, rgb_to_lab, rgb_to_lab8

FOLDER = Path(os.environ.get("MEDSEG_GOLDEN", "golden")) / "dr_lesions"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="MEDSEG_GOLDEN does not name the folder of golden numbers")


def read(name):
    if not FOLDER.is_dir():
        return {}
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as f:
        return {k: f[k] for k in f.files if k != "meta"} | {"meta": json.loads(str(f["meta"]))}


CLAHE, LAB = read("clahe"), read("lab_pipeline")
EXACT = [k for k in CLAHE if k.startswith("clahe/")]
SIZES = [k.partition("/")[2] for k in LAB if k.startswith("rgb/")]


def settings(name):
    """(clip, (columns, rows)) of a key."""
    clip, grid = re.search(r"clip([\d.]+)", name), re.search(r"grid(\d+),(\d+)", name)
    return float(clip[1]), (int(grid[1]), int(grid[2]))


def source(name):
    size = name.split("/")[1]
    if constant := re.match(r"constant(\d+)", size):
        return np.full(CLAHE[name].shape, int(constant[1]), np.uint8)
    if size.startswith("ramp"):
        return (np.arange(CLAHE[name].size) % 256).astype(np.uint8).reshape(CLAHE[name].shape)
    return CLAHE[f"image/{size}"][..., 1]


@pytest.mark.parametrize("name", EXACT)
def test_clahe_is_exact(name):
    clip, grid = settings(name)
    np.testing.assert_array_equal(clahe(source(name), clip, grid), CLAHE[name])


@pytest.mark.parametrize("name", [k for k in LAB if k.startswith("rgb/") or k == "random_rgb"])
def test_eight_bit_lab(name):
    gap = np.abs(rgb_to_lab8(LAB[name]).astype(int) - LAB[name.replace("rgb", "lab8")])
    assert gap[..., 0].max() == 0
    assert gap.max() <= 1
    assert (gap > 0).mean() < 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_the_way_back_is_within_one_level(size):
    lab = (LAB[f"lab8/{size}"] - np.array([0, 128, 128])) / [2.55, 1, 1]
    assert np.abs(lab_to_rgb(lab).astype(int) - LAB[f"rgb_back/{size}"]).max() <= 1


@pytest.mark.parametrize("name", [k for k in LAB if k.startswith("labf_sample/")])
def test_float_lab(name):
    lab, sample = rgb_to_lab(LAB[f"rgb/{name.split('/')[1]}"]), LAB[name]
    rows, columns = (-(-n // m) for n, m in zip(lab.shape, sample.shape[:2], strict=False))
    assert np.abs(lab[::rows, ::columns] - sample).max() <= 0.5


@pytest.mark.parametrize("name", [k for k in LAB if k.startswith("clahe_L/")])
def test_clahe_of_the_stored_lightness_is_exact(name):
    clip, grid = settings(name)
    np.testing.assert_array_equal(clahe(LAB[f"lab8/{name.split('/')[1]}"][..., 0], clip, grid), LAB[name])


@pytest.mark.parametrize("name", [k for k in LAB if k.startswith("pipeline/")])
def test_the_whole_pipeline_is_close(name):
    clip, grid = settings(name)
    gap = np.abs(clahe_lab(LAB[f"rgb/{name.split('/')[1]}"], clip, grid, eight_bit=True).astype(int) - LAB[name])
    assert gap.mean() <= 0.5
    assert np.quantile(gap, 0.99) <= 4
    assert gap.max() <= 10

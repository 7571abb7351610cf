"""Every rule of `check_dataset` speaks on a file that breaks it, and none on a clean data set."""

import gzip
import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.verify import (
    Problem,
    check_dataset,
    problems_json,
    problems_lines,
    problems_table,
    summary,
)
from medseg_jax.types import Geometry

SHAPE = (6, 7, 8)
AFFINE = np.diag([1.0, 1, 2, 1])
IDS = tuple("abcdefgh")
CONTENT = {
    "channel_names": {"0": "MR"},
    "labels": {"background": 0, "organ": 1, "lesion": 2},
    "numTraining": len(IDS),
    "file_ending": ".nii.gz",
    "medseg": {"cases": {id: {"patient": f"p{id}", "split": "val" if id == "h" else "train"} for id in IDS}},
}


def image(root: Path, id: str, *, folder="imagesTr", seed=None, shape=SHAPE, affine=AFFINE, change=None) -> Path:
    array = np.random.default_rng(ord(id[0]) if seed is None else seed).normal(100, 20, (*shape, 1)).astype(np.float32)
    path = root / folder / f"{id}_0000.nii.gz"
    io.write_image(path, change(array) if change else array, Geometry(shape, affine))
    return path


def label(root: Path, id: str, *, folder="labelsTr", shape=SHAPE, affine=AFFINE, values=(1, 2)) -> Path:
    array = np.zeros(shape, np.uint16)
    for number, value in enumerate(values):
        array[number + 1, 2:4] = value
    path = root / folder / f"{id}.nii.gz"
    io.write_label(path, array, Geometry(shape, affine))
    return path


def describe(root: Path, **changes) -> None:
    (root / "dataset.json").write_text(json.dumps(CONTENT | changes))


@pytest.fixture
def root(tmp_path) -> Path:
    for id in IDS:
        image(tmp_path, id)
        label(tmp_path, id)
    describe(tmp_path)
    return tmp_path


def check(root: Path) -> list[Problem]:
    return check_dataset(Dataset.open(root))


def only(problems: list[Problem], severity: str, case: str, *words: str) -> Problem:
    """The one problem that was found, if it is the expected one."""
    assert len(problems) == 1, problems_lines(problems, Path())
    problem = problems[0]
    assert (problem.severity, problem.case) == (severity, case)
    for word in words:
        assert word in problem.text, problem.text
    assert problem.remedy
    return problem


def test_clean(root):
    assert check(root) == []


def test_clean_with_test_and_unlabelled_cases(root):
    image(root, "t", folder="imagesTs")
    label(root, "t", folder="labelsTs")
    image(root, "u", folder="imagesTs")
    image(root, "v", folder="imagesUn")
    (root / "README.md").write_text("anything")
    assert check(root) == []


# ------------------------------------------------------------------------------------------------------------ one case


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
@pytest.mark.parametrize("content", [b"", b"no nifti at all", gzip.compress(b"\0" * 400, mtime=0), None])
def test_unreadable(root, folder, content):
    path = root / folder / ("c_0000.nii.gz" if folder == "imagesTr" else "c.nii.gz")
    path.write_bytes(path.read_bytes()[:60] if content is None else content)
    assert only(check(root), "error", "c").file == path


def test_shape(root):
    path = label(root, "b", shape=(6, 7, 9))
    assert only(check(root), "error", "b", "6 x 7 x 9", "6 x 7 x 8").file == path


def test_affine_in_mm(root):
    moved = AFFINE.copy()
    moved[0, 3] = 12.5
    label(root, "b", affine=moved)
    only(check(root), "error", "b", "does not lie where its image does", "12.5 mm")


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_header_that_contradicts_itself(root, folder):
    path = image(root, "c") if folder == "imagesTr" else root / folder / "c.nii.gz"
    file = nib.Nifti1Image.from_filename(path)
    moved = file.affine.copy()
    moved[0, 3] += 4
    file.header.set_qform(moved, 1)
    nib.Nifti1Image(np.asarray(file.dataobj), file.affine, file.header).to_filename(path)
    only(check(root), "warning", "c", "sform against qform", "4 mm", "the sform is used")


def test_unknown_values_with_counts(root):
    label(root, "b", values=(1, 2, 7))
    only(check(root), "error", "b", "7 (16 voxels)", "0, 1, 2")


def test_labels_that_are_no_whole_numbers(root):
    array = np.zeros(SHAPE, np.float32)
    array[2] = 0.5
    nib.Nifti1Image(array, AFFINE).to_filename(root / "labelsTr" / "b.nii.gz")
    only(check(root), "error", "b", "whole numbers", "0.5")


def test_negative_labels(root):
    array = np.zeros(SHAPE, np.int16)
    array[2] = -1
    nib.Nifti1Image(array, AFFINE).to_filename(root / "labelsTr" / "b.nii.gz")
    only(check(root), "error", "b", "-1")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_voxels_that_are_not_finite(root, value):
    def spoil(array):
        array[1, 2, 3:5] = value
        return array

    image(root, "b", change=spoil)
    only(check(root), "error", "b", "2 voxels NaN or infinite")


def test_empty_label(root):
    label(root, "b", values=())
    only(check(root), "warning", "b", "empty")


def test_everything_ignored(root):
    describe(root, labels={"background": 0, "organ": 1, "lesion": 2, "ignore": 3})
    io.write_label(root / "labelsTr" / "b.nii.gz", np.full(SHAPE, 3, np.uint8), Geometry(SHAPE, AFFINE))
    only(check(root), "error", "b", "every voxel is ignored")


def test_number_of_channels(root):
    io.write_image(
        root / "imagesTr" / "b_0000.nii.gz", np.random.default_rng(0).random((*SHAPE, 3)), Geometry(SHAPE, AFFINE)
    )
    only(check(root), "error", "b", "has 3 channels, dataset.json names 1")


def test_missing_channel_file(root):
    describe(root, channel_names={"0": "CT", "1": "PET"})
    for id in IDS:
        if id != "b":
            (root / "imagesTr" / f"{id}_0001.nii.gz").write_bytes(image(root, id).read_bytes())
    only(check(root), "error", "b", "channel 1 (PET) is missing: b_0001.nii.gz")
    for id in IDS:
        (root / "imagesTr" / f"{id}_0001.nii.gz").write_bytes(image(root, id).read_bytes())
    (root / "imagesTr" / "b_0000.nii.gz").unlink()
    only(check(root), "error", "b", "channel 0 (CT) is missing: b_0000.nii.gz")


def test_channel_file_too_many(root):
    image(root, "b").rename(root / "imagesTr" / "b_0001.nii.gz")
    image(root, "b")
    only(check(root), "error", "b", "is channel 1, dataset.json names 1 channel")


def test_channels_on_different_grids(root):
    describe(root, channel_names={"0": "CT", "1": "PET"})
    for id in IDS:
        shape, affine = ((3, 4, 4), np.diag([2.0, 2, 4, 1])) if id == "b" else (SHAPE, AFFINE)
        image(root, id, seed=ord(id) + 99, shape=shape, affine=affine).rename(root / "imagesTr" / f"{id}_0001.nii.gz")
        image(root, id)
    problem = only(check(root), "error", "b", "lies elsewhere than b_0000.nii.gz", "3 x 4 x 4", "mm")
    assert problem.file.name == "b_0001.nii.gz"


def test_missing_label(root):
    (root / "labelsTr" / "b.nii.gz").unlink()
    only(check(root), "error", "b", "label is missing")


def test_case_without_files(root):
    notes = CONTENT["medseg"]["cases"] | {"z": {"patient": "pz"}}
    describe(root, medseg={"cases": notes})
    only(check(root), "error", "z", "has no image")


def test_constant_image(root):
    image(root, "b", change=lambda array: array * 0 + 5)
    only(check(root), "warning", "b", "constant: 5 everywhere")


# ------------------------------------------------------------------------------------------------------- the whole set


def test_spacing_outlier(root):
    odd = np.diag([1.0, 1, 20, 1])
    image(root, "b", affine=odd)
    label(root, "b", affine=odd)
    only(check(root), "warning", "b", "20 x 1 x 1 mm", "2 x 1 x 1")


@pytest.mark.parametrize("change", [lambda a: a * 1000, lambda a: a / 1000, lambda a: a + 1e4])
def test_intensity_outlier(root, change):
    image(root, "b", change=change)
    only(check(root), "warning", "b", "intensities of channel 0 (MR) are unlike the others'")


def test_the_same_image_twice(root):
    image(root, "b", seed=ord("c"))
    only(check(root), "warning", "b", "b (train) holds the same image as c (train)")


def test_the_same_image_in_two_splits(root):
    image(root, "b", seed=ord("h"))
    only(check(root), "error", "b", "h (val)")
    image(root, "b")
    # The same voxels in a file that was compressed anew.
    path = root / "imagesTr" / "h_0000.nii.gz"
    path.write_bytes(gzip.compress(gzip.decompress((root / "imagesTr" / "c_0000.nii.gz").read_bytes()), 1))
    only(check(root), "error", "c", "h (val)")


def test_patient_in_two_splits(root):
    notes = CONTENT["medseg"]["cases"] | {"a": {"patient": "ph", "split": "train"}}
    describe(root, medseg={"cases": notes})
    only(check(root), "error", "", "patient ph", "train: a", "val: h")


def test_class_that_nobody_shows(root):
    describe(root, labels={"background": 0, "organ": 1, "lesion": 2, "vessel": 3})
    only(check(root), "warning", "", "class vessel is in none of the 7 training labels")


def test_class_that_only_validation_shows(root):
    for id in IDS[:-1]:
        label(root, id, values=(1,))
    only(check(root), "warning", "", "class lesion")


def test_no_training_and_no_validation_cases(root):
    for missing, severity in (("train", "error"), ("val", "warning")):
        other = "val" if missing == "train" else "train"
        describe(root, medseg={"cases": {id: {"split": other} for id in IDS}})
        only(check(root), severity, "")


def test_pictures_and_volumes_mixed(root):
    flat = np.random.default_rng(0).random(SHAPE[:2], np.float32)
    nib.Nifti1Image(flat, AFFINE).to_filename(root / "imagesTr" / "b_0000.nii.gz")
    nib.Nifti1Image(np.ones(SHAPE[:2], np.uint8), AFFINE).to_filename(root / "labelsTr" / "b.nii.gz")
    problems = [problem for problem in check(root) if "dimensions" in problem.text]
    only(problems, "error", "", "most cases are 3-D, but not b")


def test_label_without_image(root):
    path = label(root, "z")
    assert only(check(root), "error", "", "label without an image in imagesTr").file == path


@pytest.mark.parametrize("name", ["imagesTr/notes.txt", "labelsTr/a.png", "imagesTs/x_0000.NII.GZ"])
def test_files_that_belong_to_no_case(root, name):
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(b"x")
    assert only(check(root), "warning", "", "belongs to no case").file == root / name


def test_num_training(root):
    describe(root, numTraining=9)
    only(check(root), "error", "", "numTraining is 9", "8 cases")


# ------------------------------------------------------------------------------------------------ all at once, and how


def test_all_problems_are_listed_at_once(root):
    label(root, "a", values=(9,))
    (root / "imagesTr" / "b_0000.nii.gz").write_bytes(b"")
    (root / "labelsTr" / "c.nii.gz").unlink()
    label(root, "d", values=())
    label(root, "z")
    problems = check(root)
    assert [(problem.severity, problem.case) for problem in problems] == [
        ("error", ""),
        ("error", "a"),
        ("error", "b"),
        ("error", "c"),
        ("warning", "d"),
    ]
    assert summary(problems) == "4 errors, 1 warning"


def test_several_problems_of_one_case(root):
    label(root, "a", shape=(6, 7, 9), values=(9,))
    image(root, "a", change=lambda array: np.where(array > 120, np.nan, array))
    assert [problem.case for problem in check(root)] == ["a", "a", "a"]


def test_progress_and_order_do_not_depend_on_threads(root):
    label(root, "a", values=(9,))
    label(root, "g", values=())
    seen: list[tuple[int, int]] = []
    one = check_dataset(Dataset.open(root), progress=lambda done, total: seen.append((done, total)), workers=1)
    assert seen == [(i + 1, len(IDS)) for i in range(len(IDS))]
    assert check_dataset(Dataset.open(root), workers=4) == one


def test_a_reader_that_fails_in_a_new_way_is_one_problem(root, monkeypatch):
    def fails(path: Path):
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(io, "read_label", fails)
    problems = [problem for problem in check(root) if problem.case == "a"]
    only(problems, "error", "a", "ZeroDivisionError: oh")


def plain(show: Callable[[Console], None]) -> str:
    text = StringIO()
    show(Console(file=text, width=200))
    return text.getvalue()


def test_table_lines_and_json(tmp_path):
    problems = [
        Problem("a", "error", tmp_path / "labelsTr" / "a.nii.gz", "holds [7]", "mend it"),
        Problem("", "warning", Path("/elsewhere/x"), "no case validates", "give one"),
    ]
    assert problems_lines(problems, tmp_path) == [
        "error: a: labelsTr/a.nii.gz: holds [7] -> mend it",
        "warning: all: /elsewhere/x: no case validates -> give one",
        "1 error, 1 warning",
    ]
    table = plain(lambda console: console.print(problems_table(problems, tmp_path)))
    for word in ("1 error, 1 warning", "holds [7]", "labelsTr/a.nii.gz", "mend it"):
        assert word in table
    listed = json.loads(json.dumps(problems_json(problems, tmp_path)))
    assert listed[0] == {
        "case": "a",
        "severity": "error",
        "file": "labelsTr/a.nii.gz",
        "text": "holds [7]",
        "remedy": "mend it",
    }
    assert summary([]) == "no problem found"


def test_one_finding_of_many_cases_has_one_line(tmp_path):
    def holds(number: int, value: int) -> Problem:
        file = tmp_path / "labelsTr" / f"c{number}.png"
        return Problem(f"c{number}", "error", file, f"holds {value} ({number} voxels)", "mend it")

    problems = [*(holds(n, 255) for n in range(1, 12)), holds(12, 7)]
    assert problems_lines(problems, tmp_path) == [
        "error: 11 cases: labelsTr/c1.png, labelsTr/c2.png, labelsTr/c3.png ... (--json lists all): "
        "holds 255 (1 voxels) (the first) -> mend it",
        "error: c12: labelsTr/c12.png: holds 7 (12 voxels) -> mend it",
        "12 errors",
    ]
    assert plain(lambda console: console.print(problems_table(problems, tmp_path))).count("holds") == 2
    assert len(problems_json(problems, tmp_path)) == 12
    few = [holds(n, 255) for n in range(1, 6)]
    assert len(problems_lines(few, tmp_path)) == 6

"""Prediction of many cases: which files are a case, going on after an interruption, broken cases, nothing is lost."""

import json
import os
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from fakes import (
    Counter,
    expected_label,
    folder_of_cases,
    make_run,
    random_volume,
    write_nifti,
)
from medseg_jax.data import io
from medseg_jax.inference.cases import find_cases, load_case
from medseg_jax.inference.predict import CasesFailed, predict
from medseg_jax.types import Geometry, UserError

# ---------------------------------------------------------------------------------------------------- files and folders


def test_a_single_file_with_its_channels(tmp_path):
    array = random_volume(5, 6, 7)
    for channel in (0, 1):
        write_nifti(tmp_path / "in" / f"p 1_000{channel}.nii.gz", array * (1 - channel))
        write_nifti(tmp_path / "in" / f"p 2_000{channel}.nii.gz", array * 0)
    run = make_run(tmp_path / "run", channels=("CT", "PET"))
    (path,) = predict(run, tmp_path / "in" / "p 1_0000.nii.gz", tmp_path / "out", progress=False)
    assert path.name == "p 1.nii.gz"
    np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), expected_label(array))


def test_camera_names_are_not_channels(tmp_path):
    (tmp_path / "in").mkdir()
    for i in (1, 2, 7):
        Image.fromarray(np.full((9, 9), i, np.uint8)).save(tmp_path / "in" / f"IMG_000{i}.png")
    assert [c.id for c in find_cases(tmp_path / "in", ("grey",))] == ["IMG_0001", "IMG_0002", "IMG_0007"]
    assert [c.id for c in find_cases(tmp_path / "in" / "IMG_0002.png", ("grey",))] == ["IMG_0002"]


def test_nnunet_names_are_channels(tmp_path):
    for name in ("b_0000", "b_0001", "a_0000", "a_0001"):
        write_nifti(tmp_path / f"{name}.nii.gz", random_volume(3, 3, 3))
    cases = find_cases(tmp_path, ("T1", "T2"))
    assert [(c.id, [p.name for p in c.images]) for c in cases] == [
        ("a", ["a_0000.nii.gz", "a_0001.nii.gz"]),
        ("b", ["b_0000.nii.gz", "b_0001.nii.gz"]),
    ]


def test_one_rgb_file_may_carry_the_channel_number(tmp_path):
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "a_0000.png")
    for path in (tmp_path, tmp_path / "a_0000.png"):
        (case,) = find_cases(path, ("R", "G", "B"))
        assert case.id == "a"
        assert load_case(case, ("R", "G", "B"))[0].shape == (9, 9, 3)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha", ".npz", ".h5", ".tif"])
def test_every_format_is_predicted_into_itself_and_in_place(tmp_path, suffix):
    array = random_volume(5, 6, 7).astype(np.uint8)
    where = Geometry(array.shape, np.diag([0.5, 1.5, 2.0, 1.0]))
    io.write_image(tmp_path / "in" / f"a{suffix}", array[..., None], where)
    run = make_run(tmp_path / "run")
    options: dict[str, Any] = {"save_probabilities": True, "save_uncertainty": True, "progress": False}
    (path,) = predict(run, tmp_path / "in", tmp_path / "out", **options)
    assert path.name == f"a{suffix}"
    label, found = io.read_label(path)
    image, stored = io.read_image(tmp_path / "in" / f"a{suffix}")
    np.testing.assert_array_equal(label, expected_label(image[..., 0]))
    assert found.shape == stored.shape
    np.testing.assert_allclose(found.affine, stored.affine)


def test_two_files_for_one_prediction_are_refused(tmp_path):
    write_nifti(tmp_path / "a.nii", random_volume(3, 3, 3))
    write_nifti(tmp_path / "a.nii.gz", random_volume(3, 3, 3))
    with pytest.raises(UserError, match="Several files would give the prediction a"):
        find_cases(tmp_path, ("MR",))


@pytest.mark.parametrize(
    ("names", "found", "expected"),
    [
        (["a_0000"], "1 in a_0000.nii.gz", "2: a_0000.nii.gz (CT), a_0001.nii.gz (PET)"),
        (["a_0000", "a_0001", "a_0002"], "3 in a_0000.nii.gz, a_0001.nii.gz, a_0002.nii.gz", "2: "),
        (["a_0000", "a_0002"], "a_0000.nii.gz, a_0002.nii.gz", "a_0001.nii.gz (PET)"),
    ],
)
def test_a_wrong_number_of_channels_is_named(tmp_path, names, found, expected):
    for name in names:
        write_nifti(tmp_path / f"{name}.nii.gz", random_volume(3, 3, 3))
    (case,) = find_cases(tmp_path, ("CT", "PET"))
    with pytest.raises(UserError) as error:
        load_case(case, ("CT", "PET"))
    assert error.value.found == found
    assert expected in str(error.value.expected)


def test_channels_on_different_grids_are_refused_with_millimetres(tmp_path):
    write_nifti(tmp_path / "a_0000.nii.gz", random_volume(3, 3, 3))
    write_nifti(tmp_path / "a_0001.nii.gz", random_volume(3, 3, 3), np.diag([2.0, 2, 2, 1]))
    (case,) = find_cases(tmp_path, ("CT", "PET"))
    with pytest.raises(UserError, match="same space") as error:
        load_case(case, ("CT", "PET"))
    assert "mm" in error.value.found


def make_dataset(root: Path) -> Path:
    for i in range(6):
        write_nifti(root / "imagesTr" / f"c{i}_0000.nii.gz", random_volume(4, 5, 6, seed=i))
        write_nifti(root / "labelsTr" / f"c{i}.nii.gz", np.zeros((4, 5, 6), np.uint8))
    write_nifti(root / "imagesTs" / "t0_0000.nii.gz", random_volume(4, 5, 6, seed=9))
    content = {
        "channel_names": {"0": "MR"},
        "labels": {"background": 0, "low": 1, "high": 2},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


@pytest.mark.parametrize(
    ("split", "expected"), [("test", ["t0"]), ("val", ["c0", "c5"]), (None, ["c0", "c1", "c2", "c3", "c4", "c5", "t0"])]
)
def test_a_data_set_or_one_of_its_splits(tmp_path, split, expected):
    root = make_dataset(tmp_path / "data")
    run = make_run(tmp_path / "run")
    written = predict(run, root, tmp_path / "out", split=split, progress=False)
    assert [p.name for p in written] == [f"{id}.nii.gz" for id in expected]
    assert (tmp_path / "out" / "dataset.json").read_text() == (tmp_path / "run" / "dataset.json").read_text()


def test_a_preview_in_a_data_set_is_no_case(tmp_path):
    root = make_dataset(tmp_path / "data")
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(root / "preview.png")
    assert [case.id for case in find_cases(root, ("MR",), "test")] == ["t0"]
    assert len(find_cases(root, ("MR",))) == 7


def test_what_cannot_be_an_input_is_explained(tmp_path):
    (tmp_path / "in" / "imagesTs").mkdir(parents=True)
    with pytest.raises(UserError, match="no image") as error:
        find_cases(tmp_path / "in", ("MR",))
    assert error.value.remedy == f"-i {tmp_path / 'in' / 'imagesTs'}"
    with pytest.raises(UserError, match="no such image or folder"):
        find_cases(tmp_path / "missing", ("MR",))
    write_nifti(tmp_path / "flat" / "a.nii", random_volume(3, 3, 3))
    with pytest.raises(UserError, match="Only a data set folder has splits"):
        find_cases(tmp_path / "flat", ("MR",), "test")


def test_channels_in_another_order_are_refused(tmp_path):
    root = make_dataset(tmp_path / "data")
    content = json.loads((root / "dataset.json").read_text())
    content["channel_names"] = {"0": "PET", "1": "CT"}
    (root / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="another order"):
        find_cases(root, ("CT", "PET"))


# ---------------------------------------------------------------------------------------------- going on, starting anew


def test_an_interrupted_prediction_goes_on_where_it_stopped(tmp_path):
    source, out = folder_of_cases(tmp_path / "in"), tmp_path / "out"
    patch = (8, 8, 8)
    with pytest.raises(KeyboardInterrupt):
        predict(make_run(tmp_path / "run", patch, Counter(3, KeyboardInterrupt)), source, out, progress=False)
    assert sorted(p.name for p in out.glob("*.nii.gz")) == ["c0.nii.gz", "c1.nii.gz"]
    first = {p.name: p.stat().st_mtime_ns for p in out.glob("*.nii.gz")}
    network = Counter()
    written = predict(make_run(tmp_path / "run", patch, network), source, out, progress=False)
    assert network.calls == 1
    assert [p.name for p in written] == ["c0.nii.gz", "c1.nii.gz", "c2.nii.gz"]
    assert {name: (out / name).stat().st_mtime_ns for name in first} == first
    assert list(out.glob(".*")) == []


@pytest.mark.parametrize("lost", ["output", "journal", "input changed"])
def test_a_case_is_repeated_if_it_is_not_certainly_done(tmp_path, lost):
    source, out = folder_of_cases(tmp_path / "in"), tmp_path / "out"
    predict(make_run(tmp_path / "run"), source, out, progress=False)
    if lost == "output":
        (out / "c1.nii.gz").unlink()
    elif lost == "journal":
        journal = json.loads((out / "predict.json").read_text())
        del journal["cases"]["c1"]
        (out / "predict.json").write_text(json.dumps(journal))
        (out / "c1.nii.gz").write_bytes(b"half a file")
    else:
        write_nifti(source / "c1.nii.gz", random_volume(4, 5, 6, seed=77))
    network = Counter()
    run = make_run(tmp_path / "run", network=network)
    predict(run, source, out, progress=False)
    assert network.calls > 0
    image = np.asarray(nib.load(source / "c1.nii.gz").dataobj)
    np.testing.assert_array_equal(np.asarray(nib.load(out / "c1.nii.gz").dataobj), expected_label(image))
    network.calls = 0
    predict(run, source, out, progress=False)
    assert network.calls == 0


@pytest.mark.parametrize("change", ["weights", "plan", "tta", "overlap"])
def test_other_weights_or_settings_never_mix_silently(tmp_path, change):
    source, out = folder_of_cases(tmp_path / "in"), tmp_path / "out"
    predict(make_run(tmp_path / "run"), source, out, progress=False)
    old = (out / "c2.nii.gz").read_bytes()
    (source / "c2.nii.gz").unlink()
    run = make_run(
        tmp_path / "run", (4, 4, 4) if change == "plan" else (4, 6, 8), weights="b" if change == "weights" else "a"
    )
    options: dict[str, Any] = {"tta": True} if change == "tta" else {"overlap": 0.25} if change == "overlap" else {}
    with pytest.raises(UserError, match="another run or with other settings") as error:
        predict(run, source, out, progress=False, **options)
    assert change in str(error.value.found)
    assert (out / "c2.nii.gz").read_bytes() == old, "nothing may be lost before the user has decided"
    predict(run, source, out, overwrite=True, progress=False, **options)
    assert sorted(p.name for p in out.glob("*.nii.gz")) == ["c0.nii.gz", "c1.nii.gz"], (
        "the old run's case must not stay"
    )


def test_overwrite_repeats_everything(tmp_path):
    source, out = folder_of_cases(tmp_path / "in"), tmp_path / "out"
    network = Counter()
    run = make_run(tmp_path / "run", (8, 8, 8), network)
    predict(run, source, out, progress=False)
    predict(run, source, out, overwrite=True, progress=False)
    assert network.calls == 6


def test_no_map_of_an_image_that_was_replaced_stays(tmp_path):
    """It would be scored beside the new label map. Maps of the same image, asked for one after the other, all stay."""
    source, out, run = folder_of_cases(tmp_path / "in", 2), tmp_path / "out", make_run(tmp_path / "run")
    predict(run, source, out, save_probabilities=True, progress=False)
    predict(run, source, out, save_uncertainty=True, progress=False)
    assert (out / "probabilities" / "c0.npz").exists()
    write_nifti(source / "c0.nii.gz", random_volume(4, 5, 6, seed=7))
    predict(run, source, out, progress=False)
    assert {p.name[:2] for p in out.glob("*/c*")} == {"c1"}
    (source / "c1.nii.gz").unlink()
    predict(run, source, out, overwrite=True, progress=False)
    assert sorted(p.name for p in out.rglob("c*")) == ["c0.nii.gz"]


def test_a_folder_of_other_images_is_not_overwritten(tmp_path):
    source, labels = folder_of_cases(tmp_path / "in"), folder_of_cases(tmp_path / "labels")
    before = {p.name: p.read_bytes() for p in labels.iterdir()}
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="did not write"):
        predict(run, source, labels, progress=False)
    with pytest.raises(UserError, match="among the images"):
        predict(run, source, source, overwrite=True, progress=False)
    assert {p.name: p.read_bytes() for p in labels.iterdir()} == before


@pytest.mark.parametrize("lacking", [(), ("imagesTr", "labelsTr", "imagesTs")])
def test_a_data_set_keeps_its_dataset_json(tmp_path, lacking):
    root, run = make_dataset(tmp_path / "data"), make_run(tmp_path / "run")
    for name in lacking:
        (root / name).rename(tmp_path / name)
    before = sorted(root.rglob("*")), (root / "dataset.json").read_bytes()
    with pytest.raises(UserError, match=r"replace its dataset\.json"):
        predict(run, folder_of_cases(tmp_path / "in"), root, overwrite=True, progress=False)
    assert (sorted(root.rglob("*")), (root / "dataset.json").read_bytes()) == before


def test_a_broken_case_does_not_cost_the_others(tmp_path):
    source, out = folder_of_cases(tmp_path / "in", 4), tmp_path / "out"
    data = (source / "c1.nii.gz").read_bytes()
    (source / "c1.nii.gz").write_bytes(data[: len(data) // 2])
    write_nifti(source / "c2.nii.gz", np.full((4, 5, 6), np.nan, np.float32))
    run = make_run(tmp_path / "run")
    with pytest.raises(CasesFailed, match="2 of 4 cases") as error:
        predict(run, source, out, progress=False)
    assert [p.name for p in error.value.written] == ["c0.nii.gz", "c3.nii.gz"]
    assert set(error.value.failed) == {"c1", "c2"}
    assert "c1.nii.gz" in error.value.failed["c1"]
    assert "NaN" in str(error.value)
    assert sorted(p.name for p in out.glob("*.nii.gz")) == ["c0.nii.gz", "c3.nii.gz"]
    for id in ("c1", "c2"):
        write_nifti(source / f"{id}.nii.gz", random_volume(4, 5, 6))
    assert len(predict(run, source, out, progress=False)) == 4


def test_a_failing_network_is_reported_with_its_traceback(tmp_path):
    source = folder_of_cases(tmp_path / "in")
    with pytest.raises(CasesFailed) as error:
        predict(make_run(tmp_path / "run", (8, 8, 8), Counter(2)), source, tmp_path / "out", progress=False)
    assert list(error.value.failed) == ["c1"]
    assert "Traceback" in error.value.failed["c1"]
    assert "out of something" in error.value.failed["c1"]


def test_the_input_folder_may_be_read_only(tmp_path):
    source = folder_of_cases(tmp_path / "in")
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in source.iterdir()}
    os.chmod(source, 0o555)
    try:
        predict(make_run(tmp_path / "run"), source, tmp_path / "out", progress=False, save_probabilities=True)
    finally:
        os.chmod(source, 0o755)
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in source.iterdir()} == before


def test_predict_json_says_where_the_numbers_come_from(tmp_path):
    source, out = folder_of_cases(tmp_path / "in", 1), tmp_path / "out"
    predict(make_run(tmp_path / "run", weights="0123"), source, out, overlap=0.25, progress=False)
    content = json.loads((out / "predict.json").read_text())
    assert content["made_by"]["weights"] == "0123"
    assert content["made_by"]["overlap"] == 0.25
    assert (content["checkpoint"], content["step"]) == ("best", 7)
    assert content["cases"]["c0"]["outputs"] == ["c0.nii.gz"]
    assert content["cases"]["c0"]["shape"] == [4, 5, 6]


def test_plain_lines_when_piped(tmp_path, capsys):
    source = folder_of_cases(tmp_path / "in", 2)
    predict(make_run(tmp_path / "run"), source, tmp_path / "out")
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0].startswith("[1/2] c0: 4 x 5 x 6; takes at most 17 MiB of host memory")
    assert lines[1].startswith("[1/2] c0: 4 x 5 x 6, ")
    assert lines[2].startswith("[2/2] c1: 4 x 5 x 6, ")
    assert len(lines) == 3
    assert "\x1b" not in captured.err


@pytest.mark.parametrize("bad", [{"overlap": 1.0}, {"overlap": -0.1}, {"batch_size": 0}])
def test_impossible_settings_are_refused_before_anything_is_written(tmp_path, bad):
    with pytest.raises(UserError):
        predict(make_run(tmp_path / "run"), folder_of_cases(tmp_path / "in"), tmp_path / "out", progress=False, **bad)
    assert not (tmp_path / "out").exists()

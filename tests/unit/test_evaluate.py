"""Evaluation of folders: matching, geometry, ignore label, empty masks, means and intervals, the command line."""

import csv
import json
import math
import shutil

import numpy as np
import pytest

from medseg_jax.cli import main
from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.synthetic import make_phantoms
from medseg_jax.evaluation.evaluate import METRICS, bootstrap_interval, evaluate, read_rows, remarks, summarise
from medseg_jax.types import Case, Geometry, Labels, UserError


def geometry(shape, spacing=(1.0, 1.0, 2.0), shift=0.0):
    if len(shape) == 2:
        return Geometry(shape, unit="px")
    affine = np.diag([*spacing, 1.0])
    affine[0, 3] = shift
    return Geometry(shape, affine)


def write(folder, name, label, **options):
    folder.mkdir(parents=True, exist_ok=True)
    label = np.asarray(label, np.uint8)
    io.write_label(folder / name, label, geometry(label.shape, **options))


def cube(*ranges, value=1, shape=(12, 12, 8)):
    label = np.zeros(shape, np.uint8)
    label[tuple(slice(*r) for r in ranges)] = value
    return label


@pytest.fixture
def folders(tmp_path):
    """Three volumes; predictions: perfect, one voxel off, empty."""
    pred, ref = tmp_path / "pred", tmp_path / "ref"
    for name, (a, b) in {"a": (2, 6), "b": (3, 7), "c": (4, 8)}.items():
        reference = cube((a, b), (2, 6), (2, 6))
        write(ref, f"{name}.nii.gz", reference)
        write(pred, f"{name}.nii.gz", {"a": reference, "b": np.roll(reference, 1, 0), "c": reference * 0}[name])
    return pred, ref


# ---------------------------------------------------------------------------------------------------- figures


def test_scores_of_a_folder(folders, tmp_path):
    summary = evaluate(*folders, tmp_path / "out")
    rows = {row["case"]: row for row in read_rows(tmp_path / "out" / "cases.csv")}
    assert [rows[c]["dice"] for c in "abc"] == [1, 0.75, 0]
    assert [rows[c]["hd95"] for c in "abc"] == [0, 1, math.inf]
    assert [rows[c]["empty"] for c in "abc"] == ["", "", "prediction"]
    assert rows["a"]["volume_reference"] == pytest.approx(4 * 4 * 4 * 2 / 1000)
    diagonal = math.sqrt(12**2 + 12**2 + 16**2)
    assert rows["c"]["diagonal"] == pytest.approx(diagonal, rel=1e-5)
    assert summary["mean"]["dice"] == pytest.approx(1.75 / 3)
    assert summary["mean"]["hd95"] == pytest.approx((0 + 1 + diagonal) / 3)
    assert summary["median"]["hd95"] == 1
    assert summary["sd"]["dice"] == pytest.approx(np.std([1, 0.75, 0], ddof=1))
    assert summary["classes"]["label 1"]["dice"] == summary["mean"]["dice"]
    assert (summary["cases"], summary["unit"], summary["volume_unit"]) == (3, "mm", "ml")
    assert summary["worst"] == ["c", "b", "a"]
    assert summary["empty"] == {"both": 0, "prediction": 1, "reference": 0}
    assert summary["replaced_distances"] == 1
    assert set(METRICS) == set(summary["mean"]) == set(summary["ci95"])
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary
    assert not list((tmp_path / "out").glob(".*"))
    assert "No dataset.json" in summary["notes"][0]


def describe(folder, **labels):
    channels = {"0": "CT"}
    description = {"channel_names": channels, "labels": {"background": 0, **labels}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps({**description, "numTraining": 3}))


def test_classes_that_are_other_values_in_the_predictions_are_refused(folders, tmp_path):
    pred, ref = folders
    describe(ref, liver=1, spleen=2)
    describe(pred, spleen=1, liver=2)
    with pytest.raises(UserError, match=r"(?s)not the same value.*spleen = 1.*expected: 2"):
        evaluate(pred, ref, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    describe(pred, organ=1)
    notes = evaluate(pred, ref, tmp_path / "out")["notes"]
    assert any("organ, the references liver, spleen" in note for note in notes)
    describe(pred, liver=1)
    assert len(evaluate(pred, ref, tmp_path / "out")["notes"]) == 1
    describe(pred, liver=1, spleen=2)
    assert not evaluate(pred, ref, tmp_path / "out")["notes"]


def test_the_tolerance_is_used_and_stated(folders, tmp_path):
    strict = evaluate(*folders, tmp_path / "strict", nsd_tolerance=0.1)
    loose = evaluate(*folders, tmp_path / "loose", nsd_tolerance=1.0)
    assert strict["mean"]["nsd"] < loose["mean"]["nsd"] == pytest.approx(2 / 3)
    assert strict["settings"]["nsd_tolerance"] == 0.1


def test_workers_and_output_among_the_predictions_change_nothing(folders, tmp_path):
    one = evaluate(*folders, folders[0])
    two = evaluate(*folders, folders[0], workers=2)
    assert one == two


def test_a_class_absent_everywhere_scores_one_and_says_so(tmp_path):
    for folder in ("pred", "ref"):
        write(tmp_path / folder, "a.png", cube((1, 3), (1, 3), shape=(6, 6)))
        write(tmp_path / folder, "b.png", cube((1, 3), (1, 3), value=2, shape=(6, 6)))
    wrong = cube((3, 6), (3, 6), shape=(6, 6))
    write(tmp_path / "pred", "a.png", wrong)
    summary = evaluate(tmp_path / "pred", tmp_path / "ref", tmp_path / "out")
    assert summary["classes"]["label 2"]["dice"] == 1
    assert summary["classes"]["label 2"]["empty"]["both"] == 1
    assert summary["classes"]["label 1"]["dice"] == 0.5
    assert summary["classes"]["label 1"]["present"]["dice"] == 0
    assert summary["mean"]["dice"] == 0.75
    assert summary["present"]["dice"] == 0.5
    assert (summary["unit"], summary["volume_unit"]) == ("px", "px")


def test_a_class_that_is_found_in_no_case_is_named(folders, tmp_path):
    pred, ref = folders
    for name in "abc":
        both = io.read_label(ref / f"{name}.nii.gz")[0] + cube((8, 10), (8, 10), (6, 8), value=2)
        write(ref, f"{name}.nii.gz", both)
    summary = evaluate(pred, ref, tmp_path / "out")
    assert any(line.startswith("Found in no case at all: ") and "2" in line for line in remarks(summary))
    assert not any("no case at all" in line for line in remarks(evaluate(ref, ref, tmp_path / "same")))


def test_one_slice_is_measured_as_a_picture(tmp_path):
    reference = cube((2, 8), (2, 8), (0, 1), shape=(12, 12, 1))
    prediction = cube((2, 8), (2, 9), (0, 1), shape=(12, 12, 1))
    write(tmp_path / "ref", "a.nii.gz", reference, spacing=(1.0, 1.0, 9.0))
    write(tmp_path / "pred", "a.nii.gz", prediction, spacing=(1.0, 1.0, 9.0))
    summary = evaluate(tmp_path / "pred", tmp_path / "ref", tmp_path / "out", nsd_tolerance=0.5)
    # the two straight faces that moved are not within half a millimetre; caps of a slab would be
    assert summary["mean"]["nsd"] < 0.8
    assert summary["volume_unit"] == "mm²"
    assert summary["mean"]["volume_error"] == 6


def test_a_single_slice_among_volumes_is_scored_with_them(folders, tmp_path):
    pred, ref = folders
    for folder, end in ((ref, 8), (pred, 9)):
        write(folder, "flat.nii.gz", cube((2, 8), (2, end), (0, 1), shape=(12, 12, 1)), spacing=(1.0, 1.0, 9.0))
    summary = evaluate(pred, ref, tmp_path / "out")
    rows = {row["case"]: row for row in read_rows(tmp_path / "out" / "cases.csv")}
    assert (summary["unit"], summary["volume_unit"]) == ("mm", "ml")
    assert rows["flat"]["volume_reference"] == pytest.approx(6 * 6 * 9 / 1000)
    assert rows["flat"]["volume_error"] == pytest.approx(6 * 9 / 1000)
    assert rows["flat"]["volume_error_relative"] == pytest.approx(1 / 6, rel=1e-5)
    assert rows["a"]["volume_reference"] == pytest.approx(4 * 4 * 4 * 2 / 1000)


def test_the_relative_volume_error_of_an_empty_reference_is_unknown(folders, tmp_path):
    pred, ref = folders
    for name in "ab":
        write(ref, f"{name}.nii.gz", np.zeros((12, 12, 8)))
    write(pred, "b.nii.gz", np.zeros((12, 12, 8)))
    evaluate(pred, ref, tmp_path / "out", labels=Labels.simple("organ"))
    rows = {row["case"]: row for row in read_rows(tmp_path / "out" / "cases.csv")}
    assert rows["a"]["empty"] == "reference"
    assert rows["b"]["empty"] == "both"
    assert [math.isnan(rows[c]["volume_error_relative"]) for c in "abc"] == [True, True, False]


@pytest.mark.parametrize("tolerance", [-1.0, math.nan, math.inf])
def test_a_tolerance_that_is_no_distance_is_refused(folders, tmp_path, tolerance):
    assert "tolerance" in refused(*folders, tmp_path / "out", nsd_tolerance=tolerance)


def test_ignored_voxels_take_no_part(tmp_path):
    reference, prediction = cube((0, 6), (0, 12), (0, 8)), cube((0, 12), (0, 12), (0, 8))
    reference[6:] = 2
    write(tmp_path / "ref", "a.nii.gz", reference)
    write(tmp_path / "pred", "a.nii.gz", prediction)
    write(tmp_path / "ref", "b.nii.gz", np.full_like(reference, 2))
    write(tmp_path / "pred", "b.nii.gz", prediction)
    labels = Labels.simple("organ", ignore=2)
    summary = evaluate(tmp_path / "pred", tmp_path / "ref", tmp_path / "out", labels=labels)
    assert (summary["mean"]["dice"], summary["mean"]["hd"]) == (1, 0)
    assert summary["unscored"] == ["b"]
    assert summary["cases"] == 1
    assert any("ignore label: b" in note for note in summary["notes"])


def test_overlapping_classes_are_scored_each(tmp_path):
    write(tmp_path / "ref", "a.png", [[3, 3, 1, 0]])
    write(tmp_path / "pred", "a.png", [[3, 1, 1, 0]])
    labels = Labels.overlapping("lung", "heart")
    summary = evaluate(tmp_path / "pred", tmp_path / "ref", tmp_path / "out", labels=labels)
    assert summary["classes"]["lung"]["dice"] == 1
    assert summary["classes"]["heart"]["dice"] == pytest.approx(2 / 3)


# ---------------------------------------------------------------------------------------------------- intervals


def rows_of(dice, patients=None, domains=None):
    patients, domains = patients or [""] * len(dice), domains or [""] * len(dice)
    blank = dict.fromkeys(METRICS, 0.0) | {"class": "x", "empty": "", "diagonal": 10.0}
    return [
        blank | {"case": f"{i:03d}", "dice": float(v), "patient": p, "domain": d}
        for i, (v, p, d) in enumerate(zip(dice, patients, domains, strict=True))
    ]


def test_interval_is_that_of_the_mean():
    dice = np.random.default_rng(0).normal(0.8, 0.1, 200)
    low, high = summarise(rows_of(dice), seed=1)["ci95"]["dice"]
    half = 1.96 * dice.std() / np.sqrt(200)
    assert (low, high) == pytest.approx((dice.mean() - half, dice.mean() + half), abs=0.003)
    assert summarise(rows_of(dice), seed=1)["ci95"]["dice"] == [low, high]
    assert summarise(rows_of(dice), seed=2)["ci95"]["dice"] != [low, high]


def test_interval_draws_patients_and_not_their_cases():
    dice = np.repeat(np.random.default_rng(0).uniform(0.5, 1, 20), 10)
    patients = [f"p{i // 10}" for i in range(200)]
    width = np.diff(summarise(rows_of(dice))["ci95"]["dice"])
    clustered = summarise(rows_of(dice, patients))
    assert np.diff(clustered["ci95"]["dice"]) > 2.5 * width
    assert clustered["patients"]["patients"] == 20
    assert clustered["patients"]["dice"] == pytest.approx(dice.mean())


def test_patients_with_many_cases_count_once_in_the_mean_over_patients():
    summary = summarise(rows_of([1, 1, 1, 0], ["a", "a", "a", "b"]))
    assert summary["mean"]["dice"] == 0.75
    assert summary["patients"]["dice"] == 0.5


def test_interval_of_one_case_is_unknown():
    summary = summarise(rows_of([0.5]))
    assert summary["ci95"]["dice"] == [None, None]
    assert summary["sd"]["dice"] is None
    json.dumps(summary, allow_nan=False)


def test_unequal_groups_give_the_ratio_of_sums():
    values, groups = np.array([[1.0], [1.0], [1.0], [0.0]]), np.array(["a", "a", "a", "b"])
    low, high = bootstrap_interval(values, groups)
    assert (low[0], high[0]) == (0, 1)


def test_domains_are_reported_apart():
    summary = summarise(rows_of([1, 0.8, 0.2, 0.4], domains=["s0", "s0", "s1", "s1"]))
    assert {d: (v["cases"], v["dice"]) for d, v in summary["domains"].items()} == {
        "s0": (2, pytest.approx(0.9)),
        "s1": (2, pytest.approx(0.3)),
    }
    assert "domains" not in summarise(rows_of([1, 0.5]))


# ---------------------------------------------------------------------------------------------------- matching


def refused(*arguments, **options):
    with pytest.raises(UserError) as caught:
        evaluate(*arguments, **options)
    return str(caught.value)


def test_missing_predictions_are_listed_or_scored_as_empty(folders, tmp_path):
    pred, ref = folders
    (pred / "b.nii.gz").unlink()
    (pred / "c.nii.gz").unlink()
    text = refused(pred, ref, tmp_path / "out")
    assert "2 of 3" in text
    assert "b, c" in text
    assert "--missing worst" in text
    assert not (tmp_path / "out").exists()
    summary = evaluate(pred, ref, tmp_path / "out", missing="worst")
    assert summary["missing"] == ["b", "c"]
    assert summary["mean"]["dice"] == pytest.approx(1 / 3)
    summary = evaluate(pred, ref, tmp_path / "out", missing="skip")
    assert (summary["cases"], summary["mean"]["dice"], summary["missing"]) == (1, 1, [])
    assert any("left out: b, c" in note for note in summary["notes"])


def test_extra_predictions_are_named(folders, tmp_path):
    write(folders[0], "z.nii.gz", cube((1, 3), (1, 3), (1, 3)))
    assert evaluate(*folders, tmp_path / "out")["extra"] == ["z.nii.gz"]


def test_probabilities_beside_a_prediction_are_passed_over(folders, tmp_path):
    np.savez(folders[0] / "a.npz", probabilities=np.zeros((2, 2)))
    assert evaluate(*folders, tmp_path / "out")["cases"] == 3


def test_two_files_of_one_case_are_refused(folders, tmp_path):
    write(folders[1], "a.nii", cube((1, 3), (1, 3), (1, 3)))
    assert "a.nii, a.nii.gz" in refused(*folders, tmp_path / "out")


def test_no_common_name(folders, tmp_path):
    write(tmp_path / "other", "x.nii.gz", cube((1, 3), (1, 3), (1, 3)))
    text = refused(tmp_path / "other", folders[1], tmp_path / "out")
    assert "found: x" in text
    assert "expected: a, b, c" in text
    assert "no such file" in refused(tmp_path / "nowhere", folders[1], tmp_path / "out")


def test_two_files_are_matched_whatever_their_names(folders, tmp_path):
    summary = evaluate(folders[0] / "a.nii.gz", folders[1] / "b.nii.gz", tmp_path / "out")
    assert summary["cases"] == 1
    assert summary["mean"]["dice"] == pytest.approx(0.75)
    assert evaluate(folders[0] / "b.nii.gz", folders[1], tmp_path / "out")["worst"] == ["b"]


def test_all_cases_in_another_space_are_listed_with_millimetres(folders, tmp_path):
    pred, ref = folders
    write(pred, "a.nii.gz", cube((2, 6), (2, 6), (2, 6)), shift=7.5)
    write(pred, "b.nii.gz", cube((2, 6), (2, 6), (2, 6), shape=(12, 12, 9)))
    text = refused(pred, ref, tmp_path / "out")
    assert "2 of 3 cases" in text
    assert "7.5" in text
    assert "mm" in text
    assert "case a" in text
    assert "case b" in text
    assert not (tmp_path / "out").exists()


def test_unknown_values_are_refused(folders, tmp_path):
    write(folders[0], "a.nii.gz", cube((2, 6), (2, 6), (2, 6), value=7))
    text = refused(*folders, tmp_path / "out")
    assert "7 (64 voxels)" in text
    assert "a.nii.gz" in text


def test_pictures_that_are_no_label_maps_are_refused(tmp_path):
    for folder in ("pred", "ref"):
        write(tmp_path / folder, "a.png", np.arange(100).reshape(10, 10))
    assert "99 values" in refused(tmp_path / "pred", tmp_path / "ref", tmp_path / "out")


def test_pictures_and_volumes_are_not_averaged(tmp_path):
    for folder in ("pred", "ref"):
        write(tmp_path / folder, "a.png", cube((1, 3), (1, 3), shape=(6, 6)))
        write(tmp_path / folder, "b.nii.gz", cube((1, 3), (1, 3), (1, 3)))
    assert "mix units" in refused(tmp_path / "pred", tmp_path / "ref", tmp_path / "out")


# ---------------------------------------------------------------------------------------------------- data sets


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory):
    return make_phantoms(tmp_path_factory.mktemp("phantoms") / "data", dim=2, cases=12, sites=3, size=32)


def predict_perfectly(dataset, cases, folder):
    folder.mkdir()
    for case in cases:
        label, where = io.read_label(case.label)
        io.write_label(folder / case.label.name, label, where)
    return folder


def test_a_data_set_gives_classes_domains_patients_and_the_split(phantoms, tmp_path):
    cases = phantoms.subset("val")
    pred = predict_perfectly(phantoms, cases, tmp_path / "pred")
    summary = evaluate(pred, phantoms.root, tmp_path / "out")
    assert tuple(summary["classes"]) == phantoms.labels.names
    assert summary["cases"] == len(cases)
    assert set(summary["domains"]) == {case.domain for case in cases}
    assert summary["mean"]["dice"] == 1
    assert "split val" in summary["notes"][0]
    rows = read_rows(tmp_path / "out" / "cases.csv")
    assert {(r["case"], r["domain"], r["patient"]) for r in rows} == {(c.id, c.domain, c.patient) for c in cases}


def test_scores_of_training_cases_come_with_a_warning(phantoms, tmp_path):
    cases = phantoms.subset("train")
    pred = predict_perfectly(phantoms, cases, tmp_path / "pred")
    notes = evaluate(pred, phantoms.root, tmp_path / "out")["notes"]
    assert any(f"{len(cases)} of {len(cases)} cases are training cases" in note for note in notes)
    pred = predict_perfectly(phantoms, phantoms.subset("test"), tmp_path / "unseen")
    assert not any("training cases" in note for note in evaluate(pred, phantoms.root, tmp_path / "out")["notes"])


def test_the_splits_missing_cases_are_errors_too(phantoms, tmp_path):
    cases = phantoms.subset("train")
    pred = predict_perfectly(phantoms, cases[1:], tmp_path / "pred")
    assert cases[0].id in refused(pred, phantoms.root, tmp_path / "out")
    assert "No prediction" in refused(pred, phantoms.root, tmp_path / "out", split="test")
    assert "No such split" in refused(pred, phantoms.root, tmp_path / "out", split="tets")
    assert "splits" in refused(pred, pred, tmp_path / "out", split="test")


def test_a_label_folder_of_a_data_set_knows_its_classes(phantoms, tmp_path):
    pred = predict_perfectly(phantoms, phantoms.subset("test"), tmp_path / "pred")
    summary = evaluate(pred, phantoms.root / "labelsTs", tmp_path / "out")
    assert tuple(summary["classes"]) == phantoms.labels.names
    assert summary["domains"].keys() == {"site2"}


def test_the_predictions_dataset_json_knows_the_classes(phantoms, tmp_path):
    cases = phantoms.subset("test")
    pred = predict_perfectly(phantoms, cases, tmp_path / "pred")
    ref = predict_perfectly(phantoms, cases, tmp_path / "ref")
    (pred / "dataset.json").write_text((phantoms.root / "dataset.json").read_text())
    assert tuple(evaluate(pred, ref, tmp_path / "out")["classes"]) == phantoms.labels.names


def test_a_dataset_json_of_another_kind_is_noted_and_passed_over(folders, tmp_path):
    root = tmp_path / "Task04"
    (root / "imagesTr").mkdir(parents=True)
    shutil.copytree(folders[1], root / "labelsTr")
    (root / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "x"}, "training": []}))
    summary = evaluate(folders[0], root / "labelsTr", tmp_path / "out")
    assert "Not used" in summary["notes"][0]
    assert tuple(summary["classes"]) == ("label 1",)
    assert "Medical Segmentation Decathlon" in refused(folders[0], root, tmp_path / "out")


def test_ignore_label_of_a_data_set(tmp_path):
    root = tmp_path / "data"
    write(root / "labelsTs", "a.png", [[1, 1, 0, 2]])
    io.write_image(root.joinpath("imagesTs").joinpath("a_0000.png"), *_grey(root, (1, 4)))
    case = Case("a", (root / "imagesTs" / "a_0000.png",), root / "labelsTs" / "a.png", split="test")
    Dataset(root, "tiny", ("grey",), Labels.simple("x", ignore=2), (case,), ".png", "px").save()
    write(tmp_path / "pred", "a.png", [[1, 1, 0, 1]])
    assert evaluate(tmp_path / "pred", root, tmp_path / "out")["mean"]["dice"] == 1


def _grey(root, shape):
    (root / "imagesTs").mkdir()
    return np.zeros((*shape, 1), np.uint8), geometry(shape)


# ---------------------------------------------------------------------------------------------------- command line


def test_command_line(folders, tmp_path, capsys):
    arguments = ["evaluate", *map(str, folders), "-o", str(tmp_path / "out")]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "0.583" in shown.out
    assert "\x1b" not in shown.out
    assert "empty on one side" in shown.err
    assert main([*arguments, "--json", "--nsd-tolerance", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"]["nsd_tolerance"] == 2
    assert main([*arguments, "--labels", "organ"]) == 0
    assert "organ" in capsys.readouterr().out


def test_command_line_errors(folders, tmp_path, capsys):
    (folders[0] / "a.nii.gz").unlink()
    assert main(["evaluate", *map(str, folders), "-o", str(tmp_path / "out")]) == 1
    assert "1 of 3 references" in capsys.readouterr().err
    assert main(["evaluate", *map(str, folders), "-o", str(tmp_path / "out"), "--missing", "worst"]) == 0
    assert main(["evaluate", str(folders[0])]) == 2
    assert main(["evaluate", *map(str, folders), "-o", "x", "--tolerance", "3"]) == 2
    assert "nsd-tolerance" in capsys.readouterr().err


def test_csv_is_tidy(folders, tmp_path):
    evaluate(*folders, tmp_path / "out")
    with (tmp_path / "out" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [r["case"] for r in rows] == ["a", "b", "c"]
    assert rows[2]["hd95"] == "inf"

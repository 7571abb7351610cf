"""Lesions, clDice and probabilities in `medseg evaluate`: columns, pooling, ignored voxels, refusals."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from medseg_jax.cli import main
from medseg_jax.data import io
from medseg_jax.evaluation.evaluate import METRICS, evaluate, read_rows
from medseg_jax.evaluation.metrics import calibration, pr
from medseg_jax.types import Geometry, Labels, UserError

LABELS = Labels.simple("a", "b", ignore=9)


@pytest.fixture
def folders(tmp_path):
    """Two pictures, two classes, ignored pixels; the second lacks class b; labels drawn from probabilities."""
    rng = np.random.default_rng(0)
    (tmp_path / "pred" / "probabilities").mkdir(parents=True)
    (tmp_path / "ref").mkdir()
    for i, id in enumerate(("x", "y")):
        p = rng.dirichlet((1, 0.5, 0.5), (16, 20)).astype(np.float16)  # [h, w, 3]
        label = np.argmax(rng.random((16, 20, 1)) < np.cumsum(p.astype(float), -1), -1).astype(np.uint8)
        if i:
            label[label == 2] = 0
        label[:2] = 9
        io.write_label(tmp_path / "ref" / f"{id}.png", label, Geometry(label.shape, unit="px"))
        io.write_label(tmp_path / "pred" / f"{id}.png", p.argmax(-1).astype(np.uint8), Geometry(label.shape, unit="px"))
        names = ["background", "a", "b"]
        np.savez_compressed(tmp_path / "pred" / "probabilities" / f"{id}.npz", probabilities=p, classes=names)
    return tmp_path


def run(folder, **options):
    return evaluate(folder / "pred", folder / "ref", folder / "out", labels=LABELS, **options)


def voxels(folder, ids):
    """Probabilities [n, 3] and labels [n] of all voxels that are not ignored."""
    p = np.concatenate([np.load(folder / f"pred/probabilities/{i}.npz")["probabilities"].reshape(-1, 3) for i in ids])
    y = np.concatenate([np.asarray(Image.open(folder / f"ref/{i}.png")).ravel() for i in ids])
    return p[y != 9], y[y != 9]


def test_pooled_figures_are_those_of_all_voxels_that_count(folders):
    summary = run(folders)["probabilities"]
    p, y = voxels(folders, "xy")
    for k, name in ((1, "a"), (2, "b")):
        found, score, mask = summary["classes"][name], p[:, k].astype(float), y == k
        assert found["ap"] == pytest.approx(pr.average_precision(score, mask), rel=1e-9)
        assert found["aupr33"] == pytest.approx(pr.idrid_aupr(score, mask), rel=1e-9)
        soft = 2 * (score * mask).sum() / (score.sum() + mask.sum())
        assert found["soft_dice_pooled"] == pytest.approx(soft, rel=1e-9)
        assert found["brier"] == pytest.approx(calibration.brier(score, mask), rel=1e-9)
        assert found["ece"] == pytest.approx(calibration.reliability(score, mask, mass=True).ece, rel=1e-9)
        assert found["voxels"] == len(y) == sum(found["curve"]["voxels"])
        assert found["prevalence"] == pytest.approx(mask.mean())
    top = summary["top_label"]
    assert top["nll"] == pytest.approx(calibration.nll(p, y), rel=1e-9)
    assert top["brier"] == pytest.approx(calibration.brier_multiclass(p, y), rel=1e-9)
    assert top["ece_equal_width"] == pytest.approx(calibration.reliability(*calibration.top_label(p, y)).ece, rel=1e-9)


def test_a_case_without_the_class_has_no_average_precision_and_this_is_counted(folders):
    summary = run(folders)
    rows = {(r["case"], r["class"]): r for r in read_rows(folders / "out" / "cases.csv")}
    p, y = voxels(folders, "x")
    assert rows["x", "b"]["ap"] == pytest.approx(pr.average_precision(p[:, 2], y == 2), rel=1e-5)
    assert math.isnan(rows["y", "b"]["ap"])
    assert summary["classes"]["b"]["ap"] == pytest.approx(rows["x", "b"]["ap"], rel=1e-5)
    assert summary["undefined"] == {"volume_error_relative": 1, "ap": 1}
    assert json.loads((folders / "out" / "summary.json").read_text()) == summary
    with Image.open(folders / "out" / "plots" / "calibration.png") as plot:
        assert plot.size[0] > 300


def test_areas_over_the_cases_that_have_the_class_stand_beside_those_over_all(folders):
    classes = run(folders)["probabilities"]["classes"]
    assert classes["a"]["present"] == {"cases": 2, "ap": classes["a"]["ap"], "aupr33": classes["a"]["aupr33"]}
    p, y = voxels(folders, "x")  # the other case has no b
    present = classes["b"]["present"]
    assert present["cases"] == 1
    assert present["ap"] == pytest.approx(pr.average_precision(p[:, 2].astype(float), y == 2), rel=1e-9)
    assert present["aupr33"] == pytest.approx(pr.idrid_aupr(p[:, 2].astype(float), y == 2), rel=1e-9)
    assert present["ap"] > classes["b"]["ap"]  # whose negatives are more


def test_lesions_and_cldice_on_request_only(folders):
    plain, more = run(folders), run(folders, lesions=True, cldice=True, lesion_iou=0.1)
    lesions = {"lesion_f1", "lesion_sensitivity", "lesion_precision", "lesion_fp", "lesion_pq"}
    extra = lesions | {"accuracy", "accuracy_of_nothing", "cldice"}
    assert set(more["mean"]) - set(plain["mean"]) == extra
    assert {m: more["mean"][m] for m in METRICS} == {m: plain["mean"][m] for m in METRICS}
    assert "0.1" in more["settings"]["lesions"]
    assert "lesions" not in plain["settings"]


def test_without_probabilities_nothing_is_left_of_earlier_ones(folders):
    run(folders)
    (folders / "pred" / "probabilities" / "y.npz").unlink()
    summary = run(folders)
    assert "probabilities" not in summary
    assert set(summary["mean"]) == set(METRICS)
    assert "Probabilities not scored: 1 of 2" in " ".join(summary["notes"])
    assert not (folders / "out" / "plots" / "calibration.png").exists()
    with pytest.raises(UserError, match="1 of 2 cases have no probability map"):
        run(folders, probabilities=folders / "pred" / "probabilities")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (dict(probabilities=np.zeros((16, 20, 3)), classes=["background", "b", "a"]), "other classes"),
        (dict(probabilities=np.zeros((16, 21, 3)), classes=["background", "a", "b"]), "another shape"),
        (dict(probabilities=np.full((16, 20, 3), np.nan), classes=["background", "a", "b"]), "lie in"),
        (dict(other=np.zeros(1)), "no probability map"),
    ],
)
def test_maps_that_do_not_fit_are_refused(folders, content, problem):
    np.savez(folders / "pred" / "probabilities" / "x.npz", **content)
    with pytest.raises(UserError, match=problem):
        run(folders, probabilities=folders / "pred" / "probabilities")


def test_maps_of_other_classes_that_nobody_asked_for_are_noted_and_passed_over(folders):
    """Those of a run that was trained class by class have no background."""
    names = ["a", "b"]
    for id in "xy":
        path = folders / "pred" / "probabilities" / f"{id}.npz"
        np.savez(path, probabilities=np.load(path)["probabilities"][..., 1:], classes=names)
    summary = run(folders)
    assert "x.npz has the channels a, b, expected were background, a, b" in " ".join(summary["notes"])
    assert set(summary["mean"]) == set(METRICS)
    with pytest.raises(UserError, match="other classes"):
        run(folders, probabilities=folders / "pred" / "probabilities")


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_a_damaged_map_is_named(folders, damage):
    path = folders / "pred" / "probabilities" / "x.npz"
    content = bytearray(path.read_bytes())
    middle = len(content) // 3
    content[middle : middle + 50] = bytes(b ^ 255 for b in content[middle : middle + 50])
    path.write_bytes(content if damage == "flipped" else content[: 2 * middle])
    with pytest.raises(UserError, match=r"(?s)no probability map.*x\.npz"):
        run(folders)


def test_overlapping_classes_have_no_likeliest_one(tmp_path):
    labels, p = Labels.overlapping("a", "b"), np.array([[[0.9, 0.2], [0.6, 0.7], [0.1, 0.4]]], np.float16)
    for folder, label in {"ref": [[3, 1, 0]], "pred": [[1, 3, 0]]}.items():
        (tmp_path / folder).mkdir()
        io.write_label(tmp_path / folder / "x.png", np.array(label, np.uint8), Geometry((1, 3), unit="px"))
    (tmp_path / "p").mkdir()
    np.savez(tmp_path / "p" / "x.npz", probabilities=p, classes=["a", "b"])
    summary = evaluate(
        tmp_path / "pred", tmp_path / "ref", tmp_path / "out", labels=labels, probabilities=tmp_path / "p"
    )
    assert summary["probabilities"]["classes"]["a"]["ap"] == 1
    assert summary["probabilities"]["classes"]["b"]["ap"] == pytest.approx(1 / 3)
    assert "top_label" not in summary["probabilities"]


def test_command_line(folders, capsys):
    command = [
        "evaluate",
        str(folders / "pred"),
        str(folders / "ref"),
        "-o",
        str(folders / "out"),
        "--labels",
        "a",
        "b",
    ]
    for id in "xy":
        label = np.asarray(Image.open(folders / f"ref/{id}.png")).copy()
        label[label == 9] = 0
        io.write_label(folders / "ref" / f"{id}.png", label, Geometry(label.shape, unit="px"))
    assert main([*command, "--lesions", "--cldice"]) == 0
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("lesion F1", "clDice", "AP", "ECE"))
    assert main([*command, "--lesions", "--lesion-iou", "0"]) == 1
    assert "IoU" in capsys.readouterr().err

"""Post-processing: what it may change, how it is chosen, ties, regions and overlapping classes."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset
from medseg_jax.inference import postprocess
from medseg_jax.inference.postprocess import Cleaning, clean
from medseg_jax.training import postprocess as choosing
from medseg_jax.training.postprocess import MARGIN, choose
from medseg_jax.types import Case, Geometry, Labels, UserError

SPACING = (2.0, 2.0)
LABELS = Labels.simple("a", "b")


def disk(at: tuple[int, int], radius: float, shape=(48, 48)) -> np.ndarray:
    return np.hypot(*(np.indices(shape) - np.reshape(at, (2, 1, 1)))) <= radius


def test_a_class_gains_from_the_background_only():
    label = np.zeros((48, 48), np.uint8)
    label[disk((20, 20), 12)] = 1
    label[disk((20, 20), 6)] = 0
    label[disk((20, 20), 3)] = 2
    label[disk((42, 42), 2)] = 1
    before = label.copy()
    cleaned = clean(label, LABELS, {"a": Cleaning(largest=True, fill=True)}, SPACING)
    np.testing.assert_array_equal(label, before)
    np.testing.assert_array_equal(cleaned == 2, label == 2)
    np.testing.assert_array_equal(cleaned > 0, disk((20, 20), 12))
    assert clean(label, LABELS, {"a": Cleaning()}, SPACING) is label


def test_small_is_a_volume_and_not_a_number_of_voxels():
    label = disk((10, 10), 5).astype(np.uint8) | disk((40, 40), 2)
    voxels = disk((40, 40), 2).sum()
    for smallest, kept in ((4.0 * voxels, True), (4.0 * voxels + 0.1, False)):
        cleaned = clean(label, LABELS, {"a": Cleaning(smallest=smallest)}, SPACING)
        assert cleaned[40, 40] == kept
        assert cleaned[10, 10] == 1


@pytest.mark.parametrize(
    "labels", [Labels.overlapping("a", "b"), Labels(("a", "b"), ((1, 3), (2, 3)), exclusive=False)]
)
def test_overlapping_classes_and_regions_are_cleaned_apart(labels):
    a, b = disk((20, 20), 9), disk((20, 26), 9) | disk((44, 4), 2)
    label = labels.decode(np.stack([a, b], -1))
    cleaned = clean(label, labels, {"b": Cleaning(largest=True)}, SPACING)
    np.testing.assert_array_equal(labels.masks(cleaned), [a, disk((20, 26), 9)])


def write(folder, name, label):
    path = folder / f"{name}.nii.gz"
    io.write_label(path, label[..., None], Geometry((*label.shape, 1), np.diag([2.0, 2, 2, 1])))
    return path


@pytest.fixture
def pairs(tmp_path):
    """a: specks around the truth; b: perfect, in two parts that largest would break; a speck of b is nowhere."""
    found = []
    for i in range(3):
        truth = np.zeros((48, 48), np.uint8)
        truth[disk((12, 12), 8)] = 1
        truth[disk((36, 10), 5) | disk((36, 36), 5 + i)] = 2
        predicted = truth.copy()
        predicted[disk((12, 40), 1 + i)] = 1
        found.append((write(tmp_path / "p", f"c{i}", predicted), write(tmp_path / "r", f"c{i}", truth)))
    return found


def test_only_what_helps_is_chosen_and_the_numbers_are_kept(pairs):
    record = choose(pairs, LABELS)
    a, b = record["classes"]["a"], record["classes"]["b"]
    assert Cleaning(**a["choice"]) == Cleaning(largest=True), "the first of equally good ones"
    assert a["dice"]["keep the largest component"] == 1.0
    assert a["dice"]["keep the largest component and fill holes"] == 1.0
    assert a["dice"]["none"] < 1
    assert Cleaning(**b["choice"]) == Cleaning(), "nothing beats perfection"
    assert b["dice"]["keep the largest component"] < 1
    assert (record["cases"], record["margin"]) == (3, MARGIN)


def test_a_gain_within_the_margin_is_no_gain(tmp_path):
    truth = np.zeros((200, 200), np.uint8)
    truth[10:150, 10:150] = 1
    predicted = truth.copy()
    predicted[180, 180] = 1
    record = choose([(write(tmp_path / "p", "c", predicted), write(tmp_path / "r", "c", truth))], LABELS)
    a = record["classes"]["a"]
    assert a["dice"]["none"] < a["dice"]["keep the largest component"] == 1
    assert Cleaning(**a["choice"]) == Cleaning()


@pytest.mark.parametrize(
    ("name", "shape", "unit"), [("a.png", (48, 48), "px"), ("a.nii.gz", (4, 48, 48), "mm³"), ("a.npz", (48, 48), "mm²")]
)
def test_the_volume_that_was_chosen_is_told_with_its_unit(tmp_path, capsys, monkeypatch, name, shape, unit):
    where = Geometry(shape, np.diag([2.0] * len(shape) + [1.0] * (4 - len(shape))))
    io.write_label(tmp_path / "labels" / name, np.zeros(shape, np.uint8), where)
    case = Case("a", (), tmp_path / "labels" / name)
    dataset = Dataset(tmp_path, "toy", ("MR",), LABELS, (case,), io.suffix(case.label))
    about = {"choice": asdict(Cleaning(smallest=7.5)), "dice": {"none": 0.1, "remove components below 7.5": 0.2}}
    monkeypatch.setattr(choosing, "choose", lambda *args: {"classes": {"a": about}})
    monkeypatch.setattr(choosing, "evaluate", lambda *args: None)
    choosing.choose_and_score(tmp_path, dataset, {"last": tmp_path / "labels"})
    assert f"a: remove components below 7.5 {unit} (Dice 0.1000 -> 0.2000" in capsys.readouterr().err


def test_ignored_voxels_have_no_say(tmp_path):
    truth = np.zeros((48, 48), np.uint8)
    truth[disk((12, 12), 8)], truth[disk((36, 36), 8)] = 1, 3
    predicted = np.where(truth == 3, 1, truth).astype(np.uint8)
    labels = Labels.simple("a", "b", ignore=3)
    a = choose([(write(tmp_path / "p", "c", predicted), write(tmp_path / "r", "c", truth))], labels)["classes"]["a"]
    assert a["dice"]["none"] == 1
    assert Cleaning(**a["choice"]) == Cleaning()


def test_runs_must_agree(tmp_path):
    for name, largest in (("one", True), ("two", False), ("three", True)):
        (tmp_path / name).mkdir()
        about = {"best": {"classes": {"a": {"choice": {"largest": largest}}}}}
        (tmp_path / name / postprocess.FILE).write_text(json.dumps(about))
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    assert postprocess.load([one, three], "best") == {"a": Cleaning(largest=True)}
    assert postprocess.load([tmp_path / "none"], "best") == {}
    with pytest.raises(UserError, match="different post-processing") as error:
        postprocess.load([one, two], "best")
    assert "one: a: keep the largest component; two: none" in error.value.found

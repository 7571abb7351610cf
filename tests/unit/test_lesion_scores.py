"""Scores of lesions: accuracy never without that of predicting nothing, and what runs of overlapping classes report."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_jax import Augment, Config, DRLesions, Labels, Optim, Stage, UNet, evaluate, train
from medseg_jax.cli import main
from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.synthetic import make_phantoms
from medseg_jax.evaluation.evaluate import Settings, measure
from medseg_jax.types import Geometry


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 1))
def test_accuracy_is_the_share_of_equal_voxels(seed, share):
    rng = np.random.default_rng(seed)
    prediction, reference = rng.uniform(size=(2, 6, 7)) < share
    found = measure(prediction, reference, (1, 1), Settings(lesions=True))
    assert found["accuracy"] == pytest.approx((prediction == reference).mean())
    assert found["accuracy_of_nothing"] == pytest.approx((~reference).mean())
    nothing = measure(np.zeros_like(reference), reference, (1, 1), Settings(lesions=True))
    assert nothing["accuracy"] == nothing["accuracy_of_nothing"] == found["accuracy_of_nothing"]


def test_a_bad_prediction_is_accurate_and_the_command_says_what_that_is_worth(tmp_path, capsys):
    label = np.zeros((40, 40), np.uint8)
    label[3, 4] = 1
    geometry = Geometry((40, 40), np.eye(4), "px")
    for folder, values in (("ref", label), ("pred", np.roll(label, 9))):
        (tmp_path / folder).mkdir()
        io.write_label(tmp_path / folder / "a.png", values, geometry)
    (tmp_path / "pred" / "probabilities").mkdir()
    chances = np.full((40, 40, 2), 0.5, np.float16)
    np.savez(tmp_path / "pred" / "probabilities" / "a.npz", probabilities=chances, classes=["background", "MA"])
    places = (str(tmp_path / name) for name in ("pred", "ref"))
    assert main(["evaluate", *places, "-o", str(tmp_path / "out"), "--labels", "MA", "--lesions"]) == 0
    said = capsys.readouterr()
    assert "accuracy of nothing" in " ".join(said.out.split())
    assert "33 thresholds" in said.err
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["mean"]["dice"] == 0
    assert 0.998 < summary["mean"]["accuracy"] < summary["mean"]["accuracy_of_nothing"] < 1
    assert summary["probabilities"]["classes"]["MA"]["ap"] == pytest.approx(1 / 1600)  # constant scores: the prevalence


def test_without_lesions_there_is_no_accuracy(tmp_path):
    geometry = Geometry((8, 8), np.eye(4), "px")
    for folder in ("ref", "pred"):
        (tmp_path / folder).mkdir()
        io.write_label(tmp_path / folder / "a.png", np.eye(8, dtype=np.uint8), geometry)
    summary = evaluate(tmp_path / "pred", tmp_path / "ref", tmp_path / "out", labels=Labels.simple("MA"))
    assert "accuracy" not in summary["mean"]


def test_a_run_of_overlapping_classes_reports_areas_and_lesions(tmp_path):
    data = make_phantoms(tmp_path / "data", cases=8, sites=1, size=32)
    overlapping = Labels.overlapping("organ", "lesion")
    for path in (data.root / "labelsTr").glob("*.png"):
        values, geometry = io.read_label(path)
        io.write_label(path, (np.isin(values, (1, 2)) + 2 * (values == 2)).astype(np.uint8), geometry)
    data = Dataset.open(data.root)

    replace(data, labels=overlapping).save()
    net = UNet(features=(4, 8), strides=((1, 1), (2, 2)), kernel_sizes=((3, 3),) * 2)
    stage = Stage(DRLesions(net), steps=2, optim=Optim(lr=1e-2, warmup=1), augment=Augment.none())
    config = Config(data=str(data.root), stages=(stage,), cache=str(tmp_path / "cache"), validate_every=2)
    train(config, tmp_path / "run")
    for checkpoint in ("last", "best"):
        summary = json.loads((tmp_path / "run" / "validation" / checkpoint / "summary.json").read_text())
        assert {"lesion_f1", "accuracy", "accuracy_of_nothing", "ap"} <= set(summary["mean"])
        assert 0 <= summary["probabilities"]["classes"]["lesion"]["aupr33"] <= 1

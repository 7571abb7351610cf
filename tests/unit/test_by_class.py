"""A network for each class by one command: views, thresholds, merged maps, and the whole way once."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medseg_jax import Augment, Config, DRLesions, Labels, Optim, Stage, UNet, UserError, predict, train, train_by_class
from medseg_jax.cli import main
from medseg_jax.data import io
from medseg_jax.data.synthetic import make_phantoms
from medseg_jax.data.views import class_view
from medseg_jax.evaluation.metrics.pr import ScoreHistogram
from medseg_jax.inference.merge import one_map
from medseg_jax.inference.predict import common_thresholds
from medseg_jax.runtime.run import open_run, open_runs
from medseg_jax.training.by_class import _remember, best_threshold
from medseg_jax.training.prepare import open_data

LESIONS = Labels.overlapping("MA", "HE", "EX", "SE", "OD")


# ---------------------------------------------------------------- labels


def test_one_of_several_overlapping_classes_is_a_binary_task_on_the_same_label_maps():
    label = np.arange(32)
    one = LESIONS.only(["HE"])
    assert one.channels == 1
    assert one.known == set(range(32))
    np.testing.assert_array_equal(one.masks(label)[0], label >> 1 & 1)
    np.testing.assert_array_equal(one.decode(np.array([[0.2], [0.8]])), [0, 2])  # what it writes is HE's own bit


def test_some_classes_keep_the_order_that_is_asked_for():
    some = LESIONS.only(["SE", "MA"])
    probabilities = np.array([[0.9, 0.1], [0.1, 0.9], [0.9, 0.9], [0.0, 0.0]])
    np.testing.assert_array_equal(some.decode(probabilities), [8, 1, 9, 0])
    np.testing.assert_array_equal(some.decode(probabilities, [0.95, 0.05]), [1, 1, 1, 0])


def test_exclusive_classes():
    labels = Labels.simple("organ", "lesion", "vessel", ignore=4)
    assert labels.only(["lesion"]).channels == 1
    two = labels.only(["vessel", "organ"])
    assert (two.exclusive, two.values, two.rest, two.ignore) == (True, ((3,), (1,)), (2,), 4)
    np.testing.assert_array_equal(two.table[[0, 2, 3]].argmax(-1), [0, 0, 1])


def test_what_is_no_choice_is_refused():
    for names in (["XX"], [], ["MA", "MA"]):
        with pytest.raises(UserError):
            LESIONS.only(names)


# ---------------------------------------------------------------- merging


def test_classes_whose_folders_would_be_one_are_refused(tmp_path):
    _remember(tmp_path, ["肝", "脾"])
    _remember(tmp_path, ["肝", "脾"])
    with pytest.raises(UserError, match="other classes"):
        _remember(tmp_path, ["肝"])
    with pytest.raises(UserError, match="share a folder"):
        _remember(tmp_path / "new", ["left lung", "left_lung"])


def test_rules_of_merging():
    tau = [0.5, 0.25]
    p = np.array([[0.0, 0.0], [0.5, 0.25], [0.6, 0.25], [0.6, 0.9], [0.75, 0.625], [1.0, 1.0]])
    np.testing.assert_array_equal(one_map(p, tau), [0, 0, 1, 2, 1, 1])  # of equal margins the first class


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 60))
def test_the_threshold_has_the_largest_f1(seed, n):
    rng = np.random.default_rng(seed)
    scores = np.round(rng.uniform(0, 1, n), int(rng.integers(1, 4))).astype(np.float16)
    labels = rng.uniform(size=n) < 0.3
    histogram = ScoreHistogram.of(scores, labels)
    if not labels.any():
        assert best_threshold(histogram) == 0.5
        return

    def f1(t):
        found = scores.astype(float) > t
        return 2 * (found & labels).sum() / (found.sum() + labels.sum())

    levels = np.unique(np.r_[0, scores.astype(float)])
    every = [f1(t) for t in [*levels, *(levels[1:] + levels[:-1]) / 2]]
    assert np.isclose(f1(best_threshold(histogram)), max(every))


@pytest.mark.parametrize(("negative", "positive", "middle"), [(0.1, 0.9, 0.5), (0.0, 0.9, 0.45), (0.3, 0.4, 0.35)])
def test_the_threshold_lies_midway_between_two_scores(negative, positive, middle):
    """Just above the highest negative one it would call nearly everything positive on another image."""
    histogram = ScoreHistogram.of(np.array([negative, positive], np.float16), np.array([False, True]))
    assert best_threshold(histogram) == pytest.approx(middle, abs=1e-3)


def test_runs_that_predict_together_share_the_mean_of_their_thresholds():
    def runs(*thresholds):
        return [SimpleNamespace(thresholds=t, labels=Labels.overlapping("a", "b")) for t in thresholds]

    assert common_thresholds(runs(None, None)) is None
    assert common_thresholds(runs((0.2, 0.4))) == (0.2, 0.4)
    assert common_thresholds(runs((0.2, 0.4), (0.4, 0.8), None)) == pytest.approx((1.1 / 3, 1.7 / 3))


# ---------------------------------------------------------------- the whole way


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("by_class")
    data = make_phantoms(folder / "data", cases=12, sites=2, size=32)
    net = UNet(features=(4, 8), strides=((1, 1), (2, 2)), kernel_sizes=((3, 3),) * 2)
    stage = Stage(DRLesions(net), steps=16, optim=Optim(lr=1e-2, warmup=2), augment=Augment.light())
    config = Config(
        data=str(data.root),
        stages=(stage,),
        classes=("vessel", "organ"),
        cache=str(folder / "cache"),
        validate_every=16,
    )
    out = train_by_class(config, folder / "run", "organ")
    assert not (out / "thresholds.json").exists()
    with pytest.raises(UserError, match="Not all classes"):
        open_runs([out])
    return data, config, train_by_class(config, out)


def test_each_class_has_a_run_and_all_are_scored_together(trained):
    _data, _config, out = trained
    run = open_run(out / "class_organ")
    assert (run.plan.classes, run.labels.names, run.labels.channels) == (("organ",), ("organ",), 1)
    thresholds = json.loads((out / "thresholds.json").read_text())
    assert set(thresholds["last"]) == {"vessel", "organ"}
    summary = json.loads((out / "validation" / "last" / "summary.json").read_text())
    assert list(summary["classes"]) == ["vessel", "organ"]
    assert {"lesion_f1", "ap"} <= set(summary["mean"])
    assert 0 <= summary["probabilities"]["classes"]["organ"]["aupr33"] <= 1
    assert (out / "validation" / "last" / "report.html").is_file()


def test_together_they_predict_what_each_predicts_alone(trained, tmp_path):
    data, config, out = trained
    predict(out, data, tmp_path / "all", split="val", progress=False)
    tau = json.loads((out / "thresholds.json").read_text())["best"]
    alone = {}
    for name in config.classes:
        folder = tmp_path / name
        predict(out / f"class_{name}", data, folder, split="val", save_probabilities=True, progress=False)
        alone[name] = {p.stem: np.load(p)["probabilities"][..., 0] for p in (folder / "probabilities").glob("*.npz")}
    for case in data.subset("val"):
        values = np.stack([alone[name][case.id] for name in config.classes], -1)
        together = np.load(tmp_path / "all" / "probabilities" / f"{case.id}.npz")
        assert list(together["classes"]) == list(config.classes)
        np.testing.assert_allclose(together["probabilities"].astype(float), values, atol=2e-3)
        label, _ = io.read_label(tmp_path / "all" / f"{case.id}.png")
        assert set(np.unique(label)) <= {0, 1, 3}
        merged = np.asarray(Image.open(tmp_path / "all" / "merged" / f"{case.id}.png"))
        assert merged.shape == label.shape
        np.testing.assert_array_equal(merged, one_map(together["probabilities"], [tau[n] for n in config.classes]))
    legend = json.loads((tmp_path / "all" / "merged" / "legend.json").read_text())
    assert [entry["class"] for entry in legend.values()] == ["", *config.classes]


def test_it_goes_on_where_it_stopped_and_refuses_what_does_not_belong(trained, capsys):
    data, config, out = trained
    train_by_class(config, out, report=False)
    said = capsys.readouterr()
    assert (said.out + said.err).count("finished already") == 2
    with pytest.raises(UserError, match="other classes"):
        train_by_class(replace(config, classes=("organ", "lesion")), out)
    with pytest.raises(UserError, match="No such class"):
        train_by_class(config, out.parent / "other", "spleen")
    with pytest.raises(UserError, match="No such class"):
        class_view(data, ["spleen"])


def test_thresholds_are_chosen_without_a_domain_that_is_held_out(trained, tmp_path):
    data, config, _ = trained
    validating = [c.id for c in data.subset("val")]
    sites = json.loads((data.root / "dataset.json").read_text())
    for id in validating[:1]:
        sites["medseg"]["cases"][id]["domain"] = "elsewhere"
    folder = shutil.copytree(data.root, tmp_path / "data")
    (folder / "dataset.json").write_text(json.dumps(sites))
    stage = replace(config.stages[0], steps=2)
    own = replace(config, data=str(folder), stages=(stage,), classes=("organ",), hold_out="elsewhere")
    out = train_by_class(own, tmp_path / "run")
    train_by_class(own, out, report=False)  # the same data set as before
    scored = {p.stem for p in (out / "validation" / "last").glob("phantom*.png")}
    assert scored == {c.id for c in open_data(own)[1].subset("val")}
    assert not scored & set(validating[:1])


def test_one_network_for_some_classes(trained, tmp_path):
    data, config, _ = trained
    net = config.stages[0].objective.net
    with pytest.raises(UserError, match="may overlap"):
        train(replace(config, classes=("vessel", "organ")), tmp_path / "refused", report=False)
    from medseg_jax import Supervised

    stage = replace(config.stages[0], objective=Supervised(net), steps=4)
    out = train(replace(config, stages=(stage,), classes=("vessel", "organ"), validate_every=4), tmp_path / "both")
    summary = json.loads((out / "validation" / "last" / "summary.json").read_text())
    assert list(summary["classes"]) == ["vessel", "organ"]

    predict(out, data, tmp_path / "predicted", split="test", progress=False)
    assert main(["evaluate", str(tmp_path / "predicted"), str(data.root), "-o", str(tmp_path / "scores")]) == 0
    summary = json.loads((tmp_path / "scores" / "summary.json").read_text())
    assert list(summary["classes"]) == ["vessel", "organ"]
    assert any("learned nothing of them: lesion" in note for note in summary["notes"])

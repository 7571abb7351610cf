"""Cross-validation: the split's laws, a whole one from the command line, predicting with it, damage named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_jax import Augment, Config, Optim, Stage, Supervised, UNet
from medseg_jax.cli import main
from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset
from medseg_jax.evaluation.verify import verify
from medseg_jax.inference.predict import predict
from medseg_jax.runtime.run import open_runs
from medseg_jax.training.folds import fold_view, train_folds
from medseg_jax.types import Case, Labels, UserError


def dataset(cases: list[Case]) -> Dataset:
    return Dataset(Path("nowhere"), "toy", ("MR",), Labels.simple("a"), tuple(cases), ".nii.gz")


@settings(deadline=None)
@given(
    patients=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.booleans()), min_size=6, max_size=25),
    folds=st.integers(2, 6),
    tests=st.integers(0, 3),
)
def test_every_case_validates_once_with_its_patient_and_tests_stay_tests(patients, folds, tests):
    cases = []
    for p, (domain, count, validating) in enumerate(patients):
        for i in range(count):
            label = Path("x") if i == 0 or p % 2 else None
            split = "val" if validating else "train"
            cases.append(Case(f"{p:02d}-{i}", (Path("x"),), label, f"site{domain}", f"p{p}", split))
    cases += [Case(f"t{i}", (Path("x"),), Path("x"), "site0", f"t{i}", "test") for i in range(tests)]
    whole = dataset(cases)
    views = [fold_view(whole, k, folds) for k in range(folds)]
    validated = sorted(c.id for view in views for c in view.subset("val"))
    assert validated == sorted(c.id for c in cases if c.label is not None and c.split != "test")
    for view in views:
        assert [c.id for c in view.cases] == [c.id for c in whole.cases], "indices of cases must not move"
        assert [c.id for c in view.cases if c.split == "test"] == [f"t{i}" for i in range(tests)]
        sides = {split: {c.patient for c in view.cases if c.split == split} for split in ("train", "val")}
        assert not sides["train"] & sides["val"]
    for domain in (None, "site0", "site1", "site2"):
        sizes = [len({c.patient for c in v.subset("val") if domain in (None, c.domain)}) for v in views]
        assert max(sizes) - min(sizes) <= 1


def test_folds_that_cannot_be_are_refused():
    whole = dataset([Case(str(i), (Path("x"),), Path("x")) for i in range(3)])
    for fold, folds in ((3, 3), (-1, 3)):
        with pytest.raises(UserError, match="No such fold"):
            fold_view(whole, fold, folds)
    with pytest.raises(UserError, match="shared out") as error:
        fold_view(whole, 0, 5)
    assert error.value.expected == "2 to 3 folds"


def config(data: Path, cache: Path) -> Config:
    net = UNet(features=(4, 8), strides=((1, 1), (2, 2)), kernel_sizes=((3, 3),) * 2)
    stage = Stage(Supervised(net), steps=12, optim=Optim(lr=5e-3, warmup=4), augment=Augment.light())
    return Config(data=str(data), stages=(stage,), cache=str(cache), folds=2, log_every=6, validate_every=6)


@pytest.fixture(scope="module")
def crossed(phantoms, tmp_path_factory):
    """A cross-validation of two folds; read only."""
    folder = tmp_path_factory.mktemp("folds")
    out = folder / "cv"
    assert train_folds(config(phantoms.root, folder / "cache"), out, 0) == out / "fold_0"
    assert not (out / "cross_validation").exists(), "one fold is no cross-validation"
    with pytest.raises(UserError, match="not complete") as error:
        open_runs([out])
    assert "fold_1" in str(error.value.found)
    assert train_folds(config(phantoms.root, folder / "cache"), out) == out
    assert len(list((folder / "cache").iterdir())) == 1, "folds share the preprocessed cases"
    return out


def test_every_fold_is_a_run_and_the_summary_pools_them(crossed, phantoms):
    labelled = sorted(c.id for c in phantoms.cases if c.split != "test" and c.label is not None)
    said = [json.loads((crossed / f"fold_{k}" / "run.json").read_text())["cases"] for k in (0, 1)]
    assert sorted(said[0]["val"] + said[1]["val"]) == labelled
    assert said[0]["val"] == said[1]["train"]
    for checkpoint in ("last", "best"):
        folder = crossed / "cross_validation" / checkpoint
        assert sorted(io.stem(p) for p in io.list_files(folder)) == labelled
        summary = json.loads((folder / "summary.json").read_text())
        folds = [
            json.loads((crossed / f"fold_{k}" / "validation" / checkpoint / "summary.json").read_text()) for k in (0, 1)
        ]
        total = sum(s["mean"]["dice"] * s["cases"] for s in folds) / len(labelled)
        assert summary["cases"] == len(labelled)
        assert summary["mean"]["dice"] == pytest.approx(total)
        assert (folder / "report.html").stat().st_size > 10_000
    assert sorted(json.loads((crossed / "folds.json").read_text())["1"]) == said[1]["val"]
    assert set(json.loads((crossed / "postprocessing.json").read_text())) == {"last", "best"}
    for k in (0, 1):
        assert {check.state for check in verify(crossed / f"fold_{k}")} == {"ok"}


def test_folds_are_what_they_say(crossed):
    assert not [check for k in (0, 1) for check in verify(crossed / f"fold_{k}") if check.state == "problem"]


def test_predicting_with_it_averages_its_folds(crossed, phantoms, tmp_path):
    options = {"split": "test", "save_probabilities": True, "postprocessing": "none", "progress": False}
    folds = [crossed / "fold_0", crossed / "fold_1"]
    (path, *_) = predict(crossed, phantoms, tmp_path / "both", **options)
    written = [predict(fold, phantoms, tmp_path / fold.name, **options)[0] for fold in folds]

    def probabilities(label: Path) -> np.ndarray:
        with np.load(label.parent / "probabilities" / f"{io.stem(label)}.npz") as file:
            return file["probabilities"].astype(np.float32)

    np.testing.assert_allclose(probabilities(path), sum(map(probabilities, written)) / 2, atol=2e-3)
    assert len(json.loads((tmp_path / "both" / "predict.json").read_text())["made_by"]["weights"]) == 2


def test_started_again_it_repeats_nothing_and_refuses_another_config(crossed, phantoms, tmp_path, capsys):
    out = tmp_path / "cv"
    shutil.copytree(crossed, out)
    same = config(phantoms.root, crossed.parent / "cache")
    before = (out / "fold_0" / "report.html").stat().st_mtime_ns
    train_folds(same, out)
    assert capsys.readouterr().err.count("finished already") == 2
    assert (out / "fold_0" / "report.html").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="another config") as error:
        train_folds(replace(same, seed=3), out)
    assert "seed: 0 -> 3" in error.value.found
    with pytest.raises(UserError, match="a run without folds"):
        train_folds(same, out / "fold_0")


def test_folds_without_a_domain_are_summed_up_without_it(phantoms, tmp_path):
    same = config(phantoms.root, tmp_path / "cache")
    same = replace(same, stages=(replace(same.stages[0], steps=2),), hold_out="site0", labelled=1)
    out = train_folds(same, tmp_path / "cv")
    train_folds(same, out)
    summary = json.loads((out / "cross_validation" / "last" / "summary.json").read_text())
    others = [c for c in phantoms.cases if c.domain == "site1" and c.split != "test"]
    assert summary["cases"] == len(others)


def test_what_a_later_fold_lacks_is_said_before_the_first_is_trained(phantoms, tmp_path):
    """A labelled patient who is named validates in one of the folds."""
    same = config(phantoms.root, tmp_path / "cache")
    patient = fold_view(phantoms, 1, 2).subset("val")[0].patient
    with pytest.raises(UserError, match="Fold 1: No labelled training case") as error:
        train_folds(replace(same, labelled=(patient,)), tmp_path / "cv")
    assert error.value.found == patient
    assert not (tmp_path / "cv").exists()


def test_a_fold_must_be_a_number_or_all(capsys):
    assert main(["train", "phantoms2d", "--fold", "first"]) == 2
    assert main(["train", "--help"]) == 0
    assert "--fold K" in capsys.readouterr().out


def test_a_run_older_than_the_folds_goes_on(phantoms, tmp_path):
    from medseg_jax.training.prepare import refuse_other_config
    from medseg_jax.training.train import train

    run = train(replace(config(phantoms.root, tmp_path / "cache"), folds=5), tmp_path / "run", report=False)
    file = run / "run.json"
    record = json.loads(file.read_text())
    del record["config"]["fold"], record["config"]["folds"]
    file.write_text(json.dumps(record))
    refuse_other_config(replace(config(phantoms.root, tmp_path / "cache"), folds=5), run, phantoms)

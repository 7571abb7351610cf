"""A view with few labels: what is hidden, what stays, what is refused; and a run of it."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg_jax import Augment, Config, Labels, MeanTeacher, Mix, Stage, UNet, UserError, train
from medseg_jax import config as configs
from medseg_jax.cli import main
from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.planning import make_plan
from medseg_jax.data.views import labelled_view
from medseg_jax.training.prepare import open_data, open_plan
from medseg_jax.types import Case, Geometry


def dataset(*cases: Case) -> Dataset:
    return Dataset(Path("nowhere"), "toy", ("MR",), Labels.simple("a"), cases, ".nii.gz")


def case(patient: int, index: int, split: str = "train", labelled: bool = True) -> Case:
    label = Path("y") if labelled else None
    return Case(f"p{patient:02d}-{index}", (Path("x"),), label, patient=f"p{patient:02d}", split=split)


@given(counts=st.lists(st.integers(1, 3), min_size=1, max_size=8), keep=st.integers(1, 8))
def test_so_many_patients_keep_their_labels_and_nothing_else_changes(counts, keep):
    training = [case(p, i) for p, count in enumerate(counts) for i in range(count)]
    others = [case(20, 0, "val"), case(21, 0, "test"), case(22, 0, labelled=False)]
    whole = dataset(*training, *others)
    if keep > len(counts):
        with pytest.raises(UserError, match="not so many"):
            labelled_view(whole, keep)
        return
    view = labelled_view(whole, keep)
    assert {c.patient for c in view.subset("train")} == {f"p{p:02d}" for p in range(keep)}
    assert [c.id for c in view.cases] == [c.id for c in whole.cases], "indices of cases must not move"
    assert len(view.subset("train", labelled=None)) == len(training) + 1
    for split in ("val", "test"):
        assert view.subset(split) == whole.subset(split)
    names = tuple(c.id for c in view.subset("train"))
    assert labelled_view(whole, names) == view == labelled_view(view, keep)


def test_unknown_names_are_refused():
    whole = dataset(case(0, 0), case(1, 0), case(2, 0, "val"))
    with pytest.raises(UserError) as error:
        labelled_view(whole, ("p00", "p02", "p7"))
    assert error.value.found == "p02, p7"


def test_the_command_line_takes_a_number_or_names():
    one = configs.override(Config(), ["--labelled", "3"])
    many = configs.override(Config(), ["--labelled", "p1", "p2"])
    assert (one.labelled, many.labelled) == (3, ("p1", "p2"))
    assert configs.from_json(json.loads(json.dumps(configs.to_json(many)))) == many


def test_a_run_with_few_labels_resumes_is_verified_and_never_reads_the_others(phantoms, tmp_path, capsys):
    net = UNet.isotropic(2, 4, 8)
    stage = Stage(MeanTeacher(net, ramp=2), steps=2, mix=Mix(2, 2), augment=Augment.none())
    config = Config(str(phantoms.root), (stage,), labelled=1, cache=str(tmp_path / "cache"), log_every=1)
    run = train(config, tmp_path / "run")
    said = json.loads((run / "run.json").read_text())
    whole, view = open_data(config)
    assert said["cases"]["train"] == [c.id for c in view.subset("train")]
    assert 0 < len(view.subset("train")) < len(whole.subset("train"))
    assert said["dataset"]["fingerprint"] == whole.fingerprint()
    assert train(config, run) == run
    capsys.readouterr()
    assert main(["verify", str(run)]) == 0
    other = Config(str(phantoms.root), (stage,), labelled=2, cache=str(tmp_path / "cache"), log_every=1)
    with pytest.raises(UserError, match="another config") as error:
        train(other, run)
    assert error.value.found == "labelled: 1 -> 2"


def test_hidden_labels_have_no_part_in_the_plan(tmp_path, capsys):
    """CT is clipped and scaled by the labelled foreground: here each patient's is 100 HU brighter than the last."""
    geometry, cases = Geometry((8, 8, 8), np.eye(4), "mm"), []
    for i in range(3):
        image, label = np.full((8, 8, 8, 1), -500, np.int16), np.zeros((8, 8, 8), np.uint8)
        image[2:6, 2:6, 2:6], label[2:6, 2:6, 2:6] = 100 * i + np.arange(64).reshape(4, 4, 4, 1), 1
        paths = tmp_path / f"imagesTr/p{i}_0000.nii.gz", tmp_path / f"labelsTr/p{i}.nii.gz"
        for path in paths:
            path.parent.mkdir(exist_ok=True)
        io.write_image(paths[0], image, geometry)
        io.write_label(paths[1], label, geometry)
        cases.append(Case(f"p{i}", paths[:1], paths[1], split="train"))
    Dataset(tmp_path, "toy", ("CT",), Labels.simple("a"), tuple(cases), ".nii.gz").save()
    config = Config(str(tmp_path), labelled=1)
    whole, view = open_data(config)
    make_plan(whole).save(tmp_path / "plan.json")

    def mean(config, dataset):
        return open_plan(config, dataset).normalization[0]["mean"]

    assert mean(replace(config, labelled=None), whole) == pytest.approx(131.5, abs=2)
    assert mean(config, view) == pytest.approx(31.5, abs=2)
    assert "is left aside" in capsys.readouterr().err
    assert mean(replace(config, plan=str(tmp_path / "plan.json")), view) == pytest.approx(131.5, abs=2)

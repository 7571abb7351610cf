"""A view with few labels: what is hidden, what stays, what is refused; and a run of it."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg_jax import Augment, Config, Labels, MeanTeacher, Mix, Stage, UNet, UserError, train
from medseg_jax import config as configs
from medseg_jax.cli import main
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.views import labelled_view
from medseg_jax.training.prepare import open_data
from medseg_jax.types import Case


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

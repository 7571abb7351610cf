"""Leave one domain out: what the held-out domain may touch (nothing), the runs, the pooled scores, the command line."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg_jax.cli import main
from medseg_jax.config import Config, Optim, Stage
from medseg_jax.data import io
from medseg_jax.data.augment import Augment
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.views import hold_out_view
from medseg_jax.evaluation.compare import compare
from medseg_jax.evaluation.verify import verify
from medseg_jax.methods.supervised import Supervised
from medseg_jax.models.unet import UNet
from medseg_jax.runtime.run import open_run
from medseg_jax.training.hold_out import hold_out_folder, table, train_hold_out
from medseg_jax.training.train import train
from medseg_jax.types import Case, Labels, UserError


def dataset(cases) -> Dataset:
    return Dataset(Path("nowhere"), "fake", ("R",), Labels.simple("x"), tuple(cases), ".png", "px")


CASES = st.lists(
    st.tuples(
        st.sampled_from(["a", "b", "c"]),
        st.sampled_from(["p0", "p1", "p2", "p3", "p4", ""]),
        st.sampled_from(["train", "val", "test"]),
        st.booleans(),
    ),
    min_size=3,
    max_size=20,
)


@given(CASES, st.booleans())
def test_nothing_of_the_target_is_trained_on(drawn, oracle):
    cases = [
        Case(str(i), (Path("x"),), Path("y") if labelled else None, domain, patient, split)
        for i, (domain, patient, split, labelled) in enumerate(drawn)
    ]
    whole = dataset([Case("t", (Path("x"),), Path("y"), "target", "p0", "train"), *cases])
    if not [c for c in cases if c.label and c.split == "train" and c.patient != "p0"]:
        with pytest.raises(UserError, match="nothing left to train on"):
            hold_out_view(whole, "target", oracle=oracle)
        return
    view = hold_out_view(whole, "target", oracle=oracle)
    assert [c.id for c in view.cases] == [c.id for c in whole.cases], "indices of cases must not move"
    train_cases, val = view.subset("train", labelled=None), view.subset("val", labelled=None)
    assert not {c.patient for c in train_cases} & {"p0"}
    assert "target" not in {c.domain for c in train_cases}
    assert {c.domain for c in val} <= ({"target"} if oracle else {"a", "b", "c"})
    assert {c.id for c in whole.cases if c.split == "test" and c.domain != "target"} <= {
        c.id for c in view.cases if c.split == "test"
    }
    honest = hold_out_view(whole, "target")
    assert honest.subset("train", labelled=None) == train_cases, "the oracle takes the same training cases"


SITES = ("site0", "site1", "site2")


def test_other_domains_validate_even_where_only_the_target_did():
    cases = [Case(f"a{i}", (Path("x"),), Path("y"), "a", split="train") for i in range(7)]
    whole = dataset([*cases, Case("t", (Path("x"),), Path("y"), "t", split="val")])
    assert [c.id for c in hold_out_view(whole, "t").subset("val")] == ["a0", "a5"]


def test_an_unknown_domain_is_named(phantoms):
    with pytest.raises(UserError, match="No such domain") as error:
        hold_out_view(phantoms, "site3")
    assert error.value.expected == "site0, site1, site2"
    assert "did you mean site" in str(error.value.remedy)


def config(data: Path, cache: Path) -> Config:
    net = UNet(features=(4, 8), strides=((1, 1), (2, 2)), kernel_sizes=((3, 3),) * 2)
    stage = Stage(Supervised(net), steps=6, optim=Optim(lr=5e-3, warmup=2), augment=Augment.light())
    return Config(data=str(data), stages=(stage,), cache=str(cache), log_every=3, validate_every=3)


@pytest.fixture(scope="module")
def held(phantoms, tmp_path_factory):
    """Each of three sites left out in turn; read only."""
    folder = tmp_path_factory.mktemp("hold_out")
    train_hold_out(config(phantoms.root, folder / "cache"), folder / "run", "site1", oracle=True)
    return train_hold_out(config(phantoms.root, folder / "cache"), folder / "run")


def test_each_domain_is_scored_by_weights_that_never_saw_it(held, phantoms):
    labelled = {c.id: c.domain for c in phantoms.cases if c.label is not None}
    rows = json.loads((held / "hold_out.json").read_text())
    assert set(rows) == {"site0", "site1", "site2"}
    for name, row in rows.items():
        said = json.loads((held / f"hold_out_{name}" / "run.json").read_text())
        assert not {labelled[id] for id in (*said["cases"]["train"], *said["cases"]["val"])} & {name}
        folder = held / f"hold_out_{name}" / "target" / "last"
        assert {io.stem(p) for p in io.list_files(folder)} == {id for id, domain in labelled.items() if domain == name}
        assert row["last"]["cases"] == sum(domain == name for domain in labelled.values())
        assert {"sources", "last", "best"} <= set(row)
    assert [name for name, row in rows.items() if "oracle" in row] == ["site1"]
    assert not [c for c in verify(held / "hold_out_site1") if c.state == "problem"]


def test_the_pooled_scores_are_those_of_the_domains(held):
    rows = json.loads((held / "hold_out.json").read_text())
    for checkpoint in ("last", "best"):
        summary = json.loads((held / "unseen" / checkpoint / "summary.json").read_text())
        for name, row in rows.items():
            assert summary["domains"][name]["dice"] == pytest.approx(row[checkpoint]["mean"]["dice"])
        assert (held / "unseen" / checkpoint / "report.html").stat().st_size > 10_000
    text = (held / "hold_out.md").read_text()
    assert "oracle: not honest" in text
    assert f"{rows['site2']['last']['mean']['dice']:.3f}" in text


def test_the_folder_of_all_is_compared_by_its_pooled_scores_and_is_no_run(held):
    assert compare(held, held)["settings"]["a"] == str(held / "unseen" / "last")
    with pytest.raises(UserError, match="no run") as error:
        open_run(held)
    assert "hold_out_site0, hold_out_site1, hold_out_site2, oracle_site1" in error.value.found


def test_folds_of_an_oracle_would_train_on_the_target(phantoms, tmp_path):
    asked = replace(config(phantoms.root, tmp_path / "cache"), hold_out="site1", oracle=True, fold=0)
    with pytest.raises(UserError, match="oracle"):
        train(asked, tmp_path / "run")


@pytest.fixture
def asked_for(monkeypatch):
    """What would have been trained: (folder, whether as an oracle)."""
    seen = []
    monkeypatch.setattr(
        "medseg_jax.training.train.train", lambda config, out, **_: seen.append((out.name, config.oracle))
    )
    return seen


def test_the_oracle_of_a_config_stays_beside_the_honest_run(phantoms, tmp_path, asked_for):
    oracle = replace(config(phantoms.root, tmp_path / "cache"), hold_out="site0", oracle=True)
    train_hold_out(oracle, tmp_path / "run", "site1", report=False)
    assert asked_for == [("hold_out_site1", False), ("oracle_site1", True)]


def test_what_a_later_run_could_not_do_is_refused_before_the_first(phantoms, tmp_path, asked_for):
    same = config(phantoms.root, tmp_path / "cache")
    patients = {name: len({c.patient for c in hold_out_view(phantoms, name).subset("train")}) for name in SITES}
    assert patients["site2"] > patients["site1"]
    with pytest.raises(UserError, match="not so many labelled"):
        train_hold_out(replace(same, labelled=patients["site2"]), tmp_path / "run", report=False)
    with pytest.raises(UserError, match="oracle"):
        train_hold_out(replace(same, fold=0), tmp_path / "run", "site1", oracle=True, report=False)
    assert not asked_for


def test_without_patients_to_validate_on_no_stage_starts_from_the_best(phantoms, tmp_path, asked_for):
    data = Dataset.open(shutil.copytree(phantoms.root, tmp_path / "data"))
    alone = data.subset("train")[0].patient
    cases = (replace(case, domain="one" if case.patient == alone else "others") for case in data.cases)
    replace(data, cases=tuple(cases)).save()
    same = config(data.root, tmp_path / "cache")
    stages = (*same.stages, replace(same.stages[0], name="second", start="best"))
    with pytest.raises(UserError, match="no validation cases"):
        train_hold_out(replace(same, stages=stages), tmp_path / "run", report=False)
    assert not asked_for


def test_the_plan_is_made_without_the_target(held, phantoms):
    means = set()
    for name in ("site0", "site1", "site2"):
        plan = json.loads((held / f"hold_out_{name}" / "plan.json").read_text())
        means.add(plan["normalization"][0]["mean"])
    assert len(means) == 3


def test_started_again_it_repeats_nothing_and_refuses_another_config(held, phantoms, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(held, out)
    same = config(phantoms.root, held.parent / "cache")
    train_hold_out(same, out)
    assert capsys.readouterr().err.count("finished already") == 3
    with pytest.raises(UserError, match="another config") as error:
        train_hold_out(replace(same, seed=3), out)
    assert "seed: 0 -> 3" in str(error.value.found)
    with pytest.raises(UserError, match="holds nothing out"):
        train_hold_out(same, out / "hold_out_site0")


def test_the_oracle_takes_the_same_steps(held):
    """Only what is chosen differs: the last weights of both runs are the same bits."""
    last = [
        json.loads(next((held / folder / "checkpoints").glob("*/last/6.sha256.json")).read_text())
        for folder in ("hold_out_site1", "oracle_site1")
    ]
    losses = [
        [e["loss"] for e in map(json.loads, (held / folder / "log.jsonl").read_text().splitlines()) if "loss" in e]
        for folder in ("hold_out_site1", "oracle_site1")
    ]
    assert losses[0] == losses[1]
    assert last[0].keys() == last[1].keys()


def test_a_data_set_of_one_site_is_refused(tmp_path):
    from medseg_jax.data.synthetic import make_phantoms

    single = make_phantoms(tmp_path / "one", cases=4, sites=1, size=32)
    with pytest.raises(UserError, match="one only"):
        train_hold_out(config(single.root, tmp_path / "cache"), tmp_path / "run")
    with pytest.raises(UserError, match="nothing left"):
        train(replace(config(single.root, tmp_path / "cache"), hold_out="site0"), tmp_path / "run")


def test_what_cannot_be_scored_or_told_apart_is_refused_before_any_training(phantoms, held, tmp_path):
    same = config(phantoms.root, held.parent / "cache")
    out = tmp_path / "run"
    shutil.copytree(held / "hold_out_site0", out / "hold_out_site0")
    with pytest.raises(UserError, match="another config"):  # site0 would be pooled with it
        train_hold_out(replace(same, seed=3), out, "site1")
    assert not (out / "hold_out_site1").exists()

    root = tmp_path / "data"
    shutil.copytree(phantoms.root, root)
    document = json.loads((root / "dataset.json").read_text())
    theirs = document["medseg"]["cases"]
    of_site1 = [name for name, case in theirs.items() if case["domain"] == "site1"]
    for name in of_site1:
        theirs[name]["domain"] = "site 2"
    for name in (n for n, case in theirs.items() if case["domain"] == "site2"):
        theirs[name]["domain"] = "site_2"
    (root / "dataset.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="share a folder"):
        train_hold_out(replace(same, data=str(root)), tmp_path / "shared")
    (root / "imagesUn").mkdir()
    for name in of_site1:
        theirs[name]["domain"] = "北京"
        theirs[name].pop("split", None)
        for image in root.glob(f"imagesT?/{name}_*"):
            image.rename(root / "imagesUn" / image.name)
    (root / "dataset.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="nothing could be scored"):
        train_hold_out(replace(same, data=str(root)), tmp_path / "unlabelled", "北京")


def test_names_in_any_script_have_folders_of_their_own():
    assert hold_out_folder(Path("run"), "北京") != hold_out_folder(Path("run"), "上海")


def test_the_table_of_a_site_with_one_patient_has_no_interval(held):
    rows = json.loads((held / "hold_out.json").read_text())
    rows["site0"]["last"]["ci95"]["dice"] = [None, None]
    rows["site1"]["last"]["mean"] |= {"dice": None, "hd95": None}
    lines = table(rows).splitlines()
    assert "(" not in lines[2]
    assert "| – px |" in lines[3]


def test_the_command_line(capsys):
    assert main(["train", "phantoms2d", "--oracle"]) == 2
    assert main(["train", "phantoms2d", "--fold", "0", "--hold-out", "site0"]) == 2
    assert main(["train", "--help"]) == 0
    assert "--hold-out DOMAIN" in capsys.readouterr().out

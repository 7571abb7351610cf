"""medseg audit: from a run of KMSNoise to a page of probably wrong labels."""

import csv
import json
from dataclasses import replace

import pytest

from medseg_jax import (
    Augment,
    Config,
    KMSNoise,
    LabelNoise,
    Optim,
    Stage,
    UNet,
    UserError,
    audit,
    cli,
    corrupt,
    export,
    make_plan,
    train,
)
from medseg_jax.data import io
from medseg_jax.data.synthetic import make_phantoms
from medseg_jax.evaluation.verify import verify
from medseg_jax.runtime.run import seen_by

NET = UNet(features=(4, 8), strides=((1, 1), (2, 2)), kernel_sizes=((3, 3),) * 2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run on corrupted phantoms."""
    folder = tmp_path_factory.mktemp("audit")
    make_phantoms(folder / "clean", dim=2, cases=8, sites=1, size=32)
    data = corrupt(folder / "clean", folder / "wrong", LabelNoise("jsrt", alpha=0.5))
    method = KMSNoise(NET, e_steps=2, begin=0)
    stage = Stage(method, steps=6, optim=Optim(lr=3e-3, warmup=2), augment=Augment.light())
    config = Config(data=str(data.root), stages=(stage,), cache=str(folder / "cache"), validate_every=6)
    return data, train(config, folder / "run", report=False)


def test_audit_writes_a_page_a_table_and_maps(trained, capsys):
    data, run = trained
    assert cli.main(["audit", str(data.root), str(run), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    cases = data.subset("train")
    assert said["cases"] == len(cases)
    assert said["not_doubted"] == []
    assert {"error probability", "field", "entropy", "loss", "by chance"} == set(said["average_precision"])
    assert all(0 <= v <= 1 for v in (said["average_precision"] | said["calibration"]).values())
    with (run / "audit" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    shares = [float(row["share"]) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert {row["case"] for row in rows} == {case.id for case in cases}
    wrong = {row["case"]: int(row["truly_wrong"]) for row in rows}
    assert {id for id, n in wrong.items() if n} == {id for id, s in data.extra["label_noise"]["changed"].items() if s}
    for case in cases:
        values, _ = io.read_image(run / "audit" / "maps" / f"{case.id}.png")
        assert values.shape[:2] == io.read_label(case.label)[0].shape
        total = next(float(row["expected_wrong"]) for row in rows if row["case"] == case.id)
        assert values.astype(float).sum() / 255 == pytest.approx(total, rel=0.05, abs=3)
    page = (run / "audit" / "index.html").read_text()
    assert page.count("<img") == len(cases)
    assert "<script src" not in page


def test_a_run_that_keeps_posteriors_can_be_verified(trained):
    _, run = trained
    checks = verify(run)
    assert {c.state for c in checks if c.name != "scores"} == {"ok"}, [c for c in checks if c.state != "ok"]
    assert any(c.name == "weights" for c in checks)


def test_it_sees_the_classes_and_the_sites_that_the_run_saw(trained, tmp_path):
    """One class of the data set, and a run without one of its sites."""
    folder = make_phantoms(tmp_path / "data", dim=2, cases=8, sites=2, size=32).root
    stage = Stage(KMSNoise(NET, e_steps=2, begin=0), steps=6, optim=Optim(lr=3e-3), augment=Augment.light())
    config = Config(
        data=str(folder), stages=(stage,), cache=str(tmp_path / "cache"), classes=("organ",), hold_out="site1"
    )
    run = train(config, tmp_path / "run", report=False)
    said = json.loads((audit(folder, run).parent / "summary.json").read_text())
    assert set(said["prior"]) == {"mu", "s", "rho"}
    with (run / "audit" / "cases.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == said["cases"] == len(json.loads((run / "run.json").read_text())["cases"]["train"])
    export(run, tmp_path / "exported", "safetensors")
    with pytest.raises(UserError, match="keeps no posterior") as error:
        audit(folder, tmp_path / "exported")
    assert error.value.found == "an exported run"


def test_it_sees_neighbouring_slices_and_the_labels_that_the_fold_saw(tmp_path):
    """2.5-D, and the first two training patients of a fold, who are others than those of the data set's own split."""
    data = make_phantoms(tmp_path / "data", dim=3, cases=8, sites=1, size=20)
    changes = {"neighbours": 1, "patch_size": (16, 16), "batch_size": 2, "reasons": {}}
    replace(make_plan(data, dim=2), **changes).save(tmp_path / "plan.json")
    stage = Stage(KMSNoise(NET, e_steps=2, begin=0), steps=2, augment=Augment.none())
    options = {"plan": str(tmp_path / "plan.json"), "cache": str(tmp_path / "cache"), "validate_every": 2}
    config = Config(data=str(data.root), stages=(stage,), fold=1, folds=2, labelled=1, **options)
    run = train(config, tmp_path / "run", report=False)
    _, view = seen_by(config, data)
    with (audit(data, run).parent / "cases.csv").open() as file:
        assert {row["case"] for row in csv.DictReader(file)} == {case.id for case in view.subset("train")}


def test_other_files_or_another_method_are_refused(trained, tmp_path):
    data, run = trained
    other = make_phantoms(tmp_path / "other", dim=2, cases=8, sites=1, size=32, seed=1)
    with pytest.raises(UserError, match="other files"):
        audit(other, run)
    record = json.loads((run / "run.json").read_text())
    record["config"]["stages"][0]["objective"] = {"class": "medseg_jax.methods.supervised:Supervised"}
    (tmp_path / "plain").mkdir()
    for name in ("plan.json", "dataset.json", "checkpoints"):
        (tmp_path / "plain" / name).symlink_to(run / name)
    (tmp_path / "plain" / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="does not know which labels"):
        audit(data, tmp_path / "plain")

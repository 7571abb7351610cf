"""medseg verify: a run as training leaves it is fine, and every claim that is tampered with is found and named."""

import json
import shutil

import jax
import numpy as np
import pytest

import medseg_jax
from medseg_jax import Config, Stage, Supervised, UNet
from medseg_jax.cli import main
from medseg_jax.data import io
from medseg_jax.evaluation.verify import verify
from medseg_jax.runtime.checkpoint import write_manifest
from medseg_jax.types import UserError


@pytest.fixture(scope="module")
def trained(phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    net = UNet(features=(4, 8), strides=((1, 1), (2, 2)), kernel_sizes=((3, 3),) * 2)
    options = dict(validate_every=2, checkpoint_every=2, log_every=1, cache=str(folder / "cache"))
    config = Config(data=str(phantoms.root), stages=(Stage(Supervised(net), steps=4),), **options)
    return medseg_jax.train(config, folder / "run")


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def problems(path, **options):
    return {c.name: c for c in verify(path, **options) if c.state == "problem"}


def edit(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewrite_log(run, change):
    path = run / "log.jsonl"
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(e) + "\n" for e in change(entries)))


def only(found, name, words):
    assert set(found) == {name}, found
    assert words in found[name].text
    assert found[name].file
    assert found[name].remedy


def test_an_honest_run_is_fine_and_predicts_the_same_again(run):
    checks = verify(run, predict=1)
    assert {c.state for c in checks} == {"ok"}, [c for c in checks if c.state != "ok"]
    names = ("records", "checkpoints", "weights", "data", "splits", "log", "best", "scores", "versions", "predict")
    assert tuple(dict.fromkeys(c.name for c in checks)) == names


def test_a_flipped_bit_is_named(run):
    file = max((p for p in run.glob("checkpoints/*/last/4/**/*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found = problems(run)
    only(found, "checkpoints", file.name)


def test_an_incomplete_checkpoint_is_a_warning(run):
    next(run.glob("checkpoints/*/last/2.sha256.json")).unlink()
    assert not problems(run)
    assert [c.name for c in verify(run) if c.state == "warning"] == ["checkpoints"]


def test_a_file_that_is_damaged_or_gone_does_not_end_the_checks(run):
    (run / "plan.json").write_text("{")
    found = problems(run)
    assert {"records", "weights"} <= set(found)
    assert "scores" not in found


def test_weights_of_another_network(run):
    edit(run / "run.json", lambda r: r["config"]["stages"][0]["objective"]["net"].update(features=[4, 12]))
    only(problems(run), "weights", "does not fit the config")


def test_a_changed_data_set(run, phantoms, tmp_path):
    data = shutil.copytree(phantoms.root, tmp_path / "data")
    edit(run / "run.json", lambda r: r["dataset"].update(root=str(data)))
    assert not problems(run)
    image = min(data.glob("imagesTr/*.png"))
    shutil.copyfile(max(data.glob("imagesTr/*.png")), image)
    only(problems(run), "data", "changed")
    shutil.rmtree(data)
    assert [c.name for c in verify(run) if c.state == "warning"] == ["data"]


def test_regions_that_are_scored_instead_of_classes_are_known(run):
    scores = {"inside": [1, 2], "tube": 3}
    edit(run / "dataset.json", lambda d: d["medseg"].update(scores=scores))
    names = {"dice/organ": "dice/inside", "dice/lesion": "dice/tube"}
    rewrite_log(run, lambda log: [{names.get(k, k): v for k, v in e.items() if k != "dice/vessel"} for e in log])
    assert "records" not in problems(run)


def test_a_leak_between_splits(run):
    edit(run / "run.json", lambda r: r["cases"]["train"].append(r["cases"]["val"][0]))
    texts = [c.text for c in verify(run) if c.state == "problem"]
    assert [t.partition(": ")[0] for t in texts] == [
        "cases in both train and val",
        "patients in both train and val",
        "validation/best",
        "validation/last",
    ]
    assert "train cases among them" in texts[2]


def test_a_test_case_among_the_scores(run):
    record = json.loads((run / "run.json").read_text())
    for which in ("best", "last"):
        path = run / "validation" / which / "cases.csv"
        path.write_text(path.read_text().replace(record["cases"]["val"][0], record["cases"]["test"][0]))
    only(problems(run), "scores", "test cases among them")


def test_a_log_that_goes_back_and_one_that_is_cut(run):
    original = (run / "log.jsonl").read_text()
    rewrite_log(run, lambda entries: [*entries, entries[0]])
    only(problems(run), "log", "go back to step 1")
    (run / "log.jsonl").write_text(original)
    rewrite_log(run, lambda entries: [e for e in entries if e["step"] < 4])
    assert "log ends at step 3" in problems(run)["log"].text
    (run / "log.jsonl").unlink()
    assert "no log" in problems(run)["log"].text


def test_best_weights_that_are_not_the_best(run):
    saved = int(next(run.glob("checkpoints/*/best/*.sha256.json")).name.split(".")[0])

    def better_elsewhere(entries):
        return [e | {"dice": 0.99} if e["kind"] == "val" and e["step"] != saved else e for e in entries]

    rewrite_log(run, better_elsewhere)
    only(problems(run), "best", f"weights of step {saved}")


def test_a_mean_that_was_improved(run):
    edit(run / "validation" / "best" / "summary.json", lambda s: s["mean"].update(dice=s["mean"]["dice"] + 0.01))
    only(problems(run), "scores", "other means than cases.csv: dice")


def test_predictions_by_other_weights_and_label_maps_that_were_edited(run):
    edit(run / "validation" / "last" / "predict.json", lambda p: p["made_by"].update(weights="0" * 64))
    only(problems(run), "scores", "other weights")
    first = json.loads((run / "validation" / "best" / "predict.json").read_text())["cases"]
    path = run / "validation" / "best" / first[min(first)]["outputs"][0]
    label, geometry = io.read_label(path)
    label[0, 0] = 1 - min(label[0, 0], 1)
    io.write_label(path, label, geometry)
    assert f"{1 / label.size:.3%}" in problems(run, predict=1)["predict"].text


def test_weights_that_are_not_finite(run, monkeypatch):
    from medseg_jax.runtime import checkpoint

    real = checkpoint.restore_tree

    def poisoned(*args):
        state = real(*args)
        return state | {"params": jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), state["params"])}

    monkeypatch.setattr(checkpoint, "restore_tree", poisoned)
    only(problems(run), "weights", "NaN")


def test_other_versions_are_a_warning(run):
    edit(run / "run.json", lambda r: r["versions"].update(numpy="1.0"))
    assert next(c.text for c in verify(run) if c.state != "ok").startswith("other versions: numpy 1.0")


def test_predictions_alone(run, tmp_path):
    folder = run / "validation" / "best"
    assert {c.state for c in verify(folder)} == {"ok"}
    picture = min(folder.glob("*.png"))
    label, geometry = io.read_label(picture)
    io.write_label(picture, np.full_like(label, 77), geometry)
    only(problems(folder), "predictions", "values [77] are no class")
    picture.unlink()
    only(problems(folder), "predictions", f"{picture.name} missing")
    edit(folder / "predict.json", lambda p: p.update(run=str(tmp_path / "gone")))
    assert "warning" in {c.state for c in verify(folder) if c.name == "origin"}
    with pytest.raises(UserError, match="predicted again"):
        verify(folder, predict=1)


def test_a_folder_of_several_runs_names_them(tmp_path):
    for fold in ("fold_0", "fold_1"):
        (tmp_path / fold).mkdir()
        (tmp_path / fold / "run.json").write_text("{}")
    with pytest.raises(UserError, match=f"medseg verify {tmp_path / 'fold_0'} and medseg verify"):
        verify(tmp_path)


def test_what_is_neither_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing to verify"):
        verify(tmp_path)


def test_command_line(run, capsys):
    assert main(["verify", str(run)]) == 0
    assert "0 problems" in capsys.readouterr().out
    step = next(run.glob("checkpoints/*/best/*.sha256.json"))
    write_manifest(run / "validation")  # a manifest elsewhere changes nothing
    step.write_text("{}")
    assert main(["verify", str(run), "--json"]) == 1
    found = [c for c in json.loads(capsys.readouterr().out) if c["state"] == "problem"]
    assert {"checkpoints"} <= {c["name"] for c in found}
    assert main(["verify", str(run)]) == 1
    assert "try: " in capsys.readouterr().out

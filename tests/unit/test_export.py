"""An exported model computes what the run computes, on every platform it is made for, and tells no names."""

import dataclasses
import json
import re
import shutil
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import medseg_jax as ms
from medseg_jax import cli
from medseg_jax.data.io import read_label
from medseg_jax.inference import export as exporting
from medseg_jax.runtime.tensors import load_tree, save_tree
from medseg_jax.types import UserError

NET = ms.UNet(features=(4, 8, 16), strides=((1, 1), (2, 2), (2, 2)), kernel_sizes=((3, 3),) * 3, norm="batch")


def train(phantoms, out, net):
    stage = ms.Stage(ms.Supervised(net), steps=6, optim=ms.Optim(lr=1e-2, warmup=1))
    config = ms.Config(data=str(phantoms.root), stages=(stage,), cache=str(out.parent / "cache"), ema=0.5)
    return ms.train(config, out)


@pytest.fixture(scope="module")
def run(phantoms, tmp_path_factory):
    return train(phantoms, tmp_path_factory.mktemp("export") / "run", NET)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return folder, ms.export(run, folder, ("stablehlo", "safetensors"))


def test_every_form_gives_the_probabilities_of_the_run(run, exported):
    folder, found = exported
    assert [path.name for path in found] == ["model.stablehlo", "weights.safetensors"]
    assert all(set(values) == {1, 8} and max(values.values()) <= 1e-5 for values in found.values())
    model = jax.export.deserialize(bytearray((folder / "model.stablehlo").read_bytes()))
    assert set(model.platforms) == {"cpu", "cuda", "tpu"}
    opened = ms.open_run(run)
    image = np.random.default_rng(1).normal(size=(3, *opened.plan.patch_size, 3)).astype(np.float32)
    wanted = np.asarray(opened.predict(image))
    assert wanted.std() > 1e-3  # a network that says something
    np.testing.assert_allclose(model.call(image), wanted, atol=1e-5)
    np.testing.assert_array_equal(ms.open_run(folder).predict(image), wanted)


def test_the_page_says_how_to_use_it(exported, tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "export.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    program, numbers = (next(b for b in blocks if name in b) for name in ("model.stablehlo", "weights.safetensors"))
    (tmp_path / "exported").symlink_to(exported[0])
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(program + numbers, found)
    np.testing.assert_allclose(found["probabilities"].sum(-1), 1, atol=1e-5)
    assert all(name.startswith(("params/", "aux/")) for name in found["weights"])


def test_the_exported_folder_predicts_the_same_files(run, phantoms, tmp_path):
    cleaned = tmp_path / "cleaned"
    shutil.copytree(run, cleaned)
    choice = {"smallest": 0.0, "largest": True, "fill": False}
    classes = {name: {"choice": choice} for name in phantoms.labels.names}
    (cleaned / "postprocessing.json").write_text(json.dumps({"best": {"classes": classes}}))
    ms.export(cleaned, tmp_path / "exported", "safetensors")
    ms.predict(cleaned, phantoms, tmp_path / "run", split="val")
    ms.predict(tmp_path / "exported", phantoms, tmp_path / "export", split="val")
    ms.predict(run, phantoms, tmp_path / "plain", split="val", postprocessing="none")
    files = sorted((tmp_path / "run").glob("phantom*.png"))
    assert files
    mine, theirs, plain = ([read_label(tmp_path / k / f.name)[0] for f in files] for k in ("run", "export", "plain"))
    assert all(map(np.array_equal, mine, theirs))
    assert not all(map(np.array_equal, mine, plain))


def test_one_folder_holds_one_set_of_weights(run, exported, tmp_path):
    folder = tmp_path / "exported"
    ms.export(run, folder, "safetensors", checkpoint="last")
    with pytest.raises(UserError, match="something else") as error:
        ms.export(run, folder, "stablehlo")
    assert "last weights of step 6" in str(error.value.found)
    assert not (folder / "model.stablehlo").exists()
    other = tmp_path / "run"
    shutil.copytree(run, other)
    with pytest.raises(UserError, match="something else"):
        ms.export(run, other)
    found = ms.export(run, folder, "stablehlo", checkpoint="last")
    assert [path.name for path in found] == ["model.stablehlo"]
    card = (folder / "MODEL_CARD.md").read_text()
    assert "| model.stablehlo |" in card
    assert "| weights.safetensors |" in card


def test_a_data_set_keeps_its_dataset_json(run, phantoms, tmp_path):
    data = shutil.copytree(phantoms.root, tmp_path / "data")
    with pytest.raises(UserError, match="that of a data set"):
        ms.export(run, data, "safetensors")
    assert (data / "dataset.json").read_bytes() == (phantoms.root / "dataset.json").read_bytes()


def test_an_export_can_be_exported_again(exported, tmp_path):
    again = ms.export(exported[0], tmp_path / "again", "safetensors")
    assert max(again[tmp_path / "again" / "weights.safetensors"].values()) == 0
    card = (exported[0] / "MODEL_CARD.md").read_text()
    assert card.partition("## Files")[0] == (tmp_path / "again" / "MODEL_CARD.md").read_text().partition("## Files")[0]


def test_no_name_of_a_case_a_patient_or_a_folder_leaves(run, exported, phantoms, tmp_path):
    names = [case.id for case in phantoms.cases] + [str(run.parent), str(phantoms.root.parent), "alice"]
    assert names[0].encode() in (run / "run.json").read_bytes()
    shutil.copytree(run, tmp_path / "run")
    about = json.loads((run / "run.json").read_text())
    about["config"]["pretrained"] = str(tmp_path / "alice" / "w.safetensors")
    about["config"]["stages"][0]["mix"].update(labelled=3, unlabelled=2)
    (tmp_path / "run" / "run.json").write_text(json.dumps(about))
    said = json.loads((run / "dataset.json").read_text())  # what convert and corrupt write there
    said |= {"converted": ["options: --images alice"], "label_noise": {"changed": {names[0]: 0.5}}, "licence": "CC0"}
    (tmp_path / "run" / "dataset.json").write_text(json.dumps(said))
    ms.export(tmp_path / "run", tmp_path / "out", "safetensors")
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["licence"] == "CC0"
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    for words in ("**Started from:** w.safetensors", "batch 3 and 2 unlabelled"):
        assert words in card
    for file in (*exported[0].iterdir(), *(tmp_path / "out").iterdir()):
        content = file.read_bytes()
        assert not [name for name in names if name.encode() in content], file.name


def test_the_card_says_where_the_model_comes_from(run, exported):
    card = (exported[0] / "MODEL_CARD.md").read_text()
    about = json.loads((run / "run.json").read_text())
    scores = json.loads((run / "validation" / "best" / "summary.json").read_text())
    assert about["dataset"]["fingerprint"] in card
    assert f"| best (exported) | {scores['mean']['dice']:.3f}" in card
    for words in ("Licence of the data", "not stated", "Intended use", "not a medical device", "seed 0", "batch 8"):
        assert words in card


def test_a_model_that_computes_something_else_is_refused(run, tmp_path):
    opened = ms.open_run(run)
    other = dataclasses.replace(opened, predict=lambda image: opened.predict(image) + 1e-4)
    with pytest.raises(UserError, match="does not compute what the run does"):
        ms.export(other, tmp_path / "out", "safetensors")


def test_predictions_of_one_exported_folder_are_not_taken_for_those_of_another(exported, phantoms, tmp_path):
    """They have neither checkpoints nor manifests to be told apart by."""
    other, out = shutil.copytree(exported[0], tmp_path / "other"), tmp_path / "out"
    (params, aux), said = load_tree(other / "weights.safetensors")
    save_tree(other / "weights.safetensors", jax.tree.map(np.negative, params), aux, said)
    ms.predict(exported[0], phantoms, out, split="test", progress=False)
    with pytest.raises(UserError, match="another run"):
        ms.predict(other, phantoms, out, split="test", progress=False)
    assert {check.state for check in ms.verify(out)} == {"ok"}


def test_damaged_weights_are_named(exported, tmp_path):
    for name in ("run.json", "plan.json", "dataset.json"):
        (tmp_path / name).write_bytes((exported[0] / name).read_bytes())
    (tmp_path / "weights.safetensors").write_bytes((exported[0] / "weights.safetensors").read_bytes()[:-9])
    with pytest.raises(UserError, match="damaged") as error:
        ms.open_run(tmp_path)
    assert error.value.file == tmp_path / "weights.safetensors"


def test_what_cannot_be_exported_is_explained(run, tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="no such form"):
        ms.export(run, tmp_path / "out", "torch")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="in the run itself"):
        ms.export(run, run)
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    assert cli.main(["export", str(run), "--to", "onnx", "--out", str(tmp_path / "out")]) == 1
    assert "pip install 'medseg-jax[onnx]'" in capsys.readouterr().err


def test_the_command_prints_the_differences(run, tmp_path, capsys):
    assert cli.main(["export", str(run), "--to", "safetensors", "--out", str(tmp_path / "out"), "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {str(tmp_path / "out" / "weights.safetensors"): {"1": 0.0, "8": 0.0}}
    assert "largest difference from the run 0 at batch 1, 0 at batch 8" in said.err


@pytest.mark.slow
@pytest.mark.parametrize("net", [ms.VMUNet(features=(8, 16), depths=(1, 1), decoder_depths=(1, 1)), ms.ResEncUNet()])
def test_other_networks_export_for_all_platforms(phantoms, tmp_path, net):
    run = train(phantoms, tmp_path / "run", net)
    found = ms.export(run, tmp_path / "out", ("stablehlo", "safetensors"))
    assert all(max(values.values()) <= 1e-5 for values in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("net", [NET, ms.UNet(), ms.ResEncUNet()])
def test_onnx(phantoms, tmp_path, net):
    """In an environment of its own: pip install -e '.[onnx]' pytest hypothesis."""
    pytest.importorskip("jax2onnx", reason="pip install 'medseg-jax[onnx]' in an environment of its own")
    run = train(phantoms, tmp_path / "run", net)
    found = ms.export(run, tmp_path / "out", "onnx")
    assert max(found[tmp_path / "out" / "model.onnx"].values()) <= exporting.TOLERANCES["onnx"]


LEAVES = st.builds(
    lambda shape, dtype, seed: (100 * np.random.default_rng(seed).normal(size=shape)).astype(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from(["float32", "int32", "uint8", "bool"]),
    st.integers(0, 9),
)
TREES = st.recursive(
    LEAVES,
    lambda inner: (
        st.dictionaries(st.text(st.characters(codec="utf-8", exclude_characters="/"), max_size=4), inner, max_size=3)
        | st.lists(inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(params=TREES, aux=TREES)
def test_trees_come_back_as_they_were(tmp_path_factory, params, aux):
    path = tmp_path_factory.mktemp("tree") / "weights.safetensors"
    save_tree(path, params, aux, {"step": "7"})
    back, said = load_tree(path)
    assert said["step"] == "7"
    assert jax.tree.structure(back) == jax.tree.structure((params, aux))
    jax.tree.map(np.testing.assert_array_equal, back, (params, aux))

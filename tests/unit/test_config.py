import json
from dataclasses import replace

import pytest

from medseg_jax import Augment, Config, Group, Mix, Optim, Rule, Stage, Supervised, UNet
from medseg_jax.config import differences, from_json, load, override, to_json
from medseg_jax.paths import read_record
from medseg_jax.runtime.run import open_run
from medseg_jax.training.prepare import open_data
from medseg_jax.types import UserError

CONFIG = Config(
    data="here",
    stages=(
        Stage(Supervised(UNet(features=(8, 16), strides=((1, 1), (2, 2)))), steps=5, mix=Mix(unlabelled=2)),
        Stage(optim=Optim("sgd", groups=(Group("bias", lr=0.0),)), augment=Augment.none(), name="second"),
    ),
    seed=3,
)


def test_json_round_trip():
    assert from_json(json.loads(json.dumps(to_json(CONFIG)))) == CONFIG


@pytest.mark.parametrize("name", ["os:system", "subprocess:Popen", "medseg_jax.config:load", "builtins:eval", "x:y"])
def test_json_makes_only_our_dataclasses(name):
    with pytest.raises(UserError, match="dataclasses of medseg_jax only"):
        from_json({"class": name})


def test_json_with_an_unknown_field():
    with pytest.raises(UserError, match="Unknown fields"):
        from_json({"class": "medseg_jax.config:Optim", "learning_rate": 1})


def test_differences_name_the_field():
    other = replace(CONFIG, stages=(replace(CONFIG.stages[0], optim=Optim(lr=0.5)), CONFIG.stages[1]))
    assert differences(to_json(CONFIG), to_json(other)) == ["stages.0.optim.lr: 0.001 -> 0.5"]


def test_override_reaches_every_level():
    args = ["--seed", "7", "--stages.0.optim.lr", "0.1", "--stages.0.objective.net.norm", "batch"]
    new = override(CONFIG, [*args, "--stages.1.steps", "9"])
    assert new.seed == 7
    assert new.stages[0].optim.lr == 0.1
    assert new.stages[0].objective.net.norm == "batch"
    assert new.stages[0].objective.net.features == (8, 16)
    assert new.stages[1].steps == 9
    assert new.stages[1].optim.groups == CONFIG.stages[1].optim.groups


def test_override_suggests_what_was_meant(capsys):
    with pytest.raises(SystemExit) as stop:
        override(CONFIG, ["--stages.0.optim.lrr", "1"])
    assert stop.value.code == 2
    assert "--stages.0.optim.lr" in capsys.readouterr().err


def test_load_from_a_file_a_data_set_and_a_run(tmp_path):
    (tmp_path / "mine.py").write_text("from medseg_jax import Config\nconfig = Config(data='d', seed=4)\n")
    assert load(tmp_path / "mine.py").seed == 4
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset.json").write_text("{}")
    assert load(tmp_path / "data").data == str(tmp_path / "data")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"config": to_json(CONFIG)}))
    assert load(tmp_path / "run") == CONFIG


def test_load_names_what_is_wrong(tmp_path):
    (tmp_path / "unet_heart.py").write_text("config = 3\n")
    with pytest.raises(UserError, match="defines no config"):
        load(tmp_path / "unet_heart.py")
    with pytest.raises(UserError) as error:
        load(tmp_path / "unet_hart.py")
    assert "unet_heart.py" in str(error.value)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Optim("adam"), '"adamw", "sgd", "muon"'),
        (lambda: Optim(schedule="linear"), '"poly", "cosine", "constant"'),
        (lambda: Stage(start="Best"), '"last", "best"'),
        (lambda: Rule(".", "replicated"), '"replicate", "fsdp"'),
    ],
)
def test_words_that_a_config_does_not_know_are_refused(make, words):
    """Before, "adam" was Muon, "Best" the last weights and "replicated" split."""
    with pytest.raises(UserError, match="Unknown") as error:
        make()
    assert error.value.expected == words


def test_stages_of_one_name_are_refused(phantoms):
    """By its name the log tells a stage from the others."""
    config = Config(data=str(phantoms.root), stages=(Stage(), Stage()))
    with pytest.raises(UserError, match="a name of its own") as error:
        open_data(config)
    assert error.value.found == "train, train"


@pytest.mark.parametrize(
    ("content", "found"), [('{"config": {', "Expecting"), ("{}", "no config"), ("[]", "list"), (None, "No such file")]
)
def test_a_record_that_is_missing_or_damaged_is_named(tmp_path, content, found):
    file = tmp_path / "run.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=r"run.json is (missing or )?damaged") as error:
        read_record(file, "config")
    assert error.value.file == file
    assert found in str(error.value.found)
    if content is not None:
        for read in (load, open_run):
            with pytest.raises(UserError, match=r"run.json is (missing or )?damaged"):
                read(tmp_path)

"""Promises 1 and 2: killed at any instant a run goes on, and ends with the same bits as if it had never stopped."""

import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest

from medseg_jax import Config, Stage, Supervised, UNet, UserError
from medseg_jax import config as configs
from medseg_jax.runtime.checkpoint import Checkpoints
from medseg_jax.runtime.run import stage_folder
from medseg_jax.training import train as training
from runs import STEPS, finish, interrupt, last, losses, sha256, start, write_config


@pytest.fixture(scope="module")
def config(phantoms, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("resume") / "config.py", phantoms.root)


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start(config, out)
    finish(process)
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_and_resume_gives_the_same_bits(config, uninterrupted, tmp_path, workers):
    args = ("--workers", str(workers))
    assert interrupt(config, tmp_path / "run", signal.SIGKILL, 8, *args) == -signal.SIGKILL
    process = start(config, tmp_path / "run", *args)
    errors = finish(process)
    assert "resuming from step" in errors
    assert sha256(tmp_path / "run") == sha256(uninterrupted)


def test_other_topologies_agree(config, uninterrupted, tmp_path):
    """One device until step 8, then two: the same losses within 1e-4 as on one device throughout."""
    assert interrupt(config, tmp_path / "run", signal.SIGTERM, 8) == 128 + signal.SIGTERM
    process = start(config, tmp_path / "run", devices=2)
    errors = finish(process)
    assert "resuming from step" in errors
    np.testing.assert_allclose(losses(tmp_path / "run", 16, 20, 24), losses(uninterrupted, 16, 20, 24), rtol=1e-4)


def test_sigterm_saves_and_the_log_reads_as_if_nothing_had_happened(config, uninterrupted, tmp_path):
    assert interrupt(config, tmp_path / "run", signal.SIGTERM, 8) == 128 + signal.SIGTERM
    process = start(config, tmp_path / "run")
    finish(process)
    assert sha256(tmp_path / "run") == sha256(uninterrupted)

    def entries(out):
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return {(e["kind"], e["step"]): e.get("dice") for e in lines if e["step"] % 4 == 0}

    assert entries(tmp_path / "run") == entries(uninterrupted)


def test_a_later_stage_goes_on_with_its_log_and_its_best_weights(config, tmp_path, monkeypatch):
    """The complete stage before it is opened again, too; that once dropped all lines of the later one."""
    whole = configs.load(config)
    first, second = (replace(whole.stages[0], steps=steps, name=name) for steps, name in ((1, "first"), (4, "second")))
    whole, out = replace(whole, stages=(first, second), validate_every=2), tmp_path / "run"

    def scores(setting, predict, state, frozen):
        step = int(state["step"])
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"dice": 0.5 - step / 10}

    monkeypatch.setattr(training, "_validate", scores)
    with pytest.raises(training.Interrupted, match="SIGTERM"):
        training.train(whole, out, report=False)
    training.train(whole, out, report=False)
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [(e["stage"], e["step"]) for e in entries if e["kind"] == "train"]
    assert steps == [("first", 1), *(("second", step) for step in (1, 2, 3, 4))]
    assert Checkpoints(stage_folder(out, 1, "second") / "best", read_only=True).steps() == [2]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(config, uninterrupted, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    victim = max((p for p in (last(out) / str(STEPS)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(b"\x00" + victim.read_bytes()[1:])
    process = start(config, out)
    errors = finish(process)
    assert victim.name in errors
    assert f"resuming from step {STEPS - 4}" in errors
    assert sha256(out) == sha256(uninterrupted)  # the damaged step was written anew


def test_another_config_is_refused_with_the_difference(config, uninterrupted):
    process = start(config, uninterrupted, "--seed", "5")
    errors = finish(process, 1)
    assert "seed: 0 -> 5" in errors
    assert "--fresh" in errors


def test_a_config_that_cannot_work_does_not_stand_in_the_way_of_the_mended_one(phantoms, tmp_path):
    def made(*features: int) -> Config:
        net = UNet(features=features, strides=((1, 1), (2, 2)), kernel_sizes=((3, 3),) * 2)
        return Config(str(phantoms.root), (Stage(Supervised(net), steps=1),), cache=str(tmp_path / "cache"))

    with pytest.raises(UserError, match="one entry per stage"):
        training.train(made(4), tmp_path / "run")
    assert (tmp_path / "run" / "run.json").exists()
    training.train(made(4, 8), tmp_path / "run", report=False)
    with pytest.raises(UserError, match="another config"):
        training.train(made(4, 16), tmp_path / "run", report=False)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_data_set_is_no_folder_for_a_run(phantoms, tmp_path, fresh):
    data = shutil.copytree(phantoms.root, tmp_path / "data")
    before = (data / "dataset.json").read_bytes()
    with pytest.raises(UserError, match="that of a data set"):
        training.train(Config(str(data)), data, fresh=fresh)
    assert (data / "dataset.json").read_bytes() == before
    assert not (data / "run.json").exists()


def test_two_runs_in_one_folder_are_refused(config, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        process = start(config, tmp_path / "run")
        errors = finish(process, 1)
    assert "Another run is working in this folder" in errors

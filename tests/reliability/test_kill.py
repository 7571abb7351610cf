"""Promise 1: kill -9 at random instants, remnants of killed runs, SIGTERM and Ctrl-C; nothing is left running."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medseg_jax.runtime.checkpoint import Checkpoints, verify_manifest, write_manifest
from runs import finish, interrupt, last, sha256, start, wait_for_step, write_config


@pytest.fixture(scope="module")
def config(phantoms, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("kill") / "config.py", phantoms.root)


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(start(config, out))
    return out


def group(process: subprocess.Popen) -> list[int]:
    """Living processes of a run's process group."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == process.pid and fields[0] != "Z":
            found.append(int(entry.name))
    return found


def nobody_left(process: subprocess.Popen) -> bool:
    """Whether all processes of a run's group are gone; one that has closed its pipes may need a moment to end."""
    deadline = time.monotonic() + 10
    while group(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not group(process)


def killed_at_random_instants(config: Path, out: Path, seed: int, kills: int) -> str:
    """Kills a run that saves after every step, `kills` times in a row; returns what the last, whole start said."""
    rng = random.Random(seed)
    for _ in range(kills):
        process = start(config, out, "--checkpoint_every", "1")
        before = Checkpoints(last(out), read_only=True).steps()
        wait_for_step(process, out, before[-1] + 1 if before else 1)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        finish(process, None)
    return finish(start(config, out))


def test_killed_during_saves_the_run_ends_with_the_same_bits(config, uninterrupted, tmp_path):
    said = killed_at_random_instants(config, tmp_path / "run", seed=0, kills=3)
    assert "resuming from step" in said or "24" in said
    assert sha256(tmp_path / "run") == sha256(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_killed_at_twenty_more_instants(config, uninterrupted, tmp_path, seed):
    killed_at_random_instants(config, tmp_path / "run", seed + 1, kills=1)
    assert sha256(tmp_path / "run") == sha256(uninterrupted)


# Saves without a pause steps whose arrays say which step they are; the first argument is the folder.
SAVER = """
import sys
import jax.numpy as jnp
from medseg_jax.runtime.checkpoint import Checkpoints
store = Checkpoints(sys.argv[1], keep=2)
for step in range(1, 10**6):
    store.save(step, {"a": jnp.full((64, 1024), float(step)), "b": {"c": jnp.full(7, step)}})
"""


def killed_saver(folder: Path, seed: int) -> None:
    process = subprocess.Popen([sys.executable, "-c", SAVER, str(folder)], start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while not Checkpoints(folder, read_only=True).steps():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(random.Random(seed).uniform(0, 0.5))
    finally:
        process.kill()
        process.wait()
    store = Checkpoints(folder, keep=2)  # sweeps
    try:
        whole = store.steps()
        assert whole
        names = {path.name for path in folder.iterdir()}
        assert names == {name for step in whole for name in (str(step), f"{step}.sha256.json")}
        like = {"a": jax.ShapeDtypeStruct((64, 1024), jnp.float32), "b": {"c": jax.ShapeDtypeStruct((7,), jnp.int32)}}
        step, state = store.restore(like)
        assert step == whole[-1]
        np.testing.assert_array_equal(state["a"], float(step))
        np.testing.assert_array_equal(state["b"]["c"], step)
    finally:
        store.close()


def test_a_saver_killed_at_a_random_instant_leaves_whole_steps_only(tmp_path):
    killed_saver(tmp_path / "c", seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_a_saver_killed_at_twenty_more_instants(tmp_path, seed):
    killed_saver(tmp_path / "c", seed)


def test_remnants_of_killed_runs_are_swept_and_nothing_else(tmp_path):
    folder = tmp_path / "c"
    for name in ("3/default", "8.orbax-checkpoint-tmp-12", "9/default.orbax-checkpoint-tmp", "7.damaged"):
        (folder / name).mkdir(parents=True)
    (folder / "3" / "default" / "array").write_text("x")
    write_manifest(folder / "3")
    for name in ("5.sha256.json", "6.sha256.tmp", "notes.txt"):
        (folder / name).write_text("{}")
    (folder / "my_own_folder").mkdir()
    store = Checkpoints(folder)
    assert {path.name for path in folder.iterdir()} == {"3", "3.sha256.json", "notes.txt", "my_own_folder"}
    assert store.steps() == [3]
    store.close()


def test_a_start_with_remnants_and_damage_goes_on_from_what_is_whole(config, uninterrupted, tmp_path):
    """All at once: a draft, a step without a manifest, a manifest without a step, and the newest step damaged."""
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    shutil.copytree(last(out) / "20", last(out) / "21")
    (last(out) / "22.orbax-checkpoint-tmp").mkdir()
    shutil.copy(last(out) / "20.sha256.json", last(out) / "23.sha256.json")
    (last(out) / "24.sha256.json").write_text("{")
    said = finish(start(config, out))
    assert "24.sha256.json: unreadable manifest" in said
    assert "resuming from step 20" in said
    assert sha256(out) == sha256(uninterrupted)
    assert not verify_manifest(last(out) / "24")


def test_ctrl_c_saves_and_leaves_nobody_behind(config, uninterrupted, tmp_path):
    process = start(config, tmp_path / "run", "--workers", "2")
    wait_for_step(process, tmp_path / "run", 4)
    assert len(group(process)) >= 3  # the run and its two workers
    process.send_signal(signal.SIGINT)
    said = finish(process, 128 + signal.SIGINT)
    assert "stopped by SIGINT; the same command goes on from here" in said
    assert "Traceback" not in said
    assert nobody_left(process)
    finish(start(config, tmp_path / "run"))
    assert sha256(tmp_path / "run") == sha256(uninterrupted)


def test_ctrl_c_twice_ends_at_once_and_the_run_goes_on_later(config, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = start(config, out, "--checkpoint_every", "1", "--workers", "2")
    wait_for_step(process, out, 2)
    process.send_signal(signal.SIGINT)
    time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    finish(process, None, 60)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT)  # the second may come after the end
    assert nobody_left(process)
    finish(start(config, out))
    assert sha256(out) == sha256(uninterrupted)


def test_kill_9_ends_the_workers_too(config, tmp_path):
    process = start(config, tmp_path / "run", "--workers", "2")
    wait_for_step(process, tmp_path / "run", 4)
    os.kill(process.pid, signal.SIGKILL)
    finish(process, -signal.SIGKILL, 60)
    deadline = time.monotonic() + 10
    while group(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert nobody_left(process)


def test_a_signal_while_data_are_prepared_stops_before_the_first_step(phantoms, tmp_path, monkeypatch):
    """No state exists yet: cached cases stay, and the exit is the one of an interrupted run."""
    from medseg_jax import config as configs
    from medseg_jax.training import train as training

    config = configs.load(write_config(tmp_path / "config.py", phantoms.root))
    build = training.build_cache

    def interrupted(*args, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return build(*args, **options)

    monkeypatch.setattr(training, "build_cache", interrupted)
    with pytest.raises(training.Interrupted, match="SIGTERM"):
        training.train(config, tmp_path / "run", report=False)
    assert not (tmp_path / "run" / "checkpoints").exists()
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_during_the_last_look_still_saves(config, uninterrupted, tmp_path):
    """SIGTERM between two steps: the step that the message is about is on disk, whatever the checkpoint interval."""
    out = tmp_path / "run"
    assert interrupt(config, out, signal.SIGTERM, 4, "--checkpoint_every", "4") == 128 + signal.SIGTERM
    steps = Checkpoints(last(out), read_only=True).steps()
    assert steps[-1] >= 4
    assert all(not verify_manifest(last(out) / str(step)) for step in steps)

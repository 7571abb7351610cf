"""Promises 1 and 2: killed at any instant a run goes on, and ends with the same bits as if it had never stopped."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from medseg_jax.runtime.checkpoint import Checkpoints, restore_tree

STEPS = 24
CONFIG = """
from medseg_jax import Augment, Config, Optim, Stage, Supervised, UNet

net = UNet(features=(4, 8), strides=((1, 1), (2, 2)), kernel_sizes=((3, 3),) * 2, norm="batch", dropout=0.1)
stage = Stage(Supervised(net), steps={steps}, optim=Optim(lr=3e-3, warmup=4), augment=Augment.light())
every = dict(validate_every=8, checkpoint_every=4, log_every=4)
config = Config(data={data!r}, stages=(stage,), ema=0.9, cache={cache!r}, **every)
"""


@pytest.fixture(scope="module")
def config(phantoms, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    file = folder / "config.py"
    file.write_text(CONFIG.format(steps=STEPS, data=str(phantoms.root), cache=str(folder / "cache")))
    return file


def start(config: Path, out: Path, *args: str, devices: int = 1) -> subprocess.Popen:
    command = [sys.executable, "-m", "medseg_jax.cli", "train", str(config), "--out", str(out), "--no-report", *args]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices)}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)


def last(out: Path) -> Path:
    return out / "checkpoints" / "0_train" / "last"


def sha256(out: Path) -> str:
    """Hash of every array of the newest state."""
    steps = Checkpoints(last(out), read_only=True).steps()
    assert steps[-1] == STEPS
    leaves = jax.tree.leaves(restore_tree(last(out) / str(STEPS)))
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()


def interrupt(config: Path, out: Path, how: int, at: int, *args: str) -> int:
    """Starts a run and sends a signal once step `at` is on disk; returns its exit code."""
    process = start(config, out, *args)
    deadline = time.monotonic() + 300
    while not (last(out) / f"{at}.sha256.json").exists():
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(how)
    process.communicate(timeout=120)  # returns once nobody holds the pipe: no worker outlives the run
    return process.returncode


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    process = start(config, out)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_9_and_resume_gives_the_same_bits(config, uninterrupted, tmp_path, workers):
    args = ("--workers", str(workers))
    assert interrupt(config, tmp_path / "run", signal.SIGKILL, 8, *args) == -signal.SIGKILL
    process = start(config, tmp_path / "run", *args)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "resuming from step" in errors
    assert sha256(tmp_path / "run") == sha256(uninterrupted)


def test_other_topologies_agree(config, uninterrupted, tmp_path):
    """One device until step 8, then two: the same losses within 1e-4 as on one device throughout."""
    assert interrupt(config, tmp_path / "run", signal.SIGTERM, 8) == 128 + signal.SIGTERM
    process = start(config, tmp_path / "run", devices=2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "resuming from step" in errors
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(uninterrupted), rtol=1e-4)


def losses(out: Path) -> list[float]:
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [e["loss"] for e in entries if e["kind"] == "train" and e["step"] in (16, 20, 24)]


def test_sigterm_saves_and_the_log_reads_as_if_nothing_had_happened(config, uninterrupted, tmp_path):
    assert interrupt(config, tmp_path / "run", signal.SIGTERM, 8) == 128 + signal.SIGTERM
    process = start(config, tmp_path / "run")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert sha256(tmp_path / "run") == sha256(uninterrupted)

    def entries(out):
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        return {(e["kind"], e["step"]): e.get("dice") for e in lines if e["step"] % 4 == 0}

    assert entries(tmp_path / "run") == entries(uninterrupted)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(config, uninterrupted, tmp_path):
    import shutil

    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    victim = max((p for p in (last(out) / str(STEPS)).rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(b"\x00" + victim.read_bytes()[1:])
    process = start(config, out)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert victim.name in errors
    assert f"resuming from step {STEPS - 4}" in errors


def test_another_config_is_refused_with_the_difference(config, uninterrupted):
    process = start(config, uninterrupted, "--seed", "5")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "seed: 0 -> 5" in errors
    assert "--fresh" in errors


def test_two_runs_in_one_folder_are_refused(config, tmp_path):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        process = start(config, tmp_path / "run")
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Another run is working in this folder" in errors

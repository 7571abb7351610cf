"""Four processes that talk by gloo on this machine: none can be killed so that anything is lost; counts agree."""

import json
import os
import random
import signal
import time

import numpy as np
import pytest

from medseg_jax.runtime.checkpoint import Checkpoints, verify_manifest
from runs import STEPS, end, finish, last, losses, sha256, start_several, wait_for_step, write_config

pytestmark = pytest.mark.slow  # a start of four takes half a minute on two cores

LIMIT = 60
"""Seconds within which the others end, with a message."""


def trained(count, config, out, *args):
    """What process 0 said, after all have gone through."""
    processes = start_several(count, config, out, *args)
    try:
        said = [finish(process) for process in processes]
    finally:
        end(processes)
    return said[0]


@pytest.fixture(scope="module")
def config(phantoms, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("four") / "config.py", phantoms.root)


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    trained(4, config, out)
    return out


@pytest.mark.parametrize("trial", range(10))
def test_one_of_four_killed_at_a_random_step(config, uninterrupted, tmp_path, trial):
    """The others end with a message within LIMIT; started again, the run ends with the bits of one never killed."""
    out, rng = tmp_path / "run", random.Random(trial)
    victim, step = rng.randrange(4), rng.randrange(1, STEPS - 4)
    processes = start_several(4, config, out, "--checkpoint_every", "1")
    try:
        wait_for_step(processes[0], out, step)
        time.sleep(rng.uniform(0, 0.1))
        os.killpg(processes[victim].pid, signal.SIGKILL)
        since = time.monotonic()
        others = [process for process in processes if process is not processes[victim]]
        said = [finish(process, None, LIMIT) for process in others]
        seconds = time.monotonic() - since
    finally:
        end(processes)
    assert all(process.returncode not in (None, 0, 1) for process in others)  # codes with which launchers start again
    assert all("lost" in text or "another task died" in text for text in said), said
    before = Checkpoints(last(out), read_only=True).steps()
    again = trained(4, config, out)
    resumed = int(again.partition("resuming from step ")[2].partition(" ")[0])
    print(f"process {victim} killed after step {step}: the others ended in {seconds:.1f} s; resumed from {resumed}")
    assert resumed == before[-1] >= step
    assert sha256(out) == sha256(uninterrupted)
    assert losses(out) == losses(uninterrupted)
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if e["kind"] == "train"] == list(range(1, STEPS + 1))


@pytest.fixture(scope="module")
def fifty(phantoms, tmp_path_factory):
    """A config whose losses do not amplify rounding, and what one process makes of it in 50 steps."""
    config = write_config(tmp_path_factory.mktemp("fifty") / "config.py", phantoms.root, steps=50)
    adam, sgd = "lr=3e-3, warmup=4", 'name="sgd", lr=1e-2, warmup=4, momentum=0.9'
    config.write_text(config.read_text().replace(adam, sgd))
    out = config.parent / "one"
    trained(1, config, out)
    return config, losses(out)


@pytest.mark.parametrize("count", [2, 4])
def test_the_same_losses_over_fifty_steps(fifty, tmp_path, count):
    config, one = fifty
    trained(count, config, tmp_path / "run")
    found = losses(tmp_path / "run")
    print(f"{count} processes against 1: losses differ by at most {np.abs(np.subtract(found, one)).max():.1e}")
    np.testing.assert_allclose(found, one, rtol=0, atol=1e-6)


def test_a_run_moves_from_one_process_to_two_to_four_and_back(fifty, tmp_path):
    config, one = fifty
    out = tmp_path / "run"
    for count, until in ((1, 10), (2, 20), (4, 30)):
        processes = start_several(count, config, out)
        try:
            wait_for_step(processes[0], out, until)
            processes[-1].send_signal(signal.SIGTERM)
            said = [finish(process, 128 + signal.SIGTERM) for process in processes]
        finally:
            end(processes)
        assert count == 1 or "resuming from step" in said[0]
    assert "resuming from step" in trained(1, config, out)
    found = losses(out)
    print(f"1 -> 2 -> 4 -> 1 against 1: losses differ by at most {np.abs(np.subtract(found, one)).max():.1e}")
    np.testing.assert_allclose(found, one, rtol=0, atol=1e-6)
    assert not verify_manifest(last(out) / "50")

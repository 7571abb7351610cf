"""Tiny training runs in processes of their own, for the tests of reliability and of several processes."""

import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np

from medseg_jax.runtime.checkpoint import Checkpoints, restore_tree

STEPS = 24
CONFIG = """
from medseg_jax import Augment, Config, Optim, Rule, Stage, Supervised, UNet

net = UNet(features=(4, 8), strides=((1, 1), (2, 2)), kernel_sizes=((3, 3),) * 2, norm="batch", dropout=0.1)
stage = Stage(Supervised(net), steps={steps}, optim=Optim(lr=3e-3, warmup=4), augment=Augment.light())
every = dict(validate_every=8, checkpoint_every=4, log_every=1)
config = Config(data={data!r}, stages=(stage,), ema=0.9, cache={cache!r}, {more}**every)
"""


def write_config(file: Path, data: Path, steps: int = STEPS, more: str = "") -> Path:
    """A config file of a tiny run; its cache lies beside it."""
    file.write_text(CONFIG.format(steps=steps, data=str(data), cache=str(file.parent / "cache"), more=more))
    return file


def start(config: Path, out: Path, *args: str, devices: int = 1, **environment: str) -> subprocess.Popen:
    """`medseg train` in a process group of its own, standard error piped."""
    command = [sys.executable, "-m", "medseg_jax.cli", "train", str(config), "--out", str(out), "--no-report", *args]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": str(devices), **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True)


def free_port() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def start_several(count: int, config: Path, out: Path, *args: str, **environment: str) -> list[subprocess.Popen]:
    """So many processes of one run, which find each other on this machine."""
    names = {"COORDINATOR_ADDRESS": f"localhost:{free_port()}", "NUM_PROCESSES": str(count), **environment}
    return [start(config, out, *args, PROCESS_ID=str(i), **names) for i in range(count)]


def end(processes: list[subprocess.Popen]) -> None:
    """Kills what is left of them."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def finish(process: subprocess.Popen, code: int | None = 0, timeout: float = 300) -> str:
    """Waits until nobody holds the pipes any more, so that no worker outlives the run; returns what was said."""
    try:
        out, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    assert code is None or process.returncode == code, out + errors
    return out + errors


def last(out: Path) -> Path:
    return out / "checkpoints" / "0_train" / "last"


def wait_for_step(process: subprocess.Popen, out: Path, at: int = 1) -> None:
    """Returns once a checkpoint of step `at` or later is on disk."""
    deadline = time.monotonic() + 300
    while not any(step >= at for step in Checkpoints(last(out), read_only=True).steps()):
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError("no checkpoint: " + finish(process, None, 1))
        time.sleep(0.005)


def interrupt(config: Path, out: Path, how: int, at: int, *args: str) -> int:
    """Starts a run and sends a signal once step `at` is on disk; returns its exit code."""
    process = start(config, out, *args)
    wait_for_step(process, out, at)
    process.send_signal(how)
    finish(process, None, 120)
    return process.returncode


def sha256(out: Path, step: int = STEPS) -> str:
    """Hash of every array of the newest state, which is that of `step`."""
    assert Checkpoints(last(out), read_only=True).steps()[-1] == step
    leaves = jax.tree.leaves(restore_tree(last(out) / str(step)))
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()


def losses(out: Path, *steps: int) -> list[float]:
    """Training losses logged at these steps; at all by default."""
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [e["loss"] for e in entries if e["kind"] == "train" and (not steps or e["step"] in steps)]

"""A long run needs no more memory, file descriptors, threads or processes than a short one."""

import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import theilslopes

from medseg_jax import config as configs
from medseg_jax.training.train import train
from runs import write_config

# Trains in a process of its own and prints, at every log line: step, RSS in KiB once the
# allocator has given back what is free, file descriptors, threads.
SOAK = """
import ctypes, gc, os, sys
from dataclasses import replace
from medseg_jax import config as configs
from medseg_jax.runtime.log import Log
from medseg_jax.training.train import train
write = Log.write
def measured(self, kind, step, **values):
    write(self, kind, step, **values)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    status = open("/proc/self/status").read()
    rss = int(status.split("VmRSS:")[1].split()[0])
    print("at", step, rss, len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task")), flush=True)
Log.write = measured
config, out, steps, every = configs.load(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
config = replace(config, stages=(replace(config.stages[0], steps=steps),), log_every=max(every // 4, 1))
train(replace(config, validate_every=every, checkpoint_every=every), out, report=False)
"""


def soak(config, out, steps, every, timeout):
    command = [sys.executable, "-c", SOAK, str(config), str(out), str(steps), str(every)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    rows = re.findall(r"^at (\d+) (\d+) (\d+) (\d+)$", done.stdout, re.MULTILINE)
    return np.array(rows, np.int64)  # [lines, (step, rss, descriptors, threads)]


@pytest.mark.parametrize(
    ("steps", "every", "slope"),
    [(200, 20, 80.0), pytest.param(5000, 100, 2.0, marks=pytest.mark.slow)],
)
def test_memory_descriptors_and_threads_stay_flat(phantoms, tmp_path, steps, every, slope):
    """The second half of the run grows by less than `slope` KiB a step; descriptors and threads do not grow at all.

    The heap is still settling after 200 steps, so that the short run finds a leak of whole batches only.
    """
    config = write_config(tmp_path / "config.py", phantoms.root)
    rows = soak(config, tmp_path / "run", steps, every, timeout=1500)
    half = rows[rows[:, 0] > steps // 2]
    grown = theilslopes(half[:, 1], half[:, 0]).slope  # the median one: a leak is steady, an allocator's step is not
    print(f"{steps} steps: RSS {rows[-1, 1] / 1024:.0f} MiB, {grown:+.2f} KiB a step")
    assert grown < slope
    early, late = half[: len(half) // 2], half[len(half) // 2 :]
    # The smallest counts: a checkpoint that is being written has files open and threads at work, a leak never closes.
    assert late[:, 2].min() <= early[:, 2].min() + 2
    assert late[:, 3].min() <= early[:, 3].min() + 2


def settled():
    """Threads and descriptors once the last thread of a run has had ten seconds to leave."""
    end = time.monotonic() + 10
    while threading.active_count() > 1 and time.monotonic() < end:
        time.sleep(0.05)
    return threading.active_count(), len(os.listdir("/proc/self/fd"))


def test_training_again_in_one_process_leaves_no_thread_or_descriptor(phantoms, tmp_path):
    """As in a notebook: the first call may start pools that stay, the later ones add nothing."""
    config = configs.load(write_config(tmp_path / "config.py", phantoms.root, steps=4))
    config = replace(config, validate_every=4)
    counts = []
    for i in range(3):
        train(config, tmp_path / f"run{i}", report=False)
        counts.append(settled())
    assert counts[2][0] <= counts[1][0], threading.enumerate()
    assert counts[2][1] <= counts[1][1]

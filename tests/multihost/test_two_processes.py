"""Promises 1 and 2 with two processes that talk by gloo on this machine: the pod's logic, without a pod."""

import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from medseg_jax.runtime.checkpoint import Checkpoints, verify_manifest
from medseg_jax.runtime.distributed import PATIENCE, join
from medseg_jax.runtime.run import open_run
from medseg_jax.types import UserError
from runs import STEPS, end, finish, free_port, last, losses, start, start_several, wait_for_step, write_config

GPUS = """
from jax._src.xla_bridge import CUDA_VISIBLE_DEVICES
from medseg_jax.runtime.distributed import join
print(join(), CUDA_VISIBLE_DEVICES.value)
"""
# Two checkpoints are written at the same time; then the first process alone reads one, as it does for the final scores.
TOGETHER_AND_ALONE = """
import sys
import jax, numpy as np
from medseg_jax.runtime.checkpoint import Checkpoints, restore_tree
from medseg_jax.runtime.distributed import join, wait_for_all
from medseg_jax.runtime.sharding import make_mesh, replicated
assert join()
stores = [Checkpoints(sys.argv[1] + "/" + name) for name in ("best", "last")]
state = jax.device_put({"w": np.ones((4, 256, 256), "f4")}, replicated(make_mesh()))
for step in range(1, 6):
    for store in stores:
        store.save(step, state)
for store in stores:
    store.close()
if jax.process_index() == 0:
    assert (restore_tree(stores[0].folder / "5")["w"] == 1).all()
wait_for_all("read")
"""
# Process 0 still sums up when the other is done; JAX's patience with it is made short.
ONE_IS_LATE = """
import functools, time
import jax
jax.distributed.initialize = functools.partial(jax.distributed.initialize, shutdown_timeout_seconds=1)
from medseg_jax.runtime.distributed import joined
with joined():
    if jax.process_index() == 0:
        time.sleep(4)
"""
FSDP = 'fsdp=2, rules=(Rule("params|opt|ema", "fsdp"),), '


@pytest.fixture(scope="module")
def config(phantoms, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("two") / "config.py", phantoms.root)


def two(config, out, *args):
    return start_several(2, config, out, *args)


def test_two_processes_equal_one_stop_together_and_go_on(config, tmp_path):
    """SIGTERM to one stops both with a save; started again they end where one process ends. One of them writes."""
    out = tmp_path / "two"
    processes = two(config, out)
    try:
        wait_for_step(processes[0], out, 8)
        processes[1].send_signal(signal.SIGTERM)
        for process in processes:
            assert "stopped by SIGTERM" in finish(process, 128 + signal.SIGTERM)
        stopped = Checkpoints(last(out), read_only=True).steps()[-1]
        assert stopped >= 8
        processes = two(config, out)
        said = [finish(process, None) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    finally:
        end(processes)
    assert f"resuming from step {stopped}" in said[0]
    assert "resuming" not in said[1]  # only process 0 speaks and writes
    finish(start(config, tmp_path / "one"))
    np.testing.assert_allclose(losses(out, 4, 8), losses(tmp_path / "one", 4, 8), rtol=1e-5)
    np.testing.assert_allclose(losses(out, 16, 20, 24), losses(tmp_path / "one", 16, 20, 24), rtol=1e-4)
    assert not verify_manifest(last(out) / str(STEPS))
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    keys = [(e["kind"], e["step"]) for e in entries]
    assert len(keys) == len(set(keys))  # every line once: process 1 wrote none
    assert json.loads((out / "run.json").read_text())["devices"]["processes"] == 2
    assert open_run(out, "last").step == STEPS  # one process predicts what several have trained


@pytest.mark.parametrize("script", [TOGETHER_AND_ALONE, ONE_IS_LATE])
def test_two_of_a_script_end_in_good_order(script, tmp_path):
    command = [sys.executable, "-c", script, str(tmp_path)]
    address = f"localhost:{free_port()}"
    names = {**os.environ, "COORDINATOR_ADDRESS": address, "NUM_PROCESSES": "2", "JAX_NUM_CPU_DEVICES": "1"}
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    processes = [subprocess.Popen(command, env={**names, "PROCESS_ID": str(i)}, **options) for i in range(2)]
    try:
        for process in processes:
            finish(process, timeout=60)
    finally:
        end(processes)


def test_when_process_0_dies_the_other_ends_with_a_message(config, tmp_path):
    processes = two(config, tmp_path / "run", "--checkpoint_every", "1", "--stages.0.steps", "5000")
    try:
        wait_for_step(processes[0], tmp_path / "run", 1)
        os.killpg(processes[0].pid, signal.SIGKILL)
        said = finish(processes[1], None, 4 * PATIENCE)
    finally:
        end(processes)
    assert processes[1].returncode not in (0, None)
    assert "another task died" in said or "lost" in said


@pytest.mark.slow
def test_when_process_1_dies_process_0_ends_with_a_message(config, tmp_path):
    processes = two(config, tmp_path / "run", "--checkpoint_every", "1", "--stages.0.steps", "5000")
    try:
        wait_for_step(processes[0], tmp_path / "run", 1)
        os.killpg(processes[1].pid, signal.SIGKILL)
        since = time.monotonic()
        said = finish(processes[0], None, 4 * PATIENCE)
        print(f"ended {time.monotonic() - since:.0f} s after the other")
    finally:
        end(processes)
    assert processes[0].returncode not in (0, None)
    assert "lost" in said or "another task died" in said
    assert Checkpoints(last(tmp_path / "run"), read_only=True).steps()


@pytest.mark.slow
def test_split_parameters_over_two_processes_give_the_same_losses(phantoms, tmp_path):
    config = write_config(tmp_path / "config.py", phantoms.root, more=FSDP)
    processes = two(config, tmp_path / "two")
    try:
        for process in processes:
            finish(process)
    finally:
        end(processes)
    whole = write_config(tmp_path / "whole.py", phantoms.root)
    finish(start(whole, tmp_path / "one"))
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-4)


@pytest.mark.slow
def test_an_error_of_one_process_ends_both(config, tmp_path):
    """Process 0 finds the folder locked; process 1 must not wait for it for ever."""
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        processes = two(config, tmp_path / "run")
        try:
            assert "Another run is working" in finish(processes[0], 1)
            finish(processes[1], None, 4 * PATIENCE)
        finally:
            end(processes)
    assert processes[1].returncode not in (0, None)


@pytest.mark.parametrize(("nodes", "devices"), [("2", ["all", "all"]), ("1", ["0", "1"])])
def test_slurm_gives_the_only_process_of_a_node_all_of_its_gpus(nodes, devices):
    """Two tasks of a step, as srun starts them, ask JAX itself: on two nodes each has all, on one node one each."""
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_NUM_NODES": nodes, "JAX_COORDINATOR_PORT": free_port()}
    tasks = []
    for i in ("0", "1"):
        env = {**os.environ, **step, "SLURM_PROCID": i, "SLURM_LOCALID": i if nodes == "1" else "0"}
        tasks.append(subprocess.Popen([sys.executable, "-c", GPUS], env=env, stdout=subprocess.PIPE, text=True))
    assert [task.communicate(timeout=200)[0].split() for task in tasks] == [["True", which] for which in devices]


@pytest.mark.parametrize(
    ("environment", "devices"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, []),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, None),
        # mpirun in a SLURM job: its daemon is one task a node, the processes are not.
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}, None),
        ({"COORDINATOR_ADDRESS": "a:1", "NUM_PROCESSES": "2", "PROCESS_ID": "0"}, None),
        ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "JAX_LOCAL_DEVICE_IDS": "1,2"}, None),
    ],
)
def test_who_shares_a_node_or_says_which_devices_is_left_to_jax(monkeypatch, environment, devices):
    asked = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: asked.update(options))
    join(environment)
    assert asked["heartbeat_timeout_seconds"] == PATIENCE
    assert asked.get("local_device_ids") == devices


def test_one_process_joins_nobody():
    assert not join({})
    assert not join({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"})  # the shell of a batch script
    assert not join({"SLURM_STEP_NUM_TASKS": "1", "OMPI_COMM_WORLD_SIZE": "1", "TPU_WORKER_HOSTNAMES": "localhost"})


@pytest.mark.parametrize(
    "given",
    [
        {"COORDINATOR_ADDRESS": "host:1"},
        {"COORDINATOR_ADDRESS": "host:1", "NUM_PROCESSES": "2", "PROCESS_ID": "first"},
        {"NUM_PROCESSES": "2", "PROCESS_ID": "0"},
    ],
)
def test_variables_that_are_not_understood_are_named(given):
    with pytest.raises(UserError, match="not understood") as error:
        join(given)
    assert next(iter(given)) in str(error.value)

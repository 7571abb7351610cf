"""Several processes that train one run: who they are, how they agree, and what happens when one of them is lost.

All processes run the same command. They find each other by SLURM (srun), Open MPI or a TPU pod's own settings, or by

    COORDINATOR_ADDRESS=host:port NUM_PROCESSES=2 PROCESS_ID=0 medseg train ...

The only process of a node trains on all of its devices; of several that SLURM or Open MPI starts there, each on one.

Process 0 decides whatever depends on files or signals and tells the others, so that all take the same branch: a
collective operation that one process alone enters would wait for ever.
"""

import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from medseg_jax.types import UserError

VARIABLES = ("COORDINATOR_ADDRESS", "NUM_PROCESSES", "PROCESS_ID")

PATIENCE = 30
"""Seconds without a sign of life after which a process counts as lost, and the others end."""


class PeerLost(UserError):
    """Another process of the run is gone, so that this one ends; started again, all of them go on.

    Launchers tell by the exit code (EX_TEMPFAIL) that to start again is enough.
    """

    exit_code = 75


def join(environment: Mapping[str, str] = os.environ) -> bool:
    """Joins the other processes of this run if the environment says that there are any; call it before using JAX.

    Returns:
        True if this is one of several processes.

    Raises:
        UserError: the three variables are incomplete or no numbers.
        PeerLost: the others did not come.
    """
    given = {name: environment[name] for name in VARIABLES if environment.get(name)}
    if not given and not _launched(environment):
        return False
    options: dict[str, Any] = {}
    if given:
        try:
            options = {
                "coordinator_address": given["COORDINATOR_ADDRESS"],
                "num_processes": int(given["NUM_PROCESSES"]),
                "process_id": int(given["PROCESS_ID"]),
            }
        except (KeyError, ValueError):
            raise UserError(
                "The variables that name the processes of this run are not understood",
                found=given,
                expected="all three: COORDINATOR_ADDRESS=host:port NUM_PROCESSES=2 PROCESS_ID=0",
                remedy=f"set them, or unset {', '.join(given)} to train in one process",
            ) from None
    if _alone_on_its_node(environment) and not environment.get("JAX_LOCAL_DEVICE_IDS"):
        # Restricted to none in particular: all. With None, JAX reads a rank off SLURM or Open MPI, and takes one GPU.
        options["local_device_ids"] = []
    try:
        jax.distributed.initialize(**options, heartbeat_timeout_seconds=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise PeerLost(
            "The processes of this run did not find each other",
            found=str(error).splitlines()[0][:300],
            expected="every process started with the same address and number of processes, and an id of its own",
        ) from error
    return jax.process_count() > 1


def _launched(environment: Mapping[str, str]) -> bool:
    """Whether a launcher that JAX knows has started several processes."""

    def more_than_one(name: str) -> bool:
        return environment.get(name, "").isdigit() and int(environment[name]) > 1

    return (
        more_than_one("SLURM_STEP_NUM_TASKS")  # by srun only: SLURM_NTASKS is also set in a batch script's one shell
        or more_than_one("OMPI_COMM_WORLD_SIZE")
        or more_than_one("MEGASCALE_NUM_SLICES")
        or "," in environment.get("TPU_WORKER_HOSTNAMES", "")
    )


def _alone_on_its_node(environment: Mapping[str, str]) -> bool:
    """Whether SLURM or Open MPI has put one process on each node. JAX, too, asks Open MPI first: srun may start it."""
    if local := environment.get("OMPI_COMM_WORLD_LOCAL_SIZE"):
        return local == "1"
    tasks = environment.get("SLURM_STEP_NUM_TASKS")
    return tasks is not None and tasks == environment.get("SLURM_STEP_NUM_NODES")


def from_main(value: int) -> int:
    """The whole number that process 0 gives; the others' is ignored."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.broadcast_one_to_all(np.int32(value)))


def largest(value: int) -> int:
    """The largest value that any process gives."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def wait_for_all(what: str) -> None:
    """Returns once every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def peer_is_lost(error: BaseException) -> bool:
    """Whether this is how one of several processes finds out that another is gone.

    A broken collective operation raises a JaxRuntimeError, from inside jit a ValueError in Gloo's words; a barrier that
    nobody else reaches, a TimeoutError. A device without memory is nobody's loss.
    """
    if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
        return False
    return isinstance(error, TimeoutError | jax.errors.JaxRuntimeError) or "Gloo" in str(error)


@contextmanager
def joined() -> Iterator[None]:
    """Joins the others (see `join`) for what follows, and leaves when all do.

    JAX ends all of them five minutes after the first is done, when process 0 may still be summing up.
    After an error one of several processes ends at once: an orderly exit would wait for the others, who wait for this
    one in a collective operation. Its sudden end is what they notice.
    """
    several = join()
    try:
        yield
        wait_for_all("done")
    except Exception as error:
        if not several:
            raise
        if peer_is_lost(error):
            error = PeerLost("Another process was lost at the end of this run", remedy="start all of them again")
        if isinstance(error, UserError):
            print(error, file=sys.stderr, flush=True)
        else:
            traceback.print_exc()
        os._exit(error.exit_code if isinstance(error, UserError) else 1)

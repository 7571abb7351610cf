"""What stands around a run: one process a folder, signals that end it in good order, errors in words."""

import fcntl
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax

from medseg_jax.runtime import distributed
from medseg_jax.runtime.log import say
from medseg_jax.types import UserError


class Interrupted(Exception):
    """A signal asked the run to stop; everything is saved.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, signal_number: int):
        self.signal = signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; the same command goes on from here")


@dataclass
class Stop:
    """What the loop looks at after each step.

    Attributes:
        signal: number of the one that asked the run to stop, or 0.
    """

    signal: int = 0


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """Errors of the disk and of lost processes, in words; what was saved before them stays usable."""
    try:
        yield
    except Exception as error:
        if distributed.peer_is_lost(error):
            raise distributed.PeerLost(
                f"Process {jax.process_index()} cannot go on: another of the {jax.process_count()} processes is lost",
                file=out,
                found=f"{type(error).__name__}: {str(error)[:300]}",
                remedy="look at the other processes' messages, then start all of them again: the run resumes",
            ) from error
        if isinstance(error, OSError):
            remedy = "free disk space, or choose another --out; the same command then goes on from the last checkpoint"
            raise UserError.from_os(error, out, remedy) from error
        raise


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Only one run works in a folder; the lock dies with its process."""
    if jax.process_index() != 0:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                "Another run is working in this folder",
                file=out,
                remedy="wait for it, stop it, or choose another --out",
            ) from None
        yield


@contextmanager
def signals() -> Iterator[Stop]:
    """Turns the first SIGTERM or SIGINT into a flag that the loop looks at; a second one ends the process at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    old = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def handler(number: int, _) -> None:
        stop.signal = number
        signal.signal(number, signal.SIG_DFL)
        say("stopping: saving the state first (once more to stop at once)")

    for number in old:
        signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


def heed(stop: Stop | None) -> None:
    """Stops before the loop, where what is done (cached cases) is on disk already."""
    if stop is not None and stop.signal and jax.process_count() == 1:
        raise Interrupted(stop.signal)

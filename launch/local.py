"""Several processes of `medseg train` on this machine's CPU: a pod's behaviour without a pod.

    python launch/local.py 4 configs/smoke/unet2d.py --out runs/four
    python launch/local.py --restarts 10 2 data/mine --out runs/mine --seed 1

Every line says which process it is of. When one dies, the others notice and end by themselves; what still hangs after
GRACE seconds is killed. Then all of them start again and the run goes on from its last checkpoint, unless the message
explains a problem that another start does not mend (exit codes 1 and 2). Ctrl-C and SIGTERM are handed on to all.

To train on one machine's GPUs you need none of this: one process of `medseg train` uses all of them.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time

COMMAND = [sys.executable, "-m", "medseg_jax.cli", "train"]
FINAL = (0, 1, 2, 128 + signal.SIGINT, 128 + signal.SIGTERM)
"""Exit codes after which there is nothing to start again: done, explained, wrong usage, stopped and saved."""

GRACE = 60.0
"""Seconds that the others have to end by themselves once one has died."""


def main(argv: list[str] | None = None) -> int:
    """Runs all processes, again after a loss; returns the exit code of the one that ended the last start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=3, help="starts after a loss (default: 3)")
    parser.add_argument("processes", type=int, metavar="N", help="number of processes")
    parser.add_argument("train", nargs=argparse.REMAINDER, metavar="...", help="arguments of medseg train")
    args = parser.parse_args(argv)
    if args.processes < 1 or not args.train:
        parser.error("how many processes, and what do they train? e.g. 4 configs/smoke/unet2d.py --out runs/four")

    asked: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: asked.append(received))
    for start in range(args.restarts + 1):
        if start:
            say(f"start {start + 1} of {args.restarts + 1}: the run goes on from its last checkpoint")
        code = run(args.processes, args.train, asked)
        if asked or code in FINAL:
            break
    return code


def run(count: int, words: list[str], asked: list[int]) -> int:
    """Starts `count` processes and waits for all; returns 0, or the exit code of the first that failed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = []
    for i in range(count):
        names = {"COORDINATOR_ADDRESS": address, "NUM_PROCESSES": str(count), "PROCESS_ID": str(i)}
        # Several processes cannot share an accelerator. In a session of its own, none hears Ctrl-C but through us.
        env = {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1", **os.environ, **names}
        process = subprocess.Popen(
            [*COMMAND, *words],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        processes.append(process)
    relays = [threading.Thread(target=relay, args=pair) for pair in enumerate(processes)]
    for thread in relays:
        thread.start()

    handed_on, code, since = 0, 0, 0.0
    while any(process.poll() is None for process in processes):
        time.sleep(0.05)
        for number in asked[handed_on:]:
            handed_on += 1
            for process in processes:
                process.send_signal(number)
        failed = {i: c for i, c in enumerate(process.poll() for process in processes) if c}
        if failed and not code:
            # Of several that ended within one look: who was killed (a negative code), then who has a problem.
            who = min(failed, key=failed.__getitem__)
            code, since = failed[who], time.monotonic()
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            say(f"process {who} {how}" + ("" if asked else f"; the others have {GRACE:.0f} s to end by themselves"))
        if code and time.monotonic() - since > GRACE:
            for i, process in enumerate(processes):
                if process.poll() is None:
                    say(f"process {i} hangs: killed")
                    os.killpg(process.pid, signal.SIGKILL)
    for thread in relays:
        thread.join()
    return code or max((process.returncode for process in processes), key=abs)


def relay(index: int, process: subprocess.Popen) -> None:
    """Prints what a process says, line by line, until it ends."""
    assert process.stdout is not None
    with process.stdout as lines:
        for line in lines:
            print(f"[{index}] {line}", end="", flush=True)


def say(text: str) -> None:
    """Prints a line of the launcher itself."""
    print(f"[launcher] {text}", flush=True)


if __name__ == "__main__":
    code = main()
    sys.exit(code if code >= 0 else 128 - code)

"""What the benchmarks against peers share: the peer's process, interleaved repetitions, the results file.

A peer runs in its own environment (`--peers PYTHON`, an interpreter that has the packages named in README.md) and is
spoken to in lines of JSON, so that the repetitions of both sides alternate on one machine. Each repetition gives wall
seconds and CPU seconds (of all threads). The ratio is ours / theirs: of the smallest wall times, of the median ones,
and of the smallest CPU times, which other programs on the machine disturb least.

PyTorch's OpenMP threads are told to sleep while they wait: spinning, they take five times as long on a busy machine.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
OPENMP = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"}

type Seconds = tuple[float, float]
"""Wall and CPU seconds."""


class Peer:
    """A script of benchmarks/peers in the peer's interpreter; `peer(name, **arguments)` calls one of its functions."""

    def __init__(self, python: str, script: str):
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | OPENMP
        self.process = subprocess.Popen(
            [python, str(HERE / "peers" / script)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=HERE,
        )  # fmt: skip

    def __call__(self, call: str, **arguments: Any) -> Any:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps({"call": call, **arguments}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"The peer stopped during {call!r} (see its message above)")
        return json.loads(answer)["result"]

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def arguments(description: str | None) -> argparse.Namespace:
    """--peers PYTHON, --quick, --only WORD, --repetitions N."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", required=True, help="Python interpreter of the peer's environment")
    parser.add_argument("--quick", action="store_true", help="small shapes, to see that it runs; writes no results")
    parser.add_argument("--only", default="", help="only rows whose name contains this; the others stay as they are")
    parser.add_argument("--repetitions", type=int, default=7)
    return parser.parse_args()


def timed(work: Callable[[], Any]) -> Seconds:
    """Seconds that `work` takes in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def race(ours: Callable[[], Seconds], theirs: Callable[[], Seconds], repetitions: int) -> dict[str, Any]:
    """Seconds of both sides, taken in turns after one warm-up each, and their ratios."""
    ours()
    theirs()
    rounds = [(ours(), theirs()) for _ in range(repetitions)]
    (wall, cpu), (their_wall, their_cpu) = (tuple(zip(*side, strict=True)) for side in zip(*rounds, strict=True))
    return {
        "ours_min": min(wall), "ours_median": median(wall), "ours_cpu_min": min(cpu),
        "theirs_min": min(their_wall), "theirs_median": median(their_wall), "theirs_cpu_min": min(their_cpu),
        "ratio": min(wall) / min(their_wall), "ratio_of_medians": median(wall) / median(their_wall),
        "ratio_of_cpu": min(cpu) / min(their_cpu), "repetitions": repetitions,
    }  # fmt: skip


def write(name: str, what: str, settings: dict[str, Any], peer: Peer, rows: list[dict[str, Any]], quick: bool) -> None:
    """Prints the rows and merges them by "name" into results/<name>.json, in the form that README.md describes."""
    from medseg_jax.runtime.environment import versions

    for row in rows:
        times = f"ours {row['ours_min']:.4f} s  theirs {row['theirs_min']:.4f} s"
        ratios = "  ".join(f"{key} {row[key]:.2f}" for key in ("ratio", "ratio_of_medians", "ratio_of_cpu"))
        print(f"{row['name']:<44} {times}  {ratios}", flush=True)
    if quick:
        return
    path = HERE / "results" / f"{name}.json"
    old = json.loads(path.read_text())["rows"] if path.exists() else []
    new = {row["name"]: row for row in [*old, *rows]}
    content = {
        "what": what,
        "settings": {"cpu_cores": os.cpu_count(), "threads": 2, **settings},
        "versions": {"ours": versions(), "peer": peer("versions")},
        "rows": list(new.values()),
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")

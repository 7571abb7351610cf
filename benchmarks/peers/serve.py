"""The peer's end of the line: one JSON object a line in, one out. Runs in the peer's environment."""

import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any


def serve(functions: dict[str, Callable[..., Any]], packages: tuple[str, ...]) -> None:
    """Answers {"call": name, **arguments} with {"result": ...} until standard input ends."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print must not get between the answers
    functions = {
        "versions": lambda: {"python": platform.python_version()} | {p: version(p) for p in packages}
    } | functions
    for line in sys.stdin:
        request = json.loads(line)
        result = functions[request.pop("call")](**request)
        print(json.dumps({"result": result}), file=answers, flush=True)


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall seconds, and CPU seconds of all threads, that `work` takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu

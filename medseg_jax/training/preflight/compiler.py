"""The process that compiles (`worker`), as seen from the user's session."""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from medseg_jax.runtime import chips
from medseg_jax.runtime.chips import Topology

type Say = Callable[[str], None]


class Compiler:
    """The process of `worker`, started when it is needed and again if it was lost."""

    def __init__(self, topology: Topology, patience: float, say: Say):
        self.topology, self.patience, self.say = topology, patience, say
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        self.errors = tempfile.TemporaryFile("w+", errors="replace")
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self.errors.close()

    def ask(self, request: dict[str, Any], what: str) -> dict[str, Any]:
        """A worker's reply; or status "timed out" or "crashed"."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        start = shown = time.perf_counter()
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self.say(f"{self.topology.name}: compiling {what}")
        while (waited := time.perf_counter() - start) < self.patience:
            try:
                line = self.replies.get(timeout=0.5)
            except queue.Empty:
                if time.perf_counter() - shown > 15:
                    shown = time.perf_counter()
                    self.say(f"{self.topology.name}: ... {waited:.0f} s")
                continue
            if line:
                reply = json.loads(line)
                self.say(f"{self.topology.name}: {what}: {reply['status']} in {waited:.0f} s")
                return reply
            code = self.process.wait()
            self.errors.seek(0)
            tail = self.errors.read()[-1500:]
            self._end()
            return {"status": "crashed", "error": f"the compiler ended with code {code}\n{tail}"}
        self._end()
        return {"status": "timed out", "error": f"no result after {self.patience:.0f} s (--patience)"}

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parents[3])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "medseg_jax.training.preflight.worker", self.topology.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | chips.environment(self.topology) | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        self.replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, args=(self.process, self.replies), daemon=True).start()

    @staticmethod
    def _listen(process: subprocess.Popen, replies: "queue.Queue[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            replies.put(line)
        replies.put("")  # the end

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                if stream is not None:
                    stream.close()
            self.process = None


@dataclass
class Asker:
    """Requests about one config and topology."""

    compiler: Compiler
    about: dict[str, Any]
    asked: int = 0

    def __call__(
        self, what: str, stage: int, rows: Sequence[int], title: str, change: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        self.asked += 1
        request = {**self.about, "what": what, "stage": stage, "rows": list(rows), "change": change or {}}
        reply = self.compiler.ask(request, title)
        reply["fits"] = _fits(reply, self.compiler.topology)
        return reply


def _fits(reply: dict[str, Any], topology: Topology) -> bool | None:
    """Whether it fits; None where nothing is known, since it did not compile for another reason."""
    if reply["status"] == "compiled":
        return reply["memory"]["total"] <= topology.memory
    return False if reply["status"] == "out of memory" else None

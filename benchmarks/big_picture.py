"""Seconds and memory of predicting one large photograph with a trained run.

    python benchmarks/big_picture.py RUN IMAGE [--what WORDS]

Each prediction is a process of its own: one of the whole picture, one of a 600 x 600 piece of it. The largest resident
set of the first, less the picture itself, is held against the goal; the difference of both is what the picture's size
costs. The time includes loading and compiling, or reading what was compiled before.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "big_picture.json"
GOAL = 2.0
"""GiB above the picture."""
CHILD = """
import json, resource, sys, time
from medseg_jax import predict
start = time.perf_counter()
predict(sys.argv[1], sys.argv[2], sys.argv[3], progress=False)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time(), "peak_bytes": peak}))
"""


def measure(run: Path, image: Path, out: Path) -> dict[str, float]:
    """Seconds (with compilation) and largest resident set of one prediction in a process of its own."""
    said = subprocess.run(
        [sys.executable, "-c", CHILD, str(run), str(image), str(out)],
        check=True,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    return json.loads(said.stdout.splitlines()[-1])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("--what", default="", help="words for the result: network, plan")
    args = parser.parse_args()
    from medseg_jax.runtime.environment import versions

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        picture = Image.open(args.image).convert("RGB")
        w, h = picture.size
        files = {"whole": folder / "whole.png", "piece": folder / "piece.png"}
        picture.save(files["whole"])
        picture.crop((w // 2 - 300, h // 2 - 300, w // 2 + 300, h // 2 + 300)).save(files["piece"])
        found = {kind: measure(args.run.resolve(), file, folder / f"{kind}_out") for kind, file in files.items()}
    peak = {kind: one["peak_bytes"] / 2**30 for kind, one in found.items()}
    above = peak["whole"] - w * h * 3 / 2**30
    result: dict[str, Any] = {
        "what": "prediction of one photograph, whole process; " + args.what,
        "settings": {"size": [w, h], "cpu_cores": os.cpu_count()},
        "versions": versions(),
        "picture_gib": w * h * 3 / 2**30,
        "goal_gib_above_picture": GOAL,
        "peak_gib": peak,
        "gib_above_picture": above,
        "gib_by_size": peak["whole"] - peak["piece"],
        "seconds": {kind: one["seconds"] for kind, one in found.items()},
        "cpu_seconds": {kind: one["cpu_seconds"] for kind, one in found.items()},
    }
    kept = [one for one in json.loads(RESULTS.read_text()) if one["what"] != result["what"]] if RESULTS.exists() else []
    RESULTS.write_text(json.dumps([*kept, result], indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

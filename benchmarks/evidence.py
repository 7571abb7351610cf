"""Trains what the README's table claims, resumably, and makes the table from the results.

    MEDSEG_DATA=FOLDER python benchmarks/evidence.py run --work runs/evidence [--only unet_isic2018] [--seeds 0 1 2]
    python benchmarks/evidence.py table

`run` converts each data set once, trains each seed (a run that was interrupted goes on where it stopped; one that is
finished is skipped), and writes benchmarks/results/<config>.json with every figure and <config>_seed<n>_cases.csv with
every case. `table` writes the rows into README.md. A row is the mean over seeds of the mean over validation cases, the
standard deviation over seeds, and the bootstrap interval over cases of the first seed.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Job:
    """One row: a config, the raw data it is trained on, and words for the table."""

    config: str
    source: str
    options: tuple[str, ...]
    data: str


JOBS = (
    Job("unet_hippocampus", "hippocampus_msd04", (), "MSD hippocampus, 96 train / 24 val"),
    Job("unet_isic2018", "isic2018_256", (), "ISIC 2018 at 256 x 256, 500 train / 100 val"),
)


def run(job: Job, seeds: list[int], raw: Path, work: Path) -> None:
    """Converts, trains and records one job."""
    data = work / "data" / job.source
    if not (data / "dataset.json").exists():
        _medseg("data", "convert", str(raw / job.source), str(data), *job.options)
        _medseg("data", "plan", str(data))
    path = RESULTS / f"{job.config}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"seeds": {}}
    for seed in seeds:
        out = work / f"{job.config}_seed{seed}"
        if str(seed) in results["seeds"]:
            continue
        command = ("train", f"configs/{job.config}.py", "--out", str(out), "--data", str(data), "--seed", str(seed))
        _medseg(*command)
        record = json.loads((out / "run.json").read_text())
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        train = [e for e in log if e["kind"] == "train"]
        results["seeds"][str(seed)] = {
            "command": f"medseg train configs/{job.config}.py --data data/{job.source} --out RUN --seed {seed}",
            "commit": record["git"],
            "versions": record["versions"],
            "devices": {**record["devices"], "cores": os.cpu_count(), "machine": platform.machine()},
            "steps": train[-1]["step"],
            "seconds_per_step": float(np.median([e["seconds"] for e in train])),
            "minutes_of_steps": _minutes(train),
            "best_step": max((e for e in log if e["kind"] == "val"), key=lambda e: e["dice"])["step"],
            **{which: _summary(out / "validation" / which) for which in ("best", "last")},
        }
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1))
        shutil.copyfile(out / "validation" / "best" / "cases.csv", RESULTS / f"{job.config}_seed{seed}_cases.csv")


def _summary(folder: Path) -> dict[str, Any]:
    """summary.json without the places of files on this machine."""
    summary = json.loads((folder / "summary.json").read_text())
    for place in ("predictions", "references"):
        del summary["settings"][place]
    return summary


def _minutes(train: list[dict[str, Any]]) -> float:
    steps = np.diff([0, *(e["step"] for e in train)])
    return float(np.sum(steps * [e["seconds"] for e in train]) / 60)


def _medseg(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "medseg_jax.cli", *args], cwd=ROOT, check=True)


def table() -> str:
    """The README's table."""
    rows = ["| config | data, split | time | mean Dice (95 % interval) | HD95 | NSD |", "|---|---|---|---|---|---|"]
    for job in JOBS:
        path = RESULTS / f"{job.config}.json"
        if not path.exists():
            continue
        seeds = list(json.loads(path.read_text())["seeds"].values())
        for which in ("best", "last"):
            mean = {m: np.array([s[which]["mean"][m] for s in seeds]) for m in ("dice", "hd95", "nsd")}
            spread = f" ± {mean['dice'].std(ddof=1):.3f}" if len(seeds) > 1 else ""
            low, high = seeds[0][which]["ci95"]["dice"]
            minutes = np.mean([s["minutes_of_steps"] for s in seeds])
            rows.append(
                f"| [{job.config}](configs/{job.config}.py), {which} | {job.data} | "
                f"{minutes:.0f} min, {len(seeds)} seeds | "
                f"{mean['dice'].mean():.3f}{spread} ({low:.3f} – {high:.3f}) | "
                f"{mean['hd95'].mean():.2f} {seeds[0][which]['unit']} | {mean['nsd'].mean():.3f} |"
            )
    return "\n".join(rows)


def write_table() -> None:
    """Puts the table between the two markers of README.md."""
    readme = ROOT / "README.md"
    head, rest = readme.read_text().split("<!-- results -->\n")
    _, tail = rest.split("<!-- end of results -->\n")
    readme.write_text(f"{head}<!-- results -->\n\n{table()}\n\n<!-- end of results -->\n{tail}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="data sets and runs")
    parser.add_argument("--only", nargs="*", help="names of configs")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    args = parser.parse_args()
    if args.what == "table":
        write_table()
        return
    for job in JOBS:
        if not args.only or job.config in args.only:
            run(job, args.seeds, Path(os.environ["MEDSEG_DATA"]), args.work.resolve())


if __name__ == "__main__":
    main()

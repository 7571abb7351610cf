"""Trains what a page claims, resumably, and makes its table from the results.

    MEDSEG_DATA=FOLDER python benchmarks/evidence.py run --study baseline --work runs/evidence [--only JOB ...]
    python benchmarks/evidence.py table --study baseline

A study is a file of `studies/`. `run` converts each data set once and trains each job and seed, all jobs of a seed
before the next seed. A run that was interrupted goes on where it stopped; one that is finished is skipped. Every figure
goes to results/STUDY/<job>.json and every case to results/STUDY/<job>.csv. `table` writes the study's page.
"""

import argparse
import csv
import fcntl
import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from studies import RESULTS, Job, Records

ROOT = Path(__file__).resolve().parents[1]


def run(study: str, job: Job, seed: int, raw: Path, work: Path) -> None:
    """Converts, trains and records one job with one seed, unless that is done."""
    path = RESULTS / study / f"{job.name}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"seeds": {}}
    if str(seed) in results["seeds"]:
        return
    data = _data(job, raw, work)
    out = work / study / f"{job.name}_seed{seed}"
    options = (*job.overrides, "--seed", str(seed))
    _medseg("train", f"configs/{job.config}.py", "--out", str(out), "--data", str(data), *options)
    folder = next(p.parent for p in sorted(out.rglob("run.json")))  # folds and held-out domains have runs within
    for label, source, converted in job.elsewhere:
        other, place = _converted(source, converted, raw, work), out / label
        _medseg("predict", str(out), "-i", str(other), "-o", str(place), "--checkpoint", "last", "--overwrite")
        _medseg("evaluate", str(place), str(other), "-o", str(place))
    scores = (*job.scores, *((label, label) for label, *_ in job.elsewhere))
    record = json.loads((folder / "run.json").read_text())  # of several runs the first
    train = [
        e for line in (folder / "log.jsonl").read_text().splitlines() if (e := json.loads(line))["kind"] == "train"
    ]
    results["seeds"][str(seed)] = {
        "command": f"medseg train configs/{job.config}.py --data data/{data.name} --out RUN {' '.join(options)}",
        "commit": record["git"],
        "versions": record["versions"],
        "devices": {**record["devices"], "cores": os.cpu_count(), "machine": platform.machine()},
        "steps": int(_steps(train).sum()),
        "seconds_per_step": float(np.median([e["seconds"] for e in train])),
        "minutes_of_steps": _minutes(train),
        **{label: _summary(out / place) for label, place in scores},
    }
    if (held := out / "hold_out.json").exists():  # a row for each domain, with the scores on the others
        results["seeds"][str(seed)]["hold_out"] = json.loads(held.read_text())
    path.parent.mkdir(parents=True, exist_ok=True)
    _append_cases(path.with_suffix(".csv"), scores, seed, out)
    path.write_text(json.dumps(results, indent=1))


def _data(job: Job, raw: Path, work: Path) -> Path:
    """The job's data set, made and planned if it is not there."""
    data = _converted(job.source, job.options, raw, work)
    if not (data / "plan.json").exists():
        _medseg("data", "plan", str(data))
    if not job.corrupt:
        return data
    words = (w.strip("-") for w in job.corrupt if w not in ("data", "corrupt", "SRC", "DST"))
    made = data.with_name("_".join((data.name, *words)))
    if not (made / "plan.json").exists():
        shutil.rmtree(made, ignore_errors=True)
        _medseg(*({"SRC": str(data), "DST": str(made)}.get(word, word) for word in job.corrupt))
        shutil.copyfile(data / "plan.json", made / "plan.json")
    return made


def _converted(source: str, options: tuple[str, ...], raw: Path, work: Path) -> Path:
    """A data set of MEDSEG_DATA, converted if that is not done."""
    data = work / "data" / "_".join((source, *(o.strip("-") for o in options)))
    if not (data / "dataset.json").exists():
        shutil.rmtree(data, ignore_errors=True)
        _medseg("data", "convert", str(raw / source), str(data), *options)
    return data


def _summary(folder: Path) -> dict[str, Any]:
    """summary.json without the places of files on this machine."""
    summary = json.loads((folder / "summary.json").read_text())
    for place in ("predictions", "references"):
        summary.get("settings", {}).pop(place, None)
    return summary


def _append_cases(path: Path, scores: Sequence[tuple[str, str]], seed: int, out: Path) -> None:
    """Adds this seed's cases to the job's CSV."""
    rows = [
        {"seed": seed, "scores": label, **row}
        for label, place in scores
        for row in csv.DictReader((out / place / "cases.csv").open(newline=""))
    ]
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _steps(train: list[dict[str, Any]]) -> np.ndarray:
    """Steps that each line of the log stands for; those of a stage are counted from 1."""
    step = np.array([e["step"] for e in train])
    since = np.diff(step, prepend=0)
    return np.where(since > 0, since, step)


def _minutes(train: list[dict[str, Any]]) -> float:
    return float(np.sum(_steps(train) * [e["seconds"] for e in train]) / 60)


def _medseg(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "medseg_jax.cli", *args], cwd=ROOT, check=True)


@contextmanager
def _turn(lock: Path | None):
    """Waits until no other training that was given the same file is running."""
    if lock is None:
        yield
        return
    with lock.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def records(study: str) -> Records:
    """What has been measured so far: job -> seed -> record."""
    files = sorted((RESULTS / study).glob("*.json"))
    return {f.stem: {int(k): v for k, v in json.loads(f.read_text())["seeds"].items()} for f in files}


def write_table(study: str, module: ModuleType) -> None:
    """Puts the table between the study's two markers of its page."""
    page = ROOT / module.PAGE
    start, end = f"<!-- results: {study} -->\n", "<!-- end of results -->\n"
    head, rest = page.read_text().split(start)
    tail = rest.split(end, 1)[1]
    page.write_text(f"{head}{start}\n{module.table(records(study))}\n\n{end}{tail}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--study", required=True, help="file of studies/, without .py")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="data sets and runs")
    parser.add_argument("--only", nargs="*", help="names of jobs")
    parser.add_argument("--seeds", nargs="*", type=int, help="only these")
    parser.add_argument("--lock", type=Path, help="a file: only one training at a time holds it, across processes")
    args = parser.parse_args()
    module = importlib.import_module(f"studies.{args.study}")
    if args.what == "table":
        write_table(args.study, module)
        return
    jobs = [job for job in module.JOBS if not args.only or job.name in args.only]
    for seed in args.seeds or sorted({seed for job in jobs for seed in job.seeds}):
        for job in (job for job in jobs if seed in job.seeds):
            with _turn(args.lock):
                run(args.study, job, seed, Path(os.environ["MEDSEG_DATA"]), args.work.resolve())


if __name__ == "__main__":
    main()

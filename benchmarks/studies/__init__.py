"""What a study is: runs that are compared with each other, and the table that is made of them.

A study is a file of this folder with

    JOBS                 the runs: config, data, command-line overrides, seeds
    PAGE                 the page that shows the table, between `<!-- results: STUDY -->` and `<!-- end of results -->`
    table(records)       job's name -> seed -> record (see `Job`)  to  the table in Markdown

and `evidence.py run --study NAME` does the rest.
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg_jax.evaluation.evaluate import bootstrap_interval

RESULTS = Path(__file__).resolve().parents[1] / "results"

type Records = dict[str, dict[int, dict[str, Any]]]


@dataclass(frozen=True)
class Job:
    """One config with some overrides, trained once a seed.

    A seed's record holds command, commit, versions, devices, steps, minutes and, for each of `scores`, the summary that
    `medseg evaluate` wrote there.

    Attributes:
        name: of the job, and of its results' files.
        config: file in configs/, without .py.
        source: folder of raw data in MEDSEG_DATA.
        data: words for the table.
        options: of `medseg data convert`.
        corrupt: arguments of a further verb that makes the training data out of the converted set: ("data", "corrupt",
            ...); SRC and DST stand for the two folders.
        overrides: of `medseg train`.
        seeds: one run each.
        scores: label -> folder with summary.json and cases.csv, within the run's folder.
        elsewhere: (label, source, options) of data sets that have no part in training and whose cases, all of them, are
            predicted with the last weights and scored under that label.
    """

    name: str
    config: str
    source: str
    data: str = ""
    options: tuple[str, ...] = ()
    corrupt: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0, 1, 2)
    scores: tuple[tuple[str, str], ...] = (("best", "validation/best"), ("last", "validation/last"))
    elsewhere: tuple[tuple[str, str, tuple[str, ...]], ...] = ()


type Values = dict[int, dict[tuple[str, str, str], float]]
"""Seed -> (patient, case, class) -> value; where no patient is known each case is one."""


def case_values(study: str, job: str, label: str, metric: str, domain: str | None = None) -> Values:
    """From the CSV of a job, of one domain or all; empty and undefined values are left out."""
    found: Values = {}
    with (RESULTS / study / f"{job}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            here = row["scores"] == label and domain in (None, row["domain"])
            if here and row[metric] not in ("", "nan"):
                key = (row.get("patient") or row["case"], row["case"], row["class"])
                found.setdefault(int(row["seed"]), {})[key] = float(row[metric])
    return found


def interval(values: Values) -> tuple[float, float, float, float]:
    """Mean, standard deviation over seeds, and the 95 % bootstrap interval over patients of the mean over seeds.

    A case's value is its mean over classes and seeds; all cases of a patient are drawn together.
    """
    seeds = [np.mean(list(one.values())) for one in values.values()]
    cases: dict[tuple[str, str], list[float]] = {}
    for one in values.values():
        for (patient, case, _), value in one.items():
            cases.setdefault((patient, case), []).append(value)
    low, high = bootstrap_interval(
        np.array([np.mean(v) for v in cases.values()]), np.array([patient for patient, _ in cases])
    )
    spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else float("nan")
    return float(np.mean(seeds)), spread, float(low), float(high)


def difference(study: str, job: str, base: str, label: str = "last", metric: str = "dice") -> str:
    """Mean difference between two jobs over the cases and the seeds that both have, with its interval over patients.

    Of several seeds the difference of each follows, since the interval knows nothing of their spread. Empty if the jobs
    share no seed.
    """
    mine, theirs = (case_values(study, name, label, metric) for name in (job, base))
    both = {s: {key: mine[s][key] - theirs[s][key] for key in mine[s]} for s in mine.keys() & theirs.keys()}
    if not both:
        return ""
    mean, _, low, high = interval(both)
    each = ", ".join(f"{np.mean(list(both[seed].values())):+.3f}" for seed in sorted(both))
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})" + (f"; seeds {each}" if len(both) > 1 else "")

"""Predictions of several runs, each of cases that its own weights never saw, pooled and scored as one."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset

CHECKPOINTS: tuple[Literal["last", "best"], ...] = ("last", "best")
"""The weights that are scored at the end of a training."""


def pool(places: Sequence[Path], target: Path, dataset: Dataset) -> dict[str, Any]:
    """Copies the label maps of all places into a new folder, scores them and writes the report; returns the summary."""
    from medseg_jax.evaluation.evaluate import evaluate
    from medseg_jax.evaluation.report import report

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for place in places:
        for path in io.list_files(place):
            shutil.copyfile(path, target / path.name)
    shutil.copyfile(places[0] / "dataset.json", target / "dataset.json")
    summary = evaluate(target, dataset, target)
    report(target)
    return summary

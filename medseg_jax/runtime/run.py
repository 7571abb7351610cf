"""Opening a finished (or running) training run for prediction.

RUN/run.json          config, versions, git state, devices, command, seed, data fingerprint, stages
RUN/plan.json         the plan that was trained
RUN/dataset.json      channels and classes
RUN/checkpoints/<stage>/{last,best}/<step>
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax

from medseg_jax import config as configs
from medseg_jax.data.dataset import read_description
from medseg_jax.data.plan import Plan
from medseg_jax.methods.objective import Task
from medseg_jax.runtime.checkpoint import Checkpoints, restore_tree, verify_manifest
from medseg_jax.types import Labels, UserError

type Predict = Callable[[Any], Any]


@dataclass(frozen=True)
class Run:
    """A trained model with everything that a prediction needs.

    Attributes:
        path: the run's folder.
        config: what was trained.
        plan: how cases are preprocessed.
        labels: the classes.
        channels: names of the input channels.
        step: optimiser steps of these weights, within their stage.
        checkpoint: "best" or "last".
        predict: image [b, *patch, c] -> probabilities [b, *patch, k]; jitted.
    """

    path: Path
    config: configs.Config
    plan: Plan
    labels: Labels
    channels: tuple[str, ...]
    step: int
    checkpoint: str
    predict: Predict


def stage_folder(run: Path, index: int, name: str) -> Path:
    """Where a stage keeps its checkpoints."""
    return run / "checkpoints" / f"{index}_{name}"


def open_run(path: str | Path, checkpoint: Literal["best", "last"] = "best") -> Run:
    """Opens a run's last stage that has weights.

    Args:
        path: the run's folder.
        checkpoint: "best" on validation, or "last".

    Raises:
        UserError: no run there, no undamaged weights, or a config that names classes outside this package.
    """
    path = Path(path).absolute()
    if not (path / "run.json").is_file():
        raise UserError(
            "This is no run of medseg train",
            file=path,
            expected="a folder with run.json",
            remedy="medseg train CONFIG --out RUN makes one",
        )
    config: configs.Config = configs.from_json(json.loads((path / "run.json").read_text())["config"])
    plan = Plan.load(path / "plan.json")
    channels, labels = read_description(path / "dataset.json")
    for index, stage in reversed(list(enumerate(config.stages))):
        folder = stage_folder(path, index, stage.name) / checkpoint
        store = Checkpoints(folder, read_only=True)
        for step in reversed(store.steps()):
            if problems := verify_manifest(folder / str(step)):
                raise UserError(
                    "The weights are damaged",
                    file=folder / str(step),
                    found="; ".join(problems),
                    remedy=f"use --checkpoint {'last' if checkpoint == 'best' else 'best'}, or train on: it resumes",
                )
            state = restore_tree(folder / str(step))
            weights = state.get("ema") or state["params"]
            objective = stage.objective.bind(Task(plan, labels, len(channels)))
            aux = state["aux"]
            predict = partial(jax.jit(objective.predict), weights, aux, objective.frozen())
            return Run(path, config, plan, labels, channels, step, checkpoint, predict)
    raise UserError(
        f"The run has no {checkpoint} weights yet",
        file=path / "checkpoints",
        remedy="let medseg train go on until its first checkpoint (run the same command again to resume)",
    )

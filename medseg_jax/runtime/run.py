"""Opening a finished (or running) training run for prediction.

RUN/run.json          config, versions, git state, devices, command, seed, data fingerprint, stages
RUN/plan.json         the plan that was trained
RUN/dataset.json      channels and classes
RUN/checkpoints/<stage>/{last,best}/<step>

A cross-validated run is a folder of runs, RUN/fold_0 ... RUN/fold_<K-1>; one that was trained class by class is
RUN/class_<name> ..., with RUN/thresholds.json. An exported run (inference/export.py) has weights.safetensors instead of
checkpoints, and in run.json nothing but what others need.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from medseg_jax import config as configs
from medseg_jax.data.dataset import Dataset, read_description
from medseg_jax.data.plan import Plan
from medseg_jax.data.views import class_view, fold_view, hold_out_view, labelled_view
from medseg_jax.methods.objective import Objective, Task, Tree
from medseg_jax.paths import read_record, safe_name
from medseg_jax.runtime.checkpoint import Checkpoints, restore_tree, verify_manifest
from medseg_jax.runtime.tensors import load_tree
from medseg_jax.types import Labels, UserError

type Predict = Callable[[Any], Any]
"""Patches [b, *patch, c] float32 -> probabilities [b, *patch, k]."""

WEIGHTS = "weights.safetensors"
"""In an exported run, its (params, aux)."""


@dataclass(frozen=True)
class Run:
    """A trained model with everything that a prediction needs.

    Attributes:
        path: the run's folder.
        config: what was trained.
        plan: how cases are preprocessed.
        labels: the classes.
        channels: names of the input channels.
        stage: index of the stage that these weights come from.
        step: their optimiser steps, within the stage.
        checkpoint: "best" or "last".
        predict: image [b, *patch, c] -> probabilities [b, *patch, k]; jitted.
        objective: the bound method; `predict` calls its `predict` with `variables`. None with `members`.
        variables: (params, aux, frozen). None with `members`.
        members: the runs of single classes that this one is put together from.
        thresholds: probability above which a pixel is of each class; None: 0.5, or the likeliest class.
    """

    path: Path
    config: configs.Config
    plan: Plan
    labels: Labels
    channels: tuple[str, ...]
    stage: int
    step: int
    checkpoint: str
    predict: Predict
    objective: Objective | None = None
    variables: tuple[Tree, Tree, Tree] | None = None
    members: tuple["Run", ...] = ()
    thresholds: tuple[float, ...] | None = None


def stage_folder(run: Path, index: int, name: str) -> Path:
    """Where a stage keeps its checkpoints."""
    return run / "checkpoints" / f"{index}_{name}"


def described(path: Path, config: configs.Config) -> tuple[tuple[str, ...], Labels]:
    """(channels, classes) of a run."""
    channels, labels = read_description(path / "dataset.json")
    return channels, labels if config.classes is None else labels.only(config.classes)


def seen_by(config: configs.Config, dataset: Dataset) -> tuple[Dataset, Dataset]:
    """A data set without what a config holds out, and the config's view of it: fold, labelled cases, classes."""
    if config.oracle and config.fold is not None:
        raise UserError(
            "An oracle validates on the domain that is held out, and folds would train on it",
            found=f"hold_out={config.hold_out!r}, oracle=True, fold={config.fold}",
            remedy="leave out oracle or fold",
        )
    whole = dataset
    if config.hold_out is not None:
        whole = hold_out_view(whole, config.hold_out, oracle=config.oracle)
    view = whole if config.fold is None else fold_view(whole, config.fold, config.folds)
    view = view if config.labelled is None else labelled_view(view, config.labelled)
    return whole, class_view(view, config.classes)


def open_run(path: str | Path, checkpoint: Literal["best", "last"] = "best") -> Run:
    """Opens a run's last stage that has weights.

    Args:
        path: the run's folder.
        checkpoint: "best" on validation, or "last"; an exported run has one of them only, and that is opened.

    Raises:
        UserError: no run there, no undamaged weights, or a config that names classes outside this package.
    """
    path = Path(path).absolute()
    if not (path / "run.json").is_file():
        inside = sorted(file.parent.name for file in path.glob("*/run.json"))  # of folds or held-out domains
        raise UserError(
            "This is no run of medseg train",
            file=path,
            found=f"a folder of runs: {', '.join(inside)}" if inside else None,
            expected="a folder with run.json",
            remedy="name one of these runs" if inside else "medseg train CONFIG --out RUN makes one",
        )
    config: configs.Config = configs.from_json(read_record(path / "run.json", "config")["config"])
    plan = Plan.load(path / "plan.json")
    channels, labels = described(path, config)
    task = Task(plan, labels, plan.channels_seen)

    def opened(stage: int, step: int, checkpoint: str, params: Tree, aux: Tree) -> Run:
        objective = config.stages[stage].objective.bind(task)
        variables = jax.device_put((params, aux, objective.frozen()))
        predict = partial(jax.jit(objective.predict), *variables)
        return Run(path, config, plan, labels, channels, stage, step, checkpoint, predict, objective, variables)

    if (path / WEIGHTS).is_file():
        (params, aux), said = load_tree(path / WEIGHTS)
        return opened(int(said["stage"]), int(said["step"]), said["checkpoint"], params, aux)
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
            aux = {name: value for name, value in state["aux"].items() if name != "cases"}
            return opened(index, step, checkpoint, weights, aux)
    if checkpoint == "best" and any(path.glob("checkpoints/*/last/*.sha256.json")):
        remedy = "use --checkpoint last: nothing has been validated yet, or there are no validation cases"
    else:
        remedy = "let medseg train go on until its first checkpoint (run the same command again to resume)"
    raise UserError(f"The run has no {checkpoint} weights yet", file=path / "checkpoints", remedy=remedy)


# ---------------------------------------------------------------- several runs


def fold_folder(out: Path, fold: int) -> Path:
    """Where a cross-validated run keeps a fold."""
    return out / f"fold_{fold}"


def folds_of(path: Path) -> list[Path]:
    """The folds of a cross-validated run; empty for any other folder.

    Raises:
        UserError: some folds are missing.
    """
    found = sorted(path.glob("fold_*/run.json"))
    if (path / "run.json").is_file() or not found:
        return []
    wanted = read_record(found[0], "config")["config"].get("folds", len(found))
    folders = [fold_folder(path, k) for k in range(wanted)]
    if missing := [folder.name for folder in folders if not (folder / "run.json").is_file()]:
        there = " ".join(str(file.parent) for file in found)
        raise UserError(
            "The cross-validation is not complete",
            file=path,
            found=f"no {', '.join(missing)}",
            expected=f"{wanted} folds",
            remedy=f"train the others (medseg train CONFIG --fold all --out {path}), or name those there are: {there}",
        )
    return folders


def class_folder(out: Path, name: str) -> Path:
    """Where a run that is trained class by class keeps a class."""
    return out / f"class_{safe_name(name)}"


def is_by_class(path: Path) -> bool:
    """Whether this is the folder of a run that is trained class by class."""
    return not (path / "run.json").is_file() and any(path.glob("class_*/run.json"))


def open_by_class(path: Path, checkpoint: Literal["best", "last"]) -> Run:
    """The networks of single classes as one run, whose probabilities stand beside each other.

    All see the same preprocessed windows, so that an image is prepared and cut once.

    Raises:
        UserError: as `open_run`; a class is missing, or the plans differ.
    """
    found = sorted(path.glob("class_*/run.json"))
    wanted = json.loads((path / "classes.json").read_text(encoding="utf-8"))
    if missing := [name for name in wanted if not (class_folder(path, name) / "run.json").is_file()]:
        raise UserError(
            "Not all classes are trained",
            file=path,
            found=f"no {', '.join(missing)}",
            expected=", ".join(wanted),
            remedy=f"train the others (medseg train CONFIG --class all --out {path}), or name one: {found[0].parent}",
        )
    members = tuple(open_run(class_folder(path, name), checkpoint) for name in wanted)
    first = members[0]
    plan = replace(first.plan, classes=tuple(wanted), reasons={})
    for run in members[1:]:
        if replace(run.plan, classes=tuple(wanted), reasons={}) != plan:
            raise UserError("The classes were trained with different plans", file=run.path, expected=first.path)

    def predict(image: Any) -> Any:
        return jnp.concatenate([run.predict(image) for run in members], -1)

    config = replace(first.config, classes=tuple(wanted))
    _, labels = described(first.path, config)
    thresholds = load_thresholds(path, checkpoint, wanted)
    labels = replace(labels, exclusive=False).storable(path)
    return replace(
        first, path=path, config=config, plan=plan, labels=labels, predict=predict, objective=None, variables=None,
        members=members, thresholds=thresholds,
    )  # fmt: skip


THRESHOLDS = "thresholds.json"


def load_thresholds(run: Path, checkpoint: str, names: Sequence[str]) -> tuple[float, ...] | None:
    """The thresholds chosen for the weights of a run, or None where none were.

    Raises:
        UserError: the file is damaged.
    """
    file = run / THRESHOLDS
    if not file.is_file():
        return None
    try:
        chosen = json.loads(file.read_text(encoding="utf-8"))[checkpoint]
        return tuple(float(chosen[name]) for name in names)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            "The thresholds cannot be read", file=file, found=f"{type(error).__name__}: {error}", remedy="delete it"
        ) from error


def open_runs(runs: Sequence[Run | str | Path], checkpoint: Literal["best", "last"] = "best") -> list[Run]:
    """Opens runs that are to predict together, a cross-validated one as all its folds, one of single classes as one.

    Raises:
        UserError: as `open_run`; or they differ in channels or classes.
    """
    opened: list[Run] = []
    for run in runs:
        if isinstance(run, str | Path) and is_by_class(Path(run)):
            opened.append(open_by_class(Path(run).absolute(), checkpoint))
        elif isinstance(run, str | Path):
            opened += [open_run(path, checkpoint) for path in folds_of(Path(run)) or [Path(run)]]
        else:
            opened.append(run)
    if not opened:
        raise UserError("There is no run to predict with", expected="the folder of at least one run")
    first = opened[0]
    for run in opened[1:]:
        for what in ("channels", "labels"):
            if getattr(run, what) != getattr(first, what):
                raise UserError(
                    f"The runs differ in their {'classes' if what == 'labels' else what} and cannot be averaged",
                    file=run.path,
                    found=_in_words(run, what),
                    expected=f"{_in_words(first, what)}, as in {first.path}",
                    remedy="predict with each of them on its own",
                )
    return opened


def _in_words(run: Run, what: str) -> str:
    if what == "channels":
        return ", ".join(run.channels)
    pairs = zip(run.labels.names, run.labels.values, strict=True)
    return ", ".join(f"{name} = {'/'.join(map(str, values))}" for name, values in pairs)

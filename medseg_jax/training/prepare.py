"""What happens before the first step: data, plan, the run's record, the state that a stage starts from.

Shared by training, the dry run (`medseg check`) and preflight, which compiles the same step for other machines.
"""

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from medseg_jax import config as configs
from medseg_jax.config import Config, Stage
from medseg_jax.data import pipeline, synthetic
from medseg_jax.data.cache import Cache
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.plan import Plan
from medseg_jax.data.planning import make_plan
from medseg_jax.data.verify import check_dataset
from medseg_jax.methods.objective import Objective, Task, check_batch
from medseg_jax.models.network import Network
from medseg_jax.paths import file_sha256, read_record, write
from medseg_jax.runtime import distributed, sharding
from medseg_jax.runtime.environment import describe
from medseg_jax.runtime.guards import Stop, heed
from medseg_jax.runtime.log import say
from medseg_jax.runtime.run import seen_by
from medseg_jax.training.optim import make_optimizer
from medseg_jax.training.step import State, StepParts, init_state, make_step
from medseg_jax.types import Batch, UserError
from medseg_jax.weights import load as load_weights
from medseg_jax.weights import read_weights, weight_file

FREE_TO_CHANGE = (
    *("log_every", "validate_every", "checkpoint_every", "workers", "cache", "tensorboard", "max_bad_steps"),
    *("fsdp", "rules", "spatial"),
)
"""Fields of Config that may differ when a run is resumed: they change no number, those of the mesh by rounding only."""


def open_data(config: Config) -> tuple[Dataset, Dataset]:
    """The data set without what the config holds out, and the config's view of it: fold, labelled cases, classes."""
    names = [stage.name for stage in config.stages]
    if not names or len(set(names)) < len(names):
        raise UserError(
            "Every stage needs a name of its own, by which the log tells them apart",
            found=", ".join(names) or "no stage",
            remedy='Stage(..., name="first")',
        )
    return seen_by(config, synthetic.open_data(config.data))


def open_plan(config: Config, dataset: Dataset, out: Path | None = None, budget: str | None = None) -> Plan:
    """The run's own plan when resuming, else the config's, the data set's, or one made for this machine or `budget`.

    With a domain held out or labels hidden (`labelled`) the data set's own plan is left aside: they had a part in it.
    """
    own = dataset.root / "plan.json"
    candidates = [out / "plan.json"] if out else []
    candidates += [Path(config.plan)] if config.plan else [own]
    found = next((path for path in candidates if path.exists()), None)
    if found is None and config.plan:
        raise UserError("No such plan", file=config.plan, remedy=f"medseg data plan {config.data} makes one")
    if found == own and not config.plan and (config.hold_out is not None or config.labelled is not None):
        say(f"{own} is left aside: what is held out or hidden had a part in it (--plan {own} takes it)")
        found = None
    plan = Plan.load(found) if found else make_plan(dataset, budget=budget or jax.default_backend())
    return plan if config.classes is None else replace(plan, classes=config.classes)


def refuse_problems(dataset: Dataset, stop: Stop | None = None) -> None:
    """Lists all errors of a data set at once, before anything is trained on it. Files of test cases stay closed."""
    found = check_dataset(dataset, splits=("train", "val"), progress=lambda done, total: heed(stop))
    errors = [p for p in found if p.severity == "error"]
    if errors:
        lines = "\n".join(f"    {p.case}: {p.text}" for p in errors[:20])
        more = f"\n    ... and {len(errors) - 20} more" if len(errors) > 20 else ""
        raise UserError(
            f"The data set has {len(errors)} errors:\n{lines}{more}",
            file=dataset.root,
            remedy=f"medseg data check {dataset.root} lists everything with remedies",
        )


def write_run(config: Config, out: Path, whole: Dataset, dataset: Dataset, plan: Plan) -> None:
    """run.json, plan.json and dataset.json; a resumed run must agree with what is there."""
    record = {
        "config": configs.to_json(config),
        "dataset": {"root": str(dataset.root.resolve()), "name": dataset.name, "fingerprint": whole.fingerprint()},
        "cases": {split: [c.id for c in dataset.subset(split)] for split in ("train", "val", "test")},
        **describe(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    path = out / "run.json"
    if path.exists():
        refuse_other_config(config, out, whole)
        record |= {k: v for k, v in read_record(path).items() if k in ("started", "pretrained")}
    elif config.pretrained:
        record["pretrained"] = {"file": config.pretrained, "sha256": file_sha256(weight_file(config.pretrained))}
    distributed.wait_for_all("run read")  # nobody still reads what is written now
    if jax.process_index() == 0:
        plan.save(out / "plan.json")
        write(out / "dataset.json", (dataset.root / "dataset.json").read_text(encoding="utf-8-sig"))
        write(out / "run.json", json.dumps(record, indent=1))


def refuse_other_config(config: Config, out: Path, dataset: Dataset) -> None:
    """Raises a UserError that names every difference if the run in `out` was started otherwise.

    The data set is the one in the folder: what a fold or `labelled` makes of it, the config says.
    """
    path = out / "run.json"
    old = read_record(path, "config", "dataset")
    new = configs.to_json(config)
    before = configs.to_json(Config()) | old["config"]  # a run older than a field had its default
    changed = configs.differences(
        {k: v for k, v in before.items() if k not in (*FREE_TO_CHANGE, "data", "plan")},
        {k: v for k, v in new.items() if k not in (*FREE_TO_CHANGE, "data", "plan")},
    )
    if old["dataset"]["fingerprint"] != dataset.fingerprint():
        changed.append("the data set's files have changed")
    if changed:
        raise UserError(
            "The run in this folder was started with another config",
            file=path,
            found="; ".join(changed),
            remedy="use the old settings, another --out, or --fresh to throw the old run away",
        )


def never_trained(out: Path) -> bool:
    """Whether a run ended before its first step, as by a wrong config: it must not stand in the mended one's way."""
    steps = [*out.glob("log.jsonl"), *out.glob("checkpoints/*/*/*")]
    return (out / "run.json").exists() and not steps


def clear(out: Path) -> None:
    """Removes what a run writes, and nothing else."""
    for name in ("checkpoints", "validation", "tensorboard"):
        shutil.rmtree(out / name, ignore_errors=True)
    files = ("run.json", "plan.json", "dataset.json", "log.jsonl", "progress.png", "report.html", "postprocessing.json")
    for name in files:
        (out / name).unlink(missing_ok=True)


# ---------------------------------------------------------------------------------------------------------------------
# One stage
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """One stage, ready to be compiled: shared by `train` and the dry run.

    Attributes:
        parts: objective, optimiser, augmentation.
        steps: optimiser steps.
        feed: keyword arguments of `pipeline.stream` and `pipeline.batch_at`.
        first: this process's rows of the batch of step 0.
        make_state: (batch, seed) -> state at step 0.
        start: what make_state wants: the first batch of all processes, so that all start from the same state also where
            a method looks at its values; and the seed.
        state: abstract state, each leaf with its sharding.
        frozen: what is read but not trained, on the devices.
    """

    parts: StepParts
    steps: int
    feed: dict[str, Any]
    first: Batch
    make_state: Callable[[Batch, int], State]
    start: tuple[Batch, int]
    state: Any
    frozen: Any


def prepare_stage(config: Config, index: int, dataset: Dataset, plan: Plan, cache: Cache, mesh: Mesh) -> Prepared:
    """Binds the stage's method to the data, draws the first batch, and lays out the state on the mesh."""
    stage = config.stages[index]
    size = sample_size(stage, plan)
    task = Task(plan, dataset.labels, plan.channels_seen, len(dataset.cases), dataset.domains)
    if "start" in stage.objective.batch_spec:
        extent = cache.extent([case.id for case in dataset.subset("train")])
        task = replace(task, extent=extent, sample_size=size)
    feed = {
        **dict(cache=cache, dataset=dataset, plan=plan, mix=stage.mix, split="train"),
        "seed": config.seed * 1000 + index,
        "sample_size": size,
        "process": (jax.process_index(), jax.process_count()),
    }
    first = pipeline.batch_at(step=0, **feed)
    parts, steps = stage_parts(config, index, task, first)
    whole: dict[str, Any] = {**feed, "process": (0, 1)}
    start = pipeline.batch_at(step=0, **whole), feed["seed"]
    state = abstract_state(parts, start, config, mesh)
    frozen = jax.device_put(parts.objective.frozen(), sharding.replicated(mesh))
    return Prepared(parts, steps, feed, first, partial(init_state, parts), start, state, frozen)


def refuse_no_best(config: Config, dataset: Dataset) -> None:
    """Raises a UserError if a stage is to start from the best weights, and no case of this view validates."""
    best = [f'{stage.name}: start="best"' for stage in config.stages[1:] if stage.start == "best"]
    if best and not dataset.subset("val", labelled=True):
        raise UserError(
            "A stage is to start from the best weights, and there are no validation cases to choose them by",
            file=dataset.root,
            found=", ".join(best),
            remedy='use start="last", or give some cases a split of val in dataset.json',
        )


def check_stages(config: Config, dataset: Dataset, plan: Plan, cache: Cache, mesh: Mesh) -> None:
    """Raises what would stop a later stage before the first is trained: afterwards the config cannot be changed.

    Steps are traced, not compiled: seconds a stage.

    Raises:
        UserError: a batch that a stage cannot take, weights of the stage before with which it has nothing in common,
            or no best ones.
    """
    refuse_no_best(config, dataset)
    before: dict[str, Any] = {}
    for index in range(len(config.stages)):
        prepared = prepare_stage(config, index, dataset, plan, cache, mesh)
        if index:
            step = compile_step(prepared.parts, prepared.state, mesh)
            step.trace(prepared.state, prepared.frozen, sharding.put_batch(prepared.first, mesh))
            fitting(prepared.state, before)
        before = {name: prepared.state[name] for name in ("params", "aux")}


def sample_size(stage: Stage, plan: Plan) -> tuple[int, ...]:
    """Sides of the samples that are read, from which augmentation cuts patches."""
    return stage.augment.sample_size(plan.patch_size, plan.patch_spacing)


def stage_parts(config: Config, index: int, task: Task, batch: Any) -> tuple[StepParts, int]:
    """What a stage's step is made of, and its number of steps. The batch may be abstract: only shapes count."""
    stage, plan = config.stages[index], task.plan
    steps = stage.steps or plan.steps
    objective = stage.objective.bind(task)
    check_batch(objective, batch)
    params, _ = jax.eval_shape(lambda b: objective.init(jax.random.key(0), b), batch)
    optimizer = make_optimizer(stage.optim, steps, params)
    return StepParts(objective, optimizer, stage, config.ema, plan.patch_spacing, plan.patch_size), steps


def abstract_state(parts: StepParts, start: tuple[Any, int], config: Config, mesh: Mesh) -> Any:
    """The state of step 0 as shapes with their places on the mesh. `start`: (batch, seed); it may be abstract."""
    batch, seed = start
    abstract = jax.eval_shape(lambda b: init_state(parts, b, seed), batch)
    places = sharding.state_shardings(abstract, config.rules, mesh)
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, places)


def compile_step(parts: StepParts, state: Any, mesh: Mesh) -> Any:
    """The jitted step: state donated, and its out_shardings pinned, so that a resumed run is the same program."""
    places = jax.tree.map(lambda s: s.sharding, state)
    return jax.jit(
        sharding.within(mesh, make_step(parts)),
        donate_argnums=0,
        out_shardings=(places, sharding.replicated(mesh)),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Weights to start from
# ---------------------------------------------------------------------------------------------------------------------


def from_file(file: str, objective: Objective, params: Any, aux: Any) -> dict[str, Any]:
    """The method's params and aux with the values of a weight file where it has any; abstract ones can be tried too.

    Raises:
        UserError: the file cannot be read, or does not fit the network.
    """
    tensors = read_weights(file, say)

    def load(net: Network, params: Any, stats: Any) -> tuple[Any, Any]:
        loaded = load_weights(net, params, stats, tensors, file)
        new = f"; new: {', '.join(loaded.stayed[:3])}{' ...' * (len(loaded.stayed) > 3)}" if loaded.stayed else ""
        say(f"{file}: {len(loaded.filled)} of {len(loaded.filled) + len(loaded.stayed)} arrays{new}")
        return loaded.params, loaded.stats

    new_params, new_aux = objective.pretrained(params, aux, load)
    return {"params": new_params, "aux": new_aux}


def transfer(state: State, previous: dict[str, Any]) -> State:
    """A state whose params and aux take every leaf of `previous` that `fitting` finds."""
    taken = fitting(state, previous)
    weights = {k: state[k] for k in ("params", "aux")}
    new = jax.tree_util.tree_map_with_path(lambda path, leaf: taken.get(sharding.path_name(path), leaf), weights)
    params = sum(name.startswith("params/") for name in taken)  # of what else there is a teacher starts anew
    say(f"taken over from the stage before: {params} of {len(jax.tree.leaves(state['params']))} arrays of weights")
    new_state = {**state, **new}
    if "ema" in state:
        new_state["ema"] = jax.tree.map(np.copy, new["params"])
    return new_state


def fitting(state: State, previous: dict[str, Any]) -> dict[str, Any]:
    """By their paths, the leaves of `previous` that params and aux of a state have with the same shape and type.

    All but aux["step"], the updates of a stage: it starts anew, so that ramps rise again and a teacher is the student
    (methods/teacher.py). Both may be abstract.

    Raises:
        UserError: there is none.
    """
    old = {sharding.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(previous)}
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path({k: state[k] for k in ("params", "aux")}):
        name = sharding.path_name(path)
        match = old.get(name)
        if name != "aux/step" and match is not None and (match.shape, match.dtype) == (leaf.shape, leaf.dtype):
            found[name] = match
    if not found:
        raise UserError(
            "The weights to start from share nothing with this stage", found="no leaf of equal path and shape"
        )
    return found

"""THE loop. Reads from top to bottom: data, state, resume, steps, validation, checkpoints, final scores.

It knows no method by name: what is trained is an `Objective` (methods/objective.py); step.py says what a step does.
A run is a pure function of its config: starting the same command again goes on from the last complete checkpoint and
gives the same bits as if it had never stopped.
"""

import fcntl
import json
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from medseg_jax.data.cache import Cache, build_cache
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.plan import Plan, make_plan
from medseg_jax.data.verify import check_dataset
from medseg_jax.data.views import class_view, fold_view, hold_out_view, labelled_view
from medseg_jax.methods.objective import Objective, Task, check_batch
from medseg_jax.models.network import Network
from medseg_jax.runtime import distributed, sharding
from medseg_jax.runtime import log as logs
from medseg_jax.runtime.checkpoint import Checkpoints, file_sha256
from medseg_jax.runtime.environment import describe, keep_freed_memory, use_compilation_cache
from medseg_jax.runtime.log import Log, say
from medseg_jax.runtime.run import open_run, stage_folder
from medseg_jax.training.optim import make_optimizer, schedule
from medseg_jax.training.step import State, StepParts, init_state, make_step, prediction_weights
from medseg_jax.training.validate import validate
from medseg_jax.types import Batch, UserError
from medseg_jax.weights import load as load_weights
from medseg_jax.weights import read_weights, weight_file

FREE_TO_CHANGE = (
    *("log_every", "validate_every", "checkpoint_every", "workers", "cache", "tensorboard", "max_bad_steps"),
    *("fsdp", "rules", "spatial"),
)
"""Fields of Config that may differ when a run is resumed: they change no number, those of the mesh by rounding only."""


class Interrupted(Exception):
    """A signal asked the run to stop; everything is saved.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, signal_number: int):
        self.signal = signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; the same command goes on from here")


@dataclass(frozen=True)
class Setting:
    """What all stages share."""

    config: Config
    out: Path
    dataset: Dataset
    plan: Plan
    cache: Cache
    log: Log
    mesh: Mesh
    stop: threading.Event


def train(config: Config, out: str | Path, *, fresh: bool = False, report: bool = True) -> Path:
    """Trains a run, or goes on with one.

    Args:
        config: what to train.
        out: the run's folder; made if missing, resumed if it holds a run of the same config.
        fresh: throw away what is in `out` and start anew.
        report: write final scores on the validation cases and report.html at the end.

    Returns:
        The run's folder.

    Raises:
        UserError: anything that the user can mend; earlier checkpoints stay usable.
        Interrupted: SIGTERM or Ctrl-C; the state was saved.
    """
    keep_freed_memory()
    use_compilation_cache()
    out = Path(out)
    with _explained(out), _locked(out):
        with _signals() as stop:
            if fresh and jax.process_index() == 0:
                _clear(out)
            distributed.wait_for_all("cleared")
            # ------------------------------------------------------------ data
            whole, dataset = open_data(config)
            if not (out / "run.json").exists():
                refuse_problems(whole, stop)
            plan = open_plan(config, whole if config.labelled is None else dataset, out)
            cache = build_cache(whole, plan, config.cache, progress=_cache_progress(stop))  # all views share it
            _write_run(config, out, whole, dataset, plan)

            # ------------------------------------------------------------ stages
            log = Log(out, config.tensorboard)
            mesh = sharding.make_mesh(config.fsdp, config.spatial)
            setting = Setting(config, out, dataset, plan, cache, log, mesh, stop)
            previous: Any = None
            for index, stage in enumerate(config.stages):
                previous = run_stage(setting, index, stage, previous)

        # ------------------------------------------------------------ scores
        if report and jax.process_index() == 0:
            final_scores(out, dataset)
        distributed.wait_for_all("scored")
    return out


# ---------------------------------------------------------------- before the loop


def open_data(config: Config) -> tuple[Dataset, Dataset]:
    """The data set without what the config holds out, and the config's view of it: fold, labelled cases, classes."""
    whole = synthetic.open_data(config.data)
    if config.hold_out is not None:
        whole = hold_out_view(whole, config.hold_out, oracle=config.oracle)
    view = whole if config.fold is None else fold_view(whole, config.fold, config.folds)
    view = view if config.labelled is None else labelled_view(view, config.labelled)
    return whole, class_view(view, config.classes)


def open_plan(config: Config, dataset: Dataset, out: Path | None = None, budget: str | None = None) -> Plan:
    """The run's own plan when resuming, else the config's, the data set's, or one made for this machine or `budget`.

    With a domain held out the data set's own plan is left aside, for that domain's images had a part in it.
    """
    candidates = [out / "plan.json"] if out else []
    own = [dataset.root / "plan.json"] if config.hold_out is None else []
    candidates += [Path(config.plan)] if config.plan else own
    found = next((path for path in candidates if path.exists()), None)
    if found is None and config.plan:
        raise UserError("No such plan", file=config.plan, remedy=f"medseg data plan {config.data} makes one")
    plan = Plan.load(found) if found else make_plan(dataset, budget=budget or jax.default_backend())
    return plan if config.classes is None else replace(plan, classes=config.classes)


def refuse_problems(dataset: Dataset, stop: threading.Event | None = None) -> None:
    """Lists all errors of a data set at once, before anything is trained on it. Files of test cases stay closed."""
    found = check_dataset(dataset, splits=("train", "val"), progress=lambda done, total: _heed(stop))
    errors = [p for p in found if p.severity == "error"]
    if errors:
        lines = "\n".join(f"    {p.case}: {p.text}" for p in errors[:20])
        more = f"\n    ... and {len(errors) - 20} more" if len(errors) > 20 else ""
        raise UserError(
            f"The data set has {len(errors)} errors:\n{lines}{more}",
            file=dataset.root,
            remedy=f"medseg data check {dataset.root} lists everything with remedies",
        )


def _write_run(config: Config, out: Path, whole: Dataset, dataset: Dataset, plan: Plan) -> None:
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
        record |= {k: v for k, v in json.loads(path.read_text()).items() if k in ("started", "pretrained")}
    elif config.pretrained:
        record["pretrained"] = {"file": config.pretrained, "sha256": file_sha256(weight_file(config.pretrained))}
    distributed.wait_for_all("run read")  # nobody still reads what is written now
    if jax.process_index() == 0:
        plan.save(out / "plan.json")
        for name, text in (
            ("dataset.json", (dataset.root / "dataset.json").read_text(encoding="utf-8-sig")),
            ("run.json", json.dumps(record, indent=1)),
        ):
            draft = out / f"{name}.tmp"
            draft.write_text(text, encoding="utf-8")
            draft.rename(out / name)


def refuse_other_config(config: Config, out: Path, dataset: Dataset) -> None:
    """Raises a UserError that names every difference if the run in `out` was started otherwise.

    The data set is the one in the folder: what a fold or `labelled` makes of it, the config says.
    """
    path = out / "run.json"
    old = json.loads(path.read_text())
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


def _clear(out: Path) -> None:
    """Removes what a run writes, and nothing else."""
    for name in ("checkpoints", "validation", "tensorboard"):
        shutil.rmtree(out / name, ignore_errors=True)
    files = ("run.json", "plan.json", "dataset.json", "log.jsonl", "progress.png", "report.html", "postprocessing.json")
    for name in files:
        (out / name).unlink(missing_ok=True)


def _cache_progress(stop: threading.Event):
    last = time.perf_counter()

    def progress(done: int, total: int, case: str) -> None:
        nonlocal last
        _heed(stop)
        if time.perf_counter() - last > 5 or done == total:
            last = time.perf_counter()
            say(f"preprocessing {done}/{total}  {case}")

    return progress


def _heed(stop: threading.Event | None) -> None:
    """Stops before the loop, where what is done (cached cases) is on disk already."""
    if stop is not None and stop.is_set() and jax.process_count() == 1:
        raise Interrupted(stop.signal)  # type: ignore[attr-defined]


@contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Errors of the disk and of lost processes, in words; what was saved before them stays usable."""
    try:
        yield
    except Exception as error:
        if distributed.peer_is_lost(error):
            raise distributed.PeerLost(
                f"Process {jax.process_index()} cannot go on: another of the {jax.process_count()} processes is lost",
                file=out,
                found=f"{type(error).__name__}: {str(error)[:300]}",
                remedy="look at the other processes' messages, then start all of them again: the run resumes",
            ) from error
        if isinstance(error, OSError):
            remedy = "free disk space, or choose another --out; the same command then goes on from the last checkpoint"
            raise UserError.from_os(error, out, remedy) from error
        raise


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Only one run works in a folder; the lock dies with its process."""
    if jax.process_index() != 0:
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                "Another run is working in this folder",
                file=out,
                remedy="wait for it, stop it, or choose another --out",
            ) from None
        yield


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Turns the first SIGTERM or SIGINT into a flag that the loop looks at; a second one ends the process at once."""
    stop = threading.Event()
    stop.signal = 0  # type: ignore[attr-defined]
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    old = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT)}

    def handler(number: int, _) -> None:
        stop.signal = number  # type: ignore[attr-defined]
        stop.set()
        signal.signal(number, signal.SIG_DFL)
        say("stopping: saving the state first (once more to stop at once)")

    for number in old:
        signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)


# ---------------------------------------------------------------- one stage


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


def sample_size(stage: Stage, plan: Plan) -> tuple[int, ...]:
    """Sides of the samples that are read, from which augmentation cuts patches."""
    return stage.augment.sample_size(plan.patch_size, _spacing(plan))


def _spacing(plan: Plan) -> tuple[float, ...]:
    return tuple(s or 1.0 for s in plan.spacing or (1.0,) * 3)[-plan.dim :]


def stage_parts(config: Config, index: int, task: Task, batch: Any) -> tuple[StepParts, int]:
    """What a stage's step is made of, and its number of steps. The batch may be abstract: only shapes count."""
    stage, plan = config.stages[index], task.plan
    steps = stage.steps or plan.steps
    objective = stage.objective.bind(task)
    check_batch(objective, batch)
    params, _ = jax.eval_shape(lambda b: objective.init(jax.random.key(0), b), batch)
    optimizer = make_optimizer(stage.optim, steps, params)
    return StepParts(objective, optimizer, stage, config.ema, _spacing(plan), plan.patch_size), steps


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


def run_stage(setting: Setting, index: int, stage: Stage, previous: Any) -> Any:
    """Trains one stage to its end; returns the (host) params and aux that the next one starts from."""
    config, mesh = setting.config, setting.mesh
    prepared = prepare_stage(config, index, setting.dataset, setting.plan, setting.cache, mesh)
    steps, feed, frozen = prepared.steps, prepared.feed, prepared.frozen
    step_fn = compile_step(prepared.parts, prepared.state, mesh)
    predict_fn = jax.jit(sharding.within(mesh, prepared.parts.objective.predict))

    # ------------------------------------------------------------ resume
    folder = stage_folder(setting.out, index, stage.name)
    last, best = Checkpoints(folder / "last", keep=2), Checkpoints(folder / "best", keep=1)
    found = last.restore(prepared.state)
    if found is None:
        places = jax.tree.map(lambda s: s.sharding, prepared.state)
        state: State = jax.jit(prepared.make_state, out_shardings=places)(*prepared.start)
        if previous is not None:
            state = jax.device_put(transfer(state, previous), places)
        elif config.pretrained:
            weights = from_file(config.pretrained, prepared.parts.objective, state["params"], state["aux"])
            state = jax.device_put(transfer(state, weights), places)
        start = 0
    else:
        start, state = found
        say(f"{stage.name}: resuming from step {start} of {steps}")
    log = setting.log
    log.rewind(stage.name, start, tuple(s.name for s in config.stages[index + 1 :]))

    # ------------------------------------------------------------ loop
    every = config.validate_every or max(steps // 20, 1)
    save_every = config.checkpoint_every or every
    best_dice = _best_so_far(log, stage.name)  # of process 0, whose opinion counts
    if start == 0:
        count = sum(p.size for p in jax.tree.leaves(state["params"]))
        say(
            f"{stage.name}: {count:,} parameters, {steps} steps, patch {setting.plan.patch_size}, {mesh.size} device(s)"
        )
    learning_rate = schedule(stage.optim, steps)
    window, since = [], time.perf_counter()
    log.start(stage.name, start, steps)
    try:
        batches = pipeline.stream(start=start, workers=config.workers, **feed) if start < steps else iter(())
        for step in range(start + 1, steps + 1):
            state, metrics = step_fn(state, frozen, sharding.put_batch(next(batches), mesh))
            window.append(metrics)
            stop = _signal(setting, step)
            if step % config.log_every == 0 or step == steps or stop:
                means = _means(window, setting, feed, step)
                seconds = (time.perf_counter() - since) / len(window)
                log.write("train", step, **means, lr=float(np.asarray(learning_rate(step - 1))), seconds=seconds)
                window, since = [], time.perf_counter()
            if step % every == 0 or step == steps:
                scores = _validate(setting, predict_fn, state, frozen)
                if distributed.from_main(scores.get("dice", -1.0) > best_dice):
                    best_dice = scores.get("dice", best_dice)
                    best.save(step, {"params": prediction_weights(state), "aux": state["aux"]})
                log.write("val", step, **scores, best=max(best_dice, 0.0))
                _draw(setting)
                since = time.perf_counter()
            if step % save_every == 0 or step == steps or stop:
                best.wait()  # else a run killed now would resume after a validation whose weights were never written
                last.save(step, state)
            if stop:
                raise Interrupted(stop)
    finally:
        log.stop()
        best.close()
        last.close()
    return _handover(stage, best, state, setting, index)


def _signal(setting: Setting, step: int) -> int:
    """Number of the signal that asks to stop after this step, else 0.

    Several processes agree, since a checkpoint needs them all, and do so where they wait for the device anyway.
    """
    own = setting.stop.signal if setting.stop.is_set() else 0  # type: ignore[attr-defined]
    if jax.process_count() > 1 and step % setting.config.log_every:
        return 0
    return distributed.largest(own)


def _means(window: list, setting: Setting, feed: dict, step: int) -> dict[str, float]:
    """Means of the logged scalars since the last line; stops the run after too many bad steps in a row."""
    values = jax.device_get(window)
    bad = [int(v["bad"]) for v in values]
    if max(bad) >= setting.config.max_bad_steps:
        at = step - len(bad) + 1 + bad.index(max(bad))
        whole: dict[str, Any] = {**feed, "process": (0, 1)}
        cases = pipeline.batch_at(step=at - 1, **whole)["case"]
        raise UserError(
            f"{max(bad)} steps in a row gave a loss or gradient that is not finite; the weights are from before them",
            found=f"step {at}, cases {', '.join(setting.dataset.cases[i].id for i in cases)}",
            remedy="look at these images (medseg data check), or lower the learning rate (--stages.0.optim.lr)",
        )
    good = [v for v in values if int(v["bad"]) == 0]
    means = {k: float(np.mean([v[k] for v in good])) for k in values[0] if k != "bad"} if good else {}
    return {**means, "skipped": len(values) - len(good)}


def _validate(setting: Setting, predict_fn: Callable, state: State, frozen: Any) -> dict[str, float]:
    """Scores on the validation cases, known to process 0 alone; empty without validation cases."""
    cases = setting.dataset.subset("val", labelled=True)
    if not cases:
        return {}
    aux = {name: value for name, value in state["aux"].items() if name != "cases"}
    weights, aux = _whole(setting, (prediction_weights(state), aux))
    if jax.process_index() != 0:
        return {}
    local = jax.tree.map(lambda x: x.addressable_data(0), (weights, aux, frozen))
    return validate(partial(predict_fn, *local), setting.cache, cases, setting.plan, setting.dataset.labels)


def _whole(setting: Setting, tree: Any) -> Any:
    """A whole copy of every array on every device."""
    whole = sharding.replicated(setting.mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, whole)
    return jax.jit(lambda x: x, out_shardings=whole)(tree)


def _best_so_far(log: Log, stage: str) -> float:
    if not log.path.exists():
        return -1.0
    return max(
        (e["dice"] for e in logs.read(log.path) if e["kind"] == "val" and e["stage"] == stage and "dice" in e),
        default=-1,
    )


def _draw(setting: Setting) -> None:
    if jax.process_index() == 0:
        logs.draw_progress(setting.out / "progress.png", logs.read(setting.log.path))


def _handover(stage: Stage, best: Checkpoints, state: State, setting: Setting, index: int) -> Any:
    """Host copies of (params, aux) for the next stage: the last ones, or the best on validation if it asks for them."""
    following = setting.config.stages[index + 1 : index + 2]
    if not following:
        return None
    weights = {"params": prediction_weights(state), "aux": state["aux"]}
    if following[0].start == "best":
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), weights)
        found = best.restore(like)
        if found is None:
            raise UserError(f"Stage {stage.name} has no best weights to start from", remedy='use start="last"')
        weights = found[1]
    return jax.device_get(_whole(setting, weights))


def from_file(file: str, objective: Objective, params: Any, aux: Any) -> dict[str, Any]:
    """The method's params and aux with the values of a weight file where it has any; abstract ones can be tried too.

    Raises:
        UserError: the file cannot be read, or does not fit the network.
    """
    tensors = read_weights(file)

    def load(net: Network, params: Any, stats: Any) -> tuple[Any, Any]:
        loaded = load_weights(net, params, stats, tensors, file)
        new = f"; new: {', '.join(loaded.stayed[:3])}{' ...' * (len(loaded.stayed) > 3)}" if loaded.stayed else ""
        say(f"{file}: {len(loaded.filled)} of {len(loaded.filled) + len(loaded.stayed)} arrays{new}")
        return loaded.params, loaded.stats

    new_params, new_aux = objective.pretrained(params, aux, load)
    return {"params": new_params, "aux": new_aux}


def transfer(state: State, previous: dict[str, Any]) -> State:
    """A state whose params and aux take every leaf of `previous` that has the same path, shape and type."""
    old = {sharding.path_name(p): x for p, x in jax.tree_util.tree_leaves_with_path(previous)}
    taken = []

    def one(path, leaf):
        name = sharding.path_name(path)
        match = old.get(name)
        if match is None or match.shape != leaf.shape or match.dtype != leaf.dtype:
            return leaf
        taken.append(name)
        return match

    weights = {k: state[k] for k in ("params", "aux")}
    new = jax.tree_util.tree_map_with_path(one, weights)
    if not taken:
        raise UserError(
            "The weights to start from share nothing with this stage", found="no leaf of equal path and shape"
        )
    say(f"taken over: {len(taken)} of {len(jax.tree.leaves(weights))} arrays")
    new_state = {**state, **new}
    if "ema" in state:
        new_state["ema"] = jax.tree.map(np.copy, new["params"])
    return new_state


# ---------------------------------------------------------------- after the loop


def final_scores(out: Path, dataset: Dataset) -> None:
    """Predicts the validation cases with the last and the best weights, scores both in file space; the report.

    Classes that overlap (lesions) get areas under precision-recall and lesion-wise scores too, since Dice alone says
    little of them. Post-processing is chosen on these cases, and where it changes anything, scored beside the
    unprocessed predictions.
    """
    from medseg_jax.evaluation.evaluate import evaluate
    from medseg_jax.evaluation.report import report
    from medseg_jax.inference.predict import predict
    from medseg_jax.training.postprocess import choose_and_score

    if not dataset.subset("val", labelled=True):
        say("no validation cases: no scores (give some a split of val in dataset.json)")
        return
    folders = {checkpoint: out / "validation" / checkpoint for checkpoint in ("last", "best")}
    overlapping = not dataset.labels.exclusive
    for checkpoint, folder in folders.items():
        run = open_run(out, "last" if checkpoint == "last" else "best")
        predict(
            run, dataset, folder, split="val", postprocessing="none", overwrite=True, save_probabilities=overlapping
        )
        evaluate(folder, dataset, folder, lesions=overlapping)
    choose_and_score(out, dataset, folders)
    say(f"report: {report(out)}")

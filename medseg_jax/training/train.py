"""THE loop. Reads from top to bottom: data, state, resume, steps, validation, checkpoints, final scores.

It knows no method by name: what is trained is an `Objective` (methods/objective.py); step.py says what a step does.
A run is a pure function of its config: starting the same command again goes on from the last complete checkpoint and
gives the same bits as if it had never stopped.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from medseg_jax.config import Config, Stage
from medseg_jax.data import pipeline
from medseg_jax.data.cache import Cache, build_cache
from medseg_jax.data.dataset import Dataset, is_dataset
from medseg_jax.data.plan import Plan
from medseg_jax.runtime import distributed, sharding
from medseg_jax.runtime import log as logs
from medseg_jax.runtime.checkpoint import Checkpoints
from medseg_jax.runtime.environment import keep_freed_memory, use_compilation_cache
from medseg_jax.runtime.guards import Interrupted, Stop, explained, heed, locked, signals
from medseg_jax.runtime.log import Log, say
from medseg_jax.runtime.run import open_run, stage_folder
from medseg_jax.training.optim import schedule
from medseg_jax.training.pool import CHECKPOINTS
from medseg_jax.training.prepare import (
    check_stages,
    clear,
    compile_step,
    from_file,
    never_trained,
    open_data,
    open_plan,
    prepare_stage,
    refuse_problems,
    transfer,
    write_run,
)
from medseg_jax.training.step import State, prediction_weights
from medseg_jax.training.validate import validate
from medseg_jax.types import UserError


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
    stop: Stop


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
    with explained(out):
        if is_dataset(out):
            raise UserError(
                "The run's folder is that of a data set, whose dataset.json it would replace",
                file=out,
                remedy=f"give the run a folder of its own: --out runs/{out.name}",
            )
    with explained(out), locked(out):
        with signals() as stop:
            if (fresh or never_trained(out)) and jax.process_index() == 0:
                clear(out)
            distributed.wait_for_all("cleared")
            # ------------------------------------------------------------ data
            whole, dataset = open_data(config)
            if not (out / "run.json").exists():
                refuse_problems(whole, stop)
            plan = open_plan(config, whole if config.labelled is None else dataset, out)
            cache = build_cache(whole, plan, config.cache, progress=_cache_progress(stop))  # all views share it
            mesh = sharding.make_mesh(config.fsdp, config.spatial)
            if len(config.stages) > 1 and not (out / "run.json").exists():
                check_stages(config, dataset, plan, cache, mesh)
            write_run(config, out, whole, dataset, plan)

            # ------------------------------------------------------------ stages
            log = Log(out, config.tensorboard)
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


def _cache_progress(stop: Stop):
    last = time.perf_counter()

    def progress(done: int, total: int, case: str) -> None:
        nonlocal last
        heed(stop)
        if time.perf_counter() - last > 5 or done == total:
            last = time.perf_counter()
            say(f"preprocessing {done}/{total}  {case}")

    return progress


# ---------------------------------------------------------------- one stage


def run_stage(setting: Setting, index: int, stage: Stage, previous: Any) -> Any:
    """Trains one stage to its end; returns the (host) params and aux that the next one starts from."""
    config, mesh = setting.config, setting.mesh
    prepared = prepare_stage(config, index, setting.dataset, setting.plan, setting.cache, mesh)
    steps, feed, frozen = prepared.steps, prepared.feed, prepared.frozen
    step_fn = compile_step(prepared.parts, prepared.state, mesh)
    predict_fn = jax.jit(prepared.parts.objective.predict)  # on one device (`_validate`), hence not within the mesh

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
    log.rewind(stage.name, start)

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
    if start < steps:
        say(f"{stage.name}: compiling the training step, which takes seconds to minutes")
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
    own = setting.stop.signal
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
    folders = {checkpoint: out / "validation" / checkpoint for checkpoint in CHECKPOINTS}
    overlapping = not dataset.labels.exclusive
    for checkpoint in CHECKPOINTS:
        run, folder = open_run(out, checkpoint), folders[checkpoint]
        say(f"predicting the validation cases with the {checkpoint} weights")
        predict(
            run, dataset, folder, split="val", postprocessing="none", overwrite=True, save_probabilities=overlapping
        )
        evaluate(folder, dataset, folder, lesions=overlapping)
    choose_and_score(out, dataset, folders)
    say(f"report: {report(out)}")

"""Know before you rent: what a config needs on hardware that is not here, from that hardware's own compiler.

    config + plan --shapes only--> the very step of `medseg train`, sharded over the chips --XLA--> memory, HLO
    HLO --runtime.hlo--> FLOPs, bytes, collectives --published figures of the chip--> the least time of a step

Nothing is run and nothing is timed: every figure is labelled `LABEL`.

    data      what shapes depend on: of a data set here, a plan, or the user's words
    compiler  asks the other process, which compiles (worker)
    search    rows of a batch, the largest that fits, what to change where none does
    roofline  the least time of a step, and what it costs
"""

import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from medseg_jax import config as configs
from medseg_jax.config import Config
from medseg_jax.runtime import chips
from medseg_jax.runtime.chips import Topology
from medseg_jax.training.preflight.compiler import Asker, Compiler, Say
from medseg_jax.training.preflight.data import DataFacts, know_data
from medseg_jax.training.preflight.roofline import cost, roofline
from medseg_jax.training.preflight.search import largest_batch, needed, step_rows, suggestions

LABEL = "compiled, not timed"


def preflight(
    config: Config | str | Path,
    topology: str,
    *,
    overrides: Sequence[str] = (),
    plan: str | Path | None = None,
    patch_size: Sequence[int] | None = None,
    channels: int | None = None,
    classes: int | None = None,
    overlapping: bool = False,
    cases: int | None = None,
    batch: int | None = None,
    search: bool = True,
    compiles: int = 8,
    patience: float = 900,
    price: float | None = None,
    picture: str | Path | None = None,
    say: Say = lambda text: print(text, file=sys.stderr, flush=True),
) -> dict[str, Any]:
    """Compiles a config's training and prediction steps for a topology that need not be here.

    Args:
        config: a config, or the path of one (.py), of a data set or of a run. One with classes of your own must be a
            path.
        topology: "v5e-256", "v5p-64", "v6e-8", "h100x8", "cpu" ...: see `runtime.chips`.
        overrides: as on the command line of `medseg train`.
        plan: plan.json to use instead of the run's, the config's or the data set's.
        patch_size, channels, classes, overlapping, cases: of data that are not on this disk; they replace the plan's.
            `classes` without the background; `overlapping` for one sigmoid a class.
        batch: rows a step of all chips together; default the config's, or, if these do not divide over the chips, as
            many for each chip.
        search: look for the largest batch that fits.
        compiles: programs compiled at most for the search and for what to change, together.
        patience: seconds that one program may take to compile.
        price: of a chip for an hour, in any currency.
        picture: PNG of the memory to write.
        say: takes lines of progress.

    Returns:
        label, config, topology, chips, chip, memory_per_chip; data (what was assumed of it); stages and prediction,
        each with status, rows, memory, counts, roofline, cost; fits; largest (the search); suggestions; seconds.

    Raises:
        UserError: no such topology, its compiler is not installed, or too little is known of the data.
    """
    target = chips.parse_topology(topology)
    chips.require_wheels(target)
    if picture is not None:
        Path(picture).parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with ExitStack() as stack:
        path = _as_file(config, stack)
        loaded = configs.override(configs.load(path), list(overrides))
        if plan is None and (Path(path) / "run.json").is_file():
            plan = Path(path) / "plan.json"
        options: dict[str, Any] = dict(
            patch_size=patch_size, channels=channels, classes=classes, overlapping=overlapping, cases=cases
        )
        facts = know_data(loaded, target, plan, **options)
        compiler = stack.enter_context(Compiler(target, patience, say))
        ask = Asker(compiler, {"config": str(path), "overrides": list(overrides), **facts.request()})
        found = examine(loaded, target, facts, ask, batch, compiles if search else 0, say)
    result = {
        "label": LABEL,
        "config": str(config) if isinstance(config, str | Path) else "Config",
        "topology": target.name,
        "title": target.title,
        "chips": target.chips,
        "chip": dataclasses.asdict(target.chip) if target.chip else None,
        "memory_per_chip": target.memory,
        "data": facts.describe(),
        **found,
        "seconds": time.perf_counter() - start,
    }
    for part in (*result["stages"], result["prediction"]):
        if part["status"] == "compiled":
            part["roofline"] = roofline(part["counts"], target)
    if price is not None:
        for stage in result["stages"]:
            stage["cost"] = cost(stage, facts.cases, target.chips, price)
    if picture is not None:
        from medseg_jax.evaluation.charts import memory_figure, save_png

        save_png(memory_figure(result), Path(picture))
    return result


def _as_file(config: Config | str | Path, stack: ExitStack) -> Path | str:
    """The config as something that another process can load."""
    if not isinstance(config, Config):
        return config if str(config) in configs.EMBEDDED else Path(config).absolute()
    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "run.json"
    file.write_text(json.dumps({"config": configs.to_json(config)}))
    configs.load(file)  # classes that are not ours are refused here, in words
    return file


def examine(
    config: Config, target: Topology, facts: DataFacts, ask: Asker, batch: int | None, compiles: int, say: Say
) -> dict[str, Any]:
    """Every stage, the prediction, then the largest batch and what to change for the stage that needs most."""
    stages, notes = [], []
    for index, stage in enumerate(config.stages):
        rows, note = step_rows(config, index, facts.plan, target, batch)
        notes += [note] * (note is not None and note not in notes)
        title = f"training step of {stage.name}, {sum(rows)} rows over {target.chips} chip(s)"
        reply = ask("train", index, rows, title)
        stages.append({"stage": stage.name, "rows": list(rows), "rows_per_chip": sum(rows) / target.chips, **reply})
    windows = facts.plan.batch_size
    if any(stage["status"] == "refused" for stage in stages):
        prediction = {"status": "not compiled", "error": "since training is refused", "fits": None}
    else:
        prediction = ask("predict", len(stages) - 1, (windows, 0), f"prediction of {windows} windows on one chip")
    fits = [part["fits"] for part in (*stages, prediction)]
    found: dict[str, Any] = {
        "stages": stages,
        "prediction": {"windows": windows, **prediction},
        "fits": None if None in fits else all(fits),
        "notes": notes,
        "largest": None,
        "suggestions": [],
    }
    known = [i for i, s in enumerate(stages) if s["fits"] is not None]
    if compiles and known:
        worst = max(known, key=lambda i: needed(stages[i]) or math.inf)
        limit = ask.asked + compiles
        try:
            if stages[worst]["fits"] is False:
                for offer in suggestions(config, worst, stages[worst], target, ask, limit - 2):
                    found["suggestions"].append(offer)
            found["largest"] = largest_batch(config, worst, stages[worst], target, ask, limit)
        except KeyboardInterrupt:
            notes.append("the search was stopped; what had been compiled stands here")
    return found

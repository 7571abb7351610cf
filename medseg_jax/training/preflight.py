"""Know before you rent: what a config needs on hardware that is not here, from that hardware's own compiler.

    config + plan --shapes only--> the very step of `medseg train`, sharded over the chips --XLA--> memory, HLO
    HLO --runtime.hlo--> FLOPs, bytes, collectives --published figures of the chip--> the least time of a step

Nothing is run and nothing is timed: every figure is labelled `LABEL`. The roofline is a bound from below: a step takes
at least that long, and by how much longer only the chip itself can tell.
"""

import dataclasses
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from medseg_jax import config as configs
from medseg_jax.config import Config
from medseg_jax.data.cache import target_grid
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.fingerprint import fingerprint
from medseg_jax.data.plan import Plan
from medseg_jax.data.planning import plan_for
from medseg_jax.runtime import chips
from medseg_jax.runtime.chips import Topology
from medseg_jax.types import Labels, UserError

LABEL = "compiled, not timed"

CLOSE = 1 / 16
"""The search for the largest batch ends when it is known to so much of itself."""

type Say = Callable[[str], None]


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
        plan: plan.json to use instead of the config's or the data set's.
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
    start = time.perf_counter()
    with ExitStack() as stack:
        path = _as_file(config, stack)
        loaded = configs.override(configs.load(path), list(overrides))
        options: dict[str, Any] = dict(
            patch_size=patch_size, channels=channels, classes=classes, overlapping=overlapping, cases=cases
        )
        facts = know_data(loaded, target, plan, **options)
        compiler = stack.enter_context(Compiler(target, patience, say))
        ask = _Asker(compiler, {"config": str(path), "overrides": list(overrides), **facts.request()})
        found = _examine(loaded, target, facts, ask, batch, compiles if search else 0, say)
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


# ------------------------------------------------------------------------------------------------ what is known of data


@dataclass(frozen=True)
class DataFacts:
    """All that shapes depend on.

    Attributes:
        extent: smallest and largest side of the preprocessed cases.
        notes: what was assumed, a sentence each.
    """

    plan: Plan
    labels: Labels
    cases: int
    training: int
    domains: tuple[str, ...]
    extent: tuple[tuple[int, ...], tuple[int, ...]]
    notes: tuple[str, ...] = field(default=())

    def request(self) -> dict[str, Any]:
        """For the other process."""
        return {
            "plan": dataclasses.asdict(self.plan),
            "labels": dataclasses.asdict(self.labels),
            "cases": self.cases,
            "domains": self.domains,
            "extent": self.extent,
        }

    def describe(self) -> dict[str, Any]:
        """For the user."""
        return {
            "patch_size": list(self.plan.patch_size),
            "channels": self.plan.channels_seen,
            "classes": list(self.labels.names),
            "training_cases": self.training,
            "notes": list(self.notes),
        }


def know_data(
    config: Config,
    topology: Topology,
    plan: str | Path | None = None,
    *,
    patch_size: Sequence[int] | None = None,
    channels: int | None = None,
    classes: int | None = None,
    overlapping: bool = False,
    cases: int | None = None,
) -> DataFacts:
    """What the data set, a plan, or the user says of the data; data on this disk are looked at, never preprocessed."""
    from medseg_jax.training.prepare import open_data, open_plan

    notes = []
    try:
        whole, dataset = open_data(config)
    except UserError:
        whole = dataset = None
        notes.append(f"{config.data} is not on this disk")
    if plan is not None:
        chosen = Plan.load(plan)
    elif dataset is not None and whole is not None:
        budget = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}[topology.platform]
        chosen = open_plan(config, whole if config.labelled is None else dataset, budget=budget)
    elif config.plan and Path(config.plan).exists():
        chosen = Plan.load(config.plan)
    elif patch_size is not None:
        chosen = plan_for(patch_size, channels or 1, [f"class {i + 1}" for i in range(classes or 1)])
        notes.append(f"a plan made for the patch alone: batches of {chosen.batch_size}, {chosen.steps} steps")
    else:
        raise UserError(
            "Nothing is known of the data",
            file=config.data,
            found="no data set of that name on this disk, and no plan",
            expected="its sizes",
            remedy="--patch-size 256 256 --channels 3 --classes 2, or --plan plan.json, or --data FOLDER",
        )
    chosen = _adapted(chosen, patch_size, channels, classes)
    if dataset is None or classes is not None or overlapping:
        labels = Labels.overlapping(*chosen.classes) if overlapping else Labels.simple(*chosen.classes)
    else:
        labels = dataset.labels
    if dataset is not None and cases is None:
        training = dataset.subset("train", labelled=True) or dataset.subset("train")
        extent = _extent(config, dataset, chosen)
        return DataFacts(chosen, labels, len(dataset.cases), len(training), dataset.domains, extent, tuple(notes))
    if cases is None:
        notes.append("100 training cases are assumed, as large as the patch (--cases)")
    side = (1, *chosen.patch_size)[-3:]
    return DataFacts(chosen, labels, cases or 100, cases or 100, ("",), (side, side), tuple(notes))


def _adapted(plan: Plan, patch_size: Sequence[int] | None, channels: int | None, classes: int | None) -> Plan:
    """The plan with what the user says in place of its own."""
    if patch_size is not None and tuple(patch_size) != plan.patch_size:
        if len(patch_size) != plan.dim:
            raise UserError(
                "The patch does not fit the plan", found=f"{len(patch_size)} sides", expected=f"{plan.dim} of them"
            )
        plan = dataclasses.replace(plan, patch_size=tuple(patch_size))
    if channels is not None and channels != plan.in_channels:
        plan = dataclasses.replace(plan, in_channels=channels, normalization=({"scheme": "none"},) * channels)
    if classes is not None and classes != len(plan.classes):
        plan = dataclasses.replace(plan, classes=tuple(f"class {i + 1}" for i in range(classes)))
    return plan


def _extent(config: Config, dataset: Dataset, plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Smallest and largest side of the cases after resampling; they are read only if a method asks for it."""
    if not any("start" in stage.objective.batch_spec for stage in config.stages):
        side = (1, *plan.patch_size)[-3:]
        return side, side
    seen = fingerprint(dataset)
    grids = [target_grid(tuple(s), tuple(p), plan)[0] for s, p in zip(seen.shapes.tolist(), seen.spacings, strict=True)]
    sides = list(zip(*grids, strict=True))
    return tuple(min(s) for s in sides), tuple(max(s) for s in sides)


# ---------------------------------------------------------------------------------------------------- the other process


class Compiler:
    """The process of `preflight_worker`, started when it is needed and again if it was lost."""

    def __init__(self, topology: Topology, patience: float, say: Say):
        self.topology, self.patience, self.say = topology, patience, say
        self.process: subprocess.Popen | None = None

    def __enter__(self) -> Self:
        self.errors = tempfile.TemporaryFile("w+")
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self.errors.close()

    def ask(self, request: dict[str, Any], what: str) -> dict[str, Any]:
        """A worker's reply; or status "timed out" or "crashed"."""
        if self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None
        assert self.process.stdin is not None
        start = shown = time.perf_counter()
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        self.say(f"{self.topology.name}: compiling {what}")
        while (waited := time.perf_counter() - start) < self.patience:
            try:
                line = self.replies.get(timeout=0.5)
            except queue.Empty:
                if time.perf_counter() - shown > 15:
                    shown = time.perf_counter()
                    self.say(f"{self.topology.name}: ... {waited:.0f} s")
                continue
            if line:
                reply = json.loads(line)
                self.say(f"{self.topology.name}: {what}: {reply['status']} in {waited:.0f} s")
                return reply
            code = self.process.wait()
            self.errors.seek(0)
            tail = self.errors.read()[-1500:]
            self._end()
            return {"status": "crashed", "error": f"the compiler ended with code {code}\n{tail}"}
        self._end()
        return {"status": "timed out", "error": f"no result after {self.patience:.0f} s (--patience)"}

    def _start(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "medseg_jax.training.preflight_worker", self.topology.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            env=os.environ | chips.environment(self.topology) | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        self.replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, args=(self.process, self.replies), daemon=True).start()

    @staticmethod
    def _listen(process: subprocess.Popen, replies: "queue.Queue[str]") -> None:
        assert process.stdout is not None
        for line in process.stdout:
            replies.put(line)
        replies.put("")  # the end

    def _end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            for stream in (self.process.stdin, self.process.stdout):
                if stream is not None:
                    stream.close()
            self.process = None


@dataclass
class _Asker:
    """Requests about one config and topology."""

    compiler: Compiler
    about: dict[str, Any]
    asked: int = 0

    def __call__(
        self, what: str, stage: int, rows: Sequence[int], title: str, change: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        self.asked += 1
        request = {**self.about, "what": what, "stage": stage, "rows": list(rows), "change": change or {}}
        reply = self.compiler.ask(request, title)
        reply["fits"] = _fits(reply, self.compiler.topology)
        return reply


def _fits(reply: dict[str, Any], topology: Topology) -> bool | None:
    """Whether it fits; None where nothing is known, since it did not compile for another reason."""
    if reply["status"] == "compiled":
        return reply["memory"]["total"] <= topology.memory
    return False if reply["status"] == "out of memory" else None


# ----------------------------------------------------------------------------------------------------------- questions


def _examine(
    config: Config, target: Topology, facts: DataFacts, ask: _Asker, batch: int | None, compiles: int, say: Say
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
        worst = max(known, key=lambda i: _needed(stages[i]) or math.inf)
        limit = ask.asked + compiles
        try:
            if stages[worst]["fits"] is False:
                found["suggestions"] = suggestions(config, worst, stages[worst], target, ask, limit - 2)
            found["largest"] = largest_batch(config, worst, stages[worst], target, ask, limit)
        except KeyboardInterrupt:
            notes.append("the search was stopped; what had been compiled stands here")
    return found


def _needed(reply: dict[str, Any]) -> int | None:
    return reply["memory"]["total"] if reply["status"] == "compiled" else reply.get("needed")


def step_rows(
    config: Config, index: int, plan: Plan, target: Topology, batch: int | None
) -> tuple[tuple[int, int], str | None]:
    """(labelled, unlabelled) rows of all chips together, and a note where they are not the config's own.

    Raises:
        UserError: `batch` cannot be shared among the parts of the batch and the chips.
    """
    mix, parts = config.stages[index].mix, parts_of_a_batch(config, target)
    own = (mix.labelled or plan.batch_size, mix.unlabelled)
    if batch is not None:
        rows = tuple(batch * n // sum(own) for n in own)
        if sum(rows) != batch or any(n % parts for n in rows):
            shares = "labelled and unlabelled rows " + " : ".join(map(str, own)) if own[1] else "rows"
            expected = f"{shares}, each a multiple of {parts}"
            raise UserError("The batch cannot be shared", found=f"{batch} rows", expected=expected)
        return (rows[0], rows[1]), None
    if any(n % parts for n in own):
        sharing = "chips" if config.spatial == 1 else f"groups of {config.spatial} chips"
        note = (
            f"The config's {sum(own)} rows do not divide over {parts} {sharing} and medseg train would refuse them; "
            f"these figures are of {sum(own) * parts} rows together: set "
            + (f"stages.{index}.mix" if mix.labelled else "batch_size in plan.json")
        )
        return (own[0] * parts, own[1] * parts), note
    return own, None


def parts_of_a_batch(config: Config, target: Topology) -> int:
    """Chips, or groups of chips that share their samples (`spatial`), among which the rows of a batch are divided.

    Raises:
        UserError: the chips cannot form such groups.
    """
    if target.chips % config.spatial:
        raise UserError(
            "spatial does not divide the chips",
            found=f"spatial={config.spatial}, {target.chips} chip(s)",
            remedy=f"choose a topology of a multiple of {config.spatial} chips, or override it: --spatial 1",
        )
    return target.chips // config.spatial


def largest_batch(
    config: Config, index: int, first: dict[str, Any], target: Topology, ask: _Asker, limit: int
) -> dict[str, Any] | None:
    """The most rows a chip that fit. Memory grows nearly linearly with them, so that a line through what has been
    compiled says where to look next; between what fits and what does not it bisects when the line is of no use.

    Returns:
        rows, rows_per_chip, memory of the largest batch that was compiled and fits; known_to (a share), and `compiles`.
        None if none fits.
    """
    parts = parts_of_a_batch(config, target)
    labelled, unlabelled = (n // parts for n in first["rows"])
    unit = math.gcd(labelled, unlabelled)
    # Methods that mix pairs of rows want even numbers, and accumulation wants equal parts.
    step = math.lcm(2 if unit % 2 == 0 else 1, config.stages[index].optim.accumulate)
    seen = {unit: first}
    start = ask.asked

    def fitting() -> list[int]:
        return [k for k, reply in seen.items() if reply["fits"]]

    def too_large() -> list[int]:
        return [k for k, reply in seen.items() if not reply["fits"]]

    while ask.asked < limit:
        low, high = max(fitting(), default=0), min(too_large(), default=None)
        if high is not None and high - low <= max(step, CLOSE * low):
            break
        guess = _next_guess(seen, low, high, step, target.memory)
        rows = [n // unit * guess * parts for n in (labelled, unlabelled)]
        title = f"training step of {config.stages[index].name}, {sum(rows) / target.chips:g} rows a chip"
        seen[guess] = ask("train", index, rows, title)
    low, high = max(fitting(), default=0), min(too_large(), default=None)
    if not low:
        return None
    rows = [n // unit * low * parts for n in (labelled, unlabelled)]
    return {
        "stage": config.stages[index].name,
        "rows": rows,
        "rows_per_chip": sum(rows) / target.chips,
        "memory": seen[low]["memory"]["total"],
        "known_to": None if high is None else (high - step) / low - 1,
        "compiles": ask.asked - start,
    }


def _next_guess(seen: dict[int, dict[str, Any]], low: int, high: int | None, step: int, capacity: int) -> int:
    """A multiple of `step` above `low` and below `high`."""
    points = sorted((k, size) for k, reply in seen.items() if (size := _needed(reply)))
    reply = seen[low] if low else None
    if len(points) == 1 and reply is not None:  # what does not depend on the batch is the state
        held = reply["memory"]["held"]
        points.insert(0, (0, reply["memory"]["arguments"] - held.get("batch", 0)))
    guess = 0
    if len(points) > 1:
        (k0, m0), (k1, m1) = points[-2:]
        guess = int(0.99 * (k0 + (capacity - m0) * (k1 - k0) / (m1 - m0))) if m1 > m0 else 0
    guess = guess // step * step
    if high is None:
        beyond = low + max(step, int(CLOSE * low) // step * step)  # if this does not fit, the search is over
        return min(guess if guess > low else beyond, 8 * max(low, step))
    if low < guess < high:
        return guess
    return max((low + high) // 2 // step * step, low + step) if low else max(high // 2 // step * step, step)


CHANGES: tuple[tuple[dict[str, Any], str], ...] = (
    ({"remat": True}, "remat: activations are computed again in the backward pass, about a third more time"),
    ({"dtype": "bfloat16"}, "bfloat16: half the activations, faster on most chips"),
    ({"accumulate": 2}, "accumulation: the batch in 2 parts, one after the other"),
    ({"accumulate": 4}, "accumulation: the batch in 4 parts, one after the other"),
)


def suggestions(
    config: Config, index: int, first: dict[str, Any], target: Topology, ask: _Asker, limit: int
) -> list[dict[str, Any]]:
    """What could be changed, with the memory that it gives; tested as far as `limit` allows, cheapest first."""
    offers = list(CHANGES)
    if target.chips > 1:
        offers.append(({"fsdp": target.chips}, f"fsdp: parameters and optimiser split over {target.chips} chips"))
    if target.chips % 2 == 0 and config.spatial == 1:
        offers.append(({"spatial": 2}, "spatial: each sample cut along its longest side, shared by 2 chips"))
    rows, out = first["rows"], []
    for change, words in offers:
        if any(n % (change.get("accumulate", 1) * parts_of_a_batch(config, target)) for n in rows):
            continue
        offer = {"change": change, "words": words, "how": how_to(change, index, config)}
        if ask.asked >= limit:
            out.append({**offer, "status": "not tested", "fits": None, "memory": None})
            continue
        reply = ask("train", index, rows, f"it with {words.partition(':')[0]}", change)
        if reply["status"] == "refused" and "has no option" in reply["error"]:
            continue
        out.append({**offer, "status": reply["status"], "fits": reply["fits"], "memory": _needed(reply)})
    return out


def how_to(change: dict[str, Any], index: int, config: Config) -> str:
    """What to write for a change."""
    stage, objective = f"--stages.{index}", config.stages[index].objective
    nets = [f.name for f in dataclasses.fields(objective) if hasattr(getattr(objective, f.name), "remat")]
    net = f"{stage}.objective.{nets[0] if nets else 'net'}"
    key, value = next(iter(change.items()))
    return {
        "remat": f"{net}.remat",
        "dtype": f"{net}.dtype {value}",
        "accumulate": f"{stage}.optim.accumulate {value}",
        "spatial": f"--spatial {value}",
        "fsdp": f'Config(fsdp={value}, rules=(Rule("^(params|opt|ema)/", "fsdp"),))',
    }[key]


# ---------------------------------------------------------------------------------------------------------- arithmetic


def roofline(counts: dict[str, Any], target: Topology) -> dict[str, Any] | None:
    """The least time of a step, and what sets it; None for a CPU, of which no figures are known.

    Each of four parts works at its published rate and all at once: matrix units, vector units (elementwise operations
    and what hand-written kernels declare), main memory, and the links between the chips. The slowest one binds.
    Efficiency is pessimistic: the links work while all else waits.
    """
    chip = target.chip
    if chip is None:
        return None
    slowest = min(chip.flops.values())
    seconds = {
        "matrix units": sum(n / chip.flops.get(kind, slowest) for kind, n in counts["matmul_by_dtype"].items()),
        "HBM": counts["bytes"] / chip.bandwidth,
    }
    if chip.vector_flops:
        seconds["vector units"] = (counts["vector_flops"] + counts["kernel_flops"]) / chip.vector_flops
    alone = max(seconds.values())
    wire = sum(c["wire_bytes"] for c in counts["collectives"].values())
    seconds["interconnect"] = wire / target.interconnect if target.interconnect else 0.0
    binds = max(seconds, key=lambda k: seconds[k])
    return {
        "seconds": seconds,
        "step": seconds[binds],
        "binds": binds,
        "efficiency": alone / (alone + seconds["interconnect"]) if alone else None,
    }


def cost(stage: dict[str, Any], cases: int, chip_count: int, price: float) -> dict[str, float] | None:
    """What an epoch (every labelled case once) and the whole stage cost at least."""
    if not stage.get("roofline"):
        return None
    a_step = stage["roofline"]["step"] * chip_count * price / 3600
    return {"price": price, "epoch": a_step * math.ceil(cases / stage["rows"][0]), "stage": a_step * stage["steps"]}

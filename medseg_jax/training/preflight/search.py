"""Rows of a batch, the most that fit on the chips, and what to change where none do."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from medseg_jax.config import Config, Rule
from medseg_jax.data.plan import Plan
from medseg_jax.runtime.chips import Topology
from medseg_jax.training.preflight.compiler import Asker
from medseg_jax.types import UserError

CLOSE = 1 / 16
"""The search for the largest batch ends when it is known to so much of itself."""


def step_rows(
    config: Config, index: int, plan: Plan, target: Topology, batch: int | None
) -> tuple[tuple[int, int], str | None]:
    """(labelled, unlabelled) rows of all chips together, and a note where they are not the config's own.

    Raises:
        UserError: `batch` cannot be shared among the parts of the batch and the chips.
    """
    mix, parts = config.stages[index].mix, parts_of_a_batch(config, target)
    own = mix.rows(plan)
    if batch is not None:
        rows = tuple(batch * n // sum(own) for n in own)
        if batch < 1 or sum(rows) != batch or any(n % parts for n in rows):
            shares = "labelled and unlabelled rows " + " : ".join(map(str, own)) if own[1] else "rows"
            expected = f"{shares}, each a multiple of {parts}"
            raise UserError("The batch cannot be shared", found=f"{batch} rows", expected=expected)
        return (rows[0], rows[1]), None
    if any(n % parts for n in own):
        sharing = "chips" if config.spatial == 1 else f"groups of {config.spatial} chips"
        note = (
            f"The config's {sum(own)} rows do not divide over {parts} {sharing} and medseg train would refuse them; "
            f"these figures are of {sum(own) * parts} rows together: set "
            + ("batch_size in plan.json" if mix.labelled is None else f"stages.{index}.mix")
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
    config: Config, index: int, first: dict[str, Any], target: Topology, ask: Asker, limit: int
) -> dict[str, Any] | None:
    """The most rows a chip that fit. Memory grows nearly linearly with them, so that a line through what has been
    compiled says where to look next; between what fits and what does not it bisects when the line is of no use.

    Returns:
        rows, rows_per_chip, memory of the largest batch that was compiled and fits; known_to (a share), `compiles`, and
        ended: what became of a program that neither fits nor does not (timed out, crashed, refused; stopped by
        Ctrl-C). None if none fits.
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
        return [k for k, reply in seen.items() if reply["fits"] is False]

    while ask.asked < limit and all(reply["fits"] is not None for reply in seen.values()):
        low, high = max(fitting(), default=0), min(too_large(), default=None)
        if high is not None and high - low <= max(step, CLOSE * low):
            break
        guess = _next_guess(seen, low, high, step, target.memory)
        rows = [n // unit * guess * parts for n in (labelled, unlabelled)]
        title = f"training step of {config.stages[index].name}, {sum(rows) / target.chips:g} rows a chip"
        try:
            seen[guess] = ask("train", index, rows, title)
        except KeyboardInterrupt:
            seen[guess] = {"status": "stopped", "fits": None}
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
        "ended": next((reply["status"] for reply in seen.values() if reply["fits"] is None), None),
    }


def _next_guess(seen: dict[int, dict[str, Any]], low: int, high: int | None, step: int, capacity: int) -> int:
    """A multiple of `step` above `low` and below `high`."""
    points = sorted((k, size) for k, reply in seen.items() if (size := needed(reply)))
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


def suggestions(
    config: Config, index: int, first: dict[str, Any], target: Topology, ask: Asker, limit: int
) -> Iterator[dict[str, Any]]:
    """What could be changed, with the memory that it gives; tested as far as `limit` allows, cheapest first."""
    chips, parts = parts_of_a_batch(config, target), config.stages[index].optim.accumulate
    offers: list[tuple[dict[str, Any], str]] = [
        ({"remat": True}, "remat: activations are computed again in the backward pass, about a third more time"),
        ({"dtype": "bfloat16"}, "bfloat16: half the activations, faster on most chips"),
        *(
            ({"accumulate": n}, f"accumulation: the batch in {n} parts, one after the other")
            for n in (2 * parts, 4 * parts)
        ),
    ]
    if chips > config.fsdp:
        offers.append(({"fsdp": chips}, f"fsdp: parameters and optimiser split over {chips} chips"))
    if config.spatial == 1 and chips % (2 * config.fsdp) == 0:
        offers.append(({"spatial": 2}, "spatial: each sample cut along its longest side, shared by 2 chips"))
    rows = first["rows"]
    for change, words in offers:
        if any(n % (change.get("accumulate", 1) * chips) for n in rows):
            continue
        try:
            if changed(config, index, change) == config:
                continue
        except UserError:  # the network has no such option
            continue
        offer = {"change": change, "words": words, "how": how_to(change, index, config)}
        if ask.asked >= limit:
            yield {**offer, "status": "not tested", "fits": None, "memory": None}
            continue
        reply = ask("train", index, rows, f"it with {words.partition(':')[0]}", change)
        yield {**offer, "status": reply["status"], "fits": reply["fits"], "memory": needed(reply)}


def changed(config: Config, index: int, change: dict[str, Any]) -> Config:
    """The config with one of: remat=True, dtype="bfloat16", accumulate=n, fsdp=n, spatial=n.

    Raises:
        UserError: the network has no such option.
    """
    stage = config.stages[index]
    for name in ("remat", "dtype"):
        if name in change:
            nets = [
                f.name for f in dataclasses.fields(stage.objective) if hasattr(getattr(stage.objective, f.name), name)
            ]
            if not nets:
                raise UserError(f"This network has no option {name}")
            new = {n: dataclasses.replace(getattr(stage.objective, n), **{name: change[name]}) for n in nets}
            stage = dataclasses.replace(stage, objective=dataclasses.replace(stage.objective, **new))
    if "accumulate" in change:
        stage = dataclasses.replace(stage, optim=dataclasses.replace(stage.optim, accumulate=change["accumulate"]))
    if "fsdp" in change:
        rules = (*config.rules, Rule(r"^(params|opt|ema)/", "fsdp"))
        config = dataclasses.replace(config, fsdp=change["fsdp"], rules=rules)
    if "spatial" in change:
        config = dataclasses.replace(config, spatial=change["spatial"])
    return dataclasses.replace(config, stages=(*config.stages[:index], stage, *config.stages[index + 1 :]))


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


def needed(reply: dict[str, Any]) -> int | None:
    """Bytes a chip, also of a program that does not fit, if the compiler says."""
    return reply["memory"]["total"] if reply["status"] == "compiled" else reply.get("needed")

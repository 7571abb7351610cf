"""From counts of a compiled program and the chip's published figures: the least time of a step, and its price.

A bound from below: a step takes at least that long, and by how much longer only the chip itself can tell.
"""

import math
from typing import Any

from medseg_jax.runtime.chips import Topology


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

"""The process that compiles for `preflight`: for one topology, one request a line of JSON, one reply a line.

It is a process of its own because a platform is chosen before JAX is imported, and because a compiler that takes too
long or crashes must not take the user's session with it. What it compiles are the functions that train and predict
(`train.compile_step`, `Objective.predict`), with shapes in place of arrays.

    python -m medseg_jax.training.preflight.worker TOPOLOGY
"""

import dataclasses
import json
import os
import re
import sys
import time
from math import prod
from typing import Any

from medseg_jax import config as configs
from medseg_jax.config import Config
from medseg_jax.data.pipeline import batch_shapes
from medseg_jax.data.plan import Plan
from medseg_jax.methods.objective import Task
from medseg_jax.runtime import chips, hlo
from medseg_jax.training.preflight.search import changed
from medseg_jax.types import Labels, UserError


def main() -> None:
    """Answers requests until its input ends."""
    topology = chips.parse_topology(sys.argv[1])
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what compilers print is no reply
    for line in sys.stdin:
        print(json.dumps(answer(topology, json.loads(line))), file=replies, flush=True)


def answer(topology: chips.Topology, request: dict[str, Any]) -> dict[str, Any]:
    """What compiling a request gives.

    Args:
        request: config (path), overrides, plan, labels, cases, domains, extent; stage (index); what: "train" or
            "predict"; rows: (labelled, unlabelled) of all chips together; change: see `search.changed`.

    Returns:
        status: "compiled", with `memory` (bytes a chip), `counts` (of one chip and step) and more; "out of memory",
        with the bytes that the compiler says it needs, if it does; or "refused", with the reason.
    """
    import jax

    start = time.perf_counter()
    try:
        build = _training if request["what"] == "train" else _prediction
        program, held, facts = build(topology, request)
    except (UserError, ValueError, TypeError, NotImplementedError) as error:
        return {"status": "refused", "error": str(error)[:2000]}
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text and "Ran out of memory" not in text:
            return {"status": "refused", "error": text[:2000]}
        return {"status": "out of memory", "needed": needed_bytes(text), "error": text[:600]}
    return {
        "status": "compiled",
        "seconds": time.perf_counter() - start,
        "memory": memory(program, held),
        "counts": counts(program, topology),
        **facts,
    }


def needed_bytes(text: str) -> int | None:
    """Bytes that a TPU's compiler says a program would use, of its message."""
    found = re.search(r"Used ([\d.]+)([KMGT]?) of", text)
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2] or " ")) if found else None


# ----------------------------------------------------------------------------------------------------------- programs


def _task(request: dict[str, Any], index: int, config: Config) -> Task:
    from medseg_jax.training.prepare import sample_size

    plan = Plan.from_dict(request["plan"])
    labels = Labels(**{k: _tuples(v) for k, v in request["labels"].items()})
    extent = _tuples(request["extent"])
    task = Task(plan, labels, plan.channels_seen, request["cases"], tuple(request["domains"]))
    if "start" in config.stages[index].objective.batch_spec:
        task = dataclasses.replace(task, extent=extent, sample_size=sample_size(config.stages[index], plan))
    return task


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _training(topology: chips.Topology, request: dict[str, Any]) -> tuple[Any, dict[str, int], dict[str, Any]]:
    """(compiled step, bytes of what a chip holds, facts)."""
    import jax

    from medseg_jax.runtime import sharding
    from medseg_jax.training.prepare import abstract_state, compile_step, sample_size, stage_parts

    index, rows = request["stage"], tuple(request["rows"])
    config = configs.override(configs.load(request["config"]), request["overrides"])
    config = changed(config, index, request["change"])
    mesh = sharding.make_mesh(config.fsdp, config.spatial, chips.devices(topology))
    task = _task(request, index, config)
    shapes = batch_shapes(task.plan, sample_size(config.stages[index], task.plan), rows)
    multiple = sharding.rows_at_once(mesh)
    if odd := [n for n in rows if n % multiple]:
        raise UserError(
            "The batch does not divide over the devices", found=f"{odd[0]} rows", expected=f"a multiple of {multiple}"
        )
    rows_over_mesh = sharding.batch_sharding(mesh)
    batch = {k: jax.ShapeDtypeStruct(*shape, sharding=rows_over_mesh) for k, shape in shapes.items()}
    plain = {k: jax.ShapeDtypeStruct(*shape) for k, shape in shapes.items()}
    parts, steps = stage_parts(config, index, task, plain)
    state = abstract_state(parts, (plain, 0), config, mesh)
    whole = sharding.replicated(mesh)
    frozen = jax.eval_shape(parts.objective.frozen)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), frozen)
    program = compile_step(parts, state, mesh).lower(state, frozen, batch).compile()
    held = {name: _bytes(state.get(name)) for name in ("params", "opt", "aux", "ema")}
    held |= {"frozen": _bytes(frozen), "batch": _bytes(batch)}
    parameters = sum(p.size for p in jax.tree.leaves(state["params"]))
    return program, held, {"parameters": parameters, "steps": steps, "objective": type(parts.objective).__name__}


def _prediction(topology: chips.Topology, request: dict[str, Any]) -> tuple[Any, dict[str, int], dict[str, Any]]:
    """As `_training`, for one batch of windows on one chip."""
    import jax
    import jax.numpy as jnp

    from medseg_jax.runtime import sharding
    from medseg_jax.training.prepare import sample_size, stage_parts
    from medseg_jax.training.step import init_state

    index, rows = request["stage"], request["rows"][0]
    config = changed(configs.override(configs.load(request["config"]), request["overrides"]), index, request["change"])
    mesh = sharding.make_mesh(devices=chips.devices(topology)[:1])
    task = _task(request, index, config)
    mix = config.stages[index].mix
    shapes = batch_shapes(task.plan, sample_size(config.stages[index], task.plan), (2, 2 if mix.unlabelled else 0))
    plain = {k: jax.ShapeDtypeStruct(*shape) for k, shape in shapes.items()}
    parts, _ = stage_parts(config, index, task, plain)
    state = jax.eval_shape(lambda b: init_state(parts, b, 0), plain)
    aux = {name: value for name, value in state["aux"].items() if name != "cases"}
    given = (state["params"], aux, jax.eval_shape(parts.objective.frozen))
    image = jax.ShapeDtypeStruct((rows, *task.plan.patch_size, task.plan.channels_seen), jnp.float32)
    whole = sharding.replicated(mesh)
    placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), (*given, image))
    program = jax.jit(sharding.within(mesh, parts.objective.predict)).lower(*placed).compile()
    held = {"params": _bytes(placed[0]), "aux": _bytes(placed[1]), "frozen": _bytes(placed[2]), "batch": _bytes(image)}
    return program, held, {"windows": rows}


def _bytes(tree: Any) -> int:
    """Bytes on one device."""
    import jax

    def one(x: Any) -> int:
        shape = x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) is not None else x.shape
        return prod(shape) * x.dtype.itemsize

    return sum(one(x) for x in jax.tree.leaves(tree))


# ------------------------------------------------------------------------------------------------------------ figures


def memory(program: Any, held: dict[str, int]) -> dict[str, Any]:
    """Bytes on one chip: what goes in (also by name), what comes out beside it, what is needed meanwhile."""
    found = program.memory_analysis()
    arguments, temporary = found.argument_size_in_bytes, found.temp_size_in_bytes
    outputs = max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
    code = found.generated_code_size_in_bytes
    return {
        "arguments": int(arguments),
        "outputs": int(outputs),
        "temporaries": int(temporary),
        "program": int(code),
        "total": int(arguments + outputs + temporary + code),
        "held": {name: int(size) for name, size in held.items() if size},
    }


def counts(program: Any, topology: chips.Topology) -> dict[str, Any]:
    """What one chip does in one step: see `runtime.hlo`; beside it XLA's own sums, which count a loop's body once."""
    found = hlo.count(program.as_text(), topology.chips)
    cost = program.cost_analysis() or {}
    return {
        **{k: v for k, v in dataclasses.asdict(found).items() if k != "collectives"},
        "collectives": {
            kind: {"count": int(n), "bytes": size, "wire_bytes": wire}
            for kind, (n, size, wire) in found.collectives.items()
        },
        "xla": {name: cost.get(key) for name, key in (("flops", "flops"), ("bytes", "bytes accessed"))},
    }


if __name__ == "__main__":
    main()

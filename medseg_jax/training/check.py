"""The dry run before training: does the config fit the data, what will be trained, how much memory does a step take?"""

from typing import Any

import jax
import numpy as np

from medseg_jax.config import Config
from medseg_jax.data.cache import build_cache
from medseg_jax.runtime import sharding
from medseg_jax.runtime.environment import use_compilation_cache
from medseg_jax.training.optim import assign_groups
from medseg_jax.training.prepare import (
    check_stages,
    compile_step,
    from_file,
    open_data,
    open_plan,
    prepare_stage,
    refuse_problems,
)


def dry_run(config: Config) -> list[dict[str, Any]]:
    """Draws one batch of every stage and compiles its step, without training.

    Returns:
        For each stage: name, objective, steps, batch (shape, type, range of each field), parameters, groups (path,
        shape and optimiser group of every parameter), memory in bytes (state, batch, temporaries, step), flops a step.

    Raises:
        UserError: whatever would stop the training: damaged data, missing fields, wrong shapes, idle patterns.
    """
    use_compilation_cache()
    whole, dataset = open_data(config)
    refuse_problems(whole)
    plan = open_plan(config, whole if config.labelled is None else dataset)
    cache = build_cache(whole, plan, config.cache)
    mesh = sharding.make_mesh(config.fsdp, config.spatial)
    if len(config.stages) > 1:
        check_stages(config, dataset, plan, cache, mesh)
    return [_dry_stage(config, index, dataset, plan, cache, mesh) for index in range(len(config.stages))]


def _dry_stage(config: Config, index: int, dataset, plan, cache, mesh) -> dict[str, Any]:
    stage = config.stages[index]
    prepared = prepare_stage(config, index, dataset, plan, cache, mesh)
    if config.pretrained and index == 0:
        from_file(config.pretrained, prepared.parts.objective, prepared.state["params"], prepared.state["aux"])
    batch = sharding.put_batch(prepared.first, mesh)
    compiled = (
        compile_step(prepared.parts, prepared.state, mesh).lower(prepared.state, prepared.frozen, batch).compile()
    )
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    params = prepared.state["params"]
    groups = jax.tree_util.tree_leaves_with_path(assign_groups(params, stage.optim.groups))
    rows = [
        {
            "path": sharding.path_name(path),
            "shape": list(leaf.shape),
            "lr": group.lr,
            "weight_decay": group.weight_decay,
        }
        for (path, leaf), (_, group) in zip(jax.tree_util.tree_leaves_with_path(params), groups, strict=True)
    ]
    return {
        "stage": stage.name,
        "objective": type(stage.objective).__name__,
        "steps": prepared.steps,
        "batch": {name: _describe(np.asarray(value)) for name, value in prepared.first.items()},
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "groups": rows,
        "memory": {
            "state": sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(prepared.state)),
            "batch": sum(np.asarray(v).nbytes for v in prepared.first.values()),
            "temporaries": int(memory.temp_size_in_bytes),
            "step": int(memory.temp_size_in_bytes + memory.argument_size_in_bytes + memory.output_size_in_bytes)
            - int(memory.alias_size_in_bytes),
        },
        "flops": float(cost.get("flops", float("nan"))),
    }


def _describe(array: np.ndarray) -> dict[str, Any]:
    return {"shape": list(array.shape), "dtype": str(array.dtype), "min": float(array.min()), "max": float(array.max())}

"""What a config's training step needs on a TPU, from the TPU compiler and without a TPU: compiled, not timed.

    python benchmarks/compiled_step.py CONFIG --image 256 256 --channels 3 --classes 2 --batch 8 [--target v5e]
                                       [--scan pallas_tpu] [--remat]

Prints JSON: memory of one device in GB (state, which is updated in place; temporary; their sum), TFLOP and GB moved, as
XLA counts them (its count leaves out the inside of kernels), the numbers of kernel calls. Needs the `libtpu` wheel.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from medseg_jax.runtime import chips

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--image", type=int, nargs="+", default=(256, 256))
    parser.add_argument("--channels", type=int, default=3)
    parser.add_argument("--classes", type=int, default=2, help="without the background")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--target", choices=TOPOLOGIES, default="v5e")
    parser.add_argument("--scan", default="pallas_tpu", help="backend of the selective scan")
    parser.add_argument("--remat", action="store_true")
    args = parser.parse_args()
    os.environ |= chips.environment(chips.parse_topology("v5e-4"))  # the same for every TPU
    print(json.dumps({"target": args.target, "batch": args.batch, **compiled(args)}, indent=1))


def compiled(args: argparse.Namespace) -> dict[str, Any]:
    """The figures of one device that holds the whole batch."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import SingleDeviceSharding

    from medseg_jax.config import load
    from medseg_jax.training.optim import make_optimizer
    from medseg_jax.training.step import StepParts, init_state, make_step

    stage = load(args.config).stages[0]
    net = stage.objective.net  # type: ignore[attr-defined]
    options = {"scan_backend": args.scan, "remat": args.remat}
    net = dataclasses.replace(net, **{k: v for k, v in options.items() if hasattr(net, k)})
    bound = dataclasses.replace(stage.objective, net=net).bind(task(args))  # type: ignore[call-arg]

    size = tuple(args.image)
    batch = {
        "image": jax.ShapeDtypeStruct((args.batch, *size, args.channels), jnp.float32),
        "label": jax.ShapeDtypeStruct((args.batch, *size), jnp.int32),
        "case": jax.ShapeDtypeStruct((args.batch,), jnp.int32),
        "domain": jax.ShapeDtypeStruct((args.batch,), jnp.int32),
    }
    params, _ = jax.eval_shape(lambda: bound.init(jax.random.key(0), batch))
    parts = StepParts(bound, make_optimizer(stage.optim, 1000, params), stage, 0.0, (1.0,) * len(size), size)
    state = jax.eval_shape(lambda: init_state(parts, batch))
    device = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[args.target]).devices[0]
    place = SingleDeviceSharding(device)
    state, batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), (state, batch))
    program = jax.jit(make_step(parts), donate_argnums=0).lower(state, {}, batch).compile()

    memory, cost, text = program.memory_analysis(), program.cost_analysis(), program.as_text()
    assert memory is not None
    assert cost is not None
    assert text is not None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "parameters": sum(p.size for p in jax.tree.leaves(params)),
        "state_and_batch_GB": held / 1e9,
        "temporary_GB": memory.temp_size_in_bytes / 1e9,
        "together_GB": (held + memory.temp_size_in_bytes) / 1e9,
        "TFLOP": cost["flops"] / 1e12,
        "GB_moved": cost["bytes accessed"] / 1e9,
        "kernel_calls": text.count('custom_call_target="tpu_custom_call"'),
    }


def task(args: argparse.Namespace) -> Any:
    """A task of this size; nothing of it is data."""
    from medseg_jax.data.plan import Plan
    from medseg_jax.methods.objective import Task
    from medseg_jax.types import Labels

    names = tuple(f"class {i + 1}" for i in range(args.classes))
    dim = len(args.image)
    plan = Plan(
        dim=dim, spacing=None, patch_size=tuple(args.image), batch_size=args.batch, crop_nonzero=False, steps=1000,
        normalization=({"scheme": "none"},) * args.channels, features=(32, 64), classes=names,
        strides=((1,) * dim, (2,) * dim), kernel_sizes=((3,) * dim,) * 2, in_channels=args.channels,
    )  # fmt: skip
    return Task(plan, Labels.simple(*names), args.channels)


if __name__ == "__main__":
    main()

"""medseg check CONFIG [--json]"""

import json
import math
from typing import Any

from medseg_jax.cli import Parser


def main(argv: list[str]) -> int:
    """Dry run."""
    parser = Parser(
        "medseg check",
        description="Dry run: reads the data, draws one batch of each stage, compiles the step; trains nothing.",
        epilog="Fields of the config can be overridden as in medseg train.",
    )
    parser.add_argument("config", metavar="CONFIG", help="config .py, data set folder, or run folder")
    parser.add_argument("--parameters", action="store_true", help="list every parameter, not only how they are treated")
    parser.add_argument("--json", action="store_true", help="machine-readable")
    args, rest = parser.parse_known_args(argv)
    parser.mind(rest)

    from medseg_jax import config as configs
    from medseg_jax.training.check import dry_run

    found = dry_run(configs.override(configs.load(args.config), rest, f"medseg check {args.config}"))
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for stage in found:
        print(
            f"stage {stage['stage']}: {stage['objective']}, {stage['steps']} steps, {stage['parameters']:,} parameters"
        )
        for name, field in stage["batch"].items():
            print(f"  {name:12s} {field['dtype']} {field['shape']}  from {field['min']:.4g} to {field['max']:.4g}")
        for (lr, decay), rows in _treated_alike(stage["groups"]).items():
            size = sum(math.prod(row["shape"]) for row in rows)
            print(f"  lr x{lr:g}, weight decay x{decay:g}: {len(rows)} tensors, {size:,} parameters")
            for row in rows if args.parameters else ():
                print(f"    {row['path']:60s} {row['shape']}")
        memory = "  ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in stage["memory"].items())
        print(f"  memory: {memory}")
        print(f"  {stage['flops'] / 1e9:.1f} GFLOP a step (compiled, not timed)")
    print("fine: medseg train would start")
    return 0


def _treated_alike(rows: list[dict[str, Any]]) -> dict[tuple[float, float], list[dict[str, Any]]]:
    """(factor of the learning rate, of the weight decay) -> parameters."""
    groups: dict[tuple[float, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["lr"], row["weight_decay"]), []).append(row)
    return groups

"""How long the networks of the study of small networks take: which U-Net is one "of equal time"?

    python benchmarks/small_networks_step.py [--batch 4] [--rounds 9]

The whole training step without augmentation, and the prediction of one image, in turns. Writes
benchmarks/results/small_networks_step.json; its ratios are to Med-2D SegNet.
"""

import argparse
import json
import os
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
from steps import Step, in_turns

from medseg_jax import Augment, Labels
from medseg_jax.config import load
from medseg_jax.data.plan import Plan
from medseg_jax.methods.objective import Task

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent / "configs" / "small_networks"
NETWORKS = ("med2d_segnet", "unet_params", "unet_time")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    plan = Plan.load(CONFIGS / "polyp_96.plan.json")
    shape, rng = (args.batch, *plan.patch_size), np.random.default_rng(0)
    image, label = rng.normal(size=(*shape, 3)).astype(np.float32), rng.integers(0, 2, shape).astype(np.int32)
    task = Task(plan, Labels.simple("polyp"), 3)
    steps = {}
    for name in NETWORKS:
        config = load(CONFIGS / f"{name}.py")
        stage = replace(config.stages[0], augment=Augment.none())
        steps[name] = Step(stage, task, {"image": image, "label": label}, plan.patch_size, config.ema)
    found = in_turns(steps, args.rounds)
    latency = in_turns({name: step.prediction() for name, step in steps.items()}, 10 * args.rounds)
    base = found[NETWORKS[0]]
    rows = [
        {
            "name": name,
            "parameters": steps[name].parameters,
            **seconds,
            "ratio": seconds["seconds"] / base["seconds"],
            "ratio_of_medians": seconds["seconds_median"] / base["seconds_median"],
            "ratio_of_cpu": seconds["cpu_seconds"] / base["cpu_seconds"],
            "prediction_seconds": latency[name]["seconds_median"],
        }
        for name, seconds in found.items()
    ]
    result = {
        "what": "One training step of the networks of the study of small networks, over that of Med-2D SegNet",
        "settings": {"image": plan.patch_size, "batch": args.batch, "rounds": args.rounds, "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "rows": rows,
    }
    (HERE / "results" / "small_networks_step.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

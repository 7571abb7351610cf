"""How much longer a training step of KMS noise takes than one of cross entropy: same network, batch and augmentation.

    python benchmarks/label_noise_step.py [--size 256] [--batch 16] [--cases 124]

The steps run in turns in one process. CPU seconds are compared, which other work on the machine disturbs least, and
wall seconds beside them; ratios are of the smallest of each. Every label is doubted from the first step on (`begin=0`),
else there would be no E-step to time. Also the memory that XLA plans for a step. Writes
benchmarks/results/label_noise_step.json.
"""

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from steps import Step, in_turns

from medseg_jax import Augment, KMSNoise, Labels, Optim, Robust, Stage, UNet
from medseg_jax.data.plan import Plan
from medseg_jax.methods.objective import Task

GOAL = 1.15


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--cases", type=int, default=124)
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    n, b = args.size, args.batch
    net: Any = UNet.isotropic(2, 16, 32, 64, 128, 256)
    plan = Plan(
        2, None, (n, n), b, ({"scheme": "none"},), net.strides, net.kernel_sizes, net.features, False, 10, ("a",), 1
    )  # type: ignore[arg-type]
    task = Task(plan, Labels.simple("a"), 1, args.cases, extent=((1, n, n), (1, n, n)), sample_size=(n, n))
    rng = np.random.default_rng(0)
    batch = {
        "image": rng.normal(size=(b, n, n, 1)).astype(np.float32),
        "label": rng.integers(0, 2, (b, n, n)).astype(np.int32),
        "case": np.arange(b, dtype=np.int32),
        "start": np.zeros((b, 3), np.int32),
    }
    sides = {
        "cross entropy": Robust(net, loss_name="ce"),
        "KMS noise, 3 whitened E-steps": KMSNoise(net, e_steps=3, begin=0),
        "KMS noise, 10 whitened E-steps": KMSNoise(net, begin=0),
        "KMS noise, 10 plain E-steps": KMSNoise(net, whiten=False, begin=0),
    }
    steps = {
        name: Step(Stage(method, augment=Augment.light(), optim=Optim()), task, batch, (n, n))
        for name, method in sides.items()
    }
    best = in_turns(steps, args.rounds)
    plain = next(iter(best.values()))
    rows = [
        {
            "step": name,
            "ratio": found["cpu_seconds"] / plain["cpu_seconds"],
            "goal": GOAL,
            "wall ratio": found["seconds"] / plain["seconds"],
            "cpu seconds": found["cpu_seconds"],
            "temporaries MiB": steps[name].compiled.memory_analysis().temp_size_in_bytes / 2**20,
        }
        for name, found in list(best.items())[1:]
    ]
    result = {
        "what": "Training step of KMS noise over that of cross entropy with the same network, by CPU time",
        "settings": {"size": n, "batch": b, "cases": args.cases, "features": net.features, "cores": os.cpu_count()},
        "versions": {"jax": version("jax")},
        "rows": rows,
    }
    path = Path(__file__).parent / "results" / "label_noise_step.json"
    path.write_text(json.dumps(result, indent=1))
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

"""Augmentation with nnU-Net's default 3-D set, ours in the jitted step against batchgeneratorsv2 in two workers.

    python benchmarks/augmentation.py --peers PYTHON [--quick] [--repetitions 9]

Both sides take image and label of the size that `Augment.sample_size` asks for, cut them to the patch and draw anew for
each of the samples of a repetition, with the probabilities that both call default. Times are seconds per sample.
"""

from typing import Any

import numpy as np
import race

CASES = {"64 x 64 x 64": ((64, 64, 64), 64), "40 x 56 x 40": ((40, 56, 40), 128)}
"""Name: patch, samples a repetition."""
QUICK = {"16 x 16 x 16": ((16, 16, 16), 8)}
BATCH, GOAL = 4, 1.0


def run(peer: race.Peer, name: str, case: tuple, repetitions: int) -> dict[str, Any]:
    """One row."""
    import jax

    from medseg_jax import Augment
    from medseg_jax.data.augment import augment

    patch, count = case
    config = Augment()
    sample = config.sample_size(patch)
    random = np.random.default_rng(0)
    image = random.normal(size=(BATCH, *sample, 1)).astype(np.float32)
    label = random.integers(0, 3, (BATCH, *sample)).astype(np.int16)
    batch = jax.device_put({"image": image, "label": label})
    program = jax.jit(lambda key, batch: augment(key, batch, config, patch))
    seeds = {"ours": 0, "theirs": 0}

    def ours() -> race.Seconds:
        seeds["ours"] += 1
        keys = list(jax.random.split(jax.random.key(seeds["ours"]), count // BATCH))
        wall, cpu = race.timed(lambda: [jax.block_until_ready(program(key, batch)) for key in keys])
        return wall / count, cpu / count

    def theirs() -> race.Seconds:
        seeds["theirs"] += 1
        wall, cpu = peer("augment", sample=sample, patch=patch, count=count, seed=seeds["theirs"])["seconds"]
        return wall / count, cpu / count

    return {"name": name, "goal": GOAL, "samples": count, **race.race(ours, theirs, repetitions)}


def main() -> None:
    """Command line."""
    args = race.arguments(__doc__)
    from medseg_jax.runtime.environment import keep_freed_memory

    keep_freed_memory()
    cases = {k: v for k, v in (QUICK if args.quick else CASES).items() if args.only in k}
    settings = {"set": "nnU-Net v2's default 3-D transforms", "batch": BATCH, "peer": "batchgeneratorsv2, 2 workers"}
    with race.Peer(args.peers, "augmentation.py") as peer:
        rows = [run(peer, name, case, args.repetitions) for name, case in cases.items()]
        race.write("augmentation", "augmentation, seconds per sample", settings, peer, rows, args.quick)


if __name__ == "__main__":
    main()

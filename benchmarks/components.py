"""Connected components on the device against SciPy on the same CPU.

    python benchmarks/components.py --peers PYTHON [--quick] [--only WORDS] [--repetitions 9]

Both sides number the components of the same masks, or keep the largest; the run stops unless all numbers are equal.
SciPy labels one mask after the other, as the released code of WT-BCP does on the host. Times are seconds a batch.
"""

from functools import partial
from typing import Any

import numpy as np
import race
from peers import drawing

GOAL = 2.0
SLICES, VOLUME = (16, 256, 256), (1, 16, 256, 256)
CASES = [
    (what, kind, shape, neighbours)
    for shape, hoods in ((VOLUME, (26, 18, 6)), (SLICES, (8, 4)))
    for kind in ("blobs", "noise")
    for neighbours in hoods
    for what in ("label", "largest")
]


def run(peer: race.Peer, what: str, kind: str, shape: tuple[int, ...], neighbours: int, repetitions: int) -> dict:
    """One row."""
    import jax

    from medseg_jax.ops.components import RANKS, label, largest_component

    axes = len(shape) - 1
    rank = RANKS[axes][neighbours]
    mask = jax.device_put(drawing.draw_mask(kind, shape, axes))
    work = partial({"label": label, "largest": largest_component}[what], neighbours=neighbours)
    program = jax.jit(work).lower(mask).compile()
    found: dict[str, Any] = {}

    def ours() -> race.Seconds:
        return race.timed(lambda: jax.block_until_ready(program(mask)))

    def theirs() -> race.Seconds:
        found.update(peer("components", what=what, kind=kind, shape=shape, axes=axes, rank=rank))
        return tuple(found["seconds"])

    result = race.race(ours, theirs, repetitions)
    if found["fingerprint"] != drawing.fingerprint(np.asarray(program(mask))):
        raise SystemExit(f"{what} of {kind} with {neighbours} neighbours differs from SciPy's")
    name = f"{what}, {' x '.join(map(str, shape[-3:]))} {'slices' if axes == 2 else 'volume'}, {kind}, {neighbours}"
    return {"name": name, "goal": GOAL, **result}


def main() -> None:
    """Command line."""
    args = race.arguments(__doc__)
    with race.Peer(args.peers, "arrays.py") as peer:
        rows = []
        for what, kind, shape, neighbours in CASES:
            if args.quick:
                shape = (*shape[:-2], 32, 32)
            if args.only in f"{what} {kind} {neighbours}":
                rows.append(run(peer, what, kind, shape, neighbours, args.repetitions))
        settings = {"mask": "name, size, kind, neighbours", "peer": "scipy.ndimage.label"}
        race.write("components", "connected components, seconds a batch", settings, peer, rows, args.quick)


if __name__ == "__main__":
    main()

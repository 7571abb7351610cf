"""One level of the wavelet transform against PyWavelets on the same CPU.

    python benchmarks/wavelet.py --peers PYTHON [--quick] [--only WORDS] [--repetitions 9]

Both sides transform the same float32 images over their spatial axes, or back; the run stops unless the sums of
absolute coefficients agree to 1e-5. Times are seconds a batch.
"""

import math
from typing import Any

import numpy as np
import race
from peers import drawing

GOAL, TIMES = 1.0, 10
SLICES, VOLUME = (16, 256, 256), (1, 80, 112, 112)
CASES = [
    (shape, wavelet, "symmetric", inverse)
    for shape in (SLICES, VOLUME)
    for wavelet in ("haar", "db2", "bior1.5", "coif1")
    for inverse in (False, True)
]


def run(peer: race.Peer, shape: tuple[int, ...], wavelet: Any, mode: Any, inverse: bool, repetitions: int) -> dict:
    """One row."""
    import jax

    from medseg_jax.ops.wavelet import dwt, idwt

    axes = len(shape) - 1
    image = jax.device_put(drawing.draw_image(shape)[..., None])
    forward = jax.jit(lambda x: dwt(x, wavelet, mode))
    bands = forward(image)
    program, given = (jax.jit(lambda b: idwt(b, wavelet, mode)), bands) if inverse else (forward, image)
    norms: dict[str, float] = {}

    def ours() -> race.Seconds:
        wall, cpu = race.timed(lambda: [jax.block_until_ready(program(given)) for _ in range(TIMES)])
        return wall / TIMES, cpu / TIMES

    def theirs() -> race.Seconds:
        options = dict(shape=shape, axes=axes, wavelet=wavelet, mode=mode, inverse=inverse, times=TIMES)
        answer = peer("transform", **options)
        norms.update(answer["norms"])
        wall, cpu = answer["seconds"]
        return wall, cpu

    result = race.race(ours, theirs, repetitions)
    for key, band in bands.items():
        if not math.isclose(float(np.abs(np.asarray(band, np.float64)).sum()), norms[key], rel_tol=1e-5):
            raise SystemExit(f"{wavelet}, band {key}: ours and PyWavelets' differ")
    direction = "inverse" if inverse else "forward"
    return {"name": f"{wavelet} {axes}-D {direction}, {' x '.join(map(str, shape))}", "goal": GOAL, **result}


def main() -> None:
    """Command line."""
    args = race.arguments(__doc__)
    with race.Peer(args.peers, "arrays.py") as peer:
        rows = []
        for shape, wavelet, mode, inverse in CASES:
            if args.quick:
                shape = (shape[0], *(24 for _ in shape[1:]))
            if args.only in f"{wavelet} {len(shape) - 1}-D":
                rows.append(run(peer, shape, wavelet, mode, inverse, args.repetitions))
        settings = {"mode": "symmetric", "precision": "float32", "peer": "PyWavelets"}
        race.write("wavelet", "one level of the wavelet transform, seconds a batch", settings, peer, rows, args.quick)


if __name__ == "__main__":
    main()

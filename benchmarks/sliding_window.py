"""Sliding-window prediction of a whole volume with the same network, ours against MONAI's sliding_window_inference.

    python benchmarks/sliding_window.py --peers PYTHON [--quick] [--repetitions 3]

Gaussian weights, overlap 0.5. Before anything is timed, both sides must give the same probabilities for one window;
how many windows each side puts through its network is counted.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import race
from train_step import build_peer, objective

CASES = {
    "256 x 256 x 128, widths 16 to 128, patch 64": ((256, 256, 128), (16, 32, 64, 128), (64, 64, 64)),
    "256 x 256 x 128, widths 8 to 32, patch 40 x 56 x 40": ((256, 256, 128), (8, 16, 32), (40, 56, 40)),
}
"""Name: image, widths, patch."""
QUICK = {"48 x 40 x 32, widths 8 to 32, patch 16": ((48, 40, 32), (8, 16, 32), (16, 16, 16))}
GOAL = 1.0
OVERLAP, BATCH = 0.5, 2


def run(peer: race.Peer, name: str, case: tuple, repetitions: int, folder: Path) -> dict[str, Any]:
    """One row."""
    import jax

    from medseg_jax.inference.sliding_window import plan_windows, predict_volume

    shape, features, patch = case
    bound = objective(3, features)
    params, aux = bound.init(jax.random.key(0), {})
    build_peer(peer, bound, params, folder)
    predict = jax.jit(lambda image: bound.predict(params, aux, {}, image))
    image = np.random.default_rng(0).normal(size=(*shape, 1)).astype(np.float32)
    options = {"patch_size": patch, "overlap": OVERLAP, "batch_size": BATCH}

    def theirs(volume: np.ndarray, **more: Any) -> race.Seconds:
        np.save(folder / "image.npy", np.moveaxis(volume, -1, 0)[None])
        return peer("predict", image=str(folder / "image.npy"), **options, **more)["seconds"]

    window = image[tuple(slice(n) for n in patch)]
    found = predict_volume(predict, window, channels=3, **options)
    theirs(window, out=str(folder / "out.npy"))
    expected = np.moveaxis(np.load(folder / "out.npy"), 0, -1)
    np.testing.assert_allclose(found[::8, ::8, ::8], expected, atol=1e-4, err_msg="the two networks differ")
    starts = plan_windows(shape, patch, OVERLAP)

    def ours() -> race.Seconds:
        return race.timed(lambda: predict_volume(predict, image, channels=3, **options))

    times = race.race(ours, lambda: theirs(image), repetitions)
    windows = {"windows": math.prod(map(len, starts)), "their_windows": peer("windows_seen")}
    return {"name": name, "goal": GOAL, **windows, **times}


def main() -> None:
    """Command line."""
    args = race.arguments(__doc__)
    from medseg_jax.runtime.environment import keep_freed_memory

    keep_freed_memory()
    cases = {k: v for k, v in (QUICK if args.quick else CASES).items() if args.only in k}
    with race.Peer(args.peers, "unet.py") as peer, tempfile.TemporaryDirectory() as folder:
        for name, case in cases.items():
            row = run(peer, name, case, args.repetitions, Path(folder))
            settings = {"overlap": OVERLAP, "windows_at_once": BATCH, "weights": "gaussian", "peer": "MONAI, PyTorch"}
            race.write("sliding_window", "prediction of one volume, seconds", settings, peer, [row], args.quick)


if __name__ == "__main__":
    main()

"""Med-2D SegNet on one image, ours against the same layers in PyTorch, in evaluation mode.

    python benchmarks/latency.py --peers PYTHON [--quick] [--only WORDS] [--repetitions 7]

Both sides have the same weights; before anything is timed, their logits must agree.
"""

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import race

CASES = {"Med-2D SegNet, 1 x 256 x 256": (1, 256), "Med-2D SegNet, 8 x 256 x 256": (8, 256)}
"""Name: images, side."""
QUICK = {"Med-2D SegNet, quick": (1, 64)}


def in_order(params: Any) -> list[np.ndarray]:
    """Our parameters in PyTorch's layouts and in the order of peers/med2d_segnet.py."""

    def conv(layer: Any) -> list[np.ndarray]:
        kernel = np.ascontiguousarray(np.transpose(np.asarray(layer["kernel"]), (3, 2, 0, 1)))
        return [kernel, np.asarray(layer["bias"])]

    def unit(layer: Any) -> list[np.ndarray]:
        return [*conv(layer["conv"]), np.asarray(layer["norm"]["scale"]), np.asarray(layer["norm"]["bias"])]

    def each(layers: Any) -> list[Any]:
        return [layers[str(i)] for i in range(len(layers))]

    found = unit(params["stem"])
    for layer in each(params["enter"]):
        found += unit(layer)
    for block in each(params["blocks"]):
        found += [array for part in ("widen", "depthwise", "narrow") for array in unit(block[part])]
    for pair in each(params["decoder"]):
        found += [array for layer in each(pair) for array in unit(layer)]
    for layer in (*each(params["head"]), params["logits"]):
        found += conv(layer)
    return found


def run(peer: race.Peer, name: str, case: tuple[int, int], repetitions: int, folder: Path) -> dict[str, Any]:
    """One row."""
    import jax

    from medseg_jax.methods.objective import Fn
    from medseg_jax.models.med2d_segnet import MED2D_SEGNET

    count, side = case
    fn = Fn(partial(MED2D_SEGNET.build, 3, 1))
    params, stats = fn.init(jax.random.key(0))
    image = np.random.default_rng(0).normal(size=(count, side, side, 3)).astype(np.float32)
    np.savez(folder / "weights.npz", *in_order(params))
    np.save(folder / f"image{count}.npy", np.ascontiguousarray(np.moveaxis(image, -1, 1)))
    files = {"image": str(folder / f"image{count}.npy"), "output": str(folder / "logits.npy")}
    theirs = peer("build", widths=MED2D_SEGNET.widths, channels=3, classes=1, weights=str(folder / "weights.npz"))
    parameters = sum(p.size for p in jax.tree.leaves(params))
    assert theirs == parameters, f"the peer's network has {theirs} parameters, ours {parameters}"

    forward = jax.jit(lambda params, image: fn.apply(params, stats, image)[0][0])
    compiled = forward.lower(params, image).compile()
    peer("predict", **files)
    logits = np.moveaxis(np.load(folder / "logits.npy"), 1, -1)
    np.testing.assert_allclose(compiled(params, image), logits, atol=1e-4 * np.abs(logits).max())
    there = jax.device_put(image)
    times = race.race(
        lambda: race.timed(lambda: compiled(params, there).block_until_ready()),
        lambda: peer("predict", image=files["image"]),
        repetitions,
    )
    cost: Any = compiled.cost_analysis()
    gflops = cost["flops"] / count / 1e9
    return {"name": name, "goal": 1.0, "parameters": parameters, "gflops_an_image": gflops, **times}


def main() -> None:
    """Command line."""
    args = race.arguments(__doc__)
    cases = {k: v for k, v in (QUICK if args.quick else CASES).items() if args.only in k}
    with race.Peer(args.peers, "med2d_segnet.py") as peer, tempfile.TemporaryDirectory() as folder:
        for name, case in cases.items():
            row = run(peer, name, case, args.repetitions, Path(folder))
            settings = {"precision": "float32", "peer": "the same layers in PyTorch"}
            race.write("latency", "one forward pass, seconds", settings, peer, [row], args.quick)


if __name__ == "__main__":
    main()

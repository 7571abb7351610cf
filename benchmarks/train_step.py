"""One training step of the same U-Net, ours against MONAI's DynUNet on PyTorch: forward, loss, backward, optimiser.

    python benchmarks/train_step.py --peers PYTHON [--quick] [--only 3-D] [--repetitions 7]

Both sides start from the same weights, see the same batch without augmentation and use SGD with Nesterov momentum,
weight decay and clipping (nnU-Net's). Before anything is timed, the losses of the first three steps must agree.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import race

CASES = {
    "2-D, widths 16 to 128, 8 x 128 x 128": (2, (16, 32, 64, 128), 8, (128, 128), 1.3),
    "2-D, widths 16 to 128, 8 x 256 x 256": (2, (16, 32, 64, 128), 8, (256, 256), 1.3),
    "2-D, widths 32 to 256, 8 x 128 x 128": (2, (32, 64, 128, 256), 8, (128, 128), 1.3),
    "2-D, widths 32 to 256, 8 x 256 x 256": (2, (32, 64, 128, 256), 8, (256, 256), 1.3),
    "3-D, widths 8 to 32, 4 x 40 x 56 x 40": (3, (8, 16, 32), 4, (40, 56, 40), 1.6),
    "3-D, widths 16 to 128, 2 x 64 x 64 x 64": (3, (16, 32, 64, 128), 2, (64, 64, 64), 1.6),
}
"""Name: dimensions, widths, batch, patch, the ratio that is the goal."""
QUICK = {"2-D, quick": (2, (8, 16, 32), 2, (32, 32), 1.3), "3-D, quick": (3, (8, 16, 32), 1, (16, 16, 16), 1.6)}
CLASSES = 3
SGD = {"momentum": 0.99, "weight_decay": 3e-5, "clip_norm": 12.0}
LEARNING_RATE = 1e-3


def torch_weights(params: Any, dim: int) -> list[np.ndarray]:
    """Our parameters in PyTorch's layouts, block by block, in the order that peers/unet.py reads."""

    def kernel(array, transposed=False):
        order = (dim, dim + 1) if transposed else (dim + 1, dim)
        return np.ascontiguousarray(np.transpose(array, (*order, *range(dim))))

    def stack(stage):
        for _, block in sorted(stage["blocks"].items(), key=lambda pair: int(pair[0])):
            yield kernel(block["conv"]["kernel"])
            yield from (np.asarray(block["norm"]["scale"]), np.asarray(block["norm"]["bias"]))

    found: list[np.ndarray] = []
    for i in range(len(params["encoder"])):
        found += stack(params["encoder"][str(i)])
    decoder = params["decoder"]
    for i in range(len(decoder["ups"])):
        up = decoder["ups"][str(i)]
        found += [kernel(up["kernel"], transposed=True), np.asarray(up["bias"]), *stack(decoder["stages"][str(i)])]
    head = decoder["heads"]["0"]
    return [*found, kernel(head["kernel"]), np.asarray(head["bias"])]


def objective(dim: int, features: tuple[int, ...]) -> Any:
    """Our U-Net without deep supervision, bound to three classes."""
    from medseg_jax import Supervised, UNet
    from medseg_jax.methods.objective import Task
    from medseg_jax.types import Labels

    net = UNet.isotropic(dim, *features, deep_supervision=False)
    labels = Labels.simple(*(f"class {i}" for i in range(1, CLASSES)))
    return Supervised(net).bind(Task(None, labels, 1))  # type: ignore[arg-type]  # the net is complete without a plan


def build_peer(peer: race.Peer, bound: Any, params: Any, folder: Path) -> None:
    """Gives the peer our network; parameter counts must agree."""
    net, weights = bound.net, torch_weights(params, bound.net.dim)
    np.savez(folder / "weights.npz", *weights)
    shape = {"features": net.features, "strides": net.strides, "kernel_sizes": net.kernel_sizes}
    count = peer("build", dim=net.dim, classes=CLASSES, weights=str(folder / "weights.npz"), **shape)
    ours = sum(w.size for w in weights)
    assert count == ours, f"the peer's network has {count} parameters, ours {ours}"


def run(peer: race.Peer, name: str, case: tuple, repetitions: int, folder: Path) -> dict[str, Any]:
    """One row."""
    import jax

    from medseg_jax import Augment, Optim, Stage
    from medseg_jax.training.optim import make_optimizer
    from medseg_jax.training.step import StepParts, init_state, make_step

    dim, features, size, patch, goal = case
    bound = objective(dim, features)
    random = np.random.default_rng(0)
    image = random.normal(size=(size, *patch, 1)).astype(np.float32)
    label = random.integers(0, CLASSES, (size, *patch)).astype(np.int32)
    np.savez(folder / "batch.npz", image=np.moveaxis(image, -1, 1), label=label[:, None].astype(np.int64))

    optim = Optim("sgd", LEARNING_RATE, SGD["weight_decay"], "constant", 0, SGD["momentum"], SGD["clip_norm"])
    params, _ = bound.init(jax.random.key(0), {})
    stage = Stage(bound, optim=optim, augment=Augment.none())
    parts = StepParts(bound, make_optimizer(optim, 1000, params), stage, 0.0, (1.0,) * dim, tuple(patch))
    batch = jax.device_put({"image": image, "label": label})
    state = init_state(parts, batch)
    step = jax.jit(make_step(parts), donate_argnums=0)
    build_peer(peer, bound, state["params"], folder)
    peer("prepare_training", batch=str(folder / "batch.npz"), learning_rate=LEARNING_RATE, **SGD)

    losses: list[float] = []

    def advance() -> None:
        nonlocal state
        state, metrics = step(state, {}, batch)
        losses.append(float(metrics["loss"]))
        jax.block_until_ready(state)

    theirs = []
    for _ in range(3):
        advance()
        theirs.append(peer("train_step")["loss"])
    np.testing.assert_allclose(losses, theirs, rtol=1e-4, err_msg="the two networks do not compute the same")
    times = race.race(lambda: race.timed(advance), lambda: peer("train_step")["seconds"], repetitions)
    parameters = sum(p.size for p in jax.tree.leaves(state["params"]))
    return {"name": name, "goal": goal, "parameters": parameters, "first_losses": losses[:3], **times}


def main() -> None:
    """Command line."""
    args = race.arguments(__doc__)
    from medseg_jax.runtime.environment import keep_freed_memory

    keep_freed_memory()
    cases = {k: v for k, v in (QUICK if args.quick else CASES).items() if args.only in k}
    with race.Peer(args.peers, "unet.py") as peer, tempfile.TemporaryDirectory() as folder:
        for name, case in cases.items():
            row = run(peer, name, case, args.repetitions, Path(folder))
            settings = {"precision": "float32", "optimiser": "SGD, Nesterov", "peer": "MONAI DynUNet, PyTorch"}
            race.write("train_step", "one training step, seconds", settings, peer, [row], args.quick)


if __name__ == "__main__":
    main()

"""One training step of VM-UNet, ours against PyTorch with the reference scan: forward, loss, backward, AdamW.

    python benchmarks/vmunet_step.py --peers PYTHON [--quick] [--only WORDS] [--repetitions 3]

The peer (peers/vmunet.py) makes the weights, which we load through weights/vmunet.py. Before anything is timed, the
losses of the first steps must agree. The peer needs about 9 GB. DropPath is off on both sides. With
JAX_NUM_CPU_DEVICES=2 each of two cores is a device with a picture of its own, in rows of that name. The peer's scan
takes its slices of time once; "as published" it indexes them, which is quadratic in the pixels (at 128 x 128 a step
takes minutes).
"""

import resource
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import race

PUBLISHED = "the peer's scan as published"
CASES = {
    "VM-UNet, 64 x 64, batch 2": (96, 2, 64, 0.1),
    f"VM-UNet, 64 x 64, batch 2, {PUBLISHED}": (96, 2, 64, 0.1),
    "VM-UNet, 256 x 256, batch 2": (96, 2, 256, 0.1),
}
"""Name: channels of the first stage, batch, image side, the ratio that is the goal."""
QUICK = {"quick": (16, 2, 32, 0.1)}
CLASSES = 3
OPTIM = {"learning_rate": 3e-4, "weight_decay": 0.01}


def run(peer: race.Peer, name: str, case: tuple, repetitions: int, folder: Path) -> dict[str, Any]:
    """One row."""
    import jax
    import optax

    from medseg_jax.methods.objective import Fn
    from medseg_jax.models.vmunet import VMUNet
    from medseg_jax.runtime.sharding import batch_sharding, make_mesh, replicated, within
    from medseg_jax.weights import load, read_weights

    dim, size, side, goal = case
    random = np.random.default_rng(0)
    image = random.uniform(size=(size, side, side, 3)).astype(np.float32)
    label = random.integers(0, CLASSES, (size, side, side))
    np.savez(folder / "batch.npz", image=np.moveaxis(image, -1, 1), label=label)
    count = peer("build", classes=CLASSES, dim=dim, weights=str(folder / "weights.npz"), indexed=PUBLISHED in name)
    peer("prepare_training", batch=str(folder / "batch.npz"), **OPTIM)

    net = VMUNet((dim, 2 * dim, 4 * dim, 8 * dim), drop_path=0.0)
    fn = Fn(lambda rngs: net.build(3, CLASSES, rngs))
    initial, stats = jax.eval_shape(fn.init, jax.random.key(0))
    mesh = make_mesh()
    params = jax.device_put(load(net, initial, stats, read_weights(folder / "weights.npz")).params, replicated(mesh))
    ours = sum(p.size for p in jax.tree.leaves(params))
    assert count == ours, f"the peer's network has {count} parameters, ours {ours}"
    optimizer = optax.adamw(OPTIM["learning_rate"], weight_decay=OPTIM["weight_decay"])
    batch = jax.device_put((image, jax.nn.one_hot(label, CLASSES)), batch_sharding(mesh))

    def step(params, moments, image, target):
        def loss(params):
            (logits,), _ = fn.apply(params, {}, image, train=True)
            return objective(logits, target)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradient, moments, params)
        return optax.apply_updates(params, updates), moments, value

    state = params, optimizer.init(params)
    compiled = jax.jit(within(mesh, step), donate_argnums=(0, 1)).lower(*state, *batch).compile()
    needs = compiled.memory_analysis()
    assert needs is not None
    losses: list[float] = []

    def advance() -> None:
        nonlocal state
        *state, value = compiled(*state, *batch)
        losses.append(float(value))

    theirs = []
    for _ in range(2):
        advance()
        theirs.append(peer("train_step"))
    np.testing.assert_allclose(
        losses, [t["loss"] for t in theirs], rtol=1e-4, err_msg="the two networks do not compute the same"
    )
    times = race.race(lambda: race.timed(advance), lambda: peer("train_step")["seconds"], repetitions)
    memory = {
        "our_temporary_MB": needs.temp_size_in_bytes / 1e6,
        "our_peak_MB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        "their_peak_MB": theirs[-1]["peak_MB"],
    }
    name += f", {mesh.size} devices" if mesh.size > 1 else ""
    return {"name": name, "goal": goal, "parameters": count, "first_losses": losses[:2], **times, **memory}


def objective(logits: Any, target: Any) -> Any:
    """Half cross entropy, half Dice over the whole batch, background included, squares in the denominator."""
    import jax
    import jax.numpy as jnp

    p = jax.nn.softmax(logits)
    overlap, size = (p * target).sum((0, 1, 2)), (p**2).sum((0, 1, 2)) + target.sum((0, 1, 2))
    dice = 1 - (2 * overlap + 1e-5) / (size + 1e-5)
    return (-(jax.nn.log_softmax(logits) * target).sum(-1).mean() + jnp.mean(dice)) / 2


def main() -> None:
    """Command line."""
    args = race.arguments(__doc__)
    from medseg_jax.runtime.environment import keep_freed_memory

    keep_freed_memory()
    cases = {k: v for k, v in (QUICK if args.quick else CASES).items() if args.only in k}
    for name, case in cases.items():
        with race.Peer(args.peers, "vmunet.py") as peer, tempfile.TemporaryDirectory() as folder:
            row = run(peer, name, case, args.repetitions, Path(folder))
            settings = {"precision": "float32", "optimiser": "AdamW", "peer": "PyTorch, reference scan"}
            race.write("vmunet_step", "one training step of VM-UNet, seconds", settings, peer, [row], args.quick)


if __name__ == "__main__":
    main()

"""The training step: one pure function from (state, frozen, batch) to (state, metrics), for every method.

The state is a plain dict {"seed", "step", "bad", "params", "aux", "opt"[, "ema"]}. All randomness is fold_in(seed,
step), so a checkpoint holds no random state; the seed is data, so that every seed runs the same compiled program. A
step whose loss, gradient or new state is not finite leaves everything but the counters as it was: no NaN enters
weights, teacher, queue, posterior or optimiser.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from medseg_jax.config import Stage
from medseg_jax.data.augment import augment, number_voxels
from medseg_jax.methods.objective import Objective, Tree
from medseg_jax.types import Batch, UserError

type State = dict[str, Any]


@dataclass(frozen=True)
class StepParts:
    """What a step is made of.

    Attributes:
        objective: bound method.
        optimizer: gradient transformation.
        stage: for augmentation and accumulation.
        ema: decay of the moving average of the weights, 0 = none.
        spacing: of the patches, one an axis, in mm or pixels.
        patch_size: of the patches, one an axis.
    """

    objective: Objective
    optimizer: optax.GradientTransformation
    stage: Stage
    ema: float
    spacing: tuple[float, ...]
    patch_size: tuple[int, ...]


def init_state(parts: StepParts, batch: Batch, seed: int | Array = 0) -> State:
    """State at step 0; `seed` (32 bits) is that of initialisation, augmentation and dropout."""
    seed = jnp.asarray(seed, jnp.uint32)
    params, aux = parts.objective.init(jax.random.key(seed), batch)
    state = {
        "seed": seed,
        "step": jnp.zeros((), jnp.int32),
        "bad": jnp.zeros((), jnp.int32),
        "params": params,
        "aux": aux,
        "opt": parts.optimizer.init(params),
    }
    if parts.ema:
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def prediction_weights(state: State) -> Tree:
    """The weights that predict: the moving average where there is one."""
    return state.get("ema") or state["params"]


def make_step(parts: StepParts) -> Callable[[State, Tree, Batch], tuple[State, Mapping[str, Array]]]:
    """The step as a pure function, not yet jitted."""
    objective = parts.objective

    def step(state: State, frozen: Tree, batch: Batch):
        key = jax.random.fold_in(jax.random.key(state["seed"]), state["step"] + 1)
        augment_key, loss_key = jax.random.split(key)
        if objective.tracks_voxels:
            batch = {**batch, "voxel": number_voxels(batch["label"].shape)}
        batch = augment(augment_key, batch, parts.stage.augment, parts.patch_size, spacing=parts.spacing)
        loss, aux, metrics, grads = _gradients(objective, state, frozen, batch, loss_key, parts.stage.optim.accumulate)
        updates, opt = parts.optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {"params": params, "aux": objective.after_update(params, aux, state["step"]), "opt": opt}
        if parts.ema:
            decay = jnp.minimum(parts.ema, (1.0 + state["step"]) / (10.0 + state["step"]))
            new["ema"] = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state["ema"], params)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & _all_finite(new)
        new = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, {k: state[k] for k in new})
        new |= {"seed": state["seed"], "step": state["step"] + 1, "bad": jnp.where(good, 0, state["bad"] + 1)}
        return new, {"loss": loss, "grad_norm": norm, "bad": new["bad"], **metrics}

    return step


def _gradients(objective: Objective, state: State, frozen: Tree, batch: Batch, key: Array, parts: int):
    """(loss, aux, metrics, gradients), averaged over `parts` equal micro-batches (rows i, i + parts, ...)."""
    value_and_grad = jax.value_and_grad(objective.loss, has_aux=True)
    if parts == 1:
        (loss, (aux, metrics)), grads = value_and_grad(state["params"], state["aux"], frozen, batch, key)
        return loss, aux, metrics, grads
    if uneven := [f"{len(value)} rows of {name}" for name, value in batch.items() if len(value) % parts]:
        raise UserError(
            "The batch cannot be taken in so many equal parts",
            found=", ".join(uneven),
            expected=f"a multiple of accumulate = {parts}",
            remedy="change the stage's optim.accumulate, its mix, or batch_size in plan.json",
        )
    micro = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1), batch
    )  # [parts, b / parts, ...]

    def one(carry, inputs):
        aux, total_loss, total_grads = carry
        index, rows = inputs
        (loss, (aux, metrics)), grads = value_and_grad(
            state["params"], aux, frozen, rows, jax.random.fold_in(key, index)
        )
        return (aux, total_loss + loss / parts, jax.tree.map(lambda t, g: t + g / parts, total_grads, grads)), metrics

    start = (state["aux"], jnp.zeros(()), jax.tree.map(jnp.zeros_like, state["params"]))
    (aux, loss, grads), metrics = jax.lax.scan(one, start, (jnp.arange(parts), micro))
    return loss, aux, jax.tree.map(lambda v: v.mean(0), metrics), grads


def _all_finite(tree: Tree) -> Array:
    leaves = [jnp.isfinite(x).all() for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    # Without the barrier XLA on the CPU computes this anew in each of the hundreds of selections that it decides: with
    # 700 tensors a step then takes minutes.
    return jax.lax.optimization_barrier(jnp.stack(leaves).all()) if leaves else jnp.bool_(True)

"""Optimisers and schedules, with groups of parameters chosen by regular expression."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from medseg_jax.config import Group, Optim
from medseg_jax.runtime.sharding import path_name
from medseg_jax.types import UserError


def schedule(optim: Optim, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up to `optim.lr`, then its decay over the remaining steps."""
    warmup = min(optim.warmup, steps // 2)
    rest = max(steps - warmup, 1)
    decay = {
        "poly": optax.polynomial_schedule(optim.lr, 0.0, 0.9, rest),
        "cosine": optax.cosine_decay_schedule(optim.lr, rest),
        "constant": optax.constant_schedule(optim.lr),
    }[optim.schedule]
    return optax.join_schedules([optax.linear_schedule(0.0, optim.lr, warmup), decay], [warmup]) if warmup else decay


def assign_groups(params: Any, groups: tuple[Group, ...]) -> Any:
    """The group of every parameter, as a tree: the first whose pattern is found in its path, else the neutral one.

    Raises:
        UserError: a pattern that matches no parameter.
    """
    neutral, used = Group(""), set()

    def one(path, _):
        group = next((g for g in groups if re.search(g.pattern, path_name(path))), neutral)
        used.add(group)
        return group

    tree = jax.tree_util.tree_map_with_path(one, params)
    if idle := [g.pattern for g in groups if g not in used]:
        names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
        raise UserError(
            "An optimiser group matches no parameter", found=idle, expected=f"a pattern in e.g. {names[:3]}"
        )
    return tree


def make_optimizer(optim: Optim, steps: int, params: Any) -> optax.GradientTransformation:
    """The whole chain from gradient to update.

    Args:
        optim: what the config says.
        steps: steps of the stage, for the schedule.
        params: (abstract) parameters, for the groups.
    """
    groups = assign_groups(params, optim.groups)
    lr = jax.tree.map(lambda g: g.lr, groups)
    decay = jax.tree.map(lambda g, p: optim.weight_decay * g.weight_decay * (p.ndim > 1), groups, params)
    add_decay = optax.stateless(lambda u, p: jax.tree.map(lambda u, p, d: u + d * p if d else u, u, p, decay))
    if optim.name == "adamw":
        direction = optax.chain(optax.scale_by_adam(), add_decay)
    elif optim.name == "sgd":
        direction = optax.chain(add_decay, optax.trace(optim.momentum, nesterov=True))
    else:
        direction = optax.chain(_muon(params, optim.momentum), add_decay)
    return optax.chain(
        optax.stateless(lambda g, _: jax.tree.map(lambda g, m: g if m else jnp.zeros_like(g), g, lr)),
        optax.clip_by_global_norm(optim.clip_norm),
        direction,
        optax.stateless(lambda u, _: jax.tree.map(lambda u, m: u * m, u, lr)),
        optax.scale_by_learning_rate(schedule(optim, steps)),
    )


def _muon(params: Any, momentum: float) -> optax.GradientTransformation:
    """Muon's direction for kernels, all axes but the last taken as inputs; Adam's for the rest.

    Updates get the root mean square 0.2 that AdamW's have, so that one learning rate serves both
    (Liu et al., "Muon is scalable for LLM training", 2025, section 2.2).
    """
    numbers = jax.tree.map(
        lambda p: optax.contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1) if p.ndim > 1 else None,
        params,
    )
    muon = optax.contrib.muon(1.0, beta=momentum, muon_weight_dimension_numbers=numbers, consistent_rms=0.2)
    return optax.chain(muon, optax.scale(-1.0))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medseg_jax.config import Group, Optim
from medseg_jax.training.optim import make_optimizer, schedule
from medseg_jax.types import UserError

PARAMS = {"encoder": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.zeros(4)}, "head": {"kernel": jnp.ones((4, 2))}}


def run(optim, steps=3, grads=None, params=PARAMS):
    tx = make_optimizer(optim, 100, params)
    state = tx.init(params)
    grads = grads or jax.tree.map(lambda p: 0.01 * jnp.arange(1.0, p.size + 1).reshape(p.shape), params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_each_optimiser_goes_downhill(name):
    keys = iter(jax.random.split(jax.random.key(0), 3))
    target = jax.tree.map(lambda p: p + 0.5 * jax.random.normal(next(keys), p.shape), PARAMS)

    def loss(params):
        return sum(jnp.sum((p - t) ** 2) for p, t in zip(jax.tree.leaves(params), jax.tree.leaves(target), strict=True))

    params, optim = PARAMS, Optim(name, lr=0.05, weight_decay=0.0, warmup=0, momentum=0.9)
    tx = make_optimizer(optim, 60, params)
    state = tx.init(params)
    for _ in range(60):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    assert loss(params) < 0.3 * loss(PARAMS)


def test_adamw_equals_optax():
    ours = run(Optim("adamw", lr=0.1, weight_decay=0.0, warmup=0, clip_norm=1e9, schedule="constant"))
    tx = optax.adam(0.1)
    state, params = tx.init(PARAMS), PARAMS
    grads = jax.tree.map(lambda p: 0.01 * jnp.arange(1.0, p.size + 1).reshape(p.shape), params)
    for _ in range(3):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, params)


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon"])
def test_a_frozen_group_does_not_move(name):
    params = run(Optim(name, warmup=0, groups=(Group("^encoder", lr=0.0),)))
    np.testing.assert_array_equal(params["encoder"]["kernel"], PARAMS["encoder"]["kernel"])
    assert not np.allclose(params["head"]["kernel"], PARAMS["head"]["kernel"])


def test_a_frozen_group_does_not_count_in_the_clipping():
    grads = {
        "encoder": {"kernel": jnp.full((3, 3, 2, 4), 1e6), "bias": jnp.zeros(4)},
        "head": {"kernel": jnp.ones((4, 2))},
    }
    optim = Optim("sgd", lr=1.0, weight_decay=0.0, warmup=0, momentum=0.0, clip_norm=100.0, schedule="constant")
    free = run(Optim(**{**vars(optim), "groups": (Group("encoder", lr=0.0),)}), 1, grads)
    np.testing.assert_allclose(free["head"]["kernel"], 0.0, atol=1e-6)


def test_decay_spares_biases_and_norms():
    grads = jax.tree.map(jnp.zeros_like, PARAMS)
    biased = {**PARAMS, "encoder": {"kernel": jnp.ones((3, 3, 2, 4)), "bias": jnp.ones(4)}}
    params = run(Optim("adamw", lr=0.1, weight_decay=0.5, warmup=0, schedule="constant"), 1, grads, biased)
    np.testing.assert_allclose(params["encoder"]["kernel"], 0.95, rtol=1e-6)
    np.testing.assert_array_equal(params["encoder"]["bias"], 1.0)


def test_a_group_that_matches_nothing_is_an_error():
    with pytest.raises(UserError, match="matches no parameter"):
        make_optimizer(Optim(groups=(Group("decoder"),)), 10, PARAMS)


@pytest.mark.parametrize("name", ["poly", "cosine"])
def test_schedules_warm_up_and_end_at_zero(name):
    rate = schedule(Optim(lr=1.0, schedule=name, warmup=10), 100)
    assert rate(0) == 0
    np.testing.assert_allclose(rate(10), 1.0, rtol=1e-6)
    assert 0 <= rate(100) < 1e-6
    np.testing.assert_allclose(schedule(Optim(lr=1.0, schedule="poly", warmup=0), 100)(50), 0.5**0.9, rtol=1e-6)

"""The baseline: ignored voxels, overlapping classes, batch norm statistics, what a network needs from the data."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fakes import make_plan
from medseg_jax import Labels, Supervised, UNet, UserError
from medseg_jax.methods.objective import Task, check_batch

PLAN = make_plan((8, 8), classes=("a", "b"))
KEY = jax.random.key(0)


def bound(labels, **net):
    return Supervised(UNet(**net)).bind(Task(PLAN, labels, 1))


def batch(label):
    rng = np.random.default_rng(0)
    return {"image": jnp.asarray(rng.normal(size=(2, 8, 8, 1)), jnp.float32), "label": jnp.asarray(label, jnp.int32)}


def test_ignored_voxels_change_neither_loss_nor_gradient():
    objective = bound(Labels.simple("a", ignore=2))
    label = np.zeros((2, 8, 8), np.int32)
    label[:, :4] = 1
    label[:, 6:] = 2
    given = batch(label)
    params, aux = objective.init(KEY, given)
    target, weight = objective.target(given["label"])
    assert target.shape == (2, 8, 8, 2)
    np.testing.assert_array_equal(weight, label != 2)

    def loss(table):
        other = Labels.simple("a", ignore=2)
        object.__setattr__(other, "table", table)
        task = Task(PLAN, other, 1)
        return jax.value_and_grad(lambda p: Supervised(UNet()).bind(task).loss(p, aux, {}, given, KEY)[0])(params)

    plain = Labels.simple("a", ignore=2).table
    changed = plain.copy()
    changed[2] = (0.0, 1.0)
    jax.tree.map(np.testing.assert_array_equal, loss(plain), loss(changed))


@pytest.mark.parametrize(("labels", "channels"), [(Labels.simple("a", "b"), 3), (Labels.overlapping("a", "b"), 2)])
def test_predictions_are_probabilities(labels, channels):
    objective = bound(labels)
    given = batch(np.zeros((2, 8, 8)))
    params, aux = objective.init(KEY, given)
    probabilities = objective.predict(params, aux, {}, given["image"])
    assert probabilities.shape == (2, 8, 8, channels)
    assert probabilities.dtype == jnp.float32
    assert np.all((probabilities >= 0) & (probabilities <= 1))
    if labels.exclusive:
        np.testing.assert_allclose(probabilities.sum(-1), 1, rtol=1e-5)


def test_batch_norm_statistics_move_in_training_only():
    objective = bound(Labels.simple("a", "b"), norm="batch")
    given = batch(np.ones((2, 8, 8)))
    params, aux = objective.init(KEY, given)
    _, (new, _) = objective.loss(params, aux, {}, given, KEY)
    moved = [not np.allclose(a, b) for a, b in zip(jax.tree.leaves(aux), jax.tree.leaves(new), strict=True)]
    assert any(moved)
    again = objective.predict(params, new, {}, given["image"])
    np.testing.assert_array_equal(again, objective.predict(params, new, {}, given["image"]))


def test_bfloat16_compute_keeps_float32_parameters_and_agrees_roughly():
    given = batch(np.ones((2, 8, 8)))
    full, half = bound(Labels.simple("a", "b")), bound(Labels.simple("a", "b"), dtype="bfloat16")
    params, aux = full.init(KEY, given)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(half.init(KEY, given)[0]))
    a, b = (o.loss(params, aux, {}, given, KEY)[0] for o in (full, half))
    assert a.dtype == b.dtype == jnp.float32
    np.testing.assert_allclose(a, b, rtol=0.05)


def test_a_missing_field_is_named_before_anything_compiles():
    with pytest.raises(UserError) as error:
        check_batch(Supervised(), {"image": np.zeros(1)})
    assert "label" in str(error.value)


def test_an_unbound_method_says_so():
    with pytest.raises(RuntimeError, match="not bound"):
        _ = Supervised().task

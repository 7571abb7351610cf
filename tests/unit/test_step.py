"""The step with a toy objective whose numbers can be worked out by hand."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medseg_jax import Augment, Optim, Stage
from medseg_jax.methods.objective import Objective
from medseg_jax.training.step import StepParts, init_state, make_step, prediction_weights
from medseg_jax.types import UserError


@dataclass(frozen=True)
class Toy(Objective):
    """loss = mean over rows of w * mean(image); aux counts calls and keeps a teacher."""

    def init(self, key, batch):
        return {"w": jnp.float32(2.0)}, {"calls": jnp.int32(0), "teacher": jnp.float32(2.0)}

    def loss(self, params, aux, frozen, batch, key):
        loss = jnp.mean(params["w"] * batch["image"].mean((1, 2, 3)))
        noise = jax.random.normal(key)
        return loss, ({**aux, "calls": aux["calls"] + 1}, {"noise": noise})

    def after_update(self, params, aux, step):
        return {**aux, "teacher": 0.5 * aux["teacher"] + 0.5 * params["w"]}


def parts(accumulate=1, ema=0.0):
    stage = Stage(Toy(), augment=Augment.none(), optim=Optim(accumulate=accumulate))
    return StepParts(Toy(), optax.sgd(1.0), stage, ema, (1.0, 1.0), (2, 2))


def batch(rows=(1.0, 1.0, 3.0, 3.0)):
    image = np.ones((len(rows), 2, 2, 1), np.float32) * np.array(rows, np.float32)[:, None, None, None]
    return {"image": image, "label": np.zeros((len(rows), 2, 2), np.int32)}


def test_one_step_by_hand():
    p = parts(ema=0.9)
    state, metrics = jax.jit(make_step(p))(init_state(p, batch()), {}, batch())
    assert metrics["loss"] == 4.0
    assert state["params"]["w"] == 0.0
    assert state["aux"]["teacher"] == 1.0
    assert state["step"] == 1
    np.testing.assert_allclose(state["ema"]["w"], 0.1 * 2.0, rtol=1e-6)  # the decay ramps up from (1 + 0) / (10 + 0)
    assert prediction_weights(state)["w"] == state["ema"]["w"]


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    p, q = parts(), parts(accumulate=2)
    whole, _ = make_step(p)(init_state(p, batch()), {}, batch())
    split, metrics = make_step(q)(init_state(q, batch()), {}, batch())
    np.testing.assert_allclose(split["params"]["w"], whole["params"]["w"], rtol=1e-6)
    assert split["aux"]["calls"] == 2
    assert metrics["loss"] == 4.0


def test_parts_that_are_not_equal_are_refused():
    p = parts(accumulate=3)
    with pytest.raises(UserError, match="equal parts") as error:
        make_step(p)(init_state(p, batch()), {}, batch())
    assert "4 rows of image" in error.value.found


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_step_changes_nothing_but_the_counters(bad):
    p = parts(ema=0.9)
    step = jax.jit(make_step(p))
    before = init_state(p, batch())
    after, metrics = step(before, {}, batch((1.0, bad, 1.0, 1.0)))
    assert (after["step"], after["bad"], metrics["bad"]) == (1, 1, 1)
    for name in ("params", "aux", "opt", "ema"):
        jax.tree.map(np.testing.assert_array_equal, after[name], before[name])
    again, _ = step(after, {}, batch((1.0, bad, 1.0, 1.0)))
    assert again["bad"] == 2
    good, _ = step(again, {}, batch())
    assert good["bad"] == 0
    assert good["params"]["w"] == 0.0


def test_the_key_is_a_function_of_seed_and_step():
    p = parts()
    step = jax.jit(make_step(p))
    state, first = step(init_state(p, batch()), {}, batch())
    _, second = step(state, {}, batch())
    _, again = step(init_state(p, batch()), {}, batch())
    assert first["noise"] == again["noise"]
    assert first["noise"] != second["noise"]


@dataclass(frozen=True)
class Many(Objective):
    """As many weights as a deep network has tensors."""

    count: int = 0

    def init(self, key, batch):
        return {f"w{i}": jnp.ones((2,)) for i in range(self.count)}, {}

    def loss(self, params, aux, frozen, batch, key):
        return jnp.stack([w.sum() for w in params.values()]).sum() * batch["image"].mean(), (aux, {})

    def predict(self, params, aux, frozen, image):
        return image


def test_the_compiled_step_grows_linearly_with_the_number_of_weights():
    """The check for finite values is computed once, not in each of the selections that depend on it."""

    def instructions(count):
        p = StepParts(Many(count), optax.adam(1.0), parts().stage, 0.0, (1.0, 1.0), (2, 2))
        state = jax.eval_shape(lambda: init_state(p, batch()))
        return (jax.jit(make_step(p)).lower(state, {}, batch()).compile().as_text() or "").count("\n")

    assert instructions(40) < 2.5 * instructions(20)


def test_the_seed_is_data_of_one_program():
    p = parts()
    step = jax.jit(make_step(p)).lower(init_state(p, batch()), {}, batch()).compile()
    first, second, again = (step(init_state(p, batch(), s), {}, batch())[1]["noise"] for s in (0, 1, 0))
    assert first == again != second

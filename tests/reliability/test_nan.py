"""Promise 5: NaN and Inf from anywhere change no bit of weights, aux, moving average or optimiser; k in a row stop."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medseg_jax import Augment, Optim, Stage
from medseg_jax import config as configs
from medseg_jax.methods.objective import Objective
from medseg_jax.training import train as training
from medseg_jax.training.step import StepParts, init_state, make_step
from medseg_jax.types import UserError
from runs import write_config


@dataclass(frozen=True)
class Linear(Objective):
    """loss = mean(weight * w * mean(image)); aux keeps a queue of the last values and a teacher."""

    def init(self, key, batch):
        return {"w": jnp.ones(3)}, {"queue": jnp.zeros(4), "teacher": jnp.ones(3)}

    def loss(self, params, aux, frozen, batch, key):
        values = batch["image"].mean((1, 2)) @ params["w"]  # [b]
        queue = jnp.concatenate([aux["queue"][1:], values.mean()[None]])
        root = jnp.sqrt(jnp.abs(params["w"][0] * batch["root"].min()))  # its gradient at 0 is not finite
        return jnp.mean(batch["weight"] * values) + 0 * root, ({**aux, "queue": queue}, {})

    def after_update(self, params, aux, step):
        return {**aux, "teacher": 0.9 * aux["teacher"] + 0.1 * params["w"]}


def parts(accumulate=1, optimizer=None):
    stage = Stage(Linear(), augment=Augment.none(), optim=Optim(accumulate=accumulate))
    return StepParts(Linear(), optimizer or optax.adamw(0.1), stage, 0.9, (1.0, 1.0), (2, 2))


def batch(**changes):
    image = np.random.default_rng(0).normal(size=(4, 2, 2, 3)).astype(np.float32)
    values = {
        "image": image,
        "label": np.zeros((4, 2, 2), np.int32),
        "weight": np.ones(4, np.float32),
        "root": np.ones(4, np.float32),
    }
    for name, (row, value) in changes.items():
        values[name] = values[name].copy()
        values[name][row] = value
    return values


def assert_untouched(before, after):
    for name in ("params", "aux", "opt", "ema"):
        for old, new in zip(jax.tree.leaves(before[name]), jax.tree.leaves(after[name]), strict=True):
            assert np.asarray(old).tobytes() == np.asarray(new).tobytes(), name


BAD = {
    "NaN in the image": {"image": (1, np.nan)},
    "Inf in the image": {"image": (3, np.inf)},
    "NaN in a label weight": {"weight": (2, np.nan)},
    "Inf in a label weight": {"weight": (0, -np.inf)},
    "gradient alone": {"root": (slice(None), 0.0)},
}


@pytest.mark.parametrize("accumulate", [1, 2, 4])
@pytest.mark.parametrize("what", BAD)
def test_a_bad_batch_changes_no_bit(what, accumulate):
    p = parts(accumulate)
    step = jax.jit(make_step(p))
    before, _ = step(init_state(p, batch()), {}, batch())  # one good step first: moments are not zero
    after, metrics = step(before, {}, batch(**BAD[what]))
    assert (int(after["step"]), int(after["bad"])) == (2, 1)
    assert_untouched(before, after)
    if what == "gradient alone":
        assert np.isfinite(metrics["loss"])
        assert not np.isfinite(metrics["grad_norm"])
    good, _ = step(after, {}, batch())
    assert int(good["bad"]) == 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(good))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_learning_rate_that_is_not_finite_changes_no_bit(value):
    p = parts(optimizer=optax.adamw(lambda count: jnp.where(count < 1, 0.1, value)))
    step = jax.jit(make_step(p))
    before, _ = step(init_state(p, batch()), {}, batch())
    after, _ = step(before, {}, batch())
    assert int(after["bad"]) == 1
    assert_untouched(before, after)


def test_an_optimiser_that_alone_goes_wrong_changes_no_bit():
    """Finite loss, gradients and weights; only the optimiser's memory would not be."""

    def update(grads, state, params=None):
        return grads, {"memory": state["memory"] / (state["memory"] - 1)}

    p = parts(optimizer=optax.GradientTransformation(lambda params: {"memory": jnp.ones(())}, update))
    before = init_state(p, batch())
    after, metrics = jax.jit(make_step(p))(before, {}, batch())
    assert np.isfinite(metrics["loss"])
    assert int(after["bad"]) == 1
    assert_untouched(before, after)


@pytest.mark.parametrize(("at", "log_every"), [(5, 1), (5, 4), (7, 4)])
def test_k_bad_steps_in_a_row_stop_the_run_and_name_a_bad_batch(phantoms, tmp_path, monkeypatch, at, log_every):
    """The batches of steps `at` to `at + 2` are poisoned, k = 3: the last of them is named, not a good one after it."""
    config = replace(configs.load(write_config(tmp_path / "config.py", phantoms.root)), log_every=log_every)
    config = replace(config, max_bad_steps=3, cache=str(tmp_path.parent / "nan_cache"))
    stream, cases = training.pipeline.stream, {}

    def poisoned(**feed):
        for step, values in enumerate(stream(**feed), feed["start"] + 1):
            cases[step] = values["case"]
            bad = at <= step < at + 3
            yield {**values, "image": values["image"] * np.nan} if bad else values

    monkeypatch.setattr(training.pipeline, "stream", poisoned)
    with pytest.raises(UserError, match="3 steps in a row") as error:
        training.train(config, tmp_path / "run", report=False)
    ids = [f"{phantoms.cases[i].id}" for i in cases[at + 2]]
    assert error.value.found == f"step {at + 2}, cases {', '.join(ids)}"
    assert "data check" in str(error.value)
    monkeypatch.undo()
    training.train(config, tmp_path / "run", report=False)  # goes on from the last checkpoint


def test_fewer_bad_steps_are_counted_and_survived(phantoms, tmp_path, monkeypatch):
    import json

    config = configs.load(write_config(tmp_path / "config.py", phantoms.root))
    config = replace(config, max_bad_steps=3, log_every=4, cache=str(tmp_path.parent / "nan_cache"))
    stream = training.pipeline.stream

    def poisoned(**feed):
        for step, values in enumerate(stream(**feed), feed["start"] + 1):
            yield {**values, "image": np.full_like(values["image"], np.inf)} if step in (5, 6, 9) else values

    monkeypatch.setattr(training.pipeline, "stream", poisoned)
    training.train(config, tmp_path / "run", report=False)
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [e["skipped"] for e in entries if e["kind"] == "train"] == [0, 2, 1, 0, 0, 0]
    assert all(np.isfinite(e["loss"]) for e in entries if e["kind"] == "train")

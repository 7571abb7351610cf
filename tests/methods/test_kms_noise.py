"""KMS noise: finds regions of wrong labels, keeps its posteriors in the frame of the case, survives NaN."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from medseg_jax import Augment, KMSNoise, Labels, Optim, Robust, Stage, UNet, UserError
from medseg_jax.data.augment import augment, number_voxels
from medseg_jax.data.plan import Plan
from medseg_jax.methods.kms_noise import (
    Posterior,
    Prior,
    Store,
    error_probability,
    expected_flip,
    infer,
    soften,
    to_patch,
    to_window,
)
from medseg_jax.methods.objective import Task
from medseg_jax.training.step import StepParts, init_state, make_step

NET = UNet(2, (4, 8), ((1, 1), (2, 2)), ((3, 3), (3, 3)), deep_supervision=False)


def plan(patch=(16, 16), classes=("a",), dim=2):
    stage = ((1,) * dim, (2,) * dim)
    return Plan(
        dim, None, patch, 2, ({"scheme": "none"},), stage, ((3,) * dim,) * 2, (4, 8), False, 10, tuple(classes), 1
    )


def task(labels, extent=((1, 16, 16), (1, 16, 16)), sample=(16, 16), cases=3, **options):
    return Task(plan(classes=labels.names, **options), labels, 1, cases, extent=extent, sample_size=sample)


def batch(labels_map, case=(0, 1), start=(0, 0, 0)):
    image = np.random.default_rng(0).normal(size=(*labels_map.shape, 1)).astype(np.float32)
    starts = np.tile(np.int32(start), (len(case), 1))
    return {"image": image, "label": labels_map, "case": np.int32(case), "start": starts}


def parts(method, augmentation=None, accumulate=1):
    stage = Stage(method, augment=augmentation or Augment.none(), optim=Optim(accumulate=accumulate))
    return StepParts(method, optax.sgd(1e-2), stage, 0.0, (1.0, 1.0), (16, 16))


# ------------------------------------------------------------------------------------------------------------ inference


def found(rho, whiten, visits):
    """Specification T3: a strip of a square is missing in the label, and single pixels are flipped."""
    n, rng = 64, np.random.default_rng(0)
    clean = np.zeros((n, n), int)
    clean[16:48, 16:48] = 1
    y = clean.copy()
    y[16:48, 40:48] = 0
    strip = y != clean
    lone = (rng.random((n, n)) < 0.01) & ~strip
    y[lone] ^= 1
    gap = jnp.log(jnp.where(y == clean, 0.99 / 0.01, 0.01 / 0.99))[None, None]
    prior = Prior(rho=rho, rho_g=rho)

    @jax.jit
    def visit(now):
        flip = lambda p, _: expected_flip(p.m, p.g, 5)  # noqa: E731
        return infer(now, gap, jnp.ones((1, n, n)), prior, flip, optax.adam(0.1), 10, whiten)

    now = Posterior(jnp.full((1, 1, n, n), -5.0), jnp.ones((1, 1, n, n)))
    for _ in range(visits):
        now = visit(now)
    wrong = np.asarray(jax.nn.sigmoid(now.m))[0, 0]
    return wrong[strip].mean(), wrong[lone].mean(), wrong[~strip & ~lone].mean()


def test_a_missing_region_is_found_and_lone_pixels_are_not():
    strip, lone, right = found(0.75, whiten=False, visits=80)
    assert strip == pytest.approx(0.94, abs=0.02)
    assert max(lone, right) < 0.02


def test_without_correlation_regions_and_lone_pixels_look_alike():
    strip, lone, _ = found(0.0, whiten=False, visits=20)
    assert strip == pytest.approx(lone, abs=0.02)


def test_whitening_needs_few_visits_also_at_high_correlation():
    for rho in (0.75, 0.9):
        strip, lone, right = found(rho, whiten=True, visits=6)
        assert strip > 0.9
        assert max(lone, right) < 0.03


def test_quadrature_equals_many_samples():
    m, g = jnp.linspace(-6, 2, 5), jnp.full(5, 1.3)
    noise = jax.random.normal(jax.random.key(0), (200_000, 5))
    np.testing.assert_allclose(expected_flip(m, g, 5), expected_flip(m, g, 0, noise).mean(0), atol=3e-3)


def test_soft_targets_are_distributions():
    labels = Labels.simple("a", "b", "c")
    target = jnp.asarray(labels.table)[jnp.arange(4)]
    soft = soften(target, jnp.full((4, 1), 0.3), labels)
    np.testing.assert_allclose(soft.sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(jnp.diagonal(soft), 0.7)
    both = Labels.overlapping("a", "b")
    soft = soften(jnp.asarray(both.table)[jnp.arange(4)], jnp.full((4, 2), 0.3), both)
    np.testing.assert_allclose(soft[3], [0.7, 0.7])


# ---------------------------------------------------------------------------------------------------- frame of the case


@pytest.mark.parametrize("classes", [2, 4])
def test_error_probability_is_bayes_rule_over_the_true_class(classes):
    rng = np.random.default_rng(classes)
    p, flip = rng.dirichlet(np.ones(classes), 50), rng.uniform(0.01, 0.99, 50)
    channel = np.where(np.arange(classes) == 0, 1 - flip[:, None], flip[:, None] / (classes - 1))  # label 0 was written
    joint = p * channel
    expected = 1 - joint[:, 0] / joint.sum(1)
    np.testing.assert_allclose(
        error_probability(jnp.asarray(flip), jnp.asarray(p[:, 0]), classes - 1), expected, rtol=1e-5
    )


@pytest.mark.parametrize("size", [(12, 10), (6, 8, 10)])
def test_mirrors_are_undone_exactly(size):
    rng = np.random.default_rng(1)
    label = jnp.asarray(rng.integers(0, 4, (3, *size)), jnp.int32)
    image = jnp.asarray(rng.normal(size=(3, *size, 1)), jnp.float32)
    config = replace(Augment.none(), p_mirror=0.5)
    given = {"image": image, "label": label, "voxel": number_voxels(label.shape)}
    out = augment(jax.random.key(3), given, config, size)
    assert (np.asarray(out["label"]) != label).any()
    back, counted, shown = to_window(out["label"][..., None].astype(jnp.float32), None, out["voxel"], size)
    np.testing.assert_array_equal(back[:, 0], label)
    assert counted.all()
    assert shown.all()
    np.testing.assert_array_equal(to_patch(label[:, None], out["voxel"])[..., 0], out["label"])


def test_a_warp_moves_the_voxels_as_it_moves_the_labels():
    rng = np.random.default_rng(1)
    label = jnp.asarray(rng.integers(1, 9, (4, 24, 24)), jnp.int32)
    image = jnp.asarray(rng.normal(size=(4, 24, 24, 1)), jnp.float32)
    config = replace(Augment.none(), p_mirror=0.5, p_rotation=1.0, p_scale=1.0, p_elastic=1.0)
    given = {"image": image, "label": label, "voxel": number_voxels(label.shape)}
    out = augment(jax.random.key(0), given, config, (16, 16))
    np.testing.assert_array_equal(to_patch(label[:, None].astype(float), out["voxel"])[..., 0], out["label"])
    back, counted, shown = to_window(out["label"][..., None].astype(jnp.float32), None, out["voxel"], (24, 24))
    np.testing.assert_allclose(np.where(shown, back[:, 0], 0), np.where(shown, label, 0), atol=1e-5)
    assert 0 < shown.mean() < 1
    np.testing.assert_array_equal(counted > 0, shown)


def test_ignored_voxels_are_shown_but_not_counted():
    voxel = number_voxels((1, 4, 4))
    weight = jnp.ones((1, 4, 4)).at[0, 0, 0].set(0)
    values = jnp.ones((1, 4, 4, 1)).at[0, 0, 0].set(jnp.nan)
    back, counted, shown = to_window(values, weight, voxel, (4, 4))
    assert back[0, 0, 0, 0] == 0
    assert counted[0, 0, 0] == 0
    assert shown.all()


def test_a_store_holds_windows_that_reach_outside():
    labels = Labels.simple("a")
    store = Store.of(task(labels, extent=((1, 10, 20), (1, 30, 20)), sample=(20, 20)))
    assert store.shape[0] % 64 == 0
    _, corner = store.place(jnp.array([1, 2]), jnp.array([[0, -5, -2], [0, 12, 2]]))
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(2, *store.shape[1:])), jnp.float32)
    window = store.window(rows, corner)
    assert window.shape == (2, 1, 20, 20)
    changed = store.put(rows, window + 1, corner)
    np.testing.assert_allclose(store.window(changed, corner), window + 1, rtol=1e-6)
    assert int((changed != rows).sum()) == 2 * 400
    assert (corner >= 0).all()
    assert (corner + 20 <= np.array(store.shape[2:])).all()


def test_of_a_case_that_a_batch_shows_twice_the_later_sample_counts():
    store = Store.of(task(Labels.simple("a")))
    array, rows = jnp.zeros(store.shape), jnp.arange(1.0, 4.0)[:, None, None, None] * jnp.ones((3, *store.shape[1:]))
    written = store.write(array, rows, jnp.array([2, 0, 2]))
    assert [float(written[i].max()) for i in range(3)] == [2.0, 0.0, 3.0]


def test_slices_of_a_volume_have_a_row_each():
    store = Store.of(task(Labels.simple("a"), extent=((3, 16, 16), (5, 16, 16))))
    unit, _ = store.place(jnp.array([0, 2]), jnp.array([[4, 0, 0], [1, 0, 0]]))
    assert unit.tolist() == [4, 11]


# --------------------------------------------------------------------------------------------------------------- a step


@pytest.mark.parametrize(
    "labels", [Labels.simple("a"), Labels.simple("a", "b", ignore=3), Labels.overlapping("a", "b")], ids=str
)
def test_a_step_moves_the_posteriors_of_the_batch_alone(labels):
    method = KMSNoise(NET, e_steps=2, begin=0).bind(task(labels, cases=4))
    p = parts(method, replace(Augment.none(), p_mirror=0.5))
    label = np.random.default_rng(0).integers(0, 1 + max(labels.known), (2, 16, 16)).astype(np.int32)
    given = batch(label, case=(0, 2))
    state = init_state(p, given)
    new, metrics = jax.jit(make_step(p))(state, {}, given)
    moved = np.asarray((new["aux"]["cases"]["m"] != state["aux"]["cases"]["m"]).any((1, 2, 3)))
    assert np.flatnonzero(moved).tolist() == [0, 2]
    assert np.isfinite(metrics["loss"])
    assert 0 < metrics["wrong"] < 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_before_the_warm_up_ends_it_is_cross_entropy(accumulate):
    """The warm-up is counted in steps, into however many parts their batches are divided."""
    labels = Labels.simple("a", "b")
    label = np.random.default_rng(0).integers(0, 3, (2, 16, 16)).astype(np.int32)
    kms = parts(KMSNoise(NET, warmup=1, begin=0).bind(task(labels)), accumulate=accumulate)
    plain = parts(Robust(NET, loss_name="ce").bind(task(labels)), accumulate=accumulate)
    given = batch(label)
    step = jax.jit(make_step(kms))
    first, metrics = step(init_state(kms, given), {}, given)
    _, expected = jax.jit(make_step(plain))(init_state(plain, given), {}, given)
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-6)
    assert metrics["wrong"] == 0
    assert (first["aux"]["cases"]["m"] == -5).all()
    second, metrics = step(first, {}, given)
    assert metrics["wrong"] > 0
    assert (second["aux"]["cases"]["m"] != -5).any()


def test_only_classes_that_the_network_knows_are_doubted():
    p = parts(KMSNoise(NET, e_steps=2, begin=0.5).bind(task(Labels.overlapping("a", "b"))))
    given = batch(np.random.default_rng(0).integers(0, 4, (2, 16, 16)).astype(np.int32))
    state = init_state(p, given)
    state["aux"]["agreement"] = jnp.asarray([[9e5, 1e5], [1e6, 1e6]])  # Dice .9 and .1
    new, metrics = jax.jit(make_step(p))(state, {}, given)
    moved = np.asarray((new["aux"]["cases"]["m"] != -5).any((0, 2, 3)))
    assert moved.tolist() == [True, False]
    assert metrics["doubted"] == 0.5
    np.testing.assert_allclose(new["aux"]["agreement"], 0.9 * np.asarray([[9e5, 1e5], [1e6, 1e6]]), atol=2000)


def test_nan_enters_no_posterior():
    labels = Labels.simple("a")
    p = parts(KMSNoise(NET, e_steps=2, begin=0).bind(task(labels)))
    given = batch(np.ones((2, 16, 16), np.int32))
    given["image"][1, 3, 3] = np.nan
    state = init_state(p, given)
    new, metrics = jax.jit(make_step(p))(state, {}, given)
    assert metrics["bad"] == 1
    for name in ("params", "aux"):
        jax.tree.map(np.testing.assert_array_equal, new[name], state[name])


def test_a_learned_rho_moves_and_a_fixed_one_is_no_parameter():
    labels = Labels.simple("a")
    given = batch(np.random.default_rng(0).integers(0, 2, (2, 16, 16)).astype(np.int32))
    p = parts(KMSNoise(NET, e_steps=2, learn_rho=True, begin=0).bind(task(labels)))
    state = init_state(p, given)
    new, metrics = jax.jit(make_step(p))(state, {}, given)
    assert float(metrics["rho"]) == pytest.approx(0.75, abs=1e-5)
    assert new["params"]["noise"]["rho"] != state["params"]["noise"]["rho"]
    fixed = KMSNoise(NET).bind(task(labels))
    assert "noise" not in fixed.init(jax.random.key(0), given)[0]


@pytest.mark.parametrize("options", [{"rho": 1.0}, {"rho": 0.97, "learn_rho": True}, {"variance": "wrong"}])
def test_settings_that_make_no_sense_are_refused(options):
    with pytest.raises(UserError):
        KMSNoise(NET, **options)


# ------------------------------------------------------------------------------------------------------------ baselines


@pytest.mark.parametrize("name", ["ce", "dice_ce", "gce", "smoothing", "em", "t_loss"])
@pytest.mark.parametrize("labels", [Labels.simple("a", "b"), Labels.overlapping("a", "b")], ids=["softmax", "sigmoid"])
def test_every_robust_loss_learns_an_easy_batch(name, labels):
    method = Robust(NET, loss_name=name).bind(task(labels))
    label = np.zeros((2, 16, 16), np.int32)
    label[:, 4:12, 4:12] = 1
    given = batch(label)
    given["image"][..., 0] = label
    params, aux = method.init(jax.random.key(0), given)
    adam = optax.adam(1e-2)

    @jax.jit
    def step(params, aux, state):
        (loss, (aux, _)), grads = jax.value_and_grad(method.loss, has_aux=True)(
            params, aux, {}, given, jax.random.key(1)
        )
        updates, state = adam.update(grads, state)
        return optax.apply_updates(params, updates), aux, state, loss

    state, losses = adam.init(params), []
    for _ in range(12):
        params, aux, state, loss = step(params, aux, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    probabilities = method.predict(params, aux, {}, given["image"])
    assert probabilities.shape == (2, 16, 16, labels.channels)


def test_an_unknown_robust_loss_is_refused():
    with pytest.raises(UserError, match="robust loss"):
        Robust(NET, loss_name="mse")  # type: ignore[arg-type]

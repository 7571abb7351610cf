"""Mamba-Sea and the baselines beside it: what they change, what they leave alone, on one device and on two."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_jax import DSU, FourierMixing, MambaSea, MixStyle, Supervised, UNet, UserError, losses
from medseg_jax.data.plan import Plan
from medseg_jax.methods import mamba_sea as ms
from medseg_jax.methods.objective import Task
from medseg_jax.models.vmunet import VMUNet
from medseg_jax.types import Labels

RGB = ({"scheme": "fixed", "mean": 100.0, "std": 50.0},) * 3
PLAN = Plan(2, None, (16, 16), 4, RGB, ((1, 1),), ((3, 3),), (4,), False, 10, ("a",), 3)
TASK = Task(PLAN, Labels.simple("a", ignore=2), 3)
U_NET = UNet.isotropic(2, 4, 8)
VM_UNET = VMUNet(features=(8, 16), depths=(1, 1), decoder_depths=(1, 1), states=2, stem=2)


def batch(rows=4, seed=0, light=60.0):
    rng = np.random.default_rng(seed)
    image = (rng.uniform(0, 2 * light, (rows, 16, 16, 3)) - 100) / 50
    return {"image": jnp.asarray(image, jnp.float32), "label": jnp.asarray(rng.integers(0, 3, (rows, 16, 16)))}


def started(method, rows=4):
    bound = method.bind(TASK)
    return bound, *bound.init(jax.random.key(0), batch(rows))


def loss(method, params, aux, data, key=1):
    return method.loss(params, aux, {}, data, jax.random.key(key))[0]


@pytest.mark.parametrize(
    ("net", "mode"),
    [
        (U_NET, "as_run"),
        pytest.param(VM_UNET, "paper", marks=pytest.mark.slow),
        pytest.param(VM_UNET, "as_run", marks=pytest.mark.slow),
        pytest.param(U_NET, "head", marks=pytest.mark.slow),
        pytest.param(VM_UNET, "off", marks=pytest.mark.slow),
    ],
)
def test_every_parameter_learns_on_every_network(net, mode):
    method, params, aux = started(MambaSea(net, lsa=mode, lsa_probability=1.0, gva_keep=0.0))
    value, grads = jax.jit(jax.value_and_grad(partial(loss, method)))(params, aux, batch())
    assert np.isfinite(value)
    for path, g in jax.tree_util.tree_leaves_with_path(grads):
        assert np.abs(g).max() > 0, path


def test_volumes_have_a_gva_of_their_own():
    plan = replace(PLAN, dim=3, patch_size=(8, 8, 8), strides=((1, 1, 1),), kernel_sizes=((3, 3, 3),))
    method = MambaSea(UNet.isotropic(3, 4, 8)).bind(replace(TASK, plan=plan))
    image = jax.ShapeDtypeStruct((2, 8, 8, 8, 3), jnp.float32)
    params, _ = jax.eval_shape(method.init, jax.random.key(0), {"image": image})
    assert params["gva"]["enter"]["kernel"].shape == (3, 3, 3, 3, 3)
    assert jax.eval_shape(method.change, params, image, jax.random.key(0)).shape == image.shape


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        (MambaSea, {"lsa": "all"}),
        (MambaSea, {"lsa_window": 1.5}),
        (MambaSea, {"lsa_probability": -0.1}),
        (MambaSea, {"gva_keep": 3}),
        (MixStyle, {"probability": 2}),
        (MixStyle, {"alpha": -1}),
        (MixStyle, {"alpha": 0}),
        (DSU, {"probability": 2}),
        (FourierMixing, {"strength": 1.5}),
        (FourierMixing, {"band": -1}),
    ],
)
def test_settings_out_of_range_are_refused(method, setting):
    with pytest.raises(UserError, match=r"LSA|cannot be used"):
        method(U_NET, **setting)


def test_one_network_has_half_the_parameters_and_the_gradient_of_both_branches():
    two, params, aux = started(MambaSea(U_NET, lsa="off"))
    one, shared, _ = started(MambaSea(U_NET, lsa="off", one_network=True))
    assert jax.tree.map(jnp.shape, params["f"]) == jax.tree.map(jnp.shape, params["g"])
    assert set(shared) == {"f", "gva"}
    tied = {**params, "g": params["f"]}
    whole = jax.grad(partial(loss, two))(tied, aux, batch())
    summed = jax.tree.map(jnp.add, whole["f"], whole["g"])
    found = jax.grad(partial(loss, one))({"f": params["f"], "gva": params["gva"]}, {"stats": {"f": {}}}, batch())
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), found["f"], summed)


def test_the_branches_start_apart_and_f_alone_predicts():
    method, params, aux = started(MambaSea(U_NET))
    kernels = [jax.tree.leaves(params[branch]["encoder"]["0"]["blocks"]["0"]["conv"])[0] for branch in "fg"]
    assert not np.allclose(*kernels)
    image = batch()["image"]
    alone = Supervised(U_NET).bind(TASK)
    expected = alone.predict(params["f"], {"stats": aux["stats"]["f"]}, {}, image)
    np.testing.assert_array_equal(method.predict(params, aux, {}, image), expected)
    other = {**params, "g": jax.tree.map(jnp.zeros_like, params["g"])}
    np.testing.assert_array_equal(method.predict(other, aux, {}, image), expected)


def test_both_branches_start_from_the_weight_file():
    method, params, aux = started(MambaSea(U_NET))
    seen = []

    def load(net, params, stats):
        seen.append(net)
        return jax.tree.map(jnp.zeros_like, params), stats

    new, new_aux = method.pretrained(params, aux, load)
    assert seen == [method.net] * 2
    assert not any(leaf.any() for branch in "fg" for leaf in jax.tree.leaves(new[branch]))
    jax.tree.map(np.testing.assert_array_equal, new["gva"], params["gva"])
    assert jax.tree.structure(new_aux) == jax.tree.structure(aux)


def test_without_lsa_and_gva_and_consistency_it_is_two_plain_trainings():
    method, params, aux = started(MambaSea(U_NET, lsa="off", gva=False, consistency=0.0))
    grads = jax.grad(partial(loss, method))(params, aux, batch())
    changed = {**params, "g": jax.tree.map(lambda p: 2 * p, params["g"])}
    again = jax.grad(partial(loss, method))(changed, aux, batch())
    jax.tree.map(np.testing.assert_array_equal, grads["f"], again["f"])


def test_ignored_voxels_change_nothing():
    method, data = MambaSea(VM_UNET).bind(TASK), batch()
    f, g = (jax.random.normal(jax.random.key(i), (4, 16, 16, 2)) for i in (0, 1))
    target, weight = method.target(data["label"])
    ignored = (data["label"] == 2)[..., None]

    @jax.jit
    def value_and_slopes(f, g):
        return jax.value_and_grad(lambda z: ms.objective((z[0],), (z[1],), target, weight)[0])((f, g))

    expected = value_and_slopes(f, g)
    found = value_and_slopes(jnp.where(ignored, jnp.nan, f), jnp.where(ignored, 9.0, g))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_dice_is_of_the_batch_or_of_each_image(monkeypatch):
    logits = 3 * jax.random.normal(jax.random.key(0), (4, 16, 16, 2))
    monkeypatch.setattr(MambaSea, "branch", lambda *_: ((logits,), {}))
    found = {}
    for whole in (True, False):
        method = MambaSea(U_NET, gva=False, batch_dice=whole).bind(TASK)
        nothing = {"f": {}, "g": {}}
        _, (_, parts) = method.loss(nothing, {"stats": nothing}, {}, batch(), jax.random.key(0))
        expected = losses.dice_loss(
            logits, *method.target(batch()["label"]), batch=whole, background=True, squared=True
        )
        np.testing.assert_allclose(parts["dice_loss"], expected, rtol=1e-6)
        found[whole] = float(expected)
    assert found[True] != found[False]


# ------------------------------------------------------------------------------------------------------- augmentations


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 5), st.integers(3, 30), st.integers(0, 99), st.sampled_from(["as_run", "paper", "head"]))
def test_lsa_gives_each_channel_another_mean_and_leaves_a_lone_image_alone(rows, tokens, seed, mode):
    x = (
        3
        + jax.random.normal(jax.random.key(seed), (rows, tokens, 1, 5)) * jnp.arange(1.0, rows + 1)[:, None, None, None]
    )
    np.testing.assert_array_equal(ms.lsa(jax.random.key(1), x[:1], mode), x[:1])
    np.testing.assert_array_equal(ms.lsa(jax.random.key(1), x, mode, probability=0.0), x)
    y = ms.lsa(jax.random.key(seed), x, mode, probability=1.0, window=1.0)
    assert y.shape == x.shape
    if mode != "head":  # standardised tokens stay what they are, up to a sign
        standard = [(v - v.mean(1, keepdims=True)) / v.std(1, keepdims=True) for v in (x, y)]
        np.testing.assert_allclose(abs(standard[0]), abs(standard[1]), atol=2e-2)
    assert not np.allclose(x, y)


def test_the_window_of_the_paper_lets_the_rest_through():
    x = jax.random.normal(jax.random.key(0), (3, 10, 10, 4))
    y = ms.lsa(jax.random.key(1), x, "paper", 1.0, 0.3)
    changed = np.asarray((x != y).any(-1).reshape(3, -1))
    for row in changed:
        inside = np.flatnonzero(row)
        assert len(inside) == 30
        assert inside[-1] - inside[0] == 29
    assert len({tuple(row) for row in changed}) > 1


@pytest.mark.parametrize("mode", ["as_run", "paper", "head"])
def test_a_lone_token_has_no_style(mode):
    """The deepest features of a network may be a single one: VM-UNet's of a patch of 32 x 32."""
    x = jax.random.normal(jax.random.key(0), (4, 1, 1, 3))
    y, slope = jax.value_and_grad(lambda x: ms.lsa(jax.random.key(1), x, mode, probability=1.0).sum())(x)
    np.testing.assert_array_equal(y, x.sum())
    np.testing.assert_array_equal(slope, 1)
    mixed = MixStyle(U_NET, probability=1.0).mix(jax.random.key(1), x)
    np.testing.assert_array_equal(mixed, x)


def test_gva_changes_dark_images_only_and_spares_some():
    bright, dark = batch(64, light=125.0), batch(64, light=30.0)
    method, params, _ = started(MambaSea(U_NET))
    for data, share in ((bright, 0.0), (dark, 0.8)):
        changed = method.change(params, data["image"], jax.random.key(0))
        moved = (changed != data["image"]).any((1, 2, 3))
        assert abs(float(moved.mean()) - share) < 0.15
        unit = (changed[moved] * 50 + 100) / 255
        assert not moved.any() or (unit.min() >= 0 and unit.max() <= 1 + 1e-5)
    np.testing.assert_array_equal(method.change(params, dark["image"][:1], jax.random.key(0)), dark["image"][:1])


@pytest.mark.parametrize(
    "scheme",
    [{"scheme": "zscore", "nonzero": False}, {"scheme": "ct", "low": -100.0, "high": 300.0, "mean": 40.0, "std": 9.0}],
)
def test_images_find_their_range_again(scheme):
    plan = replace(PLAN, normalization=(scheme,) * 3)
    raw = np.random.default_rng(0).uniform(-100, 300, (2, 8, 8, 3))
    image = (raw - raw.mean()) / raw.std() if scheme["scheme"] == "zscore" else (raw - 40) / 9
    low, span = ms.unit_range(jnp.asarray(image, jnp.float32), plan)
    unit = (image - np.asarray(low)) / np.asarray(span)
    assert -1e-6 <= unit.min() < 0.02
    assert 0.98 < unit.max() <= 1 + 1e-6


def test_mixstyle_takes_styles_from_the_batch_and_stops_after_its_stages():
    method = MixStyle(U_NET, probability=1.0, alpha=1.0).bind(TASK)
    x = jnp.arange(4.0)[:, None, None, None] * 10 + jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    y = method.mix(jax.random.key(1), x)
    means = np.asarray(y.mean((1, 2)))
    assert means.min() > -1
    assert means.max() < 31
    assert not np.allclose(means, x.mean((1, 2)), atol=0.5)
    hook = ms.at_each_call(method.mix, jax.random.key(1), 2)
    assert [bool((hook(x) != x).any()) for _ in range(4)] == [True, True, False, False]
    np.testing.assert_array_equal(replace(method, probability=0.0).bind(TASK).mix(jax.random.key(1), x), x)


def test_fourier_mixing_keeps_phases_and_high_frequencies():
    method = FourierMixing(U_NET, probability=1.0, band=0.3).bind(TASK)
    image = batch()["image"]
    mixed = method.mix(jax.random.key(0), image)
    before, after = (np.fft.fft2(50 * v + 100, axes=(1, 2)) / 255 for v in (image, mixed))
    far = np.abs(np.fft.fftfreq(16)) > 0.15
    outside = far[:, None] | far[None]
    np.testing.assert_allclose(before[:, outside], after[:, outside], atol=2e-3)
    np.testing.assert_allclose(np.angle(before[:, ~outside]), np.angle(after[:, ~outside]), atol=2e-3)
    assert not np.allclose(np.abs(before[:, ~outside]), np.abs(after[:, ~outside]), rtol=0.05)
    same = method.mix(jax.random.key(0), jnp.repeat(image[:1], 4, 0))
    np.testing.assert_allclose(same, jnp.repeat(image[:1], 4, 0), atol=1e-4)


def test_fourier_mixing_makes_a_dark_image_brighter_when_it_meets_a_bright_one():
    """The plan's scale has its zero in the middle, where a dark image's mean is negative."""
    light = jnp.array([20.0, 60.0, 180.0, 220.0])[:, None, None, None]
    image = (light + 20 * jax.random.uniform(jax.random.key(0), (4, 16, 16, 3)) - 100) / 50
    method = FourierMixing(U_NET, probability=1.0).bind(TASK)
    means = np.asarray([method.mix(jax.random.key(i), image).mean((1, 2, 3)) for i in range(8)])
    dark, *_, bright = np.asarray(image.mean((1, 2, 3)))
    assert means.min() > dark - 0.01
    assert means.max() < bright + 0.01
    assert means[:, 0].max() > dark + 0.5


# ---------------------------------------------------------------------------------------------------- several devices


ON_TWO = """
import jax, jax.numpy as jnp, numpy as np, sys
sys.path.insert(0, sys.argv[1])
import test_mamba_sea as t
from medseg_jax.runtime import hlo, sharding
key = jax.random.key(3)
sea, params, _ = t.started(t.MambaSea(t.U_NET))
functions = {
    "lsa as_run": lambda x: t.ms.lsa(key, x, "as_run", 1.0),
    "lsa paper": lambda x: t.ms.lsa(key, x, "paper", 1.0),
    "gva": lambda x: sea.change(params, x, key),
    "mixstyle": lambda x: t.MixStyle(t.U_NET, probability=1.0).mix(key, x),
    "fourier": lambda x: t.FourierMixing(t.U_NET, probability=1.0).bind(t.TASK).mix(key, x),
}
image = np.asarray(t.batch()["image"])
w = np.random.default_rng(0).normal(size=image.shape).astype("f4")
for name, function in functions.items():
    found = []
    for devices in (1, 2):
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        x = sharding.put_batch({"image": image}, mesh)["image"]
        assert len(x.sharding.device_set) == devices
        found.append(jax.jit(function)(x))
        found.append(jax.jit(jax.grad(lambda x: (function(x) * w).sum()))(x))
    assert not np.allclose(found[0], image), name
    for one, two in zip(found[:2], found[2:]):
        np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5, err_msg=name)


def sent(times):
    x = sharding.put_batch({"image": np.repeat(image, times, 0)}, sharding.make_mesh())["image"]
    found = hlo.count(jax.jit(functions["lsa as_run"]).lower(x).compile().as_text(), 2).collectives
    return {kind: one[1] for kind, one in found.items()}


assert sent(1) == sent(4), (sent(1), sent(4))  # nothing that is sent grows with the batch
assert set(sent(1)) == {"all-reduce"}
print("equal")
"""


def test_two_devices_give_the_numbers_of_one():
    """The statistics are those of the global batch, and all devices draw the same numbers; gradients too."""
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    command = [sys.executable, "-c", ON_TWO, str(Path(__file__).parent)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout.endswith("equal\n"), done.stderr

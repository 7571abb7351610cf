"""Mamba-Sea's augmentations and objective against the released code (golden/mamba_sea/{lsa,gva,losses}.npz)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_files
from medseg_jax import losses
from medseg_jax.methods import mamba_sea as ms
from medseg_jax.methods.objective import Fn


@pytest.fixture(scope="module")
def recipe(golden):
    return golden_files.load(golden)


@pytest.fixture(scope="module")
def reading(golden, recipe):
    """name -> (arrays, meta, inputs) of a golden file."""

    def read(name):
        arrays, meta = golden_files.read(golden / "mamba_sea" / f"{name}.npz")
        inputs = {key: golden_files.draw(recipe, i, meta["salt"]) for key, i in meta["recipe_inputs"].items()}
        return arrays, meta, inputs

    return read


def check(meta, name, found, expected):
    tolerance = meta["outputs"][name]["tolerance"]
    assert found.shape == expected.shape, name
    np.testing.assert_allclose(found, expected, rtol=tolerance.get("rtol", 0), atol=tolerance["atol"], err_msg=name)


def last(x):
    """PyTorch's channels second -> ours last."""
    return jnp.moveaxis(jnp.asarray(x), 1, -1)


@pytest.mark.parametrize("mode", ["as_run", "head", "paper"])
def test_lsa(reading, mode):
    arrays, meta, given = reading("lsa")
    x = last(given["amplitude"] * given["x0"] + given["offset"])
    window = (meta["window_length"] + 0.5) / x.shape[1]

    def call(x):
        return ms.resample_style(x, given["n1"], given["n2"], jnp.asarray(arrays["starts"]), mode, window)

    y, undo = jax.vjp(jax.jit(call), x)
    check(meta, mode, np.moveaxis(y, -1, 1), arrays[mode])
    check(meta, f"d_{mode}", np.moveaxis(undo(last(given["w"]))[0], -1, 1), arrays[f"d_{mode}"])


def test_the_style_that_lsa_draws(reading):
    arrays, meta, given = reading("lsa")
    x = last(given["amplitude"] * given["x0"] + given["offset"])
    mean, deviation = ms.style(x)
    check(meta, "beta", (mean + given["n1"][:, None] * ms.spread(mean))[:, 0], arrays["beta"])
    check(meta, "gamma", (deviation + given["n2"][:, None] * ms.spread(deviation))[:, 0], arrays["gamma"])


GVA_NAMES = {
    "in_conv.0.weight": ("enter", "kernel"),
    "in_conv.0.bias": ("enter", "bias"),
    "conv.0.weight": ("block", "kernel"),
    "conv.0.bias": ("block", "bias"),
    "conv.1.weight": ("norm", "scale"),
    "conv.1.bias": ("norm", "bias"),
    "out_conv.0.weight": ("leave", "kernel"),
    "out_conv.0.bias": ("leave", "bias"),
}


def test_gva(reading, recipe):
    arrays, meta, given = reading("gva")
    names = meta["weights"]["gva"]["names_and_shapes"]
    weights = recipe.weights({k: tuple(v) for k, v in names.items()}, meta["salt"])
    params: dict = {}
    for name, (module, leaf) in GVA_NAMES.items():
        w = weights[f"gva.{name}"]
        params.setdefault(module, {})[leaf] = jnp.asarray(w.transpose(2, 3, 1, 0) if w.ndim == 4 else w)
    x = last(given["x0"] * arrays["scale"][:, None, None, None])
    fn = Fn(lambda rngs: ms.GVA(x.shape[-1], rngs))

    def call(params, x):
        gate = ms.gva_gate(x, jnp.asarray(arrays["skip_draw"]), 0.4, 0.2)
        return jnp.where(gate, fn.apply(params, {}, x)[0], x)

    y, undo = jax.vjp(jax.jit(call), params, x)
    check(meta, "train", np.moveaxis(y, -1, 1), arrays["train"])
    d_params, d_x = undo(last(given["w"]))
    check(meta, "train_d_x", np.moveaxis(d_x, -1, 1), arrays["train_d_x"])
    for name, (module, leaf) in GVA_NAMES.items():
        g = np.asarray(d_params[module][leaf])
        check(meta, f"train_d_{name}", g.transpose(3, 2, 0, 1) if g.ndim == 4 else g, arrays[f"train_d_{name}"])
    channels = x.shape[-1]
    count = 3 * (9 * channels + 1) * channels + 2 * channels  # 258 of colour
    assert sum(p.size for p in jax.tree.leaves(params)) == count


def test_the_objective(reading):
    arrays, meta, given = reading("losses")
    for case in sorted({name.partition("/")[0] for name in given}):
        check_the_objective(arrays, meta, given, case)


def check_the_objective(arrays, meta, given, case):
    f, g = last(2 * given[f"{case}/f"]), last(2 * given[f"{case}/g"])
    note = meta["recipe_inputs"][f"{case}/label"]["then"]  # "integer label = minimum(floor(3 * value), 2)"
    factor, most = (int(part.split(")")[0].split("(")[-1].split(" ")[0]) for part in (note, note.split(", ")[1]))
    label = np.minimum(np.floor(factor * given[f"{case}/label"]), most).astype(int)
    target = jax.nn.one_hot(label, f.shape[-1])
    total, (d_f, d_g) = jax.value_and_grad(lambda z: ms.objective((z[0],), (z[1],), target, None)[0])((f, g))
    found = {"total": total, "d_f": np.moveaxis(d_f, -1, 1), "d_g": np.moveaxis(d_g, -1, 1)}
    for branch, z in (("f", f), ("g", g)):
        found[f"ce_{branch}"] = losses.cross_entropy(z, target)
        found[f"dice_{branch}"] = losses.dice_loss(z, target, background=True, squared=True)
    found["consistency"] = ms.logit_distance(f, g, None)
    for name, value in found.items():
        check(meta, f"{case}/{name}", value, arrays[f"{case}/{name}"])

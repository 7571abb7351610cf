"""KMS noise against the published code and dense linear algebra (golden/kms_noise): field, bound, E-step, baselines."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import golden_files
from medseg_jax import losses
from medseg_jax.methods.kms_noise import Posterior, Prior, expected_flip, infer, soften
from medseg_jax.ops import kms
from medseg_jax.types import Labels

FOLDER = "kms_noise"


def read(golden, name):
    return (*golden_files.read(golden / FOLDER / f"{name}.npz"), golden_files.load(golden))


def softplus(x):
    return float(np.logaddexp(x, 0))


def labels_of(recipe, meta, tag, shape, classes):
    drawn = recipe.array(tag, shape, meta["salt"], low=0, high=classes)
    return np.minimum(np.floor(drawn), classes - 1).astype(int)


def last(x):
    """[b, c, h, w] -> [b, h, w, c]."""
    return np.moveaxis(x, 1, -1)


# ---------------------------------------------------------------------------------------------------------------- field


def test_dense_matrices(golden, x64):
    arrays, *_ = read(golden, "dense")
    checked = 0
    for key, expected in arrays.items():
        if not (match := re.fullmatch(r"(inv|logdet|chol)/n(\d+)_rho([\d.]+)", key)):
            continue
        kind, n, rho = match[1], int(match[2]), float(match[3])
        eye = jnp.eye(n)
        if kind == "inv":  # a grid of n x 1, one unit impulse a field
            found = kms.precision_times(eye[:, :, None], rho, 2)[..., 0]
        elif kind == "chol":
            found = kms.correlate(eye[:, :, None], rho, 2)[..., 0].T
        else:
            found = kms.log_determinant((n, 1), rho, jnp.float64)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9, err_msg=key)
        checked += 1
    assert checked > 50


@pytest.mark.parametrize("double", [True, False])
def test_dense_kronecker(golden, double):
    arrays, meta, recipe = read(golden, "dense")
    shape, mu, s = (meta["H"], meta["W"]), meta["mu"], meta["s"]
    if abs(s - softplus(1)) < 1e-4:
        s = softplus(1)  # the meta rounds it
    names = {key.rsplit("/", 1)[0] for key in arrays if not re.match(r"(inv|logdet|chol)/", key)}
    assert names
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        salt = meta["salt"]
        m = jnp.asarray(-2 + recipe.array(f"{FOLDER}/dense/m", shape, salt).astype(float), dtype)
        g = jnp.asarray(1 + 0.25 * np.abs(recipe.array(f"{FOLDER}/dense/g", shape, salt).astype(float)), dtype)
        z = jnp.asarray(recipe.array(f"{FOLDER}/dense/z", shape, salt), dtype)
        for name in names:
            rhos = [float(x) for x in re.findall(r"rhog?([\d.]+)", name)]
            rho, rho_g = rhos[0], rhos[-1]
            found = {
                "quad": kms.quadratic(m - mu, rho, 2) / s**2,
                "trace": kms.trace(g, rho, rho_g, 2) / s**2,
                "kl": kms.kl(m, g, mu, s, rho, rho_g, 2),
                "logdet_sigma": 2 * m.size * math.log(s) + kms.log_determinant(shape, rho, dtype),
                "logdet_gamma": kms.entropy_term(g, rho_g, 2),
                "precision_times_field": kms.precision_times(z, rho, 2),
                "sample": m + g * kms.correlate(z, rho_g, 2),
            }
            tolerance = 1e-9 if double else 1e-5 if max(rhos) < 0.95 else 2e-5
            matched = [key for key in arrays if key.startswith(name + "/")]
            for key in matched:
                what = key.rsplit("/", 1)[1]
                scale = max(1.0, float(np.abs(arrays[key]).max()))
                np.testing.assert_allclose(
                    found[what], arrays[key], rtol=tolerance, atol=tolerance * scale, err_msg=key
                )


# ---------------------------------------------------------------------------------------------------------------- bound


def bound(logits, m, raw, y, eps, prior, variant):
    """total, term1, term2, term5 of a batch, as the published code prints them."""
    g = jax.nn.softplus(raw)
    labels = Labels.simple(*"abcdefgh"[: logits.shape[-1] - 1])
    target = jnp.asarray(labels.table, logits.dtype)[y]
    flip = expected_flip(m, jnp.sqrt(g) if variant == "official" else g, 0, eps)
    n = math.prod(m.shape[1:])
    guarded = jnp.log(jax.nn.softmax(logits) + 1e-8)  # as theirs; without it, improbable classes differ by 1e-3
    term1 = -losses.cross_entropy(guarded, soften(target, flip[..., None], labels))
    half = 0.5 * math.log(2 * math.pi)
    term2 = (-0.5 * kms.cross_term(m, g, *prior, dim=2) / n).mean() - half
    term5 = (0.5 * kms.entropy_term(g, prior.rho_g, 2) / n).mean() + half + 0.5
    return -(term1 + term2 + term5), (term1, term2, term5)


@pytest.mark.parametrize("double", [True, False])
def test_loss(golden, double):
    arrays, meta, recipe = read(golden, "loss")
    bits, dtype = ("f64", jnp.float64) if double else ("f32", jnp.float32)
    with jax.enable_x64(double):
        for case in meta["cases"]:
            n, c, rho = case["n"], case["C"], case["rho"]
            tag, b, salt = f"{FOLDER}/loss/n{n}_c{c}/", meta["batch"], meta["salt"]
            logits = jnp.asarray(last(2 * recipe.array(tag + "logits", (b, c, n, n), salt)), dtype)
            y = labels_of(recipe, meta, tag + "labels", (b, n, n), c)
            m = jnp.asarray(-2 + recipe.array(tag + "m", (b, n, n), salt), dtype)
            raw = jnp.asarray(1 + 0.5 * recipe.array(tag + "g_raw", (b, n, n), salt), dtype)
            eps = jnp.asarray(recipe.array(tag + "eps", (b, n, n), salt), dtype)
            prior = Prior(meta["mu"], softplus(meta["sigma_raw"]), rho, case["rho_g"])
            for variant in meta["variants"]:
                prefix = f"{case['key']}/{variant}/"
                run = jax.value_and_grad(bound, argnums=(0, 1, 2), has_aux=True)
                (total, terms), grads = jax.jit(run, static_argnums=6)(logits, m, raw, y, eps, prior, variant)
                found = {"total": total, **dict(zip(("term1", "term2", "term5"), terms, strict=True))}
                found["quad"] = kms.quadratic(m - prior.mu, rho, 2)
                found["trace"] = kms.trace(jax.nn.softplus(raw), rho, prior.rho_g, 2)
                for what in ("quad", "trace"):
                    key = f"{prefix}{what}_{bits}"
                    if key in arrays and not np.isclose(np.ravel(found[what])[0], np.ravel(arrays[key])[0], rtol=1e-2):
                        found[what] = found[what] / prior.s**2
                rtol = 1e-7 if double else (2e-6 if rho <= 0.75 else 1e-5)
                for what, value in found.items():
                    if (key := f"{prefix}{what}_{bits}") in arrays:
                        np.testing.assert_allclose(value, arrays[key], rtol=rtol, err_msg=key)
                for what, value in zip(("logits", "m", "g_raw"), grads, strict=True):
                    if (key := f"{prefix}grad_{what}_{bits}") in arrays:
                        expected = last(arrays[key]) if what == "logits" else arrays[key]
                        tolerance = (1e-6 if double else 2e-5) * np.abs(expected).max()
                        np.testing.assert_allclose(value, expected, rtol=0, atol=tolerance, err_msg=key)


@pytest.mark.parametrize("double", [True, False])
def test_estep(golden, double):
    arrays, meta, recipe = read(golden, "estep")
    n, c, b, steps, salt = meta["n"], meta["C"], meta["batch"], meta["steps"], meta["salt"]
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        assert c == 2
        logits = jnp.asarray(last(3 * recipe.array(f"{FOLDER}/estep/logits", (b, c, n, n), salt)), dtype)
        y = labels_of(recipe, meta, f"{FOLDER}/estep/labels", (b, n, n), c)
        eps = jnp.asarray(recipe.array(f"{FOLDER}/estep/eps", (steps, b, n, n), salt), dtype)[:, :, None]
        # Adam magnifies whatever it sees: their guard of 1e-8 inside the logarithm has to be repeated here.
        log_p = jnp.log(jax.nn.softmax(logits) + 1e-8)
        gap = jnp.where(y == 1, log_p[..., 1] - log_p[..., 0], log_p[..., 0] - log_p[..., 1])[:, None]
        prior = Prior(meta["mu"], softplus(meta["sigma_raw"]), meta["rho"], meta["rho_g"])
        starts = {
            "init": (np.full((b, n, n), -5.0), np.ones((b, n, n))),
            "spread": (
                -3 + 2 * recipe.array(f"{FOLDER}/estep/m0", (b, n, n), salt),
                1 + 0.5 * recipe.array(f"{FOLDER}/estep/g0", (b, n, n), salt),
            ),
        }
        # Theirs descends on the mean over voxels and batch, ours on the sum: Adam's epsilon grows with it.
        adam = optax.adam(meta["lr"], eps=1e-8 * n * n * b)
        for name, start in starts.items():
            for variant in ("official", "stdg"):

                def flip(now, t, variant=variant):
                    return expected_flip(now.m, jnp.sqrt(now.g) if variant == "official" else now.g, 0, eps[t])

                before = Posterior(*(jnp.asarray(x, dtype)[:, None] for x in start))
                counted = jnp.ones((b, n, n), dtype)
                found = {
                    t: jax.jit(infer, static_argnums=(4, 5, 6, 7))(before, gap, counted, prior, flip, adam, t, False)
                    for t in ((1, steps // 2, steps) if double else (steps,))
                }
                for t, posterior in found.items():
                    for what, value in zip(("m", "g_raw"), posterior, strict=True):
                        expected = arrays[f"{name}/{variant}/{what}"][t - 1]
                        error = np.abs(np.asarray(value)[:, 0] - expected)
                        if name == "spread":
                            assert error.max() < (1e-6 if double else 2e-5), (name, variant, what, t)
                        elif what == "m":
                            assert error.max() < (5e-6 if double else 5e-3)
                        else:  # the gradient of g starts at 0, and Adam makes steps of what rounding leaves
                            assert np.quantile(error, 0.99) < (1e-4 if double else 0.05)
                            assert error.max() < (1e-3 if double else 0.5)


# ------------------------------------------------------------------------------------------------------------ baselines


@pytest.mark.parametrize("double", [True, False])
def test_baselines(golden, double):
    arrays, meta, recipe = read(golden, "baselines")
    n, b, salt = meta["n"], meta["batch"], meta["salt"]
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        rtol, atol = (1e-7, 1e-6) if double else (2e-6, 1e-5)

        def close(found, key, tolerance=rtol):
            expected = arrays[key]
            if "grad" in key or "respons" in key:
                np.testing.assert_allclose(found, expected, rtol=0, atol=atol * np.abs(expected).max(), err_msg=key)
            else:
                np.testing.assert_allclose(found, expected, rtol=tolerance, err_msg=key)

        for c in meta["classes"]:
            logits = jnp.asarray(last(2 * recipe.array(f"{FOLDER}/baselines/logits_c{c}", (b, c, n, n), salt)), dtype)
            y = labels_of(recipe, meta, f"{FOLDER}/baselines/labels_c{c}", (b, n, n), c)
            target = jnp.eye(c, dtype=dtype)[y]
            for smooth in sorted({k.split("/")[2] for k in arrays if k.startswith(f"em/c{c}/")}):
                share = float(smooth.removeprefix("smooth"))
                on, off = math.log(1 - share + 1e-8), math.log((share + 1e-8) / (c - 1))
                confusion = (off + (on - off) * jnp.eye(c, dtype=dtype))[None]
                value, (dz, dc) = jax.value_and_grad(
                    lambda z, a, target=target: losses.confusion_loss(z, target, confusion=a), argnums=(0, 1)
                )(logits, confusion)
                prefix = f"em/c{c}/{smooth}/"
                close(value, prefix + "loss")
                close(np.moveaxis(dz, -1, 1), prefix + "grad_logits")
                close(dc[0], prefix + "grad_confusion")
            value, dz = jax.value_and_grad(lambda z, target=target: losses.binary_cross_entropy(z, target))(logits)
            close(value, f"bce_on_onehot/c{c}/loss")
            close(np.moveaxis(dz, -1, 1), f"bce_on_onehot/c{c}/grad_logits")
        c = 2
        logits = jnp.asarray(last(2 * recipe.array(f"{FOLDER}/baselines/logits_c{c}", (b, c, n, n), salt)), dtype)
        y = labels_of(recipe, meta, f"{FOLDER}/baselines/labels_c{c}", (b, n, n), c)
        target = jnp.eye(c, dtype=dtype)[y]
        for key in sorted({k.rsplit("/", 1)[0] for k in arrays if k.startswith("tloss")}):
            form, nu = key.split("/")
            nu = jnp.asarray(float(nu.removeprefix("nu")), dtype)

            def t_loss(z, nu, form=form, target=target):
                error = jax.nn.softmax(z) - target  # [b, h, w, c]
                if form == "tloss_foreground":
                    return losses.student_t_loss(error[..., 1:], nu)
                columns = jnp.moveaxis(error, 2, -1)  # [b, h, c, w]: their copy sums over rows and classes
                return losses.student_t_loss(columns, nu, size=n * n)

            value, (dz, dnu) = jax.value_and_grad(t_loss, argnums=(0, 1))(logits, nu)
            close(value, key + "/loss", 1e-6 if double else 2e-5)  # their constants are float32
            close(np.moveaxis(dz, -1, 1), key + "/grad_logits")
            np.testing.assert_allclose(dnu, arrays[key + "/grad_nu"], rtol=1e-5 if double else 1e-3)

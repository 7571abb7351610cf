"""Dice + cross entropy against MONAI's DiceCELoss (golden/unetr/dice_ce.npz): value, gradient, without background."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_files
from medseg_jax.losses import dice_ce


@pytest.fixture(scope="module")
def reference(golden):
    arrays, meta = golden_files.read(golden / "unetr" / "dice_ce.npz")
    given = meta["inputs"]["logits"]
    logits = 2 * golden_files.load(golden).array(given["recipe_tag"], tuple(given["shape"]), meta["salt"])  # [b, k, *s]
    logits = jnp.moveaxis(jnp.asarray(logits), 1, -1)
    target = jax.nn.one_hot(arrays["in_labels"][:, 0], meta["config"]["classes"])  # [b, *s, k]
    return arrays, meta, logits, target


@pytest.mark.parametrize(("name", "background"), [("loss", True), ("loss_without_background", False)])
def test_value(reference, name, background):
    arrays, meta, logits, target = reference
    smooth = meta["config"]["smooth_nr"]
    value = dice_ce(logits, target, batch=False, background=background, smooth=smooth)
    np.testing.assert_allclose(value, arrays[name], rtol=0, atol=meta["outputs"][name]["atol"])


def test_gradient(reference):
    arrays, meta, logits, target = reference
    gradient = jax.grad(lambda x: dice_ce(x, target, batch=False, background=True))(logits)
    atol = meta["outputs"]["grad_logits"]["atol"]
    np.testing.assert_allclose(np.moveaxis(gradient, -1, 1), arrays["grad_logits"], rtol=0, atol=atol)

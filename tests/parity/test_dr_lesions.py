"""DeepLabv3+ against segmentation_models_pytorch (golden/dr_lesions/deeplab_*.npz): logits and encoder features.

CLAHE, L*a*b* and areas under precision-recall have files of their own: test_clahe.py and test_aupr.py.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_files
from medseg_jax.methods.objective import Fn
from medseg_jax.models.deeplabv3p import DeepLabV3Plus
from medseg_jax.weights import load

ENCODERS = {"effb0": "efficientnet-b0", "resnet50": "resnet50"}


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("double", [pytest.param(True, marks=pytest.mark.slow), False])
def test_deeplab(golden, name, double):
    arrays, meta = golden_files.read(golden / "dr_lesions" / f"deeplab_{name}.npz")
    recipe = golden_files.load(golden)
    names = json.loads((golden / "dr_lesions" / f"deeplab_{name}_names.json").read_text())
    tensors = recipe.weights(names, meta["salt"])
    assert sum(w.size for n, w in tensors.items() if not re.search("running|num_batches", n)) == meta["parameters"]
    found = re.search(r'array\("([^"]+)",\(([\d, ]+)\)\)', meta["input"])
    bound = re.search(r"max abs ([\d.e-]+)", meta["tolerance"])
    assert found
    assert bound
    shape = tuple(int(n) for n in found[2].split(","))
    net = DeepLabV3Plus(encoder=ENCODERS[name])
    classes = tensors["segmentation_head.0.bias"].shape[0]
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        fn = Fn(lambda rngs: DeepLabV3Plus(ENCODERS[name], dtype=dtype.__name__).build(shape[1], classes, rngs))
        params, stats = fn.init(jax.random.key(0))
        loaded = load(net, params, stats, tensors)
        assert not loaded.stayed
        params, stats = jax.tree.map(lambda x: jnp.asarray(x, dtype), (loaded.params, loaded.stats))
        x = jnp.asarray(np.moveaxis(recipe.array(found[1], shape, meta["salt"]), 1, -1), dtype)
        (logits,), _ = jax.jit(lambda p, s, x: fn.apply(p, s, x))(params, stats, x)
        tolerance = 1e-7 if double else float(bound[1])  # our logits leave the network as float32
        np.testing.assert_allclose(np.moveaxis(np.asarray(logits), -1, 1), arrays["logits_f64"], rtol=0, atol=tolerance)
        if not double:
            encoder = Fn(lambda rngs: DeepLabV3Plus(ENCODERS[name]).build(shape[1], classes, rngs).encoder)
            part = jax.tree.map(jnp.asarray, (params["encoder"], stats["encoder"]))
            features, _ = jax.jit(lambda p, s, x: encoder.apply(p, s, x))(*part, x)
            for i, feature in enumerate(features, start=1):
                found = np.moveaxis(np.asarray(feature), -1, 1)
                step, scale = max(1, found.shape[1] // 8), np.abs(arrays[f"feature{i}_stats"][2:]).max()
                ours = found[:, ::step, ::4, ::4]
                np.testing.assert_allclose(ours, arrays[f"feature{i}_sample"], rtol=0, atol=1e-5 * max(scale, 1))

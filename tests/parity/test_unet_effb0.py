"""U-Net with an EfficientNet-b0 encoder against segmentation_models_pytorch (golden/kms_noise/unet_effb0.npz)."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_files
from medseg_jax.methods.objective import Fn
from medseg_jax.models.efficientnet import EfficientUNet
from medseg_jax.weights import load


@pytest.mark.parametrize("double", [pytest.param(True, marks=pytest.mark.slow), False])
def test_unet_effb0(golden, double):
    arrays, meta = golden_files.read(golden / "kms_noise" / "unet_effb0.npz")
    recipe = golden_files.load(golden)
    names = json.loads((golden / "kms_noise" / "unet_effb0_names.json").read_text())
    tensors = recipe.weights(names, meta["salt"])
    found = re.search(r'array\("([^"]+)",\(([\d, ]+)\)\)', meta["input"])
    bound = re.search(r"max abs ([\d.e-]+)", meta["tolerance"])
    assert found
    assert bound
    shape = tuple(int(n) for n in found[2].split(","))
    net = EfficientUNet()
    classes = tensors["segmentation_head.0.bias"].shape[0]
    assert sum(w.size for n, w in tensors.items() if not re.search("running|num_batches", n)) == meta["parameters"]
    with jax.enable_x64(double):
        dtype = jnp.float64 if double else jnp.float32
        fn = Fn(lambda rngs: EfficientUNet(dtype=dtype.__name__).build(shape[1], classes, rngs))
        params, stats = fn.init(jax.random.key(0))
        loaded = load(net, params, stats, tensors)
        assert not loaded.stayed
        params, stats = jax.tree.map(lambda x: jnp.asarray(x, dtype), (loaded.params, loaded.stats))
        x = jnp.asarray(np.moveaxis(recipe.array(found[1], shape, meta["salt"]), 1, -1), dtype)
        (logits,), _ = jax.jit(lambda p, s, x: fn.apply(p, s, x))(params, stats, x)
        tolerance = 1e-6 if double else float(bound[1])  # our logits leave the network as float32
        expected = arrays["logits_f64"]
        np.testing.assert_allclose(np.moveaxis(np.asarray(logits), -1, 1), expected, rtol=0, atol=tolerance)
        if not double:
            encoder = Fn(lambda rngs: EfficientUNet().build(shape[1], classes, rngs).encoder)
            part = jax.tree.map(jnp.asarray, (params["encoder"], stats["encoder"]))
            features, _ = jax.jit(lambda p, s, x: encoder.apply(p, s, x))(*part, x)
            for i, feature in enumerate(features, start=1):
                found = np.moveaxis(np.asarray(feature), -1, 1)
                c = found.shape[1]
                np.testing.assert_allclose(
                    found[:, :: max(1, c // 8), ::4, ::4], arrays[f"feature{i}_sample"], rtol=0, atol=1e-4
                )

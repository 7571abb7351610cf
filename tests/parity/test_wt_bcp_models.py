"""The networks of WT-BCP and BCP against the public PyTorch code (golden/wt_bcp), through the weight converters."""

import json
import re

import jax
import numpy as np
import pytest

import golden_files
from medseg_jax.methods.objective import Fn
from medseg_jax.models.bcp_unet import BCPUNet
from medseg_jax.models.vnet import VNet
from medseg_jax.models.xnet import XNET_2D, XNET_3D
from medseg_jax.weights import load


@pytest.fixture(scope="module")
def recipe(golden):
    return golden_files.load(golden)


class Reference:
    """One golden file: its arrays, its inputs channels-last, its network with its weights."""

    def __init__(self, golden, recipe, name, net):
        self.arrays, self.meta = golden_files.read(golden / "wt_bcp" / f"{name}.npz")
        self.inputs = {}
        for key, i in self.meta["recipe_inputs"].items():
            self.inputs[key] = np.moveaxis(golden_files.draw(recipe, i, self.meta["salt"]), 1, -1)
        names = json.loads((golden / "wt_bcp" / self.meta["weights"]["net"]["names_and_shapes_file"]).read_text())
        shapes = {key: tuple(shape) for key, shape in names["names_and_shapes"].items()}
        self.tensors = recipe.weights(shapes, self.meta["salt"])
        channels = next(iter(self.inputs.values())).shape[-1]
        classes = next(facts["shape"][1] for key, facts in self.meta["outputs"].items() if "logits" in key)
        self.fn = Fn(lambda rngs: net.build(channels, classes, rngs))
        self.params, self.stats = jax.eval_shape(self.fn.init, jax.random.key(0))
        (self.gain,) = map(float, re.findall(r"multiplied by ([\d.]+) ", self.meta.get("gain", "multiplied by 1 ")))
        self.net = net

    def weights(self, gain=1.0):
        tensors = {k: np.float32(t * np.float32(gain)) if t.ndim > 1 else t for k, t in self.tensors.items()}
        loaded = load(self.net, self.params, self.stats, tensors)
        assert not loaded.stayed
        return loaded

    def check(self, key, value):
        """`value` is channels-last where the reference is an image."""
        facts = self.meta["outputs"][key]
        value = np.moveaxis(np.asarray(value), -1, 1) if len(facts["shape"]) > 3 else np.asarray(value)
        assert value.shape == tuple(facts["shape"])
        if "stored" in facts:
            value = value[golden_files.kept(facts["stored"])]
        tolerance = facts["tolerance"]
        np.testing.assert_allclose(
            value, self.arrays[key], rtol=tolerance.get("rtol", 0), atol=tolerance["atol"], err_msg=key
        )


@pytest.mark.parametrize(("name", "net"), [("xnet2d", XNET_2D), ("xnet3d", XNET_3D)])
def test_xnet(golden, recipe, name, net):
    reference = Reference(golden, recipe, name, net)
    assert sum(leaf.size for leaf in jax.tree.leaves(reference.params)) == reference.meta["parameters"]
    x, low, high = (reference.inputs[key] for key in ("main", "low", "high"))
    program = jax.jit(lambda w, *x: reference.fn.apply(*w, x[0], low=x[1], high=x[2])[0])
    for prefix, gain in (("", 1.0), ("gain/", reference.gain)):
        loaded = reference.weights(gain)
        logits = program((loaded.params, loaded.stats), x, low, high)
        for head, found in zip(("main", "low", "high"), logits, strict=True):
            reference.check(f"{prefix}logits_{head}", found)


@pytest.mark.parametrize(("name", "net"), [("bcp_unet2d", BCPUNet()), ("bcp_vnet", VNet())])
def test_single_input_networks(golden, recipe, name, net):
    reference = Reference(golden, recipe, name, net)
    program = jax.jit(lambda w, x: reference.fn.apply(*w, x)[0][0])
    for prefix, gain in (("", 1.0), ("gain/", reference.gain)):
        loaded = reference.weights(gain)
        reference.check(f"{prefix}logits", program((loaded.params, loaded.stats), reference.inputs["x"]))


@pytest.mark.slow
def test_xnet_in_training(golden, recipe):
    """Batch statistics, running statistics after one pass, and the gradient of every tensor."""
    reference = Reference(golden, recipe, "xnet3d_train", XNET_3D)
    loaded = reference.weights()
    heads = ("main", "low", "high")
    x, low, high = (reference.inputs[key] for key in heads)

    @jax.jit
    def step(params, stats):
        def loss(params):
            logits, after = reference.fn.apply(params, stats, x, train=True, low=low, high=high)
            means = [(z * reference.inputs[f"w_{head}"]).mean() for z, head in zip(logits, heads, strict=True)]
            return sum(means), (logits, after)

        return jax.grad(loss, has_aux=True)(params)

    gradient, (logits, after) = step(loaded.params, loaded.stats)
    for head, found in zip(heads, logits, strict=True):
        reference.check(f"logits_{head}", found)

    paths = {name: path for path, name in loaded.filled.items()}
    (every,) = map(int, re.findall(r"every (\d+)th value", reference.meta["notes"]))
    for kind in ("running_mean", "running_var"):
        names = [name for name in reference.tensors if name.endswith(kind)]
        reference.check(f"{kind}_after", np.concatenate([at(after, paths[name]) for name in names])[::every])
    trainable = [name for name in reference.tensors if name.endswith(("weight", "bias"))]
    reference.check("grad_norms", np.array([np.linalg.norm(at(gradient, paths[name])) for name in trainable]))
    for key in reference.arrays:
        if key.startswith("d_"):
            reference.check(key, np.moveaxis(at(gradient, paths[key[2:]]), -1, 0))  # [*k, i, o] -> [o, *k, i]


def at(tree, path):
    for key in path.split("/"):
        tree = tree[key]
    return tree

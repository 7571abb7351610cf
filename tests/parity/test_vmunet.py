"""VM-UNet against the authors' code (golden/mamba_sea): patch operations, a VSS block, the network; gradients too.

Weights are made from the reference's names and shapes and come in through `weights/vmunet.py`.
"""

import json
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import golden_files
from medseg_jax.methods.objective import Fn
from medseg_jax.models.vmunet import VM_UNET, PatchExpand, PatchMerging, Stage, VSSBlock
from medseg_jax.weights import KeyMap, load
from medseg_jax.weights.vmunet import RULES

BLOCK = KeyMap("one block", RULES)
AT = "layers.0.blocks.0."
"""Where a single block is put so that the network's rules apply to it."""


class File:
    """One golden file: arrays, meta, the inputs and weights that its recipe makes."""

    def __init__(self, folder, name):
        self.recipe = golden_files.load(folder)
        self.arrays, self.meta = golden_files.read(folder / "mamba_sea" / f"{name}.npz")
        self.folder = folder / "mamba_sea"

    def input(self, name):
        x = golden_files.draw(self.recipe, self.meta["recipe_inputs"][name], self.meta["salt"])
        if name.endswith("/x"):
            return np.rint(8 * x.astype(np.float64) - 4)
        return np.rint(6 * x.astype(np.float64) - 3) if name.endswith("/int_weight") else x

    def weights(self, name):
        entry = self.meta["weights"][name]
        if "names_and_shapes_file" in entry:
            entry = json.loads((self.folder / entry["names_and_shapes_file"]).read_text())
        shapes = {k: tuple(v) for k, v in entry["names_and_shapes"].items()}
        return self.recipe.weights(shapes, self.meta["salt"])

    def check(self, key, found):
        """Compares the slice that is kept of an output, within the file's tolerance."""
        entry = self.meta["outputs"][key]
        assert list(found.shape) == entry["shape"], key
        kept = np.asarray(found)[golden_files.kept(entry["stored"]) if "stored" in entry else ...]
        tolerance = entry["tolerance"]
        if tolerance.get("exact"):
            np.testing.assert_array_equal(kept, self.arrays[key], err_msg=key)
        else:
            rtol, atol = tolerance.get("rtol", 0), tolerance["atol"]
            np.testing.assert_allclose(kept, self.arrays[key], rtol=rtol, atol=atol, err_msg=key)


def in_torch_layout(mapping, params, weights):
    """A function that gives a tree like `params` back under the names and in the layouts of `weights`.

    Numbers that say where each element was are sent through the converter and followed back.
    """
    positions = {k: np.arange(v.size, dtype=np.float32).reshape(v.shape) for k, v in weights.items()}
    zeros = jax.tree.map(lambda p: np.zeros(p.shape, np.float32), params)
    loaded = load(mapping, zeros, {}, positions)
    assert sorted(loaded.filled.values()) == sorted(weights)

    def back(tree):
        leaves, places = (flat(t) for t in (tree, loaded.params))
        found = {name: np.empty(v.size, np.float32) for name, v in weights.items()}
        for path, name in loaded.filled.items():
            found[name][places[path].astype(int).ravel()] = np.asarray(leaves[path]).ravel()
        return {name: v.reshape(weights[name].shape) for name, v in found.items()}

    return back


def flat(tree):
    return {"/".join(k.key for k in path): v for path, v in jax.tree_util.tree_leaves_with_path(tree)}


def config_of(weights):
    """VM-UNet in the sizes of a file's weights, which never skips a block."""
    norms = [re.fullmatch(r"(layers|layers_up)\.(\d+)\.blocks\.\d+\.ln_1\.weight", name) for name in weights]
    blocks = Counter((found[1], int(found[2])) for found in norms if found)
    depths, decoder_depths = (
        tuple(blocks[side, i] for i in range(len(blocks)) if (side, i) in blocks) for side in ("layers", "layers_up")
    )
    features = tuple(len(weights[f"layers.{i}.blocks.0.ln_1.weight"]) for i in range(len(depths)))
    states = weights[f"{AT}self_attention.A_logs"].shape[1]
    return replace(VM_UNET, features=features, depths=depths, decoder_depths=decoder_depths, states=states, drop_path=0)


# ---------------------------------------------------------------------------------------------------- patch operations


@pytest.mark.parametrize("case", ["merge", "merge_odd", "expand", "final"])
def test_patch_operations(golden, case):
    file = File(golden, "patch_ops")
    x = jnp.asarray(file.input(f"{case}/x"), jnp.float32)
    weights = file.weights(case)
    linear = "reduction" if case.startswith("merge") else "expand"
    outputs, inputs = weights[f"{case}.{linear}.weight"].shape
    channels = len(weights[f"{case}.norm.weight"])
    options = {"dtype": "float32", "rngs": nnx.Rngs(0)}
    if case.startswith("merge"):
        module = PatchMerging(inputs // 4, outputs, **options)
    else:
        module = PatchExpand(inputs, channels, round((outputs / channels) ** 0.5), **options)
    kernel = getattr(module, linear).kernel

    kernel[...] = jnp.asarray(weights[f"{case}.{linear}.weight"].T)
    module.norm.scale[...] = jnp.asarray(weights[f"{case}.norm.weight"])
    module.norm.bias[...] = jnp.asarray(weights[f"{case}.norm.bias"])
    file.check(f"{case}/full", module(x))

    kernel[...] = jnp.asarray(file.input(f"{case}/int_weight").T, jnp.float32)
    module.norm = lambda x: x
    file.check(f"{case}/index", module(x))


# ----------------------------------------------------------------------------------------------------------- one block


@pytest.fixture(scope="module")
def block(golden):
    file = File(golden, "vss_block")
    weights = {AT + k.removeprefix("block."): v for k, v in file.weights("block").items()}
    channels, net = len(weights[f"{AT}ln_1.weight"]), config_of(weights)
    fn = Fn(lambda rngs: VSSBlock(channels, 0.0, net, rngs))
    params, _ = jax.eval_shape(fn.init, jax.random.key(0))
    params = {"encoder": {"0": {"blocks": {"0": params}}}}

    @jax.jit
    def forward_and_back(params, x, w):
        y, undo = jax.vjp(lambda p, x: fn.apply(p["encoder"]["0"]["blocks"]["0"], {}, x)[0], params, x)
        return y, *undo(w)

    return SimpleNamespace(file=file, weights=weights, params=params, run=forward_and_back)


@pytest.mark.parametrize("case", ["", "strong/", "small/"])
def test_vss_block(block, case):
    more = 3.0 if case == "strong/" else 0.0
    weights = {k: v + np.float32(more) * k.endswith("dt_projs_bias") for k, v in block.weights.items()}
    params = load(BLOCK, block.params, {}, weights).params
    x = block.file.input("x") * np.float32(0.01 if case == "small/" else 1)
    out, d_params, d_x = block.run(params, x, block.file.input("w"))
    found = {"out": out, "d_x": d_x}
    found |= {f"d_{k.removeprefix(AT)}": v for k, v in in_torch_layout(BLOCK, params, weights)(d_params).items()}
    keys = [k for k in block.file.arrays if k.rpartition("/")[0] == case.rstrip("/")]
    assert keys
    for key in keys:
        block.file.check(key, found[key.removeprefix(case)])


# --------------------------------------------------------------------------------------------------- the whole network


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_network(golden, whole, monkeypatch):
    """Block by block, since blocks of one size are then compiled once; and the other file as a whole."""
    names = sorted(path.stem for path in (golden / "mamba_sea").glob("vmunet_c*.npz"))
    file = File(golden, names[0 if whole else -1])
    weights = file.weights("net")
    classes, channels = len(weights["final_conv.bias"]), weights["patch_embed.proj.weight"].shape[1]
    net = config_of(weights)
    fn = Fn(lambda rngs: net.build(channels, classes, rngs))
    params, _ = jax.eval_shape(fn.init, jax.random.key(0))
    loaded = load(net, params, {}, weights)
    assert len(loaded.filled) == len(weights) == file.meta["weights"]["net"]["tensors"]
    assert not loaded.stayed
    seen = []
    monkeypatch.setattr(Stage, "__call__", recording(Stage.__call__, seen))

    def forward(params, x):
        seen.clear()
        (logits,), _ = fn.apply(params, {}, x)
        return logits, list(seen)

    if not whole:
        monkeypatch.setattr(VSSBlock, "__call__", compiled(VSSBlock.__call__))

    def forward_and_back(params, x, w):
        logits, undo, seen = jax.vjp(forward, params, x, has_aux=True)
        return logits, seen, *undo(w)

    x, w = (np.moveaxis(file.input(k), 1, -1) for k in "xw")
    run = jax.jit(forward_and_back) if whole else forward_and_back
    logits, stages, d_params, d_x = run(jax.tree.map(jnp.asarray, loaded.params), jnp.asarray(x), jnp.asarray(w))

    depth = len(net.features)
    found = {"logits": np.moveaxis(logits, -1, 1), "d_x": np.moveaxis(d_x, -1, 1), "enc": stages[depth - 1][1]}
    found |= {f"skip{i}": before for i, (before, _) in enumerate(stages[:depth])}
    found |= {f"dec{i}": after for i, (_, after) in enumerate(stages[depth:])}
    gradients = in_torch_layout(net, params, weights)(d_params)
    found |= {f"d_{k}": v for k, v in gradients.items()}
    found["grad_norms"] = np.array([np.linalg.norm(gradients[k].astype(np.float64)) for k in weights])
    for key in file.arrays:
        file.check(key, found[key])
    agreement = (np.argmax(found["logits"], 1) == np.argmax(file.arrays["logits"], 1)).mean()
    assert agreement > 0.999


def compiled(call):
    """A module's call, jitted by itself."""
    jitted = jax.jit(lambda graph, state, x: call(nnx.merge(graph, state), x), static_argnums=0)
    return lambda self, x, *_: jitted(*nnx.split(self), x)


def recording(call, seen):
    """A stage's call that also keeps (input, output)."""

    def recorded(self, x, *rest):
        y = call(self, x, *rest)
        seen.append((x, y))
        return y

    return recorded

"""Checkpoints of VMamba, VM-UNet and Mamba-Sea, made up by names and shapes: every tensor lands where it belongs."""

import re
from dataclasses import replace

import jax
import numpy as np
import pytest

from medseg_jax.methods.objective import Fn
from medseg_jax.models.vmunet import VM_UNET, VMUNet
from medseg_jax.types import UserError
from medseg_jax.weights import load

NARROW = replace(VM_UNET, features=(4, 8, 12, 16), states=2)


def block(at, d, r, n):
    """Names and shapes of a VSS block of VM-UNet."""
    at, c = f"{at}.", 2 * d
    own = {"x_proj_weight": (4, r + 2 * n, c), "dt_projs_weight": (4, c, r), "dt_projs_bias": (4, c), "Ds": (4 * c,)}
    own |= {"A_logs": (4 * c, n), "in_proj.weight": (2 * c, d), "conv2d.weight": (c, 1, 3, 3), "conv2d.bias": (c,)}
    own |= {"out_norm.weight": (c,), "out_norm.bias": (c,), "out_proj.weight": (d, c)}
    names = {f"{at}ln_1.weight": (d,), f"{at}ln_1.bias": (d,)}
    return names | {f"{at}self_attention.{k}": v for k, v in own.items()}


def encoder(net, depths):
    first, n = net.features[0], net.states
    found = {"patch_embed.proj.weight": (first, 3, 4, 4)}
    found |= {f"patch_embed.{k}": (first,) for k in ("proj.bias", "norm.weight", "norm.bias")}
    for i, (d, depth) in enumerate(zip(net.features, depths, strict=True)):
        for j in range(depth):
            found |= block(f"layers.{i}.blocks.{j}", d, -(-d // 16), n)
        if i < len(depths) - 1:
            found[f"layers.{i}.downsample.reduction.weight"] = (net.features[i + 1], 4 * d)
            found |= {f"layers.{i}.downsample.norm.{k}": (4 * d,) for k in ("weight", "bias")}
    return found


def vmamba(net):
    last = net.features[-1]
    head = {"norm.weight": (last,), "norm.bias": (last,), "head.weight": (10, last), "head.bias": (10,)}
    return encoder(net, (2, 2, 27, 2)) | head


def vmunet(net, classes):
    found, features = encoder(net, net.depths), net.features
    for j, depth in enumerate(net.decoder_depths):
        i = len(features) - 1 - j
        for m in range(depth):
            found |= block(f"layers_up.{j}.blocks.{m}", features[i], -(-features[i] // 16), net.states)
        if j:
            found[f"layers_up.{j}.upsample.expand.weight"] = (4 * features[i], features[i + 1])
            found |= {f"layers_up.{j}.upsample.norm.{k}": (features[i],) for k in ("weight", "bias")}
    small = features[0] // 4
    found |= {"final_up.expand.weight": (16 * small, features[0])}
    found |= {"final_up.norm.weight": (small,), "final_up.norm.bias": (small,)}
    return found | {"final_conv.weight": (classes, small, 1, 1), "final_conv.bias": (classes,)}


def values(shapes):
    """Tensors with a mean of their own."""
    return {k: np.full(shape, i, np.float32) for i, (k, shape) in enumerate(shapes.items(), 1)}


def current_names(tensors):
    """As today's VMamba repository calls them."""
    pairs = [("patch_embed.proj", "patch_embed.0"), ("patch_embed.norm", "patch_embed.2"), (".ln_1.", ".norm.")]
    pairs += [("self_attention", "op"), ("^norm", "classifier.norm"), ("^head", "classifier.head")]
    for old, new in pairs:
        tensors = {re.sub(old, new, k): v for k, v in tensors.items()}
    return tensors


def initial(net, classes=3):
    fn = Fn(lambda rngs: net.build(3, classes, rngs))
    params, _ = jax.eval_shape(fn.init, jax.random.key(0))
    return jax.tree.map(lambda p: np.zeros(p.shape, np.float32), params)


@pytest.fixture(scope="module")
def params():
    return initial(NARROW)


@pytest.mark.parametrize("rename", [dict, current_names])
def test_the_first_vmamba_fills_the_encoder_and_the_decoders_blocks(params, rename):
    tensors = values(vmamba(NARROW))
    assert len(tensors) == 446
    loaded = load(NARROW, params, {}, rename(tensors))
    assert len(loaded.filled) == 117 + 91
    assert sum(path.startswith("decoder") for path in loaded.filled) == 91
    assert len(loaded.stayed) == 14
    assert len(loaded.unused) == 25 * 13 + 4
    for ours, stage in enumerate((3, 2, 1, 0)):
        for index, mine in loaded.params["decoder"][str(ours)]["blocks"].items():
            want = tensors[f"layers.{stage}.blocks.{index}.self_attention.A_logs"]
            np.testing.assert_array_equal(mine["mixer"]["A_log"], want)
            theirs = loaded.params["encoder"][str(stage)]["blocks"][index]
            assert jax.tree.all(jax.tree.map(np.array_equal, mine, theirs))
    assert not loaded.params["head"]["kernel"].any()


@pytest.mark.parametrize("prefix", ["", "vmunet.", "module.vmunet."])
def test_vmunet_and_mamba_sea_checkpoints_are_used_whole(params, prefix):
    tensors = {prefix + k: v for k, v in values(vmunet(NARROW, 3)).items()}
    extra = {"module." * prefix.startswith("module") + "gva.in_conv.weight": np.zeros(3)} if prefix else {}
    loaded = load(NARROW, params, {}, tensors | extra)
    assert len(loaded.filled) == len(tensors) == 222
    assert not loaded.stayed
    assert len(loaded.unused) == len(extra)
    np.testing.assert_array_equal(loaded.params["head"]["bias"], tensors[f"{prefix}final_conv.bias"])
    np.testing.assert_array_equal(
        loaded.params["decoder"]["3"]["up"]["norm"]["scale"], tensors[f"{prefix}layers_up.3.upsample.norm.weight"]
    )


def test_the_published_shapes_fit():
    shapes = vmunet(VM_UNET, 3)
    assert sum(map(np.prod, shapes.values())) == 27_427_611
    wide = VMUNet()
    loaded = load(wide, initial(wide), {}, {k: np.zeros(shape, np.float32) for k, shape in shapes.items()})
    assert len(loaded.filled) == 222


def test_a_head_of_other_classes_stays_random(params):
    loaded = load(NARROW, params, {}, values(vmunet(NARROW, 7)))
    assert loaded.stayed == ("head/bias", "head/kernel")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t | {"layers.0.blocks.0.mlp.fc1.weight": np.zeros((8, 4))}, "MLPs"),
        (lambda t: t | {"patch_embed.5.weight": np.zeros((4, 4, 3, 3))}, "a stem of two convolutions"),
        (lambda t: {k: v[..., :1] if k.endswith("A_logs") else v for k, v in t.items()}, "one state a channel"),
    ],
)
def test_weights_of_later_vmambas_are_refused(params, change, words):
    with pytest.raises(UserError) as error:
        load(NARROW, params, {}, current_names(change(values(vmamba(NARROW)))))
    assert words in str(error.value)
    assert "vmamba_small_e238_ema.pth" in str(error.value)


def test_what_does_not_fit_is_an_error(params):
    tensors = values(vmunet(NARROW, 3))
    with pytest.raises(UserError, match="not whole"):
        load(NARROW, params, {}, {k: v for k, v in tensors.items() if "upsample" not in k})
    with pytest.raises(UserError, match=r"encoder/0/blocks/1/mixer/D .*not in the file"):
        load(NARROW, params, {}, {k: v for k, v in tensors.items() if k != "layers.0.blocks.1.self_attention.Ds"})
    with pytest.raises(UserError, match="does not fit"):
        load(replace(NARROW, states=3), initial(replace(NARROW, states=3)), {}, tensors)

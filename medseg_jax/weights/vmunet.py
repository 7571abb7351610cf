"""Published weights for `models/vmunet.py`.

VM-UNet or Mamba-Sea, 222 tensors: all are used. A head of another number of classes keeps its random values, and
Mamba-Sea's GVA network (`gva.`) is left out.

VMamba-S of the first generation (`vmamba_small_e238_ema.pth`, 446 tensors), or another encoder of its kind: 117 fill
the encoder and 91 of these the decoder's blocks as well, mirrored stage by stage. 14 keep their random values: the
decoder's up-samplers and the head. Blocks beyond our depths, the last norm and the classifier are left out.

Names of today's VMamba repository (`op`, `norm`, `patch_embed.0`, `classifier.head`) are understood as well. Its later
models (v05 and up: MLPs, one state a channel, another stem) are other networks and are refused.

Spec: mamba_sea sections 1.6 and 1.7.
"""

import re
from functools import partial

from medseg_jax.models.vmunet import VMUNet
from medseg_jax.types import UserError
from medseg_jax.weights.mapping import KeyMap, Layout, Rule, Tensors, without_prefix

BLOCK: tuple[tuple[str, str, Layout], ...] = (
    ("ln_1.weight", "norm/scale", "keep"),
    ("ln_1.bias", "norm/bias", "keep"),
    ("self_attention.in_proj.weight", "mixer/in_proj", "linear"),
    ("self_attention.conv2d.weight", "mixer/kernel", "conv"),
    ("self_attention.conv2d.bias", "mixer/bias", "keep"),
    ("self_attention.x_proj_weight", "mixer/x_proj", "keep"),
    ("self_attention.dt_projs_weight", "mixer/dt_weight", "keep"),
    ("self_attention.dt_projs_bias", "mixer/dt_bias", "keep"),
    ("self_attention.A_logs", "mixer/A_log", "keep"),
    ("self_attention.Ds", "mixer/D", "keep"),
    ("self_attention.out_norm.weight", "mixer/norm/scale", "keep"),
    ("self_attention.out_norm.bias", "mixer/norm/bias", "keep"),
    ("self_attention.out_proj.weight", "mixer/out_proj", "linear"),
)
"""Name within a block, our path within a block, layout."""

RULES = (
    *(
        Rule(rf"{theirs}\.(\d+)\.blocks\.(\d+)\.{re.escape(name)}", rf"{ours}/\1/blocks/\2/{path}", layout)
        for theirs, ours in (("layers", "encoder"), ("layers_up", "decoder"))
        for name, path, layout in BLOCK
    ),
    Rule(r"patch_embed\.proj\.weight", "patch_embed/conv/kernel", "conv"),
    Rule(r"patch_embed\.proj\.bias", "patch_embed/conv/bias"),
    Rule(r"patch_embed\.norm\.weight", "patch_embed/norm/scale"),
    Rule(r"patch_embed\.norm\.bias", "patch_embed/norm/bias"),
    Rule(r"layers\.(\d+)\.downsample\.reduction\.weight", r"encoder/\1/down/reduction/kernel", "linear"),
    Rule(r"layers\.(\d+)\.downsample\.norm\.weight", r"encoder/\1/down/norm/scale"),
    Rule(r"layers\.(\d+)\.downsample\.norm\.bias", r"encoder/\1/down/norm/bias"),
    Rule(r"layers_up\.(\d+)\.upsample\.expand\.weight", r"decoder/\1/up/expand/kernel", "linear"),
    Rule(r"layers_up\.(\d+)\.upsample\.norm\.weight", r"decoder/\1/up/norm/scale"),
    Rule(r"layers_up\.(\d+)\.upsample\.norm\.bias", r"decoder/\1/up/norm/bias"),
    Rule(r"final_up\.expand\.weight", "final_up/expand/kernel", "linear"),
    Rule(r"final_up\.norm\.weight", "final_up/norm/scale"),
    Rule(r"final_up\.norm\.bias", "final_up/norm/bias"),
    Rule(r"final_conv\.weight", "head/kernel", "conv"),
    Rule(r"final_conv\.bias", "head/bias"),
)

VARIANTS = (
    (r"patch_embed\.0\.", "patch_embed.proj."),
    (r"patch_embed\.2\.", "patch_embed.norm."),
    (r"(layers\.\d+\.blocks\.\d+)\.norm\.", r"\1.ln_1."),
    (r"(layers\.\d+\.blocks\.\d+)\.op\.", r"\1.self_attention."),
)
"""How today's VMamba repository calls things -> how the first generation did."""


def key_map(net: VMUNet) -> KeyMap:
    """For both kinds of files. A later VMamba's, or a decoder without its up-samplers, is a UserError."""
    return KeyMap(
        name="VM-UNet or Mamba-Sea (222 tensors), or the encoder of the first VMamba (vmamba_small_e238_ema.pth)",
        rules=RULES,
        ignore=(r"unused\..*", r"(gva|enhance)\..*"),
        may_stay=(r"decoder/\d+/up/.*", r"final_up/.*", r"head/.*"),
        adapt=partial(_adapt, net),
    )


def _adapt(net: VMUNet, tensors: Tensors) -> Tensors:
    """Names as VM-UNet has them; from an encoder's file also the decoder's blocks."""
    tensors = {name.removeprefix("vmunet."): v for name, v in without_prefix(tensors, "module.").items()}
    for pattern, name in VARIANTS:
        tensors = {re.sub(f"^{pattern}", name, old): v for old, v in tensors.items()}
    _refuse_later_models(tensors)
    if not any(name.startswith("layers_up.") for name in tensors):
        return _encoder_only(net, tensors)
    samplers = [f"layers_up.{i}.upsample.expand.weight" for i in range(1, len(net.depths))]
    if missing := [name for name in (*samplers, "final_up.expand.weight") if name not in tensors]:
        raise UserError("This VM-UNet checkpoint is not whole", found=f"no {', '.join(missing)}")
    return tensors


def _encoder_only(net: VMUNet, tensors: Tensors) -> Tensors:
    """Marks what we have no use for, and mirrors the encoder's blocks: its first stage is the decoder's last."""
    found: Tensors = {}
    for name, value in tensors.items():
        block = re.match(r"layers\.(\d+)\.blocks\.(\d+)\.(.*)", name)
        stage, index = (int(block[1]), int(block[2])) if block else (0, 0)
        deep = stage < len(net.depths) and index >= net.depths[stage]
        if deep or re.match(r"(norm|head|classifier)\.", name):
            found[f"unused.{name}"] = value
            continue
        found[name] = value
        mirrored = len(net.depths) - 1 - stage
        if block and mirrored >= 0 and index < net.decoder_depths[mirrored]:
            found[f"layers_up.{mirrored}.blocks.{index}.{block[3]}"] = value
    return found


def _refuse_later_models(tensors: Tensors) -> None:
    signs = {
        "MLPs": [name for name in tensors if ".mlp." in name],
        "a stem of two convolutions": [name for name in tensors if re.match(r"patch_embed\.[57]\.", name)],
        "one state a channel": [n for n, v in tensors.items() if n.endswith(".A_logs") and v.shape[-1] == 1],
    }
    if any(signs.values()):
        raise UserError(
            "These are weights of a later VMamba (v05 or v2), which is another network",
            found="; ".join(f"{sign} ({names[0]})" for sign, names in signs.items() if names),
            expected="VMamba of the first generation: vmamba_small_e238_ema.pth, or the same weights, "
            "vssmsmall_dp03_ckpt_epoch_238.pth#model_ema",
            remedy="get one of these files; the VM-UNet project links to the first",
        )

"""EfficientNet weights by the names of segmentation_models_pytorch (whole U-Nets, or encoders alone) and of timm.

timm's `tf_efficientnet_*` weights belong to this network; its `efficientnet_*` ones were trained with other padding and
another epsilon of the norms, fit by name all the same, and need some training to recover. An encoder alone leaves the
decoder as it is. The stem wants three input channels.
"""

import re

from medseg_jax.models.efficientnet import EfficientUNet, Variant, stages
from medseg_jax.weights.mapping import KeyMap, Rule, Tensors

NORM = (("weight", "scale"), ("bias", "bias"), ("running_mean", "mean"), ("running_var", "var"))
IGNORE = (r".*num_batches_tracked", r"encoder\._conv_head\..*", r"encoder\._bn1\..*", r"encoder\._fc\..*")


def norm(theirs: str, ours: str) -> tuple[Rule, ...]:
    """Rules of a batch norm."""
    return tuple(Rule(rf"{theirs}\.{a}", f"{ours}/{b}") for a, b in NORM)


ENCODER = (
    Rule(r"encoder\._conv_stem\.weight", "encoder/stem/kernel", "conv"),
    *norm(r"encoder\._bn0", "encoder/norm"),
    *(
        Rule(rf"encoder\._blocks\.(\d+)\.{theirs}\.weight", rf"encoder/blocks/\1/{ours}/kernel", "conv")
        for theirs, ours in (
            ("_expand_conv", "expand"),
            ("_depthwise_conv", "depthwise"),
            ("_se_reduce", "reduce"),
            ("_se_expand", "excite"),
            ("_project_conv", "project"),
        )
    ),
    *(
        Rule(rf"encoder\._blocks\.(\d+)\.{theirs}\.bias", rf"encoder/blocks/\1/{ours}/bias")
        for theirs, ours in (("_se_reduce", "reduce"), ("_se_expand", "excite"))
    ),
    *(rule for i in range(3) for rule in norm(rf"encoder\._blocks\.(\d+)\._bn{i}", rf"encoder/blocks/\1/norm{i}")),
)
"""The encoder under `encoder.` by the names of segmentation_models_pytorch, ours under `encoder/`."""

UNET = (
    *(
        rule
        for i in (1, 2)
        for rule in (
            Rule(rf"decoder\.blocks\.(\d+)\.conv{i}\.0\.weight", rf"decoder/\1/conv{i}/kernel", "conv"),
            *norm(rf"decoder\.blocks\.(\d+)\.conv{i}\.1", rf"decoder/\1/norm{i}"),
        )
    ),
    Rule(r"segmentation_head\.0\.weight", "head/kernel", "conv"),
    Rule(r"segmentation_head\.0\.bias", "head/bias"),
)


def key_map(net: EfficientUNet) -> KeyMap:
    """The U-Net's key map; the head stays where the number of classes differs, the decoder where there is none."""
    return KeyMap(
        f"EfficientNet-{net.variant} by the names of segmentation_models_pytorch or timm",
        (*ENCODER, *UNET),
        ignore=IGNORE,
        may_stay=(r"head/.*", r"decoder/.*"),
        adapt=lambda tensors: smp_names(tensors, net.variant),
    )


def smp_names(tensors: Tensors, variant: Variant) -> Tensors:
    """Any of the known namings -> that of segmentation_models_pytorch, the encoder's under `encoder.`."""
    if any(name.startswith("encoder._") for name in tensors):
        return tensors
    if any(name.startswith("_blocks.") for name in tensors):
        return {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    first = [sum(s.count for s in stages(variant)[:i]) for i in range(len(stages(variant)))]
    return {_from_timm(name, first): tensor for name, tensor in tensors.items()}


# Where a block does not expand (the first stage), timm counts its layers from the depthwise convolution on.
TIMM_PLAIN = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv", "bn2": "_bn2"}
TIMM_BLOCK = {
    "conv_pw": "_expand_conv",
    "bn1": "_bn0",
    "conv_dw": "_depthwise_conv",
    "bn2": "_bn1",
    "conv_pwl": "_project_conv",
    "bn3": "_bn2",
}
TIMM_BOTH = {"se.conv_reduce": "_se_reduce", "se.conv_expand": "_se_expand"}
TIMM_ENDS = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1", "classifier": "_fc"}


def _from_timm(name: str, first: list[int]) -> str:
    layer, _, leaf = name.rpartition(".")
    if layer in TIMM_ENDS:
        return f"encoder.{TIMM_ENDS[layer]}.{leaf}"
    match = re.fullmatch(r"blocks\.(\d+)\.(\d+)\.(.+)", layer)
    if not match or int(match[1]) >= len(first):
        return name
    names = TIMM_BOTH | (TIMM_PLAIN if match[1] == "0" else TIMM_BLOCK)
    block = first[int(match[1])] + int(match[2])
    return f"encoder._blocks.{block}.{names.get(match[3], match[3])}.{leaf}"

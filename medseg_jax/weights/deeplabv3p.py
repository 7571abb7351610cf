"""DeepLabv3+ weights by the names of segmentation_models_pytorch: whole networks, or encoders alone.

Encoders alone are read by the names of torchvision and timm (`conv1.weight`, `layer1.0.conv2.weight` ... for ResNets;
see weights/efficientnet.py for the others), and leave the decoder as it is. torchvision's own DeepLabV3 is another
network (no plus), whose weights do not fit.
"""

from typing import cast

from medseg_jax.models.deeplabv3p import DeepLabV3Plus
from medseg_jax.models.efficientnet import Variant
from medseg_jax.weights.efficientnet import ENCODER, IGNORE, norm, smp_names
from medseg_jax.weights.mapping import KeyMap, Rule, Tensors


def unit(conv: str, theirs_norm: str, ours: str) -> tuple[Rule, ...]:
    """A 1 x 1 convolution and its norm."""
    return (Rule(rf"{conv}\.weight", f"{ours}/conv/kernel", "conv"), *norm(theirs_norm, f"{ours}/norm"))


def separable(convs: str, theirs_norm: str, ours: str) -> tuple[Rule, ...]:
    """A depthwise and a 1 x 1 convolution, `<convs>.0` and `.1`, and their norm."""
    depthwise = Rule(rf"{convs}\.0\.weight", f"{ours}/depthwise/kernel", "conv")
    return (depthwise, *unit(rf"{convs}\.1", theirs_norm, f"{ours}/point"))


RESNET = (
    Rule(r"encoder\.conv1\.weight", "encoder/stem/kernel", "conv"),
    *norm(r"encoder\.bn1", "encoder/norm"),
    *(
        rule
        for stage in range(4)
        for conv, bn, our_conv, our_norm in (
            *((f"conv{i}", f"bn{i}", f"conv{i}", f"norm{i}") for i in (1, 2, 3)),
            (r"downsample\.0", r"downsample\.1", "shortcut", "shortcut_norm"),
        )
        for theirs, ours in [(rf"encoder\.layer{stage + 1}\.(\d+)", rf"encoder/stages/{stage}/\1")]
        for rule in (
            Rule(rf"{theirs}\.{conv}\.weight", f"{ours}/{our_conv}/kernel", "conv"),
            *norm(rf"{theirs}\.{bn}", f"{ours}/{our_norm}"),
        )
    ),
)
"""The encoder under `encoder.` by torchvision's names, ours under `encoder/`."""

DECODER = (
    *unit(r"decoder\.aspp\.0\.convs\.0\.0", r"decoder\.aspp\.0\.convs\.0\.1", "aspp/point"),
    *(
        rule
        for i in range(3)
        for rule in separable(
            rf"decoder\.aspp\.0\.convs\.{i + 1}\.0", rf"decoder\.aspp\.0\.convs\.{i + 1}\.1", f"aspp/dilated/{i}"
        )
    ),
    *unit(r"decoder\.aspp\.0\.convs\.4\.1", r"decoder\.aspp\.0\.convs\.4\.2", "aspp/pooled"),
    *unit(r"decoder\.aspp\.0\.project\.0", r"decoder\.aspp\.0\.project\.1", "aspp/project"),
    *separable(r"decoder\.aspp\.1", r"decoder\.aspp\.2", "after"),
    *unit(r"decoder\.block1\.0", r"decoder\.block1\.1", "low"),
    *separable(r"decoder\.block2\.0", r"decoder\.block2\.1", "fuse"),
    Rule(r"segmentation_head\.0\.weight", "head/kernel", "conv"),
    Rule(r"segmentation_head\.0\.bias", "head/bias"),
)


def key_map(net: DeepLabV3Plus) -> KeyMap:
    """The rules."""
    efficient = net.encoder.startswith("efficientnet")
    return KeyMap(
        f"DeepLabv3+ with {net.encoder} by the names of segmentation_models_pytorch, or that encoder alone",
        (*(ENCODER if efficient else RESNET), *DECODER),
        ignore=(*IGNORE, r"encoder\.fc\..*"),
        may_stay=(r"head/.*", r"aspp/.*", r"after/.*", r"low/.*", r"fuse/.*"),
        adapt=lambda tensors: _smp_names(tensors, net),
    )


def _smp_names(tensors: Tensors, net: DeepLabV3Plus) -> Tensors:
    """An encoder alone -> under `encoder.`."""
    if any(name.startswith(("encoder.", "decoder.")) for name in tensors):
        return tensors
    if net.encoder.startswith("efficientnet"):
        variant = net.encoder.removeprefix("efficientnet-")
        return smp_names(tensors, cast(Variant, variant))
    return {f"encoder.{name}": tensor for name, tensor in tensors.items()}

"""Checkpoints of BCP's and UA-MT's V-Net -> models/vnet.py."""

from collections.abc import Iterator

from medseg_jax.models.vnet import DOWN, UP, VNet
from medseg_jax.weights.bcp_unet import UNUSED
from medseg_jax.weights.blocks import block_rules, conv_rules, norm_rules
from medseg_jax.weights.mapping import KeyMap, Rule

NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def key_map(net: VNet) -> KeyMap:
    """Names of BCP's `VNet`, whatever its width."""
    del net
    return KeyMap("BCP's V-Net", tuple(_rules()), UNUSED)


def _rules() -> Iterator[Rule]:
    def level(theirs: str, ours: str, count: int) -> Iterator[Rule]:
        for i in range(count):  # convolution, norm, ReLU
            yield from block_rules(f"{theirs}.conv.{3 * i}", f"{theirs}.conv.{3 * i + 1}", f"{ours}/blocks/{i}")

    for i, count in enumerate(DOWN):
        name = f"encoder.block_{NUMBERS[i]}"
        yield from level(name, f"encoder/{i}", count)
        if i + 1 < len(DOWN):
            yield from block_rules(f"{name}_dw.conv.0", f"{name}_dw.conv.1", f"down/{i}")
    for i, count in enumerate(UP):
        name = f"decoder.block_{NUMBERS[len(DOWN) - 1 + i]}_up.conv"
        yield from conv_rules(f"{name}.0", f"up/{i}/conv", "conv_transpose")
        yield from norm_rules(f"{name}.1", f"up/{i}/norm")
        yield from level(f"decoder.block_{NUMBERS[len(DOWN) + i]}", f"decoder/{i}", count)
    yield from conv_rules("decoder.out_conv", "head")

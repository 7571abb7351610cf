"""Checkpoints of BCP's 2-D U-Net -> models/bcp_unet.py. Their projection, prediction and selector heads are unused."""

from collections.abc import Iterator

from medseg_jax.models.bcp_unet import DROPOUT, BCPUNet
from medseg_jax.weights.blocks import block_rules, conv_rules
from medseg_jax.weights.mapping import KeyMap, Rule

UNUSED = (r".*\.num_batches_tracked", r"(projection|prediction)_head\..*", r"contrastive_class_selector_.*")


def key_map(net: BCPUNet) -> KeyMap:
    """Names of BCP's `UNet_2d`, whatever its width."""
    del net
    return KeyMap("BCP's 2-D U-Net", tuple(_rules()), UNUSED)


def _rules() -> Iterator[Rule]:
    def level(theirs: str, ours: str) -> Iterator[Rule]:
        for i, ours_i in (0, "first"), (4, "second"):
            yield from block_rules(f"{theirs}.conv_conv.{i}", f"{theirs}.conv_conv.{i + 1}", f"{ours}/{ours_i}")

    yield from level("encoder.in_conv", "encoder/0")
    for i in range(1, len(DROPOUT)):
        yield from level(f"encoder.down{i}.maxpool_conv.1", f"encoder/{i}")
        yield from conv_rules(f"decoder.up{i}.conv1x1", f"up/{i - 1}")
        yield from level(f"decoder.up{i}.conv", f"decoder/{i - 1}")
    yield from conv_rules("decoder.out_conv", "head")

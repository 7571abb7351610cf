"""Checkpoints of WT-BCP (XNet v2, 2-D and the small 3-D form) -> models/xnet.py."""

from collections.abc import Iterator

from medseg_jax.models.xnet import LEVELS, XNet
from medseg_jax.weights.blocks import block_rules, conv_rules
from medseg_jax.weights.mapping import KeyMap, Rule

BRANCHES = {"M": "main", "L": "low", "H": "high"}
PARTNERS = ("H", "H", "L", "L")
"""The branch with which M is fused, level 1 first."""


def key_map(net: XNet) -> KeyMap:
    """Names of `XNetv2` for a 2-D network, of `XNetv2_3D_min` for a 3-D one."""
    rules = _rules_2d() if net.dim == 2 else _rules_3d()
    return KeyMap(f"XNet v2 in {net.dim}-D", tuple(rules), ignore=(r".*\.num_batches_tracked",))


def _rules_2d() -> Iterator[Rule]:
    def pair(theirs: str, ours: str) -> Iterator[Rule]:
        for i, ours_i in (0, "first"), (3, "second"):
            yield from block_rules(f"{theirs}.conv.{i}", f"{theirs}.conv.{i + 1}", f"{ours}/{ours_i}")

    for letter, ours in BRANCHES.items():
        for level in range(LEVELS):
            yield from pair(f"{letter}_Conv{level + 1}", f"{ours}/encoder/{level}")
        for level in range(LEVELS - 1):
            up = f"{letter}_Up{level + 2}.up"
            yield from block_rules(f"{up}.1", f"{up}.2", f"{ours}/up/{level}")
            yield from pair(f"{letter}_Up_conv{level + 2}", f"{ours}/decoder/{level}")
        yield from conv_rules(f"{letter}_Conv_1x1", f"{ours}/head")
    for level, partner in enumerate(PARTNERS):
        yield from pair(f"M_{partner}_Conv{level + 1}", f"fusion/{level}")


def _rules_3d() -> Iterator[Rule]:
    def pair(theirs: str, prefix: str, ours: str) -> Iterator[Rule]:
        for i, ours_i in (1, "first"), (2, "second"):
            yield from block_rules(f"{theirs}.{prefix}conv{i}", f"{theirs}.{prefix}norm{i}", f"{ours}/{ours_i}")

    for letter, ours in BRANCHES.items():
        for level in range(LEVELS - 1):
            yield from pair(f"{letter}_encoder{level + 1}", f"enc{level + 1}", f"{ours}/encoder/{level}")
            yield from conv_rules(f"{letter}_upconv{level + 1}", f"{ours}/up/{level}", "conv_transpose")
            yield from pair(f"{letter}_decoder{level + 1}", f"dec{level + 1}", f"{ours}/decoder/{level}")
        yield from pair(f"{letter}_bottleneck", "bottleneck", f"{ours}/encoder/{LEVELS - 1}")
        yield from conv_rules(f"{letter}_conv", f"{ours}/head")
    for level, partner in enumerate(PARTNERS):
        yield from pair(f"M_{partner}_conv{level + 1}", f"fusion{level + 1}", f"fusion/{level}")

"""Rules for the blocks of models/blocks.py, which the key maps of several networks share."""

import re
from collections.abc import Iterator

from medseg_jax.weights.mapping import Layout, Rule


def conv_rules(theirs: str, ours: str, layout: Layout = "conv") -> Iterator[Rule]:
    """A convolution with a bias (`Conv`, `ConvTranspose`)."""
    name = re.escape(theirs)
    yield Rule(rf"{name}\.weight", f"{ours}/kernel", layout)
    yield Rule(rf"{name}\.bias", f"{ours}/bias")


def norm_rules(theirs: str, ours: str) -> Iterator[Rule]:
    """A batch norm (`Norm`)."""
    name = re.escape(theirs)
    leaves = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
    yield from (Rule(rf"{name}\.{leaf}", f"{ours}/{to}") for leaf, to in leaves.items())


def block_rules(conv: str, norm: str, ours: str) -> Iterator[Rule]:
    """A convolution and its norm (`ConvBlock`)."""
    yield from conv_rules(conv, f"{ours}/conv")
    yield from norm_rules(norm, f"{ours}/norm")

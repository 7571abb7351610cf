"""V-Net as UA-MT, BCP and the 3-D semi-supervised field have it (after Milletari et al. 2016, arXiv 1606.04797).

Five levels of 16 to 256 channels with 1, 2, 3, 3, 3 convolutions of size 3 (batch norm, ReLU; no residual connections),
strided convolutions down and transposed ones up, each with norm and ReLU; skips are added; 3, 3, 2, 1 convolutions on
the way up; a 1x1x1 head. Channels are dropped after the bottleneck and before the head. The published checkpoints also
hold heads that no output uses. Parameters with 1 input and 2 output channels: 9,448,866, of which 2,800 are without
effect (biases that batch norm takes away; they stay for the count to be the publication's).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from medseg_jax.models.blocks import Conv, ConvBlock, ConvTranspose, Norm, default_init, dropout
from medseg_jax.models.network import Network, Perturb
from medseg_jax.types import UserError

DOWN, UP = (1, 2, 3, 3, 3), (3, 3, 2, 1)
"""Convolutions of each level, in the order in which data pass them."""


@dataclass(frozen=True)
class VNet(Network):
    """V-Net. Image sizes are multiples of 16.

    Attributes:
        width: channels of the first level; each level below doubles it.
        dropout: probability of dropping a channel of the bottleneck and before the head.
        dtype: compute dtype, "float32" or "bfloat16"; parameters, statistics and logits are float32.
    """

    plan_dim = 3

    width: int = 16
    dropout: float = 0.5
    dtype: str = "float32"

    def __post_init__(self):
        if self.width < 1:
            raise UserError("VNet has no channels", found=f"width={self.width}", expected="1 or more")

    def build(self, in_channels: int, out_channels: int, rngs: nnx.Rngs) -> "VNetModule":
        """The network with fresh parameters (PyTorch's default, as released) from the stream "params" of `rngs`."""
        module = VNetModule(self, in_channels, out_channels, rngs)
        default_init(module, rngs)
        return module


class VNetModule(nnx.Module):
    """Levels on the way down, the steps between them, levels on the way up, head."""

    def __init__(self, config: VNet, in_channels: int, out_channels: int, rngs: nnx.Rngs):
        widths = [config.width * 2**i for i in range(len(DOWN))]
        options = {"norm": "batch", "slope": 0.0, "bias": True, "dtype": config.dtype, "rngs": rngs}
        self.encoder = nnx.List([Level(in_channels, widths[0], DOWN[0], options)])
        self.down, self.up, self.decoder = nnx.List([]), nnx.List([]), nnx.List([])
        for (above, w), count in zip(pairwise(widths), DOWN[1:], strict=True):
            self.down.append(ConvBlock(above, w, (2, 2, 2), 2, **options))
            self.encoder.append(Level(w, w, count, options))
        for (below, w), count in zip(pairwise(reversed(widths)), UP, strict=True):
            self.up.append(Up(below, w, config.dtype, rngs))
            self.decoder.append(Level(w, w, count, options))
        self.head = Conv(widths[0], out_channels, (1, 1, 1), dtype=config.dtype, rngs=rngs)
        self.dropout = config.dropout

    def __call__(
        self,
        x: Float[Array, "b d h w c"],
        train: bool = False,
        rngs: nnx.Rngs | None = None,
        perturb: Perturb | None = None,
    ) -> tuple[Float[Array, "b d h w k"]]:
        """Logits. UserError unless every axis is a multiple of 16. Dropout wants `rngs` in training.

        `perturb` acts on the output of each encoder level, skips included.
        """
        if x.ndim != 5 or any(n % 16 for n in x.shape[1:-1]):
            found, expected = " x ".join(map(str, x.shape[1:-1])), "three axes, each a multiple of 16"
            raise UserError("VNet cannot take images of this size", found=found, expected=expected)
        skips = []
        for down, level in zip([None, *self.down], self.encoder, strict=True):
            x = level(x if down is None else down(x, train), train)
            x = x if perturb is None else perturb(x)
            skips.append(x)
        x = dropout(skips.pop(), self.dropout, train, rngs)
        for up, level, skip in zip(self.up, self.decoder, reversed(skips), strict=True):
            x = level(up(x, train) + skip, train)
        return (self.head(dropout(x, self.dropout, train, rngs)).astype(jnp.float32),)


class Level(nnx.Module):
    """`count` convolutions of size 3 with norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, count: int, options: dict[str, Any]):
        channels = [in_channels] + [out_channels] * count
        self.blocks = nnx.List([ConvBlock(c, o, (3, 3, 3), **options) for c, o in pairwise(channels)])

    def __call__(self, x: Array, train: bool) -> Array:
        for block in self.blocks:
            x = block(x, train)
        return x


class Up(nnx.Module):
    """Transposed convolution to twice the size, norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, dtype: str, rngs: nnx.Rngs):
        self.conv = ConvTranspose(in_channels, out_channels, (2, 2, 2), dtype=dtype, rngs=rngs)
        self.norm = Norm("batch", out_channels, slope=0.0)

    def __call__(self, x: Array, train: bool) -> Array:
        return self.norm(self.conv(x), train)

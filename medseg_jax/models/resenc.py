"""Residual encoder U-Net, nnU-Net's recommended network (Isensee et al. 2024, "nnU-Net Revisited", arXiv 2404.09556).

Encoder: a stem convolution, then per stage residual blocks ("BasicBlockD": two convolutions; where the block is strided
its shortcut is an average pool, where it changes the channels a 1x1 convolution and a norm follow). The decoder is that of
the plain U-Net with one convolution a stage.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from medseg_jax.models.blocks import ConvBlock, NormKind, leaky_relu
from medseg_jax.models.network import Network
from medseg_jax.models.unet import Decoder, StageShapes, UNetModule
from medseg_jax.types import UserError

BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6, 6, 6)
"""Residual blocks of each stage in nnU-Net's ResEnc presets."""


@dataclass(frozen=True)
class ResEncUNet(Network):
    """Residual encoder U-Net. Fields that are None are taken from the plan by `from_plan`; see `unet.UNet` for the others.

    Attributes:
        blocks_per_stage: residual blocks of each encoder stage; None for nnU-Net's 1, 3, 4, 6, 6, ...
    """

    dim: int | None = None
    features: tuple[int, ...] | None = None
    strides: tuple[tuple[int, ...], ...] | None = None
    kernel_sizes: tuple[tuple[int, ...], ...] | None = None
    blocks_per_stage: tuple[int, ...] | None = None
    decoder_convs: int = 1
    norm: NormKind = "instance"
    deep_supervision: bool = True
    dropout: float = 0.0
    remat: bool = False
    dtype: str = "float32"

    def from_plan(self, plan: Any) -> Self:
        """Fills the fields that are None from the plan's fields of the same name."""
        names = ("dim", "features", "strides", "kernel_sizes")
        return replace(self, **{n: getattr(plan, n) for n in names if getattr(self, n) is None})

    def build(self, in_channels: int, out_channels: int, rngs: nnx.Rngs) -> UNetModule:
        """The network with fresh parameters. `rngs` has a stream "params" (or a default one)."""
        shape = StageShapes.of(self)
        counts = self.blocks_per_stage or BLOCKS[: len(shape.stages)]
        if len(counts) != len(shape.stages):
            raise UserError(
                "ResEncUNet: one number of blocks a stage", found=counts, expected=f"{len(shape.stages)} entries"
            )
        block = {"norm": self.norm, "dropout": self.dropout, "dtype": self.dtype, "rngs": rngs}
        encoder, channels = [], in_channels
        for i, (features, kernel_size, strides) in enumerate(shape.stages):
            stem = ConvBlock(channels, features, kernel_size, **block) if i == 0 else None
            channels = features if i == 0 else channels
            encoder.append(ResidualStage(stem, channels, features, kernel_size, strides, counts[i], **block))
            channels = features
        decoder = Decoder(shape, out_channels, self.decoder_convs, self.deep_supervision, self.remat, **block)
        return UNetModule(encoder, decoder, shape, self.remat)


class ResidualStage(nnx.Module):
    """`count` residual blocks, the first one strided; before the first stage's, the stem."""

    def __init__(
        self, stem: ConvBlock | None, in_channels: int, features: int, kernel_size, strides, count: int, **block
    ):
        self.stem = stem
        self.blocks = nnx.List(
            [
                ResidualBlock(
                    features if i else in_channels,
                    features,
                    kernel_size,
                    (1,) * len(kernel_size) if i else strides,
                    **block,
                )
                for i in range(count)
            ]
        )

    def __call__(self, x: Array, train: bool = False, rngs: nnx.Rngs | None = None) -> Array:
        x = x if self.stem is None else self.stem(x, train, rngs)
        for block in self.blocks:
            x = block(x, train, rngs)
        return x


class ResidualBlock(nnx.Module):
    """nnU-Net's BasicBlockD: leaky_relu(conv2(conv1(x)) + shortcut(x))."""

    def __init__(
        self, in_channels: int, features: int, kernel_size, strides: tuple[int, ...], *, dropout: float, **block
    ):
        self.conv1 = ConvBlock(in_channels, features, kernel_size, strides, dropout=dropout, **block)
        self.conv2 = ConvBlock(features, features, kernel_size, activation=False, **block)
        point = (1,) * len(kernel_size)
        projects = in_channels != features
        self.project = (
            ConvBlock(in_channels, features, point, activation=False, bias=False, **block) if projects else None
        )
        self.strides = strides

    def __call__(self, x: Array, train: bool = False, rngs: nnx.Rngs | None = None) -> Array:
        y = self.conv2(self.conv1(x, train, rngs), train, rngs)
        shortcut = average_pool(x, self.strides)
        if self.project is not None:
            shortcut = self.project(shortcut, train, rngs)
        return leaky_relu(y + shortcut)


def average_pool(x: Array, strides: tuple[int, ...]) -> Array:
    """Mean over blocks of `strides` voxels: [b, *s, c] -> [b, *(s / strides), c]."""
    if math.prod(strides) == 1:
        return x
    b, *s, c = x.shape
    split = [v for n, k in zip(s, strides, strict=True) for v in (n // k, k)]
    return x.reshape(b, *split, c).mean(tuple(range(2, 2 + 2 * len(s), 2)), dtype=jnp.float32).astype(x.dtype)

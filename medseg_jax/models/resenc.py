"""Residual encoder U-Net, which nnU-Net recommends (Isensee et al. 2024, "nnU-Net Revisited", arXiv 2404.09556).

Encoder: a stem convolution, then per stage residual blocks ("BasicBlockD"): two convolutions; where the block is
strided its shortcut is an average pool, where it changes the number of channels a 1x1 convolution and a norm follow.
The decoder is the plain U-Net's with one convolution a stage. ResEnc M, L and XL are this network: they differ in patch
and batch size, which the plan decides.

As in `unet`, convolutions before a norm have no bias, and a strided first stage is allowed.

Parameters with 1 input and 2 output channels (with the biases that nnU-Net has beside norms):

| preset | parameters | with nnU-Net's biases |
|---|---|---|
| RESENC_3D | 102,336,714 | 102,349,770 |
| RESENC_2D | 139,985,870 | 140,017,038 |
| SMALL_3D | 2,436,358 | 2,437,414 |
"""

import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from medseg_jax.models.blocks import ConvBlock, leaky_relu
from medseg_jax.models.unet import Decoder, StagedConfig, UNetModule
from medseg_jax.types import UserError

BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6, 6, 6)
"""Residual blocks of each stage in nnU-Net's presets."""


@dataclass(frozen=True)
class ResEncUNet(StagedConfig):
    """Residual encoder U-Net; see `unet.StagedConfig` for the other fields.

    Attributes:
        blocks_per_stage: residual blocks of each encoder stage; None for nnU-Net's 1, 3, 4, 6, 6, ...
        decoder_convs: convolutions of a decoder stage.
    """

    blocks_per_stage: tuple[int, ...] | None = None
    decoder_convs: int = 1

    def build(self, in_channels: int, out_channels: int, rngs: nnx.Rngs) -> UNetModule:
        """The network with fresh parameters drawn from the stream "params" of `rngs`."""
        stages, options = self.stages(), self.block_options(rngs)
        counts = self.blocks_per_stage or BLOCKS[: len(stages)]
        if len(counts) != len(stages):
            expected = f"{len(stages)} numbers, one per stage"
            raise UserError("ResEncUNet.blocks_per_stage does not fit", found=counts, expected=expected)
        channels, kernel_size, _ = stages[0]
        stem = ConvBlock(in_channels, channels, kernel_size, **options)
        encoder = []
        for (features, kernel_size, strides), count in zip(stages, counts, strict=True):
            encoder.append(ResidualStage(stem, channels, features, kernel_size, strides, count, **options))
            stem, channels = None, features
        return UNetModule(self, encoder, Decoder(self, out_channels, self.decoder_convs, rngs))


RESENC_3D = ResEncUNet.isotropic(3, 32, 64, 128, 256, 320, 320)
"""ResEnc M and L for patches of about 128 x 128 x 128."""

RESENC_2D = ResEncUNet.isotropic(2, 32, 64, 128, 256, 512, 512, 512, 512)
"""ResEnc M and L for patches of about 512 x 512."""

SMALL_3D = ResEncUNet.isotropic(3, 16, 32, 64, 128, blocks_per_stage=(1, 2, 2, 2))
"""For small structures, or without an accelerator."""


class ResidualStage(nnx.Module):
    """`count` residual blocks, the first one strided, after the stem if there is one."""

    def __init__(
        self,
        stem: ConvBlock | None,
        in_channels: int,
        features: int,
        kernel_size: tuple[int, ...],
        strides: tuple[int, ...],
        count: int,
        **options: Any,
    ):
        self.stem = stem
        self.blocks = nnx.List([ResidualBlock(in_channels, features, kernel_size, strides, **options)])
        for _ in range(count - 1):
            self.blocks.append(ResidualBlock(features, features, kernel_size, (1,) * len(strides), **options))

    def __call__(self, x: Array, train: bool = False, rngs: nnx.Rngs | None = None) -> Array:
        x = x if self.stem is None else self.stem(x, train, rngs)
        for block in self.blocks:
            x = block(x, train, rngs)
        return x


class ResidualBlock(nnx.Module):
    """leaky_relu(conv2(conv1(x)) + shortcut(x)); dropout after the first convolution only, as in nnU-Net."""

    def __init__(
        self,
        in_channels: int,
        features: int,
        kernel_size: tuple[int, ...],
        strides: tuple[int, ...],
        *,
        dropout: float,
        **options: Any,
    ):
        self.conv1 = ConvBlock(in_channels, features, kernel_size, strides, dropout=dropout, **options)
        self.conv2 = ConvBlock(features, features, kernel_size, activation=False, **options)
        point = (1,) * len(strides)
        change = in_channels != features
        self.project = ConvBlock(in_channels, features, point, activation=False, **options) if change else None
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
    b, *size, c = x.shape
    blocks = x.reshape(b, *(v for n, k in zip(size, strides, strict=True) for v in (n // k, k)), c)
    return blocks.mean(tuple(range(2, blocks.ndim - 1, 2)), dtype=jnp.float32).astype(x.dtype)

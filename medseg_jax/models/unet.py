"""U-Net as nnU-Net configures it ("PlainConvUNet"; Isensee et al. 2021, doi:10.1038/s41592-020-01008-z), 2-D and 3-D.

Encoder: per stage `convs_per_stage` x (convolution, instance norm, leaky ReLU), the first one strided. Decoder: per stage
a transposed convolution with kernel = stride, concatenation with the skip, convolutions. A 1x1 head at every decoder
stage gives the logits of deep supervision.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from medseg_jax.models.blocks import Conv, ConvBlock, ConvTranspose, NormKind, rematerialised
from medseg_jax.models.network import Network
from medseg_jax.types import UserError


@dataclass(frozen=True)
class UNet(Network):
    """Plain U-Net. Fields that are None are taken from the plan by `from_plan`.

    Attributes:
        dim: 2 or 3.
        features: channels of each stage, highest resolution first.
        strides: for each stage, the strides of its first convolution, one an axis; ones for the first stage.
        kernel_sizes: for each stage, one an axis, odd.
        convs_per_stage: convolutions of an encoder stage.
        decoder_convs: convolutions of a decoder stage.
        norm: "instance", "batch" or "group".
        deep_supervision: whether training returns logits of every decoder stage.
        dropout: probability of dropping a channel after each convolution.
        remat: compute the activations of a stage again in the backward pass, which saves memory and costs a third more time.
        dtype: compute dtype, "float32" or "bfloat16"; parameters, statistics and logits are float32.
    """

    dim: int | None = None
    features: tuple[int, ...] | None = None
    strides: tuple[tuple[int, ...], ...] | None = None
    kernel_sizes: tuple[tuple[int, ...], ...] | None = None
    convs_per_stage: int = 2
    decoder_convs: int = 2
    norm: NormKind = "instance"
    deep_supervision: bool = True
    dropout: float = 0.0
    remat: bool = False
    dtype: str = "float32"

    def from_plan(self, plan: Any) -> Self:
        """Fills the fields that are None from the plan's fields of the same name."""
        names = ("dim", "features", "strides", "kernel_sizes")
        return replace(self, **{n: getattr(plan, n) for n in names if getattr(self, n) is None})

    def build(self, in_channels: int, out_channels: int, rngs: nnx.Rngs) -> "UNetModule":
        """The network with fresh parameters. `rngs` has a stream "params" (or a default one)."""
        shape = StageShapes.of(self)
        block = {"norm": self.norm, "dropout": self.dropout, "dtype": self.dtype, "rngs": rngs}
        encoder, channels = [], in_channels
        for features, kernel_size, strides in shape.stages:
            encoder.append(Stack(channels, features, kernel_size, strides, self.convs_per_stage, **block))
            channels = features
        decoder = Decoder(shape, out_channels, self.decoder_convs, self.deep_supervision, self.remat, **block)
        return UNetModule(encoder, decoder, shape, self.remat)


@dataclass(frozen=True)
class StageShapes:
    """The checked stages of a config: (features, kernel size, strides) each."""

    stages: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]

    @classmethod
    def of(cls, config: Any) -> Self:
        """Raises UserError where a field is missing or the fields contradict each other."""
        name = type(config).__name__
        empty = [n for n in ("dim", "features", "strides", "kernel_sizes") if getattr(config, n) is None]
        if empty:
            raise UserError(
                f"{name} does not know its shape",
                found=f"{', '.join(empty)} = None",
                remedy=f"{name}(...).from_plan(plan), or give the fields",
            )
        lengths = {n: len(getattr(config, n)) for n in ("features", "strides", "kernel_sizes")}
        if len(set(lengths.values())) > 1 or lengths["features"] < 2:
            raise UserError(f"{name}: one entry a stage, two stages at least", found=lengths)
        for field in ("strides", "kernel_sizes"):
            wrong = [v for v in getattr(config, field) if len(v) != config.dim]
            if wrong:
                raise UserError(
                    f"{name}: {field} need one entry an axis", found=wrong[0], expected=f"{config.dim} entries"
                )
        even = [k for k in config.kernel_sizes if any(n % 2 == 0 for n in k)]
        if even:
            raise UserError(f"{name}: kernel sizes are odd", found=even[0])
        stages = zip(config.features, map(tuple, config.kernel_sizes), map(tuple, config.strides), strict=True)
        return cls(tuple(stages))

    @property
    def total_strides(self) -> tuple[int, ...]:
        """Voxels of the input per voxel of the last stage, an axis each."""
        return tuple(math.prod(s) for s in zip(*(strides for _, _, strides in self.stages), strict=True))

    def check_input(self, x: Array) -> None:
        """Raises UserError unless every axis of x [b, *s, c] is a multiple of the total stride."""
        size, total = x.shape[1:-1], self.total_strides
        if len(size) != len(total) or any(n % t for n, t in zip(size, total, strict=True)):
            expected = " x ".join(f"multiple of {t}" for t in total)
            raise UserError(
                "The network cannot take this input size",
                found=" x ".join(map(str, size)),
                expected=expected,
                remedy="mend patch_size in plan.json, or use fewer stages",
            )


class Stack(nnx.Module):
    """`count` convolution blocks, the first one strided."""

    def __init__(self, in_channels: int, features: int, kernel_size, strides, count: int, **block):
        self.blocks = nnx.List(
            [
                ConvBlock(features if i else in_channels, features, kernel_size, 1 if i else strides, **block)
                for i in range(count)
            ]
        )

    def __call__(self, x: Array, train: bool = False, rngs: nnx.Rngs | None = None) -> Array:
        for block in self.blocks:
            x = block(x, train, rngs)
        return x


class Decoder(nnx.Module):
    """From the skips of an encoder to logits: nnU-Net's UNetDecoder."""

    def __init__(
        self,
        shape: StageShapes,
        out_channels: int,
        convs: int,
        deep_supervision: bool,
        remat: bool,
        *,
        dtype,
        rngs,
        **block,
    ):
        self.ups, self.stages, self.heads = nnx.List([]), nnx.List([]), nnx.List([])
        point = (1,) * len(shape.total_strides)
        for i in reversed(range(len(shape.stages) - 1)):
            (features, kernel_size, _), (below, _, strides) = shape.stages[i], shape.stages[i + 1]
            self.ups.append(ConvTranspose(below, features, strides, dtype=dtype, rngs=rngs))
            self.stages.append(Stack(2 * features, features, kernel_size, 1, convs, dtype=dtype, rngs=rngs, **block))
            if deep_supervision or i == 0:
                self.heads.append(Conv(features, out_channels, point, dtype=dtype, rngs=rngs))
        self.deep_supervision, self.remat = deep_supervision, remat

    def __call__(self, skips: Sequence[Array], train: bool, rngs: nnx.Rngs | None) -> tuple[Array, ...]:
        *skips, x = skips
        features = []
        for up, stage, skip in zip(self.ups, self.stages, reversed(skips), strict=True):
            x = run_stage(stage, jnp.concatenate([up(x), skip], -1), train, rngs, self.remat)
            features.append(x)
        wanted = features if self.deep_supervision and train else features[-1:]
        heads = list(self.heads)[-len(wanted) :]
        return tuple(h(f).astype(jnp.float32) for h, f in zip(reversed(heads), reversed(wanted), strict=True))


class UNetModule(nnx.Module):
    """Encoder stages, each of which leaves a skip, and a decoder."""

    def __init__(self, encoder: Sequence[nnx.Module], decoder: Decoder, shape: StageShapes, remat: bool):
        self.encoder, self.decoder = nnx.List(encoder), decoder
        self.shape, self.remat = shape, remat

    def __call__(
        self, x: Float[Array, "b *s c"], train: bool = False, rngs: nnx.Rngs | None = None
    ) -> tuple[Float[Array, "b *t k"], ...]:
        """Logits, full resolution first; only these unless `train` and deep supervision."""
        self.shape.check_input(x)
        skips = []
        for stage in self.encoder:
            x = run_stage(stage, x, train, rngs, self.remat)
            skips.append(x)
        return self.decoder(skips, train, rngs)


def run_stage(stage: Any, x: Array, train: bool, rngs: nnx.Rngs | None, remat: bool) -> Array:
    """A stage, rematerialised if asked for and of use."""
    return rematerialised(stage, x, train, rngs) if remat and train else stage(x, train, rngs)

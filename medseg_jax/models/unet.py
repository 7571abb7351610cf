"""U-Net as nnU-Net configures it ("PlainConvUNet"; Isensee et al. 2021, doi:10.1038/s41592-020-01008-z), 2-D and 3-D.

Encoder: per stage `convs_per_stage` x (convolution, instance norm, leaky ReLU), the first one strided. Decoder: per
stage a transposed convolution with kernel = stride, the skip beside it, convolutions. A 1x1 head at every decoder stage
gives the logits of deep supervision.

Two departures from nnU-Net. Convolutions that a norm follows have no bias (`blocks.ConvBlock`): the same functions with
one parameter less per such channel. And the first stage may be strided: then all stages work on blocks of voxels, and
the head of full resolution is a transposed convolution. A step then takes a quarter (2-D) or a sixth (3-D) of the time
of the same features at full resolution, which makes 3-D networks bearable on a CPU.

Parameters with 1 input and 2 output channels (with the biases that nnU-Net has beside norms):

| preset | parameters | with nnU-Net's biases |
|---|---|---|
| PLAIN_3D | 31,191,754 | 31,195,594 |
| PLAIN_2D | 46,315,470 | 46,324,558 |
| SMALL_3D | 1,401,478 | 1,402,182 |
| SMALL_2D | 1,942,760 | 1,944,232 |
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from medseg_jax.data.plan import Plan
from medseg_jax.models.blocks import Conv, ConvBlock, ConvTranspose, NormKind, rematerialised
from medseg_jax.models.network import Network, Perturb
from medseg_jax.types import UserError

PLANNED = ("dim", "features", "strides", "kernel_sizes")
"""Fields that a plan knows."""

# -------------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class StagedConfig(Network):
    """What all U-Nets here have in common. Fields that are None are taken from the plan by `from_plan`.

    Attributes:
        dim: 2 or 3.
        features: channels of each stage, highest resolution first.
        strides: for each stage, the stride of its first convolution along each axis; usually ones for the first stage.
        kernel_sizes: for each stage, the odd size of its kernels along each axis.
        norm: "instance", "batch" or "group".
        deep_supervision: whether training returns the logits of every decoder stage.
        dropout: probability of dropping a channel after each convolution.
        remat: compute the activations of a stage again in the backward pass: less memory, about a third more time.
        dtype: compute dtype, "float32" or "bfloat16"; parameters, statistics and logits are float32.
    """

    dim: int | None = None
    features: tuple[int, ...] | None = None
    strides: tuple[tuple[int, ...], ...] | None = None
    kernel_sizes: tuple[tuple[int, ...], ...] | None = None
    norm: NormKind = "instance"
    deep_supervision: bool = True
    dropout: float = 0.0
    remat: bool = False
    dtype: str = "float32"

    @classmethod
    def isotropic(cls, dim: int, *features: int, **options: Any) -> Self:
        """Kernels of 3, strides of 2 along all axes in every stage but the first."""
        strides = tuple((1 if i == 0 else 2,) * dim for i in range(len(features)))
        return cls(dim, features, strides, ((3,) * dim,) * len(features), **options)

    def from_plan(self, plan: Plan) -> Self:
        """Fills the fields that are None from the plan's fields of the same name."""
        return replace(self, **{name: getattr(plan, name) for name in PLANNED if getattr(self, name) is None})

    def stages(self) -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
        """(features, kernel size, strides) of each stage.

        UserError where fields are missing or contradict each other.
        """
        name = type(self).__name__
        dim, features, strides, kernel_sizes = self.dim, self.features, self.strides, self.kernel_sizes
        if dim is None or features is None or strides is None or kernel_sizes is None:
            missing = ", ".join(field for field in PLANNED if getattr(self, field) is None)
            remedy = f"{name}(...).from_plan(plan), or give these fields"
            raise UserError(f"{name} does not know its shape", found=f"no {missing}", remedy=remedy)
        lengths = {"features": len(features), "strides": len(strides), "kernel_sizes": len(kernel_sizes)}
        if len(set(lengths.values())) > 1 or len(features) < 2:
            raise UserError(f"{name} wants one entry per stage, and two stages or more", found=lengths)
        for field, rows in (("strides", strides), ("kernel_sizes", kernel_sizes)):
            for row in rows:
                if len(row) != dim or min(row) < 1:
                    expected = f"{dim} positive integers, one per axis"
                    raise UserError(f"{name}.{field} has a wrong entry", found=row, expected=expected)
        even = [size for size in kernel_sizes if any(n % 2 == 0 for n in size)]
        if even:
            raise UserError(f"{name}.kernel_sizes has an even entry", found=even[0], expected="odd sizes")
        return list(zip(features, map(tuple, kernel_sizes), map(tuple, strides), strict=True))

    def block_options(self, rngs: nnx.Rngs) -> dict[str, Any]:
        """What every `ConvBlock` of the network is given."""
        return {"norm": self.norm, "dropout": self.dropout, "dtype": self.dtype, "rngs": rngs}


@dataclass(frozen=True)
class UNet(StagedConfig):
    """Plain U-Net; see `StagedConfig` for the other fields.

    Attributes:
        convs_per_stage: convolutions of an encoder stage.
        decoder_convs: convolutions of a decoder stage.
    """

    convs_per_stage: int = 2
    decoder_convs: int = 2

    def build(self, in_channels: int, out_channels: int, rngs: nnx.Rngs) -> "UNetModule":
        """The network with fresh parameters drawn from the stream "params" of `rngs`."""
        stages, options = self.stages(), self.block_options(rngs)
        encoder, channels = [], in_channels
        for features, kernel_size, strides in stages:
            encoder.append(ConvStack(channels, features, kernel_size, strides, self.convs_per_stage, **options))
            channels = features
        return UNetModule(self, encoder, Decoder(self, out_channels, self.decoder_convs, rngs))


PLAIN_3D = UNet.isotropic(3, 32, 64, 128, 256, 320, 320)
"""nnU-Net's 3d_fullres network for patches of about 128 x 128 x 128."""

PLAIN_2D = UNet.isotropic(2, 32, 64, 128, 256, 512, 512, 512, 512)
"""nnU-Net's 2-D network for patches of about 512 x 512."""

SMALL_3D = UNet.isotropic(3, 16, 32, 64, 128)
"""For small structures, or without an accelerator."""

SMALL_2D = UNet.isotropic(2, 16, 32, 64, 128, 256)
"""For pictures of 128 to 256 pixels, without an accelerator."""

# ------------------------------------------------------------------------------------------------------------- modules


class UNetModule(nnx.Module):
    """Encoder stages, each of which leaves a skip, and a decoder."""

    def __init__(self, config: StagedConfig, encoder: Sequence[nnx.Module], decoder: "Decoder"):
        self.encoder, self.decoder = nnx.List(encoder), decoder
        self.total_strides = tuple(math.prod(axis) for axis in zip(*(s for _, _, s in config.stages()), strict=True))
        self.remat = config.remat

    def __call__(
        self,
        x: Float[Array, "b *s c"],
        train: bool = False,
        rngs: nnx.Rngs | None = None,
        perturb: Perturb | None = None,
    ) -> tuple[Float[Array, "b *t k"], ...]:
        """Logits, full resolution first; only these unless `train` and deep supervision.

        `perturb` acts on the output of each encoder stage, skips included. Dropout wants `rngs` in training.
        UserError unless every axis of x is a multiple of the network's total stride.
        """
        size = x.shape[1:-1]
        if len(size) != len(self.total_strides) or any(n % s for n, s in zip(size, self.total_strides, strict=True)):
            raise UserError(
                "The network cannot take images of this size",
                found=" x ".join(map(str, size)),
                expected=" x ".join(f"(a multiple of {s})" for s in self.total_strides),
                remedy="change patch_size in plan.json, or take away a stage",
            )
        skips = []
        for stage in self.encoder:
            x = run_stage(stage, x, train, rngs, self.remat)
            x = x if perturb is None else perturb(x)
            skips.append(x)
        return self.decoder(skips, train, rngs)


class ConvStack(nnx.Module):
    """`count` convolution blocks, the first one strided."""

    def __init__(
        self,
        in_channels: int,
        features: int,
        kernel_size: tuple[int, ...],
        strides: int | tuple[int, ...],
        count: int,
        **options: Any,
    ):
        self.blocks = nnx.List([ConvBlock(in_channels, features, kernel_size, strides, **options)])
        for _ in range(count - 1):
            self.blocks.append(ConvBlock(features, features, kernel_size, **options))

    def __call__(self, x: Array, train: bool = False, rngs: nnx.Rngs | None = None) -> Array:
        for block in self.blocks:
            x = block(x, train, rngs)
        return x


class Decoder(nnx.Module):
    """From the skips of an encoder to logits."""

    def __init__(self, config: StagedConfig, out_channels: int, convs: int, rngs: nnx.Rngs):
        stages, options = config.stages(), config.block_options(rngs)
        plain = {"dtype": config.dtype, "rngs": rngs}
        self.ups, self.stages, self.heads = nnx.List([]), nnx.List([]), nnx.List([])
        for (features, kernel_size, _), (below, _, strides) in reversed(list(pairwise(stages))):
            self.ups.append(ConvTranspose(below, features, strides, **plain))
            self.stages.append(ConvStack(2 * features, features, kernel_size, 1, convs, **options))
            if config.deep_supervision and len(self.stages) < len(stages) - 1:
                self.heads.append(Conv(features, out_channels, (1,) * len(strides), **plain))
        features, _, strides = stages[0]
        if max(strides) == 1:
            self.heads.append(Conv(features, out_channels, strides, **plain))
        else:
            self.heads.append(ConvTranspose(features, out_channels, strides, **plain))
        self.deep_supervision, self.remat = config.deep_supervision, config.remat

    def __call__(self, skips: Sequence[Array], train: bool, rngs: nnx.Rngs | None) -> tuple[Array, ...]:
        """Skips [b, *s_i, c_i], highest resolution first, the last one being the bottleneck -> logits, likewise."""
        *skips, x = skips
        features = []
        for up, stage, skip in zip(self.ups, self.stages, reversed(skips), strict=True):
            x = run_stage(stage, jnp.concatenate([up(x), skip], -1), train, rngs, self.remat)
            features.append(x)
        wanted = len(self.heads) if self.deep_supervision and train else 1
        outputs = zip(reversed(self.heads), reversed(features), strict=False)
        return tuple(head(x).astype(jnp.float32) for _, (head, x) in zip(range(wanted), outputs, strict=False))


def run_stage(stage: Any, x: Array, train: bool, rngs: nnx.Rngs | None, remat: bool) -> Array:
    """A stage, rematerialised where asked for and of use."""
    return rematerialised(stage, x, train, rngs) if remat and train else stage(x, train, rngs)

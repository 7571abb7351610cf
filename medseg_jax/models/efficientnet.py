"""EfficientNet b0 to b3 as an encoder, and the U-Net on top of it (Tan & Le 2019, arXiv 1905.11946).

A stem and blocks of "mobile inverted bottleneck": expand by a 1x1 convolution, filter each channel on its own, weigh
the channels by what the whole image holds of them (squeeze and excitation), project back, add. Padding and epsilon are
those of the original TensorFlow code, which PyTorch ports keep: strided convolutions pad more at the bottom and right.
The momentum of batch normalisation is 0.1 instead of their 0.01, with which the running statistics need several hundred
steps to be of use: trained from scratch for 300 steps, the network then predicted nothing. [our choice] The decoder and
the five features of the encoder are those of segmentation_models_pytorch 0.4, so that its weights fit
(weights/efficientnet.py).

Parameters with 3 input and 2 output channels (segmentation_models_pytorch counts the unused ImageNet head's convolution
and norm of the encoder too, 412,160 for b0):

| variant | encoder | U-Net |
|---|---|---|
| b0 | 3,595,388 | 5,839,454 |
| b1 | 6,101,024 | 8,345,090 |
| b2 | 7,202,562 | 9,548,004 |
| b3 | 10,103,336 | 12,566,282 |
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from medseg_jax.models.blocks import Conv, Norm
from medseg_jax.models.network import Network, Perturb
from medseg_jax.types import UserError

type Variant = Literal["b0", "b1", "b2", "b3"]

SCALING = {"b0": (1.0, 1.0), "b1": (1.0, 1.1), "b2": (1.1, 1.2), "b3": (1.2, 1.4)}
"""Width and depth of each variant, relative to b0."""

FEATURES = {"b0": (3, 5, 9), "b1": (5, 8, 16), "b2": (5, 8, 16), "b3": (5, 8, 18)}
"""How many blocks come before the features of stride 4, 8 and 16."""

EPS = 1e-3


class Stage(NamedTuple):
    """Blocks of b0: kernel, stride of the first, expansion, channels, how many."""

    kernel: int
    stride: int
    expansion: int
    channels: int
    count: int


STAGES = (
    Stage(3, 1, 1, 16, 1),
    Stage(3, 2, 6, 24, 2),
    Stage(5, 2, 6, 40, 2),
    Stage(3, 2, 6, 80, 3),
    Stage(5, 1, 6, 112, 3),
    Stage(5, 2, 6, 192, 4),
    Stage(3, 1, 6, 320, 1),
)


def width(channels: int, variant: Variant) -> int:
    """Channels of a variant: scaled, to a multiple of 8, never less than 90 % of it."""
    wanted = channels * SCALING[variant][0]
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded if rounded >= 0.9 * wanted else rounded + 8


def stages(variant: Variant) -> list[Stage]:
    """The stages of a variant."""
    depth = SCALING[variant][1]
    return [s._replace(channels=width(s.channels, variant), count=math.ceil(depth * s.count)) for s in STAGES]


# -------------------------------------------------------------------------------------------------------------- encoder


class EfficientNetEncoder(nnx.Module):
    """Image [b, h, w, c] -> features of stride 2, 4, 8, 16 and 32, whose channels are `channels`.

    Args:
        variant: "b0" to "b3".
        output_stride: 32; or 16, where the last stride becomes a dilation of 2 (DeepLab); or 8, where the last two
            become dilations of 2 and 4.
        drop_connect: probability that the last block's branch is skipped for a sample in training; less for earlier
            ones.
    """

    def __init__(
        self,
        variant: Variant,
        in_channels: int,
        *,
        output_stride: Literal[8, 16, 32] = 32,
        drop_connect: float = 0.2,
        dtype: jnp.dtype | str = "float32",
        rngs: nnx.Rngs,
    ):
        if variant not in SCALING:
            raise UserError("No such EfficientNet", found=variant, expected=", ".join(SCALING))
        if output_stride not in (8, 16, 32):
            raise UserError("No such output stride of EfficientNet", found=output_stride, expected="8, 16 or 32")
        plain = {"dtype": dtype, "rngs": rngs}
        before = width(32, variant)
        self.stem = Conv(in_channels, before, (3, 3), 2, padding=same(3, 2), bias=False, **plain)
        self.norm = Norm("batch", before, eps=EPS)
        self.blocks = nnx.List([])
        self.ends, self.drop_connect = (*FEATURES[variant], sum(s.count for s in stages(variant))), drop_connect
        dilations = {8: (2, 4), 16: (1, 2), 32: (1, 1)}[output_stride]  # of what is beyond stride 8, and beyond 16
        channels = []
        for stage in stages(variant):
            for number in range(stage.count):
                beyond = sum(len(self.blocks) >= end for end in self.ends[1:3])
                dilation = (1, *dilations)[beyond]
                stride = stage.stride if number == 0 and dilation == 1 else 1
                shape = (before, stage.channels, stage.kernel, stride, stage.expansion, dilation)
                self.blocks.append(Bottleneck(*shape, **plain))
                before = stage.channels
                channels.append(before)
        self.channels = (width(32, variant), *(channels[end - 1] for end in self.ends))

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        train: bool = False,
        rngs: nnx.Rngs | None = None,
        perturb: Perturb | None = None,
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Five features, largest first, each changed by `perturb`. Training wants `rngs` unless `drop_connect` is 0."""
        x = jax.nn.swish(self.norm(self.stem(x), train))
        x = x if perturb is None else perturb(x)
        features = [x]
        for number, block in enumerate(self.blocks):
            rate = self.drop_connect * number / len(self.blocks)
            x = block(x, train, rate, rngs)
            if number + 1 in self.ends:
                x = x if perturb is None else perturb(x)
                features.append(x)
        return tuple(features)


class Bottleneck(nnx.Module):
    """One mobile inverted bottleneck."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        expansion: int,
        dilation: int = 1,
        *,
        dtype: jnp.dtype | str,
        rngs: nnx.Rngs,
    ):
        plain = {"dtype": dtype, "rngs": rngs}
        inner = in_channels * expansion
        self.expand = Conv(in_channels, inner, (1, 1), bias=False, **plain) if expansion > 1 else None
        self.norm0 = Norm("batch", inner, eps=EPS) if expansion > 1 else None
        padding = same(kernel, stride, dilation)
        options = {"padding": padding, "dilation": dilation, "groups": inner, "bias": False}
        self.depthwise = Conv(inner, inner, (kernel, kernel), stride, **options, **plain)
        self.norm1 = Norm("batch", inner, eps=EPS)
        squeezed = max(1, in_channels // 4)
        self.reduce = Conv(inner, squeezed, (1, 1), **plain)
        self.excite = Conv(squeezed, inner, (1, 1), **plain)
        self.project = Conv(inner, out_channels, (1, 1), bias=False, **plain)
        self.norm2 = Norm("batch", out_channels, eps=EPS)
        self.shortcut = stride == 1 and in_channels == out_channels

    def __call__(self, x: Array, train: bool, rate: float, rngs: nnx.Rngs | None) -> Array:
        """Input and output [b, h, w, c]; the branch is left out with probability `rate` in training."""
        y = x
        if self.expand is not None and self.norm0 is not None:
            y = jax.nn.swish(self.norm0(self.expand(y), train))
        y = jax.nn.swish(self.norm1(self.depthwise(y), train))
        squeezed = self.reduce(y.mean((1, 2), keepdims=True))
        y = y * jax.nn.sigmoid(self.excite(jax.nn.swish(squeezed)))
        y = self.norm2(self.project(y), train)
        return drop_branch(y, rate, train, rngs) + x if self.shortcut else y


def same(kernel: int, stride: int, dilation: int = 1) -> tuple[tuple[int, int], ...]:
    """TensorFlow's "same" padding for even sizes: with strides, the odd pixel goes to the bottom and right."""
    total = dilation * (kernel - 1) + 1 - stride
    return ((total // 2, total - total // 2),) * 2


def drop_branch(y: Array, rate: float, train: bool, rngs: nnx.Rngs | None) -> Array:
    """Zeroes a residual branch for whole samples with probability `rate`, scales the rest (stochastic depth)."""
    if not train or rate == 0:
        return y
    if rngs is None:
        raise ValueError("stochastic depth while training needs rngs=nnx.Rngs(dropout=key)")
    keep = jax.random.bernoulli(rngs.dropout(), 1 - rate, (len(y), *(1,) * (y.ndim - 1)))
    return jnp.where(keep, y / (1 - rate), 0)


# ---------------------------------------------------------------------------------------------------------------- U-Net


@dataclass(frozen=True)
class EfficientUNet(Network):
    """U-Net with an EfficientNet encoder, for pictures; sizes are multiples of 32.

    Attributes:
        variant: "b0" to "b3".
        decoder: features of the five decoder stages, the deepest first.
        drop_connect: see `EfficientNetEncoder`.
        dtype: compute dtype, "float32" or "bfloat16".
    """

    plan_dim = 2

    variant: Variant = "b0"
    decoder: tuple[int, int, int, int, int] = (256, 128, 64, 32, 16)
    drop_connect: float = 0.2
    dtype: str = "float32"

    def build(self, in_channels: int, out_channels: int, rngs: nnx.Rngs) -> "EfficientUNetModule":
        """The network with fresh parameters drawn from the stream "params" of `rngs`."""
        return EfficientUNetModule(self, in_channels, out_channels, rngs)


class EfficientUNetModule(nnx.Module):
    """Encoder, decoder stages, head."""

    def __init__(self, config: EfficientUNet, in_channels: int, out_channels: int, rngs: nnx.Rngs):
        plain = {"dtype": config.dtype, "rngs": rngs}
        self.encoder = EfficientNetEncoder(config.variant, in_channels, drop_connect=config.drop_connect, **plain)
        *skips, below = self.encoder.channels
        self.decoder = nnx.List([])
        for features, skip in zip(config.decoder, (*reversed(skips), 0), strict=True):
            self.decoder.append(UpBlock(below + skip, features, **plain))
            below = features
        self.head = Conv(below, out_channels, (3, 3), **plain)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        train: bool = False,
        rngs: nnx.Rngs | None = None,
        perturb: Perturb | None = None,
    ) -> tuple[Float[Array, "b h w k"], ...]:
        """Logits. UserError unless both sides are multiples of 32. `perturb` acts on the encoder's five features."""
        if any(n % 32 for n in x.shape[1:-1]):
            raise UserError(
                "EfficientUNet cannot take images of this size",
                found=" x ".join(map(str, x.shape[1:-1])),
                expected="multiples of 32",
                remedy="change patch_size in plan.json",
            )
        *skips, x = self.encoder(x, train, rngs, perturb)
        for block, skip in zip(self.decoder, (*reversed(skips), None), strict=True):
            x = block(x, skip, train)
        return (self.head(x).astype(jnp.float32),)


class UpBlock(nnx.Module):
    """Nearest neighbour to twice the size, the skip beside it, two convolutions with batch norm and ReLU."""

    def __init__(self, in_channels: int, features: int, *, dtype: jnp.dtype | str, rngs: nnx.Rngs):
        plain = {"bias": False, "dtype": dtype, "rngs": rngs}
        self.conv1, self.norm1 = Conv(in_channels, features, (3, 3), **plain), Norm("batch", features, slope=0.0)
        self.conv2, self.norm2 = Conv(features, features, (3, 3), **plain), Norm("batch", features, slope=0.0)

    def __call__(self, x: Array, skip: Array | None, train: bool) -> Array:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        if skip is not None:
            x = jnp.concatenate([x, skip.astype(x.dtype)], -1)
        return self.norm2(self.conv2(self.norm1(self.conv1(x), train)), train)

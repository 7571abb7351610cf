"""Med-2D SegNet (Chowdhury et al. 2025, arXiv 2504.14715): a U-Net of about two million parameters for 2-D images.

    stem -> five stages of one Med Block each, halved in between -> the way back, skips beside it -> head

A Med Block widens its input by a 1 x 1 convolution, looks around with a depthwise 7 x 7 convolution, weighs each
channel with its own mean over the image, narrows it again and adds the input (`MedBlock`).

The article gives the block, the 2.07 million parameters, and no more that could be read. OUR CHOICE are therefore:
widths, one block a stage, max-pooling, ELU, the gate without parameters, the bilinear decoder of two 3 x 3 convolutions
a level, and the head. They hit the published size, and so do others; do not take this for the authors' exact network.

| preset | parameters (3 channels in, 1 out) | with the statistics of batch norm |
|---|---|---|
| MED2D_SEGNET | 2,052,545 | 2,067,425 |
| MED2D_TINY | 559,937 | 567,377 |

Spec: bayes_spe_med2d_dr C3.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from medseg_jax.models.blocks import Conv, Norm
from medseg_jax.models.network import Network, Perturb
from medseg_jax.types import UserError


@dataclass(frozen=True)
class Med2DSegNet(Network):
    """Med-2D SegNet for 2-D images of any size.

    Attributes:
        widths: channels of each stage, highest resolution first.
        expand: channels inside a Med Block over those outside.
        kernel_size: side of the depthwise convolution.
        gate: "gap" weighs each channel with the sigmoid of its mean; "none" leaves an inverted residual block.
        dtype: compute dtype, "float32" or "bfloat16"; parameters, statistics and logits are float32.
    """

    plan_dim = 2

    widths: tuple[int, ...] = (16, 32, 64, 128, 256)
    expand: int = 6
    kernel_size: int = 7
    gate: Literal["gap", "none"] = "gap"
    dtype: str = "float32"

    def build(self, in_channels: int, out_channels: int, rngs: nnx.Rngs) -> "Med2DSegNetModule":
        """The network with fresh parameters drawn from the stream "params" of `rngs`."""
        if self.gate not in ("gap", "none"):
            raise UserError("Unknown Med2DSegNet.gate", found=self.gate, expected='"gap" or "none"')
        return Med2DSegNetModule(self, in_channels, out_channels, rngs)


MED2D_SEGNET = Med2DSegNet()
"""Of the published size."""

MED2D_TINY = Med2DSegNet(widths=(8, 16, 32, 64, 128))
"""A quarter of it."""


class Med2DSegNetModule(nnx.Module):
    """Stem, stages, decoder, head; see the file's docstring."""

    def __init__(self, config: Med2DSegNet, in_channels: int, out_channels: int, rngs: nnx.Rngs):
        options: dict[str, Any] = {"dtype": config.dtype, "rngs": rngs}
        widths = config.widths
        self.stem = ConvUnit(in_channels, widths[0], 3, **options)
        self.enter, self.blocks, self.decoder = nnx.List([]), nnx.List([]), nnx.List([])
        for before, width in zip((widths[0], *widths), widths, strict=False):
            self.enter.append(ConvUnit(before, width, 1, **options))
            self.blocks.append(MedBlock(width, config, rngs))
        for below, width in zip(widths[:0:-1], widths[-2::-1], strict=True):
            pair = [ConvUnit(below + width, width, 3, **options), ConvUnit(width, width, 3, **options)]
            self.decoder.append(nnx.List(pair))
        self.head = nnx.List([Conv(a, b, (3, 3), **options) for a, b in ((widths[0], 32), (32, 16))])
        self.logits = Conv(16, out_channels, (1, 1), **options)
        self.total_stride = 2 ** (len(widths) - 1)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        train: bool = False,
        rngs: nnx.Rngs | None = None,
        perturb: Perturb | None = None,
    ) -> tuple[Float[Array, "b h w k"]]:
        """Logits, as a tuple of one. `perturb` acts on the output of each stage."""
        del rngs
        if x.ndim != 4:
            raise UserError("Med2DSegNet is 2-D", found=f"an image of {x.ndim - 2} spatial axes", expected="two")
        (h, w), multiple = x.shape[1:3], self.total_stride
        x = jnp.pad(x, ((0, 0), (0, -h % multiple), (0, -w % multiple), (0, 0)), mode="edge")
        x = self.stem(x, train)
        skips = []
        for enter, block in zip(self.enter, self.blocks, strict=True):
            x = halve(skips[-1]) if skips else x
            x = block(enter(x, train), train)
            skips.append(x if perturb is None else perturb(x))
        x = skips.pop()
        for first, second in self.decoder:
            skip = skips.pop()
            x = jax.image.resize(x, skip.shape[:-1] + x.shape[-1:], "bilinear")
            x = second(first(jnp.concatenate([x, skip], -1), train), train)
        for layer in self.head:
            x = jax.nn.elu(layer(x))
        return (self.logits(x)[:, :h, :w].astype(jnp.float32),)


class MedBlock(nnx.Module):
    """x + narrow(gate(depthwise(widen(x)))), [b, h, w, c] -> [b, h, w, c]."""

    def __init__(self, channels: int, config: Med2DSegNet, rngs: nnx.Rngs):
        wide = config.expand * channels
        options: dict[str, Any] = {"dtype": config.dtype, "rngs": rngs}
        self.widen = ConvUnit(channels, wide, 1, **options)
        self.depthwise = ConvUnit(wide, wide, config.kernel_size, groups=wide, **options)
        self.narrow = ConvUnit(wide, channels, 1, activation=False, **options)
        self.gated = config.gate == "gap"

    def __call__(self, x: Array, train: bool = False) -> Array:
        y = self.depthwise(self.widen(x, train), train)
        if self.gated:
            y = y * jax.nn.sigmoid(y.mean((1, 2), keepdims=True, dtype=jnp.float32)).astype(y.dtype)
        return x + self.narrow(y, train)


class ConvUnit(nnx.Module):
    """Convolution, batch norm, ELU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        side: int,
        *,
        groups: int = 1,
        activation: bool = True,
        dtype: str,
        rngs: nnx.Rngs,
    ):
        self.conv = Conv(in_channels, out_channels, (side, side), groups=groups, dtype=dtype, rngs=rngs)
        self.norm, self.activation = Norm("batch", out_channels), activation

    def __call__(self, x: Array, train: bool = False) -> Array:
        y = self.norm(self.conv(x), train)
        return jax.nn.elu(y) if self.activation else y


def halve(x: Float[Array, "b h w c"]) -> Float[Array, "b t u c"]:
    """Largest of each 2 x 2 pixels."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).max((2, 4))

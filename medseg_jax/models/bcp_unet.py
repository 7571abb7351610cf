"""The 2-D U-Net of BCP (Bai et al. 2023, arXiv 2305.00673) and of the semi-supervised field before it (SSL4MIS).

Five levels of 16 to 256 channels; two convolutions with batch norm and leaky ReLU a level, dropout of single values
between them in the encoder; max-pooling down; up by a 1x1 convolution and bilinear interpolation that keeps the corners
where they are; skip first in the concatenation; a 3x3 head. The published checkpoints also hold heads that no output
uses. Parameters with 1 input and 4 output channels: 1,813,764, of which 1,472 are without effect (biases that batch
norm takes away; they stay for the count to be the publication's).
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from medseg_jax.models.blocks import Conv, ConvBlock, default_init, dropout, max_pool
from medseg_jax.models.network import Network, Perturb
from medseg_jax.types import UserError

DROPOUT = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Probability in each level of the encoder."""


@dataclass(frozen=True)
class BCPUNet(Network):
    """BCP's U-Net. Image sizes are multiples of 16.

    Attributes:
        width: channels of the first level; each level below doubles it.
        dtype: compute dtype, "float32" or "bfloat16"; parameters, statistics and logits are float32.
    """

    plan_dim = 2

    width: int = 16
    dtype: str = "float32"

    def __post_init__(self):
        if self.width < 1:
            raise UserError("BCPUNet has no channels", found=f"width={self.width}", expected="1 or more")

    def build(self, in_channels: int, out_channels: int, rngs: nnx.Rngs) -> "BCPUNetModule":
        """The network with fresh parameters (PyTorch's default, as released) from the stream "params" of `rngs`."""
        module = BCPUNetModule(self, in_channels, out_channels, rngs)
        default_init(module, rngs)
        return module


class BCPUNetModule(nnx.Module):
    """Encoder, decoder (deepest level first) and head."""

    def __init__(self, config: BCPUNet, in_channels: int, out_channels: int, rngs: nnx.Rngs):
        widths = [config.width * 2**i for i in range(len(DROPOUT))]
        plain = {"dtype": config.dtype, "rngs": rngs}
        options = {"norm": "batch", "bias": True, **plain}
        stages = zip([in_channels, *widths], widths, DROPOUT, strict=False)
        self.encoder = nnx.List([Level(c, w, rate, options) for c, w, rate in stages])
        self.up, self.decoder = nnx.List([]), nnx.List([])
        for below, w in pairwise(reversed(widths)):
            self.up.append(Conv(below, w, (1, 1), **plain))
            self.decoder.append(Level(2 * w, w, 0.0, options))
        self.head = Conv(widths[0], out_channels, (3, 3), **plain)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        train: bool = False,
        rngs: nnx.Rngs | None = None,
        perturb: Perturb | None = None,
    ) -> tuple[Float[Array, "b h w k"]]:
        """Logits. UserError unless h and w are multiples of 16. Dropout wants `rngs` in training.

        `perturb` acts on the output of each encoder level, skips included.
        """
        if x.ndim != 4 or any(n % 16 for n in x.shape[1:-1]):
            found, expected = " x ".join(map(str, x.shape[1:-1])), "two axes, each a multiple of 16"
            raise UserError("BCPUNet cannot take images of this size", found=found, expected=expected)
        skips = []
        for i, level in enumerate(self.encoder):
            x = level(x if i == 0 else max_pool(x), train, rngs)
            x = x if perturb is None else perturb(x)
            skips.append(x)
        for up, level, skip in zip(self.up, self.decoder, reversed(skips[:-1]), strict=True):
            x = level(jnp.concatenate([skip, double(up(x))], -1), train, rngs)
        return (self.head(x).astype(jnp.float32),)


class Level(nnx.Module):
    """Convolution, norm, leaky ReLU, dropout, convolution, norm, leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, rate: float, options: dict[str, Any]):
        self.first = ConvBlock(in_channels, out_channels, (3, 3), **options)
        self.second = ConvBlock(out_channels, out_channels, (3, 3), **options)
        self.rate = rate

    def __call__(self, x: Array, train: bool = False, rngs: nnx.Rngs | None = None) -> Array:
        x = dropout(self.first(x, train, rngs), self.rate, train, rngs, channels=False)
        return self.second(x, train, rngs)


def double(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Bilinear interpolation to twice the size with the corners where they were (PyTorch's `align_corners`)."""
    for axis in (1, 2):
        n = x.shape[axis]
        position = jnp.arange(2 * n) * ((n - 1) / (2 * n - 1))
        weights = jax.nn.relu(1 - jnp.abs(position[:, None] - jnp.arange(n)))  # [2 n, n]
        x = jnp.moveaxis(jnp.tensordot(weights.astype(x.dtype), x, (1, axis), precision="highest"), 0, axis)
    return x

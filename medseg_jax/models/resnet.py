"""ResNet-50 and -101 as encoders (He et al. 2016, arXiv 1512.03385), in the form that everybody's weights have.

A stem, then four stages of bottleneck blocks: narrow by a 1 x 1 convolution, filter 3 x 3, widen, add. The stride lies
on the 3 x 3 convolution ("v1.5", torchvision's and timm's `resnet50`), not on the first one as in the article. For
dense prediction the strides of the last stages become dilations.

| variant | parameters (3 channels in) |
|---|---|
| resnet50 | 23,508,032 |
| resnet101 | 42,500,160 |
"""

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from medseg_jax.models.blocks import Conv, Norm
from medseg_jax.models.network import Perturb
from medseg_jax.types import UserError

BLOCKS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3)}
"""Bottleneck blocks of each stage."""

WIDEN = 4
"""Channels of a block's output over those of its 3 x 3 convolution."""


class ResNetEncoder(nnx.Module):
    """Image [b, h, w, c] -> features of stride 2, 4, 8, 16 and 32, whose channels are `channels`.

    Args:
        variant: a key of `BLOCKS`.
        output_stride: 32; 16, where the last stage has a dilation of 2 instead of its stride; 8, where the last two
            have 2 and 4.
    """

    def __init__(
        self,
        variant: str,
        in_channels: int,
        *,
        output_stride: Literal[8, 16, 32] = 32,
        dtype: jnp.dtype | str = "float32",
        rngs: nnx.Rngs,
    ):
        if variant not in BLOCKS:
            raise UserError("No such ResNet", found=variant, expected=", ".join(BLOCKS))
        if output_stride not in (8, 16, 32):
            raise UserError("No such output stride of ResNet", found=output_stride, expected="8, 16 or 32")
        plain = {"dtype": dtype, "rngs": rngs}
        self.stem = Conv(in_channels, 64, (7, 7), 2, bias=False, **plain)
        self.norm = Norm("batch", 64, slope=0.0)
        self.stages = nnx.List([])
        before, reached = 64, 4
        for number, blocks in enumerate(BLOCKS[variant]):
            width, wanted = 64 * 2**number, 4 * 2**number
            dilation = max(1, wanted // output_stride)
            stride = 2 if reached < wanted <= output_stride else 1
            stage = []
            for block in range(blocks):
                stage.append(Bottleneck(before, width, stride if block == 0 else 1, dilation, **plain))
                before = WIDEN * width
            self.stages.append(nnx.List(stage))
            reached = min(wanted, output_stride)
        self.channels = (64, *(WIDEN * 64 * 2**number for number in range(4)))

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        train: bool = False,
        rngs: nnx.Rngs | None = None,
        perturb: Perturb | None = None,
    ) -> tuple[Float[Array, "b _ _ _"], ...]:
        """Five features, largest first, each changed by `perturb`."""
        del rngs
        x = self.norm(self.stem(x), train)
        x = x if perturb is None else perturb(x)
        features = [x]
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (1, 1), (0, 0)))
        for stage in self.stages:
            for block in stage:
                x = block(x, train)
            x = x if perturb is None else perturb(x)
            features.append(x)
        return tuple(features)


class Bottleneck(nnx.Module):
    """One residual block, [b, h, w, c] -> [b, h / stride, w / stride, 4 width]."""

    def __init__(
        self, in_channels: int, width: int, stride: int, dilation: int, *, dtype: jnp.dtype | str, rngs: nnx.Rngs
    ):
        plain = {"bias": False, "dtype": dtype, "rngs": rngs}
        out = WIDEN * width
        self.conv1, self.norm1 = Conv(in_channels, width, (1, 1), **plain), Norm("batch", width, slope=0.0)
        self.conv2 = Conv(width, width, (3, 3), stride, dilation=dilation, **plain)
        self.norm2 = Norm("batch", width, slope=0.0)
        self.conv3, self.norm3 = Conv(width, out, (1, 1), **plain), Norm("batch", out)
        changes = stride > 1 or in_channels != out
        self.shortcut = Conv(in_channels, out, (1, 1), stride, **plain) if changes else None
        self.shortcut_norm = Norm("batch", out) if changes else None

    def __call__(self, x: Array, train: bool) -> Array:
        y = self.norm1(self.conv1(x), train)
        y = self.norm3(self.conv3(self.norm2(self.conv2(y), train)), train)
        if self.shortcut is not None and self.shortcut_norm is not None:
            x = self.shortcut_norm(self.shortcut(x), train)
        return jnp.maximum(x + y, 0)

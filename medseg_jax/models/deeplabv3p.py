"""DeepLabv3+ (Chen et al. 2018, arXiv 1802.02611) on a ResNet or an EfficientNet, for pictures.

    encoder -> features of stride 16 (or 8): 1 x 1, three dilated 3 x 3, the image's mean, side by side (ASPP)
            -> up to stride 4, beside the encoder's own features there (48 channels) -> 3 x 3 -> logits, up to stride 1

All 3 x 3 convolutions of the decoder are separable: depthwise, then 1 x 1, one norm after both. Both interpolations
align the corners, so that the outermost pixels lie on each other. Sizes, names and numbers are those of
segmentation_models_pytorch 0.4, so that its weights fit (weights/deeplabv3p.py), and so do ImageNet weights of the
encoder alone.

| encoder | parameters (3 channels in, 1 out) |
|---|---|
| efficientnet-b0 | 4,495,309 |
| efficientnet-b3 | 11,087,289 |
| resnet50 | 26,677,585 |
| resnet101 | 45,669,713 |

(segmentation_models_pytorch counts the unused ImageNet head of EfficientNet too: 4,907,469 for b0.)

Spec: bayes_spe_med2d_dr D5.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from medseg_jax.models.blocks import Conv, Norm, default_init, dropout
from medseg_jax.models.efficientnet import EfficientNetEncoder
from medseg_jax.models.network import Network, Perturb
from medseg_jax.models.resnet import ResNetEncoder
from medseg_jax.types import UserError

type Encoder = Literal[
    "efficientnet-b0", "efficientnet-b1", "efficientnet-b2", "efficientnet-b3", "resnet50", "resnet101"
]

ENCODERS = ("efficientnet-b0", "efficientnet-b1", "efficientnet-b2", "efficientnet-b3", "resnet50", "resnet101")

LOW = 48
"""Channels that the encoder's features of stride 4 are narrowed to."""


@dataclass(frozen=True)
class DeepLabV3Plus(Network):
    """DeepLabv3+; sides are multiples of `output_stride`.

    Attributes:
        encoder: one of `ENCODERS`.
        output_stride: of the encoder's last features, 16 or 8. 8 sees twice as finely and costs about three times as
            much.
        rates: dilations of the three 3 x 3 convolutions of the ASPP.
        channels: of the decoder.
        dropout: on what the ASPP joined, in training.
        drop_connect: see `EfficientNetEncoder`; ResNets have none.
        dtype: compute dtype, "float32" or "bfloat16".
    """

    plan_dim = 2

    encoder: Encoder = "efficientnet-b0"
    output_stride: Literal[8, 16] = 16
    rates: tuple[int, int, int] = (12, 24, 36)
    channels: int = 256
    dropout: float = 0.5
    drop_connect: float = 0.2
    dtype: str = "float32"

    def build(self, in_channels: int, out_channels: int, rngs: nnx.Rngs) -> "DeepLabV3PlusModule":
        """The network with fresh parameters drawn from the stream "params" of `rngs`."""
        if self.encoder not in ENCODERS:
            raise UserError("No such encoder of DeepLabV3Plus", found=self.encoder, expected=", ".join(ENCODERS))
        if self.output_stride not in (8, 16):
            raise UserError("No such output stride of DeepLabV3Plus", found=self.output_stride, expected="8 or 16")
        module = DeepLabV3PlusModule(self, in_channels, out_channels, rngs)
        default_init(module, rngs)
        return module


class DeepLabV3PlusModule(nnx.Module):
    """Encoder, ASPP, decoder, head; see the file's docstring."""

    def __init__(self, config: DeepLabV3Plus, in_channels: int, out_channels: int, rngs: nnx.Rngs):
        plain: dict[str, Any] = {"dtype": config.dtype, "rngs": rngs}
        kind, _, variant = config.encoder.partition("-")
        shared: dict[str, Any] = {"output_stride": config.output_stride, **plain}
        if kind == "efficientnet":
            variant: Any
            self.encoder = EfficientNetEncoder(variant, in_channels, drop_connect=config.drop_connect, **shared)
        else:
            self.encoder = ResNetEncoder(kind, in_channels, **shared)
        _, low, *_, deep = self.encoder.channels
        self.output_stride, width = config.output_stride, config.channels
        self.aspp = ASPP(deep, width, config, **plain)
        self.after = Separable(width, width, **plain)
        self.low = Unit(low, LOW, **plain)
        self.fuse = Separable(width + LOW, width, **plain)
        self.head = Conv(width, out_channels, (1, 1), **plain)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        train: bool = False,
        rngs: nnx.Rngs | None = None,
        perturb: Perturb | None = None,
    ) -> tuple[Float[Array, "b h w k"], ...]:
        """Logits, as a tuple of one. UserError unless both sides are multiples of the output stride.

        `perturb` acts on the encoder's five features.
        """
        h, w = x.shape[1:3]
        if h % self.output_stride or w % self.output_stride:
            raise UserError(
                "DeepLabV3Plus cannot take images of this size",
                found=f"{h} x {w}",
                expected=f"multiples of {self.output_stride}",
                remedy="change patch_size in plan.json",
            )
        _, low, *_, deep = self.encoder(x, train, rngs, perturb)
        y = self.after(self.aspp(deep, train, rngs), train)
        y = resize_aligned(y, low.shape[1:3])
        y = self.fuse(jnp.concatenate([y, self.low(low, train)], -1), train)
        return (resize_aligned(self.head(y).astype(jnp.float32), (h, w)),)


class ASPP(nnx.Module):
    """Atrous spatial pyramid pooling [b, h, w, c] -> [b, h, w, o]: views of five sizes, joined and narrowed."""

    def __init__(self, in_channels: int, out_channels: int, config: DeepLabV3Plus, **plain: Any):
        self.point = Unit(in_channels, out_channels, **plain)
        self.dilated = nnx.List([Separable(in_channels, out_channels, rate, **plain) for rate in config.rates])
        self.pooled = Unit(in_channels, out_channels, **plain)
        self.project = Unit((2 + len(config.rates)) * out_channels, out_channels, **plain)
        self.dropout = config.dropout

    def __call__(self, x: Array, train: bool, rngs: nnx.Rngs | None) -> Array:
        views = [self.point(x, train), *(view(x, train) for view in self.dilated)]
        mean = self.pooled(x.mean((1, 2), keepdims=True), train)
        views.append(jnp.broadcast_to(mean, views[0].shape))
        return dropout(self.project(jnp.concatenate(views, -1), train), self.dropout, train, rngs, channels=False)


class Unit(nnx.Module):
    """1 x 1 convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, **plain: Any):
        self.conv = Conv(in_channels, out_channels, (1, 1), bias=False, **plain)
        self.norm = Norm("batch", out_channels, slope=0.0)

    def __call__(self, x: Array, train: bool) -> Array:
        return self.norm(self.conv(x), train)


class Separable(nnx.Module):
    """Depthwise 3 x 3 and 1 x 1 convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, dilation: int = 1, **plain: Any):
        options = {"dilation": dilation, "groups": in_channels, "bias": False}
        self.depthwise = Conv(in_channels, in_channels, (3, 3), **options, **plain)
        self.point = Unit(in_channels, out_channels, **plain)

    def __call__(self, x: Array, train: bool) -> Array:
        return self.point(self.depthwise(x), train)


def resize_aligned(x: Float[Array, "b h w c"], size: tuple[int, ...]) -> Float[Array, "b t u c"]:
    """Bilinear interpolation to `size` (t, u) with the corner pixels' centres on each other.

    PyTorch's `align_corners=True`: output i looks at i (n - 1) / (m - 1). Done as one matrix product an axis.
    """
    for axis, name in ((1, "oh,bhwc->bowc"), (2, "ow,bhwc->bhoc")):
        matrix = jnp.asarray(_interpolation(x.shape[axis], size[axis - 1]), x.dtype)
        x = jnp.einsum(name, matrix, x, precision=lax.Precision.HIGHEST)
    return x


def _interpolation(n: int, m: int) -> np.ndarray:
    """[m, n] weights of n input positions for m output positions; rows sum to 1."""
    place = np.linspace(0, n - 1, m) if m > 1 else np.zeros(1)
    return np.maximum(0, 1 - np.abs(place[:, None] - np.arange(n)))

"""VM-UNet: a U-Net whose blocks are selective state-space models (Ruan and Xiang 2024, arXiv 2402.02491), the network
of Mamba-Sea (Cheng et al., IEEE TMI 2025). Its encoder is that of the first VMamba (Liu et al. 2024, arXiv 2401.10166).

    patches of 4 x 4 -> stages of VSS blocks, halved in between -> the way back, skips added -> pixels

A VSS block is x + DropPath(SS2D(LayerNorm(x))). SS2D reads the image in four orders: along rows, along columns, and
both backwards. All orders go through one selective scan: the backward ones run against time on the same sequence, so
that the image is transposed once on the way in and once on the way out, and never flipped.

Kept from the published code: the skip of a stage is its input and is added before the decoder's upsampling; the first
skip is never used; no norm after the encoder, no positional embedding, no dropout besides DropPath. Departures: images
of any size (edges repeated up to a multiple of the total stride, logits cropped back), logits also for one class.

So all that the published network knows of a picture has gone through half the resolution of its patches: 64 pixels a
position. From scratch it finds no thin vessel within minutes; with `skips="unet"` (same parameters) it begins to.

Parameters with 3 input channels (1 is repeated to 3) and 3 output channels (VM_UNET has 25 a class):

| preset | mixer "scan" | mixer "conv" |
|---|---|---|
| VM_UNET | 27,427,611 | 31,280,187 |
| SMALL | 3,586,315 | 3,481,963 |
| TINY | 150,503 | 120,263 |

Spec: mamba_sea section 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from medseg_jax.models.blocks import Conv, LayerNorm, Linear, drop_path, rematerialised
from medseg_jax.models.network import Network, Perturb
from medseg_jax.ops.conv import conv
from medseg_jax.ops.scan import selective_scan
from medseg_jax.types import UserError

NO_DECAY = "A_log|dt_bias"
"""Parameters with two axes that weight decay should spare, for `Group(NO_DECAY, weight_decay=0)`. The authors decay all
parameters; the engine leaves out those with one axis anyway."""

DIRECTIONS = 4
BACKWARDS = (False, False, True, True)
"""Along rows, along columns, and the same against time."""

# -------------------------------------------------------------------------------------------------------------- config


@dataclass(frozen=True)
class VMUNet(Network):
    """VM-UNet for 2-D images of any size.

    Attributes:
        features: channels of each stage, highest resolution first.
        depths: VSS blocks of each encoder stage.
        decoder_depths: VSS blocks of each decoder stage, lowest resolution first.
        stem: side of the square patches that become one position each.
        states: states of each channel of the scan.
        expand: channels inside a block over those outside.
        drop_path: largest probability of skipping a block for a sample; it rises linearly over the encoder and falls
            over the decoder.
        mixer: what a block mixes positions with: "scan" (SS2D) or "conv" (a 3 x 3 convolution and SiLU), the ablation
            of about as many parameters.
        skips: "published": a stage's input, added before the decoder doubles the resolution, the first one never;
            "unet": a stage's output, added at its own resolution, all of them.
        scan_backend: of `ops.scan.selective_scan`; "auto" goes by the platform.
        remat: compute the activations of a block again in the backward pass: less memory, about a third more time.
        dtype: compute dtype, "float32" or "bfloat16", also of what enters and leaves the scan. Inside it all is
            float32, as are parameters, norm statistics, the sum over the directions and the logits.
    """

    plan_dim = 2

    features: tuple[int, ...] = (96, 192, 384, 768)
    depths: tuple[int, ...] = (2, 2, 2, 2)
    decoder_depths: tuple[int, ...] = (2, 2, 2, 1)
    stem: int = 4
    states: int = 16
    expand: int = 2
    drop_path: float = 0.2
    mixer: Literal["scan", "conv"] = "scan"
    skips: Literal["published", "unet"] = "published"
    scan_backend: Literal["auto", "reference", "associative", "chunked", "pallas_tpu", "mosaic_gpu"] = "auto"
    remat: bool = False
    dtype: str = "float32"

    def build(self, in_channels: int, out_channels: int, rngs: nnx.Rngs) -> "VMUNetModule":
        """The network with fresh parameters drawn from the stream "params" of `rngs`."""
        counts = {"features": self.features, "depths": self.depths, "decoder_depths": self.decoder_depths}
        if len({len(v) for v in counts.values()}) > 1 or len(self.features) < 2:
            raise UserError("VMUNet wants one entry per stage, and two stages or more", found=counts)
        if any(n % 4 for n in self.features):
            raise UserError("VMUNet.features has a wrong entry", found=self.features, expected="multiples of 4")
        if not 0 <= self.drop_path < 1:
            raise UserError("VMUNet.drop_path is no probability", found=self.drop_path, expected="0 or more, below 1")
        if self.mixer not in ("scan", "conv"):
            raise UserError("Unknown VMUNet.mixer", found=self.mixer, expected='"scan" or "conv"')
        if self.skips not in ("published", "unet"):
            raise UserError("Unknown VMUNet.skips", found=self.skips, expected='"published" or "unet"')
        return VMUNetModule(self, in_channels, out_channels, rngs)


VM_UNET = VMUNet()
"""The published network, for pretrained weights and an accelerator."""

SMALL = VMUNet(features=(32, 64, 128, 256))
"""A third of the channels: from scratch, on a few CPU cores."""

TINY = VMUNet(features=(16, 32, 64), depths=(1, 1, 1), decoder_depths=(1, 1, 1), states=8, drop_path=0.1)
"""For pictures of 64 pixels: smoke tests."""

# ------------------------------------------------------------------------------------------------------------- modules


class VMUNetModule(nnx.Module):
    """Patch embedding, encoder, decoder, head; see the file's docstring."""

    def __init__(self, config: VMUNet, in_channels: int, out_channels: int, rngs: nnx.Rngs):
        features, depths, stem = config.features, config.depths, config.stem
        options: dict[str, Any] = {"dtype": config.dtype, "rngs": rngs}
        self.in_channels = 3 if in_channels == 1 else in_channels
        self.patch_embed = PatchEmbed(self.in_channels, features[0], stem, **options)
        self.encoder, self.decoder = nnx.List([]), nnx.List([])

        rates = iter(_linear(config.drop_path, sum(depths)))
        for i, depth in enumerate(depths):
            blocks = [VSSBlock(features[i], next(rates), config, rngs) for _ in range(depth)]
            last = i == len(depths) - 1
            down = None if last else PatchMerging(features[i], features[i + 1], **options)
            self.encoder.append(Stage(blocks, config.remat, down=down))
        rates = iter(reversed(_linear(config.drop_path, sum(config.decoder_depths))))
        for j, depth in enumerate(config.decoder_depths):
            i = len(features) - 1 - j
            up = PatchExpand(features[i + 1], features[i], 2, **options) if j else None
            blocks = [VSSBlock(features[i], next(rates), config, rngs) for _ in range(depth)]
            self.decoder.append(Stage(blocks, config.remat, up=up))
        self.final_up = PatchExpand(features[0], features[0] // 4, stem, **options)
        self.head = _torch_init(Conv(features[0] // 4, out_channels, (1, 1), **options), rngs)
        self.total_stride = stem * 2 ** (len(features) - 1)
        self.skips = config.skips

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        train: bool = False,
        rngs: nnx.Rngs | None = None,
        perturb: Perturb | None = None,
    ) -> tuple[Float[Array, "b h w k"]]:
        """Logits, as a tuple of one.

        `perturb` acts on each of the four scan outputs of every block [b, h, w, c] (on the output of the convolution
        where the mixer is "conv"), before they are added. DropPath wants `rngs` in training.
        """
        if x.ndim != 4:
            raise UserError("VMUNet is a 2-D network", found=f"an image of {x.ndim - 2} spatial axes", expected="two")
        (h, w), multiple = x.shape[1:3], self.total_stride
        if x.shape[-1] == 1:
            x = jnp.repeat(x, self.in_channels, -1)
        x = jnp.pad(x, ((0, 0), (0, -h % multiple), (0, -w % multiple), (0, 0)), mode="edge")

        x = self.patch_embed(x)
        inputs, outputs = [], []
        for stage in self.encoder:
            inputs.append(x)
            x = stage(x, train, rngs, perturb)
            outputs.append(x)
            x = x if stage.down is None else stage.down(x)
        for j, stage in enumerate(self.decoder):
            if stage.up is not None:
                x = stage.up(x + inputs[-j]) if self.skips == "published" else stage.up(x) + outputs[-j - 1]
            x = stage(x, train, rngs, perturb)
        return (self.final_up(x, self.head)[:, :h, :w].astype(jnp.float32),)


class Stage(nnx.Module):
    """VSS blocks of one size, and what leads to them (`up`) or away from them (`down`), which the network calls."""

    def __init__(
        self,
        blocks: list["VSSBlock"],
        remat: bool,
        up: "PatchExpand | None" = None,
        down: "PatchMerging | None" = None,
    ):
        self.blocks, self.remat, self.up, self.down = nnx.List(blocks), remat, up, down

    def __call__(self, x: Array, train: bool, rngs: nnx.Rngs | None, perturb: Perturb | None) -> Array:
        for block in self.blocks:
            if self.remat and train:
                x = rematerialised(block, x, train, rngs, perturb=perturb)
            else:
                x = block(x, train, rngs, perturb)
        return x


class VSSBlock(nnx.Module):
    """x + DropPath(mixer(LayerNorm(x))), [b, h, w, c]."""

    def __init__(self, channels: int, rate: float, config: VMUNet, rngs: nnx.Rngs):
        self.norm = LayerNorm(channels)
        self.mixer = SS2D(channels, config, rngs) if config.mixer == "scan" else ConvMixer(channels, config, rngs)
        self.rate = rate

    def __call__(
        self, x: Array, train: bool = False, rngs: nnx.Rngs | None = None, perturb: Perturb | None = None
    ) -> Array:
        return x + drop_path(self.mixer(self.norm(x), perturb), self.rate, train, rngs)


class SS2D(nnx.Module):
    """The four-way selective scan of the first VMamba, [b, h, w, c] -> [b, h, w, c], over d = expand * c channels.

    x_proj: from d channels to (r = ceil(c / 16) low-rank step sizes, n B, n C), one map a direction.
    dt_weight, dt_bias: from the r step sizes to those of the d channels, one map a direction.
    """

    def __init__(self, channels: int, config: VMUNet, rngs: nnx.Rngs):
        d, r, n = config.expand * channels, math.ceil(channels / 16), config.states
        shapes = {
            "in_proj": (channels, 2 * d), "kernel": (3, 3, 1, d), "bias": (d,), "x_proj": (DIRECTIONS, r + 2 * n, d),
            "dt_weight": (DIRECTIONS, d, r), "dt_bias": (DIRECTIONS, d), "out_proj": (d, channels),
        }  # fmt: skip
        u = _uniform(rngs, shapes)
        self.in_proj, self.out_proj = nnx.Param(_normal(u["in_proj"])), nnx.Param(_normal(u["out_proj"]))
        self.kernel, self.bias = nnx.Param(u["kernel"] / 3), nnx.Param(u["bias"] / 3)  # 9 taps
        self.x_proj, self.dt_weight = nnx.Param(u["x_proj"] * d**-0.5), nnx.Param(u["dt_weight"] * r**-0.5)
        self.dt_bias = nnx.Param(_step_size_bias(u["dt_bias"]))
        self.A_log = nnx.Param(jnp.tile(jnp.log(jnp.arange(1.0, n + 1)), (DIRECTIONS * d, 1)))
        self.D = nnx.Param(jnp.ones(DIRECTIONS * d))
        self.norm = LayerNorm(d)
        self.dtype = jnp.dtype(config.dtype)
        self.backend: Any = config.scan_backend

    def __call__(self, x: Float[Array, "b h w c"], perturb: Perturb | None = None) -> Float[Array, "b h w c"]:
        x, z = jnp.split(x.astype(self.dtype) @ self.in_proj[...].astype(self.dtype), 2, -1)
        b, h, w, d = x.shape
        x = jax.nn.silu(conv(x, self.kernel[...], groups=d) + self.bias[...].astype(self.dtype))

        # Groups 0 and 2 of the scan read the rows, 1 and 3 the columns.
        rows, columns = x.reshape(b, h * w, d), x.swapaxes(1, 2).reshape(b, h * w, d)
        maps = self.x_proj[...].astype(self.dtype)
        projected = [jnp.einsum("bld,jmd->bljm", u, maps[i::2]) for i, u in enumerate((rows, columns))]
        projected = jnp.stack(projected, 3).reshape(b, h * w, DIRECTIONS, -1)  # [b, l, k, r + 2 n]
        rank, states = self.dt_weight.shape[-1], self.A_log.shape[-1]
        delta, B, C = jnp.split(projected, (rank, rank + states), -1)
        y = selective_scan(
            jnp.concatenate([rows, columns], -1),
            delta.reshape(b, h * w, -1),
            -jnp.exp(self.A_log[...]),
            B,
            C,
            self.D[...],
            self.dt_bias[...].reshape(-1),
            delta_weight=self.dt_weight[...].swapaxes(1, 2),
            reverse=BACKWARDS,
            backend=self.backend,
        )
        across, down, across_back, down_back = jnp.split(y.astype(jnp.promote_types(y.dtype, jnp.float32)), 4, -1)

        def by_rows(y):
            return y.reshape(b, w, h, d).swapaxes(1, 2)

        if perturb is None:
            y = (across + across_back).reshape(b, h, w, d) + by_rows(down + down_back)
        else:
            outputs = across.reshape(b, h, w, d), by_rows(down), across_back.reshape(b, h, w, d), by_rows(down_back)
            y = reduce(jnp.add, map(perturb, outputs))
        return (self.norm(y).astype(self.dtype) * jax.nn.silu(z)) @ self.out_proj[...].astype(self.dtype)


class ConvMixer(nnx.Module):
    """SiLU of a 3 x 3 convolution: what SS2D is replaced with to see what the scan is good for."""

    def __init__(self, channels: int, config: VMUNet, rngs: nnx.Rngs):
        self.conv = _torch_init(Conv(channels, channels, (3, 3), dtype=config.dtype, rngs=rngs), rngs)

    def __call__(self, x: Array, perturb: Perturb | None = None) -> Array:
        y = self.conv(x)
        return jax.nn.silu(y if perturb is None else perturb(y))


class PatchEmbed(nnx.Module):
    """Linear map of each patch and LayerNorm: [b, h, w, c] -> [b, h / p, w / p, o]."""

    def __init__(self, in_channels: int, out_channels: int, side: int, dtype: str, rngs: nnx.Rngs):
        self.conv = _torch_init(Conv(in_channels, out_channels, (side, side), dtype=dtype, rngs=rngs), rngs)
        self.norm = LayerNorm(out_channels)

    def __call__(self, x: Array) -> Array:
        assert self.conv.bias is not None
        kernel, bias = (p[...].astype(self.conv.dtype) for p in (self.conv.kernel, self.conv.bias))
        b, h, w, c = x.shape
        p, _, _, o = kernel.shape
        x = x.astype(self.conv.dtype).reshape(b, h // p, p, w // p, p, c).swapaxes(2, 3)
        # A product, because a strided convolution has a slow gradient on a CPU.
        return self.norm(x.reshape(b, h // p, w // p, p * p * c) @ kernel.reshape(-1, o) + bias)


class PatchMerging(nnx.Module):
    """Blocks of 2 x 2 side by side as channels, LayerNorm, linear: [b, h, w, c] -> [b, h // 2, w // 2, o].

    Channels are in the order (row 0, column 0), (1, 0), (0, 1), (1, 1); an odd last row or column is dropped.
    """

    def __init__(self, in_channels: int, out_channels: int, dtype: str, rngs: nnx.Rngs):
        self.norm = LayerNorm(4 * in_channels)
        self.reduction = Linear(4 * in_channels, out_channels, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        b, h, w, c = x.shape[0], x.shape[1] // 2, x.shape[2] // 2, x.shape[3]
        x = x[:, : 2 * h, : 2 * w].reshape(b, h, 2, w, 2, c).transpose(0, 1, 3, 4, 2, 5)  # [b, h, w, column, row, c]
        return self.reduction(self.norm(x.reshape(b, h, w, 4 * c)))


class PatchExpand(nnx.Module):
    """Linear, each position's channels laid out as a block of p x p, LayerNorm: [b, h, w, c] -> [b, p h, p w, o].

    `then` is applied before the blocks are laid out: a map of single positions, of which nothing is seen but the cost.
    """

    def __init__(self, in_channels: int, out_channels: int, side: int, dtype: str, rngs: nnx.Rngs):
        self.expand = Linear(in_channels, side * side * out_channels, bias=False, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(out_channels)
        self.side = side

    def __call__(self, x: Array, then: Callable[[Array], Array] = lambda x: x) -> Array:
        (b, h, w, _), p = x.shape, self.side
        x = then(self.norm(self.expand(x).reshape(b, h * w, p * p, -1)))
        return x.reshape(b, h, w, p, p, -1).swapaxes(2, 3).reshape(b, h * p, w * p, -1)


# ------------------------------------------------------------------------------------------------------- initial values


def _linear(last: float, count: int) -> list[float]:
    """`count` numbers from 0 to `last`."""
    return [last * i / max(count - 1, 1) for i in range(count)]


def _uniform(rngs: nnx.Rngs, shapes: dict[str, tuple[int, ...]]) -> dict[str, Array]:
    """Numbers between -1 and 1, all from one draw: each draw takes a tenth of a second to compile on a CPU."""
    sizes = list(map(math.prod, shapes.values()))
    low = np.nextafter(np.float32(-1), np.float32(0))  # so that the normal deviate is finite
    parts = jnp.split(jax.random.uniform(rngs.params(), (sum(sizes),), minval=low), np.cumsum(sizes)[:-1])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _normal(u: Array) -> Array:
    """Normal with deviation 0.02 from uniform numbers between -1 and 1."""
    return 0.02 * math.sqrt(2) * jax.scipy.special.erfinv(u)


def _torch_init(module: Conv, rngs: nnx.Rngs) -> Conv:
    """PyTorch's default for convolutions: kernel and bias uniform within 1 / sqrt(fan-in)."""
    assert module.bias is not None
    bound = math.prod(module.kernel.shape[:-1]) ** -0.5
    u = _uniform(rngs, {"kernel": module.kernel.shape, "bias": module.bias.shape})
    module.kernel[...], module.bias[...] = bound * u["kernel"], bound * u["bias"]
    return module


def _step_size_bias(u: Array) -> Array:
    """Inverse softplus of step sizes that are log-uniform between 0.001 and 0.1."""
    dt = 10 ** (u - 2)
    return dt + jnp.log(-jnp.expm1(-dt))

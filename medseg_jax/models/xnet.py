"""XNet-Plus, the network of WT-BCP (arXiv 2504.14445): three U-Nets that share skips, on an image and its two bands.

Main (M) sees the image, L its low and H its high frequencies. Each is a U-Net of five levels (two convolutions with
batch norm and ReLU a level, max-pooling) with a head of its own. The skips of M are fused by two convolutions over
both: at the two shallow levels with those of H, at the two deep ones with those of L. The decoders take

| level | M | L | H |
|---|---|---|---|
| 4, 3 (deep) | fused | fused | own (3-D: none) |
| 2, 1 (shallow) | fused | own (3-D: none) | fused |

The released network is XNet v2 without a change. In 2-D nearest neighbours and a convolution go up and the skip comes
first in the concatenation; in 3-D a transposed convolution goes up and the skip comes last.

Two ways to call it. `module(x, low=low, high=high)`, as WT-BCP does, gives the logits of M, L and H; M comes first and
predicts. `module(x)`, as all other methods do, gives those of M alone, and all branches see x: the encoders of L and H
take part by the fused skips, their decoders (and what lies too deep in them to be fused) learn nothing.

Parameters with 1 input and 4 (2-D) or 2 (3-D) output channels. The convolutions keep the biases that batch norm takes
away again, for the count to be the publication's:

| preset | parameters | without effect |
|---|---|---|
| XNET_2D (width 64) | 112,984,332 | 22,464 |
| XNET_3D (width 24) | 40,757,622 | 7,344 |

At width 8 the 2-D network has the parameters of BCP's U-Net: what the idea gives can be told from what its size gives.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from medseg_jax.data.plan import Plan
from medseg_jax.models.blocks import Conv, ConvBlock, ConvTranspose, default_init, max_pool, rematerialised
from medseg_jax.models.network import Network, Perturb
from medseg_jax.types import UserError

LEVELS = 5
WIDTHS = {2: 64, 3: 24}
"""Published width of level 1; each level below doubles it."""


@dataclass(frozen=True)
class XNet(Network):
    """XNet-Plus. Image sizes are multiples of 16.

    Attributes:
        dim: 2 or 3; from the plan where None.
        width: channels of the first level; the published 64 (2-D) or 24 (3-D) where None.
        remat: compute the activations of a level again in the backward pass: less memory, about a third more time.
        dtype: compute dtype, "float32" or "bfloat16"; parameters, statistics and logits are float32.
    """

    dim: int | None = None
    width: int | None = None
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        if self.width is not None and self.width < 1:
            raise UserError("XNet has no channels", found=f"width={self.width}", expected="1 or more, or None")

    def from_plan(self, plan: Plan) -> Self:
        """Takes the number of axes from the plan."""
        return replace(self, dim=plan.dim if self.dim is None else self.dim)

    def build(self, in_channels: int, out_channels: int, rngs: nnx.Rngs) -> "XNetModule":
        """The network with fresh parameters (PyTorch's default, as released) from the stream "params" of `rngs`."""
        if self.dim not in WIDTHS:
            remedy = "XNet(...).from_plan(plan), or XNet(dim=2)"
            raise UserError("XNet is 2-D or 3-D", found=f"dim={self.dim}", expected="2 or 3", remedy=remedy)
        module = XNetModule(self, self.dim, in_channels, out_channels, rngs)
        default_init(module, rngs)
        return module


XNET_2D = XNet(2)
"""As published for ACDC, slices of 256 x 256."""

XNET_3D = XNet(3)
"""As published for left atria, patches of 112 x 112 x 80."""


class XNetModule(nnx.Module):
    """Three branches and the fusion of their skips."""

    def __init__(self, config: XNet, dim: int, in_channels: int, out_channels: int, rngs: nnx.Rngs):
        widths = [(WIDTHS[dim] if config.width is None else config.width) * 2**i for i in range(LEVELS)]
        options = {"norm": "batch", "slope": 0.0, "bias": True, "dtype": config.dtype, "rngs": rngs}

        def branch(*has_skip: bool) -> Branch:
            return Branch(dim, in_channels, out_channels, widths, has_skip, config.remat, options)

        own = dim == 2
        self.main = branch(True, True, True, True)
        self.low = branch(own, own, True, True)
        self.high = branch(True, True, own, own)
        self.fusion = nnx.List([Pair(dim, 2 * w, w, options) for w in widths[:-1]])
        self.remat, self.dim = config.remat, dim

    def __call__(
        self,
        x: Float[Array, "b *s c"],
        train: bool = False,
        rngs: nnx.Rngs | None = None,
        perturb: Perturb | None = None,
        *,
        low: Float[Array, "b *s c"] | None = None,
        high: Float[Array, "b *s c"] | None = None,
    ) -> tuple[Float[Array, "b *s k"], ...]:
        """Logits of M, L and H; of M alone without `low` and `high`. All of full resolution, also in prediction.

        Args:
            x: the image, multiples of 16 voxels an axis (UserError otherwise).
            train: normalise with the batch's statistics and update the running ones.
            rngs: not used; there is no dropout.
            perturb: acts on the output of each encoder level, of M first, then L and H.
            low: its low frequencies, of x's size; x itself where None.
            high: its high frequencies, likewise.
        """
        del rngs
        if x.ndim != self.dim + 2 or any(n % 16 for n in x.shape[1:-1]):
            raise UserError(
                "XNet cannot take images of this size",
                found=" x ".join(map(str, x.shape[1:-1])),
                expected=f"{self.dim} axes, each a multiple of 16",
                remedy="change patch_size in plan.json",
            )
        m, l, h = (  # noqa: E741  # the paper's letters
            branch.encode(image, train, perturb)
            for branch, image in (
                (self.main, x),
                (self.low, x if low is None else low),
                (self.high, x if high is None else high),
            )
        )
        partners = [*h[:2], *l[2:4]]
        fused = [
            run(fuse, jnp.concatenate([skip, partner], -1), train, self.remat)
            for fuse, skip, partner in zip(self.fusion, m[:-1], partners, strict=True)
        ]
        main = self.main.decode(m[-1], fused, train)
        if low is None and high is None:
            return (main,)  # a method that does not know of three heads would take them for scales
        return (
            main,
            self.low.decode(l[-1], [*l[:2], *fused[2:]], train),
            self.high.decode(h[-1], [*fused[:2], *h[2:4]], train),
        )


class Branch(nnx.Module):
    """One U-Net. `has_skip`: level 1 first, whether its decoder takes the skip that `decode` is given."""

    def __init__(
        self,
        dim: int,
        in_channels: int,
        out_channels: int,
        widths: Sequence[int],
        has_skip: Sequence[bool],
        remat: bool,
        options: dict[str, Any],
    ):
        plain = {"dtype": options["dtype"], "rngs": options["rngs"]}
        self.encoder, self.up, self.decoder = nnx.List([]), nnx.List([]), nnx.List([])
        for c, w in zip([in_channels, *widths], widths, strict=False):
            self.encoder.append(Pair(dim, c, w, options))
        for w, skip in zip(widths, has_skip, strict=False):
            up = ConvBlock(2 * w, w, (3, 3), **options) if dim == 2 else ConvTranspose(2 * w, w, (2, 2, 2), **plain)
            self.up.append(up)
            self.decoder.append(Pair(dim, 2 * w if skip else w, w, options))
        self.head = Conv(widths[0], out_channels, (1,) * dim, **plain)
        self.dim, self.has_skip, self.remat = dim, tuple(has_skip), remat

    def encode(self, x: Array, train: bool, perturb: Perturb | None) -> list[Array]:
        """Features of every level, full resolution first."""
        features = []
        for i, stage in enumerate(self.encoder):
            x = run(stage, x if i == 0 else max_pool(x), train, self.remat)
            x = x if perturb is None else perturb(x)
            features.append(x)
        return features

    def decode(self, x: Array, skips: Sequence[Array], train: bool) -> Array:
        """Bottleneck and the skips of the other levels -> logits."""
        levels = list(zip(self.up, self.decoder, skips, self.has_skip, strict=True))
        for up, stage, skip, wanted in reversed(levels):
            if self.dim == 2:
                x = run(up, jnp.repeat(jnp.repeat(x, 2, 1), 2, 2), train, self.remat)
                parts = [skip, x]
            else:
                x = up(x)
                parts = [x, skip]
            x = run(stage, jnp.concatenate(parts, -1) if wanted else x, train, self.remat)
        return self.head(x).astype(jnp.float32)


class Pair(nnx.Module):
    """Two convolutions of size 3, each with batch norm and ReLU."""

    def __init__(self, dim: int, in_channels: int, out_channels: int, options: dict[str, Any]):
        self.first = ConvBlock(in_channels, out_channels, (3,) * dim, **options)
        self.second = ConvBlock(out_channels, out_channels, (3,) * dim, **options)

    def __call__(self, x: Array, train: bool = False, rngs: nnx.Rngs | None = None) -> Array:
        return self.second(self.first(x, train, rngs), train, rngs)


def run(stage: Any, x: Array, train: bool, remat: bool) -> Array:
    """A stage, rematerialised where asked for and of use."""
    return rematerialised(stage, x, train, None) if remat and train else stage(x, train)

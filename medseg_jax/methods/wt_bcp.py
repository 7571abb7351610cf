"""WT-BCP: bidirectional copy-paste (bcp.py) of a network with three branches that see wavelet images.

Every image x that a network is given, mixed or not, student's or teacher's, is split by one level of a Haar transform:

    l = mm(approximation),  h = mm(sum of mm(detail)),  mm(v) = (v - min v) / (max v - min v) of one sample
    LF = mm(l + alpha h),   HF = mm(h + beta l),        resized to the size of x; volumes are then z-scored

and XNet-Plus (models/xnet.py) gives three outputs M, L, H = net(x, LF, HF). M alone predicts and gives pseudo-labels.

    stage 1, `WTCopyPaste`:  the loss of CopyPaste, mean over the three outputs
    stage 2, `WTBCP`:        the loss of BCP, mean over the three outputs
                             + c(t) [D(L, M) + D(H, M) + D(M, L) + D(M, H)]    on the inward images

D(p, k) is a Dice loss of output p to the hard prediction of k, and c rises linearly to its value.

Source: Zhang et al., "WT-BCP: Wavelet Transform based Bidirectional Copy-Paste for Semi-Supervised Medical Image
Segmentation", ICME 2025 (arXiv 2504.14445), and its code, whose scripts do not do everything that the paper says. Here
it works as described; `as_released=True` does what the scripts for ACDC (pictures) and LA (volumes) do:

* The consistency has no effect: its gradient is cleared before the step. (It is still logged. The Pancreas script
  uses it.) Its classes end at the largest one that is predicted.
* Pictures: one min-max over the sum of the raw details, HF is fused from the already fused LF, no min-max afterwards,
  and when predicting there is no fusion at all.
* Pictures: losses are summed over the outputs; volumes: stage 2 is halved, and stage 1 trains L twice and H never.

`fusion=None` takes the scripts' alpha and beta. `wavelet=None` gives all branches x itself: the network alone is left.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from medseg_jax.methods.bcp import BCP, CopyPaste, Heads
from medseg_jax.methods.objective import Tree, check_numbers, probabilities
from medseg_jax.methods.teacher import linear_ramp
from medseg_jax.models.xnet import XNet
from medseg_jax.ops.wavelet import Wavelet, dwt
from medseg_jax.types import UserError

FUSION = {2: (0.1, 0.9), 3: (0.2, 0.5)}
"""(alpha, beta) of the released scripts, by the number of axes."""

TINY = 1e-8  # A range below this is that of a constant image, whose LF and HF are 0.
FLAT = 1e-3  # Least deviation to divide by: that of a volume of one brightness with a dark spot is rounding.

# ---------------------------------------------------------------- images


def low_high(
    image: Float[Array, "b *s c"], alpha: float, beta: float, wavelet: Wavelet = "haar"
) -> tuple[Float[Array, "b *s c"], Float[Array, "b *s c"]]:
    """LF and HF of an image, each channel for itself; constant images give zeros."""
    first, *details = (min_max(band) for band in dwt(image, wavelet).values())
    low, high = first, min_max(sum(details[1:], details[0]))
    pair = (_resized(min_max(v), image) for v in (low + alpha * high, high + beta * low))
    one, two = pair if image.ndim == 4 else map(z_score_of_bright, pair)
    return one, two


def low_high_as_released(
    image: Float[Array, "b h w c"], alpha: float, beta: float
) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w c"]]:
    """LF and HF of pictures as the ACDC script makes them for training; with alpha = beta = 0, for validation."""
    first, *details = dwt(image).values()
    low, high = min_max(first), min_max(sum(details[1:], details[0]))
    low = low + alpha * high
    return _resized(low, image), _resized(high + beta * low, image)


def min_max(x: Float[Array, "b *s c"]) -> Float[Array, "b *s c"]:
    """To [0, 1], each sample and channel for itself."""
    axes = tuple(range(1, x.ndim - 1))
    low, high = x.min(axes, keepdims=True), x.max(axes, keepdims=True)
    return (x - low) / jnp.maximum(high - low, TINY)


def z_score_of_bright(x: Float[Array, "b *s c"]) -> Float[Array, "b *s c"]:
    """(x - mean) / std of x in [0, 1], with mean and (unbiased) std, `FLAT` or more, of the voxels above the mean."""
    axes = tuple(range(1, x.ndim - 1))
    bright = x > x.mean(axes, keepdims=True)
    count = bright.sum(axes, keepdims=True)
    mean = jnp.where(bright, x, 0).sum(axes, keepdims=True) / jnp.maximum(count, 1)
    square = jnp.where(bright, (x - mean) ** 2, 0).sum(axes, keepdims=True)
    return (x - mean) / jnp.maximum(jnp.sqrt(square / jnp.maximum(count - 1, 1)), FLAT)


def _resized(x: Array, like: Array) -> Array:
    return jax.image.resize(x, (*x.shape[:1], *like.shape[1:-1], *x.shape[-1:]), "linear", antialias=False)


# ---------------------------------------------------------------- consistency


def consistency(
    main: Float[Array, "b *s k"],
    low: Float[Array, "b *s k"],
    high: Float[Array, "b *s k"],
    exclusive: bool = True,
    up_to_largest: bool = False,
) -> Float[Array, ""]:
    """D(L, M) + D(H, M) + D(M, L) + D(M, H) of logits.

    `up_to_largest`: only classes up to the largest predicted one count, as released.
    """

    def toward(logits: Array, other: Array) -> Array:
        p, axes = probabilities(logits, exclusive), tuple(range(1, logits.ndim - 1))
        classes = jnp.arange(p.shape[-1])
        hard = other.argmax(-1)
        target = jax.nn.one_hot(hard, p.shape[-1]) if exclusive else (other > 0).astype(p.dtype)
        overlap = (2 * (p * target).sum(axes) + 1) / ((p**2).sum(axes) + (target**2).sum(axes) + 1)  # [b, k]
        counted = (classes <= hard.max()) if up_to_largest else jnp.ones(len(classes), bool)
        return jnp.where(counted, 1 - overlap.mean(0), 0).sum() / counted.sum()

    return toward(low, main) + toward(high, main) + toward(main, low) + toward(main, high)


# ---------------------------------------------------------------- the two stages


@dataclass(frozen=True)
class WaveletInputs(CopyPaste):
    """A network with three outputs, which sees the image, LF and HF.

    Attributes:
        net: called as net(x, low=LF, high=HF), gives three outputs: XNet.
        fusion: (alpha, beta), 0 or more; None: those of the released scripts.
        wavelet: which one; None: LF = HF = the image. As released, Haar or None.
        as_released: what the scripts do; see the module.
    """

    net: XNet = XNet()  # pyright: ignore[reportIncompatibleVariableOverride]
    fusion: tuple[float, float] | None = None
    wavelet: Wavelet | None = "haar"
    as_released: bool = False

    def __post_init__(self):
        super().__post_init__()
        name = type(self).__name__
        if not isinstance(self.net, XNet):
            found = type(self.net).__name__
            raise UserError(f"{name} wants a network with three branches", found=found, expected="XNet")
        if self.fusion is not None and not (len(self.fusion) == 2 and all(0 <= v < math.inf for v in self.fusion)):
            raise UserError(f"{name}: fusion is no (alpha, beta)", found=self.fusion, expected="two numbers, 0 or more")
        if self.as_released and self.wavelet not in ("haar", None):
            remedy = 'wavelet="haar", or as_released=False'
            raise UserError(f"{name} was released with Haar alone", found=f'wavelet="{self.wavelet}"', remedy=remedy)

    def images(self, image: Float[Array, "b *s c"], train: bool) -> dict[str, Array]:
        """LF and HF by the names of the network's arguments; the image itself without a wavelet."""
        if self.wavelet is None:
            return {"low": image, "high": image}
        dim = image.ndim - 2
        alpha, beta = self.fusion or FUSION[dim]
        if dim == 2 and self.as_released:
            low, high = low_high_as_released(image, alpha, beta) if train else low_high_as_released(image, 0, 0)
        else:
            low, high = low_high(image, alpha, beta, self.wavelet)
        return {"low": low, "high": high}

    def heads(self, params: Tree, stats: Tree, image: Array, key: Array) -> tuple[Heads, Tree]:
        outputs, stats = self.fn.apply(params, stats, image, train=True, key=key, **self.images(image, True))
        return tuple((logits,) for logits in outputs), stats

    def predict(self, params: Tree, aux: Tree, frozen: Tree, image: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        outputs, _ = self.fn.apply(params, aux["stats"], image, train=False, **self.images(image, False))
        return probabilities(outputs[0], self.task.labels.exclusive)


@dataclass(frozen=True)
class WTCopyPaste(WaveletInputs):
    """Stage 1 of WT-BCP."""

    def over_heads(self, each: Float[Array, "heads"]) -> Float[Array, ""]:
        if not self.as_released:
            return each.mean()
        if self.task.plan.dim == 2:
            return each.sum()
        main, low, _ = each
        return (main + 2 * low) / 3


@dataclass(frozen=True)
class WTBCP(WaveletInputs, BCP):
    """Stage 2 of WT-BCP.

    Attributes:
        consistency: largest weight of the mutual consistency, c.
        ramp: steps until it is reached; as released, those of the stage.
    """

    consistency: float = 0.5
    ramp: int = 2000

    def __post_init__(self):
        super().__post_init__()
        check_numbers(self, amounts=("consistency", "ramp"))

    def over_heads(self, each: Float[Array, "heads"]) -> Float[Array, ""]:
        if not self.as_released:
            return each.mean()
        return each.sum() if self.task.plan.dim == 2 else each.mean() / 2

    def extra_loss(self, inward: Heads, step: Array) -> tuple[Array | float, dict[str, Array]]:
        (main,), (low,), (high,) = inward
        value = consistency(main, low, high, self.task.labels.exclusive, up_to_largest=self.as_released)
        loss = self.consistency * linear_ramp(step, self.ramp) * value
        return 0.0 if self.as_released else loss, {"consistency": value}

"""Mamba-Sea: train on some sites, segment another (arXiv 2504.17515; IEEE TMI 2025, doi:10.1109/TMI.2025.3564765).

Two networks see every batch x with its labels y: f as it is, g behind a small learned network that changes the
appearance of dark images (GVA). In both, the style of what a block computes is drawn anew (LSA):

    loss = 1/2 [CE(f(x), y) + CE(g(a(x)), y)] + 1/2 [Dice(f(x), y) + Dice(g(a(x)), y)] + 0.1 MSE(f(x), g(a(x)))

with Dice over the whole batch, squares in its denominator and the background included, and the mean squared difference
of the raw logits, whose gradient flows into both networks. f alone predicts, without GVA and LSA.

LSA, on features x of sample i and channel d with mean mu and standard deviation sd over the sequence of tokens:

    T(x) = (x - mu) / sd * (sd + n2 S_sd) + (mu + n1 S_mu),      n1, n2 ~ N(0, 1) for each i and d

where S_mu and S_sd are the standard deviations of mu and sd over the batch. Three modes, since the article, the code
that its numbers come from, and today's code differ:

    paper    m T(x) + (1 - m) x           in a random window m of each sample's tokens, as the article describes it
    as_run   T(x)                         what the released code did until April 2026: its window was always empty
    head     m T(T(x)) + (1 - m) T(x)     what it does now; both T with the statistics of x

`as_run` is DSU (Li et al., ICLR 2022) on the outputs of the scan. A hook of the network, `perturb`, calls it: VM-UNet's
after each of the four scans of every block, all others after each stage of the encoder.

Where this departs from the released code:

* The statistics are those of the global batch, whatever number of devices it lies on. LSA acts in training alone.
* g trains to the end as it began; the released trainer left it in evaluation mode from the second epoch on.
* GVA wants images in [0, 1]. Under plans that scale 8-bit pictures or CT by fixed numbers the inverse gives these;
  otherwise the image's own range does (our choice).
* It and the networks take any number of channels; the released ones repeat a single channel to three first.
* Its BatchNorm sees one image at a time in training, so that it is an instance norm, and its running statistics are
  never needed.
* One AdamW trains all: the two of the released code have equal settings and no parameter in common.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from medseg_jax import losses
from medseg_jax.data.plan import Plan
from medseg_jax.methods.objective import Fn, Tree, check_numbers
from medseg_jax.methods.supervised import Supervised
from medseg_jax.models.blocks import Norm
from medseg_jax.models.network import Perturb
from medseg_jax.ops.conv import conv
from medseg_jax.types import Batch, UserError

type Mode = Literal["paper", "as_run", "head", "off"]

EIGHT_BIT = 255.0

# -------------------------------------------------------------------------------------------------------------- method


@dataclass(frozen=True)
class MambaSea(Supervised):
    """Two branches, GVA, LSA and consistency; see the module's docstring. Also a baseline's own ablation by `off`.

    Attributes:
        lsa: mode of LSA; "as_run" is what the published numbers were obtained with.
        lsa_probability: with which a call of LSA does anything; one draw for the whole batch.
        lsa_window: share of the tokens in the window of the modes "paper" and "head".
        gva: whether g sees images that GVA has changed.
        gva_threshold: brighter images (mean in [0, 1]) stay as they are.
        gva_keep: probability that a dark image stays as it is, too.
        consistency: weight of the mean squared difference of the logits.
        one_network: f and g share their weights: half the parameters, the same time.
    """

    lsa: Mode = "as_run"
    lsa_probability: float = 0.9
    lsa_window: float = 0.75
    gva: bool = True
    gva_threshold: float = 0.4
    gva_keep: float = 0.2
    consistency: float = 0.1
    one_network: bool = False

    def __post_init__(self):
        if self.lsa not in ("paper", "as_run", "head", "off"):
            raise UserError("Unknown mode of LSA", found=self.lsa, expected='"as_run", "paper", "head" or "off"')
        check_numbers(self, shares=("lsa_probability", "lsa_window", "gva_keep"), amounts=("consistency",))

    @cached_property
    def gva_fn(self) -> Fn:
        """GVA as pure functions."""
        return Fn(lambda rngs: GVA(self.task.in_channels, rngs, self.task.plan.dim))

    def init(self, key: Array, batch: Batch) -> tuple[Tree, Tree]:
        params, stats = {}, {}
        for branch, branch_key in zip("f" if self.one_network else "fg", jax.random.split(key), strict=False):
            params[branch], stats[branch] = self.fn.init(branch_key)
        if self.gva:
            params["gva"], _ = self.gva_fn.init(jax.random.fold_in(key, 2))
        return params, {"stats": stats}

    def pretrained(self, params: Tree, aux: Tree, load) -> tuple[Tree, Tree]:
        """Both branches start from the same file; what it does not hold stays random, and different."""
        params, stats = dict(params), dict(aux["stats"])
        for branch in stats:
            params[branch], stats[branch] = load(self.net, params[branch], stats[branch])
        return params, {**aux, "stats": stats}

    def loss(self, params: Tree, aux: Tree, frozen: Tree, batch: Batch, key: Array):
        key_f, key_g, key_gva = jax.random.split(key, 3)
        changed = self.change(params, batch["image"], key_gva) if self.gva else batch["image"]
        f, stats_f = self.branch(params["f"], aux["stats"]["f"], batch["image"], key_f)
        if self.one_network:
            g, stats_f = self.branch(params["f"], stats_f, changed, key_g)
            stats = {"f": stats_f}
        else:
            g, stats_g = self.branch(params["g"], aux["stats"]["g"], changed, key_g)
            stats = {"f": stats_f, "g": stats_g}
        target, weight = self.target(batch["label"])
        options = {"exclusive": self.task.labels.exclusive, "batch_dice": self.batch_dice}
        total, parts = objective(f, g, target, weight, self.consistency, **options)
        return total, ({"stats": stats}, parts)

    def branch(self, params: Tree, stats: Tree, image: Array, key: Array) -> tuple[tuple[Array, ...], Tree]:
        """Logits of one network on the way of training, and its new statistics."""
        key_net, key_lsa = jax.random.split(key)
        options = {} if self.lsa == "off" else {"perturb": self.perturb(key_lsa)}
        return self.fn.apply(params, stats, image, train=True, key=key_net, **options)

    def perturb(self, key: Array) -> Perturb:
        """LSA for the hook of a network."""

        def call(key: Array, x: Array) -> Array:
            return lsa(key, x, self.lsa, self.lsa_probability, self.lsa_window)

        return at_each_call(call, key)

    def change(self, params: Tree, image: Float[Array, "b *s c"], key: Array) -> Float[Array, "b *s c"]:
        """What g sees: images that GVA has changed, on the plan's scale. A lone image stays as it is."""
        if len(image) == 1:
            return image
        low, span = unit_range(image, self.task.plan)
        unit = (image - low) / span
        made, _ = self.gva_fn.apply(params["gva"], {}, unit)
        draw = jax.random.uniform(key, (len(image),))
        return jnp.where(gva_gate(unit, draw, self.gva_threshold, self.gva_keep), made * span + low, image)

    def predict(self, params: Tree, aux: Tree, frozen: Tree, image: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        return super().predict(params["f"], {"stats": aux["stats"]["f"]}, frozen, image)


def objective(
    f: tuple[Array, ...],
    g: tuple[Array, ...],
    target: Float[Array, "b *s k"],
    weight: Float[Array, "b *s"] | None,
    consistency: float = 0.1,
    *,
    exclusive: bool = True,
    batch_dice: bool = True,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """The method's loss and its parts, from the logits of both branches (full resolution first; spec 3.1)."""

    def both(loss: losses.Loss) -> Array:
        return (losses.deep_supervision(loss, f, target, weight) + losses.deep_supervision(loss, g, target, weight)) / 2

    def dice(z, y, w):
        return losses.dice_loss(z, y, w, exclusive=exclusive, batch=batch_dice, background=True, squared=True)

    entropy = both(losses.cross_entropy if exclusive else losses.binary_cross_entropy)
    overlap, distance = both(dice), logit_distance(f[0], g[0], weight)
    parts = {"ce": entropy, "dice_loss": overlap, "consistency": distance}
    return entropy + overlap + consistency * distance, parts


def logit_distance(
    f: Float[Array, "b *s k"], g: Float[Array, "b *s k"], weight: Float[Array, "b *s"] | None
) -> Float[Array, ""]:
    """Mean squared difference of the logits of two branches, over the voxels that count."""
    if weight is None:
        return jnp.square(f - g).mean()
    difference = jnp.where(weight[..., None] > 0, f - g, 0)
    return (weight * jnp.square(difference).mean(-1)).sum() / jnp.maximum(weight.sum(), 1)


# ----------------------------------------------------------------------------------------------------------------- LSA


def at_each_call(function: Callable[[Array, Array], Array], key: Array, calls: int | None = None) -> Perturb:
    """A hook that calls function(key, x) with another key at each call; after the first `calls` ones it does nothing.

    Calls are counted while the network is traced, which happens once, so that the program stays a pure function.
    """
    counter = itertools.count()

    def perturb(x: Array) -> Array:
        number = next(counter)
        return x if calls is not None and number >= calls else function(jax.random.fold_in(key, number), x)

    return perturb


def lsa(
    key: Array, x: Float[Array, "b *s d"], mode: Mode, probability: float = 0.9, window: float = 0.75
) -> Float[Array, "b *s d"]:
    """Draws the style of features anew (spec 2.3). Tokens are in row-major order.

    A batch of one and features of one token stay as they are: neither has a deviation.
    """
    tokens = math.prod(x.shape[1:-1])
    if mode == "off" or len(x) == 1 or tokens == 1:
        return x
    # One draw for all samples: a network calls this up to a hundred times, and each draw costs time to compile. Samples
    # come first, so that each device draws for its own: [2 b, d] would be sent to all of them, at every call.
    noise = jax.random.normal(key, (len(x), 2, x.shape[-1]))
    n1, n2 = noise[:, 0], noise[:, 1]
    taken = jax.random.uniform(jax.random.fold_in(key, 2)) < probability
    first = None
    if mode != "as_run":
        first = jax.random.randint(jax.random.fold_in(key, 1), (len(x),), 0, tokens - int(window * tokens) + 1)
    return jnp.where(taken, resample_style(x, n1, n2, first, mode, window), x)


def resample_style(
    x: Float[Array, "b *s d"],
    n1: Float[Array, "b d"],
    n2: Float[Array, "b d"],
    first: Int[Array, " b"] | None,
    mode: Mode,
    window: float = 0.75,
) -> Float[Array, "b *s d"]:
    """LSA with given noise and, but for `as_run`, windows' first tokens. Gradients flow through all statistics."""
    y = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(len(x), -1, x.shape[-1])  # [b, l, d]
    mean, deviation = style(y)
    wanted_mean = mean + n1[:, None] * spread(mean)
    ratio = (deviation + n2[:, None] * spread(deviation)) / deviation

    def draw(v: Array) -> Array:
        return (v - mean) * ratio + wanted_mean

    changed = draw(y)
    if mode != "as_run" and first is not None:
        token, length = jnp.arange(y.shape[1]), int(window * y.shape[1])
        inside = (token >= first[:, None]) & (token < first[:, None] + length)  # [b, l]
        within, without = (changed, y) if mode == "paper" else (draw(changed), changed)
        changed = jnp.where(inside[..., None], within, without)
    return changed.reshape(x.shape).astype(x.dtype)


STYLE_EPSILON = 1e-6


def style(x: Float[Array, "b l d"]) -> tuple[Float[Array, "b 1 d"], Float[Array, "b 1 d"]]:
    """Mean and standard deviation (unbiased) over the tokens."""
    return x.mean(1, keepdims=True), jnp.sqrt(x.var(1, keepdims=True, ddof=1) + STYLE_EPSILON)


def spread(statistic: Float[Array, "b 1 d"]) -> Float[Array, "1 1 d"]:
    """Standard deviation of a statistic over the batch: how far styles lie apart."""
    return jnp.sqrt(statistic.var(0, keepdims=True, ddof=1) + STYLE_EPSILON)


# ----------------------------------------------------------------------------------------------------------------- GVA


class GVA(nnx.Module):
    """A learned change of appearance: convolutions that keep the channels (258 parameters for three in 2-D).

    As the network of SCI (Ma et al., CVPR 2022) for dark images: one block, used three times over, with a residual.
    """

    def __init__(self, channels: int, rngs: nnx.Rngs, dim: int = 2):
        self.enter, self.block, self.leave = (Conv3(channels, dim, rngs) for _ in range(3))
        self.norm = Norm("instance", channels, slope=0.0)

    def __call__(self, x: Float[Array, "b *s c"], rngs: nnx.Rngs | None = None) -> Float[Array, "b *s c"]:
        """Images in [0, 1] -> images in [1e-4, 1]."""
        del rngs
        y = jax.nn.relu(self.enter(x))
        for _ in range(3):
            y = y + self.norm(self.block(y))
        y = jax.nn.sigmoid(self.leave(y)) + x
        whole = tuple(range(1, x.ndim))
        low, high = y.min(whole, keepdims=True), y.max(whole, keepdims=True)
        return jnp.clip((y - low) / (high - low + 1e-8), 1e-4, 1)


class Conv3(nnx.Module):
    """Convolution of size 3 that keeps the channels, with PyTorch's default initialisation."""

    def __init__(self, channels: int, dim: int, rngs: nnx.Rngs):
        bound = (3**dim * channels) ** -0.5
        shape = (*(3,) * dim, channels, channels)
        self.kernel = nnx.Param(jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound))
        self.bias = nnx.Param(jax.random.uniform(rngs.params(), (channels,), minval=-bound, maxval=bound))

    def __call__(self, x: Float[Array, "b *s c"]) -> Float[Array, "b *s c"]:
        return conv(x, self.kernel[...], 1, "SAME") + self.bias[...]


def gva_gate(unit: Float[Array, "b *s c"], draw: Float[Array, " b"], threshold: float, keep: float) -> Array:
    """[b, 1, ..., 1]: which images GVA changes, from their brightness and a uniform draw each."""
    chosen = (unit.mean(tuple(range(1, unit.ndim))) <= threshold) & (draw >= keep)
    return chosen.reshape(-1, *(1,) * (unit.ndim - 1))


def unit_range(image: Float[Array, "b *s c"], plan: Plan) -> tuple[Array, Array]:
    """(low, span), broadcastable against the image, such that (image - low) / span lies in [0, 1]."""
    schemes = {entry["scheme"] for entry in plan.normalization}
    if schemes == {"minmax"}:
        return jnp.zeros(()), jnp.ones(())
    if schemes <= {"fixed", "ct"}:
        bounds = [(e["low"], e["high"], e) if e["scheme"] == "ct" else (0.0, EIGHT_BIT, e) for e in plan.normalization]
        low = np.array([(low - e["mean"]) / e["std"] for low, _, e in bounds], np.float32)
        span = np.array([(high - low) / e["std"] for low, high, e in bounds], np.float32)
        slices = 1 + 2 * plan.neighbours
        return jnp.tile(low, slices), jnp.tile(span, slices)
    whole = tuple(range(1, image.ndim))
    low = image.min(whole, keepdims=True)
    return low, jnp.maximum(image.max(whole, keepdims=True) - low, 1e-6)

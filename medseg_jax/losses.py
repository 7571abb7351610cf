"""Segmentation losses: overlap (Dice, generalised Dice, Tversky), cross entropy (plain, top-k, focal), and their sums.

All share one signature: logits [b, *s, k] as the network gives them, target [b, *s, k] in [0, 1] (one-hot, soft, or one
independent mask a channel; `Labels.table[label]`), weight [b, *s] >= 0 or None (`Labels.weights[label]`; 0 = ignored).

What holds for every loss here:
* `exclusive=True` reads the logits as a softmax over background (channel 0) + classes, otherwise as k sigmoids.
* An ignored voxel changes neither value nor gradient, whatever its logit or target is, NaN included. Where nothing is
  left to learn from, the loss is 0 with zero gradients.
* Arithmetic is float32 for logits of lower precision (float64 stays float64).
* Under `jit` on a sharded batch the sums run over the global batch, so the value does not depend on the device count.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

type Logits = Float[Array, "b *s k"]
type Target = Float[Array, "b *s k"]
type Weight = Float[Array, "b *s"] | None
type Loss = Callable[[Logits, Target, Weight], Float[Array, ""]]

SMOOTH = 1e-5  # Added to both sides of every overlap ratio; nnU-Net's and MONAI's value.

# ---------------------------------------------------------------------------------------------------------------------
# What every loss starts and ends with


def _prepare(logits: Logits, target: Target, weight: Weight) -> tuple[Logits, Target, Float[Array, "b *s"]]:
    """Float32, and zeros wherever the weight is 0: a product with 0 would still let NaN and inf through."""
    if logits.shape != target.shape:
        raise ValueError(f"logits {logits.shape} and target {target.shape} must have one shape [b, *s, k]")
    dtype = jnp.promote_types(logits.dtype, jnp.float32)
    if weight is None:
        return logits.astype(dtype), target.astype(dtype), jnp.ones(logits.shape[:-1], dtype)
    if weight.shape != logits.shape[:-1]:
        raise ValueError(f"weight {weight.shape} must have the logits' shape without channels, {logits.shape[:-1]}")
    counted = weight[..., None] > 0
    return (
        jnp.where(counted, logits.astype(dtype), 0),
        jnp.where(counted, target.astype(dtype), 0),
        weight.astype(dtype),
    )


def _probabilities(logits: Logits, exclusive: bool) -> Logits:
    return jax.nn.softmax(logits, axis=-1) if exclusive else jax.nn.sigmoid(logits)


def _ratio(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, and 0 (with zero gradient) where the denominator is 0."""
    empty = denominator == 0
    return jnp.where(empty, 0, numerator / jnp.where(empty, 1, denominator))


def _mean(values: Array, weight: Array) -> Float[Array, ""]:
    """Weighted mean; 0 where all weights are 0."""
    return _ratio((values * weight).sum(), weight.sum())


def _sum_space(values: Float[Array, "b *s k"], batch: bool) -> Float[Array, "g k"]:
    """Sum over space, and over the batch too if `batch`: one group for the whole batch, or one a sample."""
    values = values.reshape(values.shape[0], -1, values.shape[-1])  # [b, s, k]
    return values.sum((0, 1))[None] if batch else values.sum(1)


def _mean_groups(values: Float[Array, "g k"], weight: Float[Array, "b *s"], batch: bool) -> Float[Array, ""]:
    """Mean over groups and channels; a group whose voxels are all ignored does not count."""
    counted = _sum_space(weight[..., None], batch) > 0  # [g, 1]
    return _mean(values, jnp.broadcast_to(counted, values.shape).astype(values.dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Overlap


def dice_loss(
    logits: Logits,
    target: Target,
    weight: Weight = None,
    *,
    exclusive: bool = True,
    batch: bool = True,
    background: bool = False,
    squared: bool = False,
    smooth: float = SMOOTH,
) -> Float[Array, ""]:
    """Soft Dice loss, the mean over channels of `1 - (2 Σ w p g + smooth) / (Σ w p + Σ w g + smooth)`.

    Range [0, 1]. A channel that is absent from target and prediction scores 0. Source: Milletari et al. 2016 (V-Net,
    eq. 3, which squares the denominator); the form without squares, the sums over the batch and leaving out the
    background are nnU-Net's (Isensee et al. 2021).

    Args:
        batch: sum over the batch before dividing, which steadies classes that most samples lack. False: one Dice a
            sample, then the mean over the samples that have voxels to count (MONAI's `batch=False`).
        background: count channel 0 of exclusive classes too.
        squared: `Σ w p² + Σ w g²` in the denominator.
        smooth: added to numerator and denominator.
    """
    logits, target, weight = _prepare(logits, target, weight)
    p, w = _probabilities(logits, exclusive), weight[..., None]
    if exclusive and not background:
        p, target = p[..., 1:], target[..., 1:]
    overlap = _sum_space(w * p * target, batch)  # [g, k]
    size = _sum_space(w * (p**2 + target**2 if squared else p + target), batch)
    return _mean_groups(1 - _ratio(2 * overlap + smooth, size + smooth), weight, batch)


def generalised_dice_loss(
    logits: Logits,
    target: Target,
    weight: Weight = None,
    *,
    exclusive: bool = True,
    batch: bool = True,
    smooth: float = SMOOTH,
) -> Float[Array, ""]:
    """Generalised Dice loss, `1 - 2 Σ_c v_c Σ w p g / Σ_c v_c Σ w (p + g)` with `v_c = 1 / (Σ w g_c)²`.

    Range [0, 1]; background included. Small structures weigh as much as large ones. Source: Sudre et al. 2017, section
    2.1. The v_c are divided by the largest of them, which leaves the ratio as it is and gives `smooth` a meaning
    whatever the image size; a class that is absent gets the largest weight of those present (1), as in MONAI.
    """
    logits, target, weight = _prepare(logits, target, weight)
    p, w = _probabilities(logits, exclusive), weight[..., None]
    reference = _sum_space(w * target, batch)  # [g, k]
    smallest = jnp.where(reference > 0, reference, jnp.inf).min(-1, keepdims=True)
    v = jnp.where(reference > 0, _ratio(smallest, reference) ** 2, 1)
    overlap = (v * _sum_space(w * p * target, batch)).sum(-1, keepdims=True)  # [g, 1]
    size = (v * _sum_space(w * (p + target), batch)).sum(-1, keepdims=True)
    return _mean_groups(1 - _ratio(2 * overlap + smooth, size + smooth), weight, batch)


def tversky_loss(
    logits: Logits,
    target: Target,
    weight: Weight = None,
    *,
    exclusive: bool = True,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 1.0,
    batch: bool = True,
    background: bool = False,
    smooth: float = SMOOTH,
) -> Float[Array, ""]:
    """(Focal) Tversky loss, the mean over channels of `(1 - T) ** gamma`, T = (TP + s) / (TP + alpha FP + beta FN + s).

    TP = Σ w p g, FP = Σ w p (1 - g), FN = Σ w (1 - p) g, s = `smooth`. Range [0, 1]; alpha = beta = 0.5 is Dice;
    beta > alpha punishes misses more than false alarms. Source: Salehi et al. 2017, eq. 3 (alpha, beta); Abraham & Khan
    2019, eq. 4 (the exponent, written 1 / gamma there; they use 3/4). An exponent below 1 has an infinite slope at a
    perfect score, so its base is held at 1e-6 or more.
    """
    logits, target, weight = _prepare(logits, target, weight)
    p, w = _probabilities(logits, exclusive), weight[..., None]
    if exclusive and not background:
        p, target = p[..., 1:], target[..., 1:]
    hit = _sum_space(w * p * target, batch)  # [g, k]
    alarm = _sum_space(w * p * (1 - target), batch)
    miss = _sum_space(w * (1 - p) * target, batch)
    loss = 1 - _ratio(hit + smooth, hit + alpha * alarm + beta * miss + smooth)
    return _mean_groups(loss if gamma == 1 else jnp.maximum(loss, 1e-6) ** gamma, weight, batch)


# ---------------------------------------------------------------------------------------------------------------------
# Cross entropy


def _voxel_cross_entropy(logits: Logits, target: Target) -> Float[Array, "b *s"]:
    return -(target * jax.nn.log_softmax(logits, axis=-1)).sum(-1)


def _voxel_binary_cross_entropy(logits: Logits, target: Target, pos_weight: Array | float = 1.0) -> Logits:
    return -(pos_weight * target * jax.nn.log_sigmoid(logits) + (1 - target) * jax.nn.log_sigmoid(-logits))


def cross_entropy(
    logits: Logits, target: Target, weight: Weight = None, *, class_weights: Sequence[float] | Array | None = None
) -> Float[Array, ""]:
    """Softmax cross entropy, `Σ w v (-Σ_c g_c log p_c) / Σ w v`; soft targets allowed. Range [0, ∞).

    `class_weights` [k] gives a voxel the weight `v = Σ_c class_weights_c g_c` (PyTorch's rule for hard targets).
    """
    logits, target, weight = _prepare(logits, target, weight)
    if class_weights is not None:
        weight = weight * (target * jnp.asarray(class_weights, target.dtype)).sum(-1)
    return _mean(_voxel_cross_entropy(logits, target), weight)


def binary_cross_entropy(
    logits: Logits, target: Target, weight: Weight = None, *, pos_weight: Sequence[float] | Array | float = 1.0
) -> Float[Array, ""]:
    """Sigmoid cross entropy, the weighted mean over voxels and channels of `-(u g log p + (1 - g) log(1 - p))`.

    Range [0, ∞). `pos_weight` u, a number or one a channel [k], lifts rare positives as in PyTorch's BCEWithLogitsLoss.
    """
    logits, target, weight = _prepare(logits, target, weight)
    loss = _voxel_binary_cross_entropy(logits, target, jnp.asarray(pos_weight, target.dtype))
    return _mean(loss.mean(-1), weight)


def top_k_cross_entropy(
    logits: Logits, target: Target, weight: Weight = None, *, exclusive: bool = True, fraction: float = 0.1
) -> Float[Array, ""]:
    """Mean cross entropy of the hardest `fraction` of the counted voxels of the batch (at least one). Range [0, ∞).

    Voxels are ranked by `w` x cross entropy (for sigmoids, the mean over channels). Source: nnU-Net's TopKLoss
    (k = 10 %, after Wu et al. 2016); here ignored voxels do not swell the number that is kept.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must lie in (0, 1], not {fraction}")
    logits, target, weight = _prepare(logits, target, weight)
    loss = _voxel_cross_entropy(logits, target) if exclusive else _voxel_binary_cross_entropy(logits, target).mean(-1)
    loss, weight = (loss * weight).ravel(), weight.ravel()
    # Counted voxels come before ignored ones even where their loss is 0.
    rank = jnp.where(weight > 0, loss, -1)
    _, hardest = jax.lax.top_k(jax.lax.stop_gradient(rank), math.ceil(fraction * loss.size))
    keep = jnp.arange(hardest.size) < jnp.ceil(fraction * (weight > 0).sum())
    return _ratio((loss[hardest] * keep).sum(), (weight[hardest] * keep).sum())


def focal_loss(
    logits: Logits,
    target: Target,
    weight: Weight = None,
    *,
    exclusive: bool = True,
    gamma: float = 2.0,
    alpha: Sequence[float] | Array | float | None = None,
) -> Float[Array, ""]:
    """Focal loss, cross entropy times `(1 - p_true) ** gamma`; gamma = 0 is cross entropy. Range [0, ∞).

    Softmax: mean of `-Σ_c a_c (1 - p_c)^gamma g_c log p_c`, with a_c = `alpha` [k] or 1.
    Sigmoid: mean over voxels and channels of `-(a (1 - p)^gamma g log p + (1 - a) p^gamma (1 - g) log(1 - p))`, with
    a = `alpha` (a number or [k]; the paper's 0.25), or both factors 1 if None. Source: Lin et al. 2017, eq. 5.
    The focusing factor's base is held at 1e-7 or more, so that a gamma below 1 has a finite slope.
    """
    logits, target, weight = _prepare(logits, target, weight)
    alphas = None if alpha is None else jnp.asarray(alpha, target.dtype)
    p = _probabilities(logits, exclusive)
    miss = jnp.maximum(1 - p, 1e-7) ** gamma
    if exclusive:
        scale = 1 if alphas is None else alphas
        return _mean(-(scale * miss * target * jax.nn.log_softmax(logits, axis=-1)).sum(-1), weight)
    alarm = jnp.maximum(p, 1e-7) ** gamma
    positive, negative = (1, 1) if alphas is None else (alphas, 1 - alphas)
    loss = positive * miss * target * jax.nn.log_sigmoid(logits)
    loss += negative * alarm * (1 - target) * jax.nn.log_sigmoid(-logits)
    return _mean(-loss.mean(-1), weight)


# ---------------------------------------------------------------------------------------------------------------------
# Sums


def dice_ce(
    logits: Logits,
    target: Target,
    weight: Weight = None,
    exclusive: bool = True,
    *,
    batch: bool = True,
    background: bool = False,
    squared: bool = False,
    smooth: float = SMOOTH,
) -> Float[Array, ""]:
    """Dice + cross entropy, 1 : 1, the default loss of nnU-Net (Isensee et al. 2021). Range [0, ∞).

    Exclusive classes: `dice_loss` without background on softmax + `cross_entropy`. Otherwise `dice_loss` on sigmoids +
    `binary_cross_entropy`. With `batch=False, background=True` it equals MONAI's DiceCELoss(softmax=True).
    """
    entropy = cross_entropy if exclusive else binary_cross_entropy
    dice = dice_loss(
        logits, target, weight, exclusive=exclusive, batch=batch, background=background, squared=squared, smooth=smooth
    )
    return dice + entropy(logits, target, weight)


def deep_supervision_weights(levels: int) -> tuple[float, ...]:
    """1, 1/2, 1/4, ..., 0 for the lowest resolution (unless it is the only one), divided by their sum."""
    weights = [0.5**i for i in range(levels)]
    if levels > 1:
        weights[-1] = 0.0
    return tuple(w / sum(weights) for w in weights)


def deep_supervision(loss: Loss, logits: Sequence[Logits], target: Target, weight: Weight = None) -> Float[Array, ""]:
    """Weighted sum of `loss` over the decoder's resolutions, `Σ_i v_i loss(logits_i, target_i, weight_i)`.

    Weights as in nnU-Net (`deep_supervision_weights`); a resolution of weight 0 is not computed. Target and weight are
    reduced by strided nearest neighbour, `x[::stride]`: a strided convolution with symmetric padding centres its output
    i on input i * stride, so that is the voxel the logit stands for.

    Args:
        loss: called as loss(logits [b, *s_i, k], target [b, *s_i, k], weight [b, *s_i] | None).
        logits: full resolution first; shapes [b, ceil(s / stride_i), k].
    """
    total = jnp.zeros((), jnp.promote_types(logits[0].dtype, jnp.float32))
    for level, share in zip(logits, deep_supervision_weights(len(logits)), strict=True):
        if share > 0:
            steps = _strides(target.shape[1:-1], level.shape[1:-1])
            reduced = None if weight is None else weight[:, *steps]
            total += share * loss(level, target[:, *steps], reduced)
    return total


def _strides(full: tuple[int, ...], low: tuple[int, ...]) -> tuple[slice, ...]:
    """One strided slice a spatial axis that takes `full` to `low`."""
    strides = [math.ceil(n / m) for n, m in zip(full, low, strict=True)]
    if any(math.ceil(n / s) != m for n, m, s in zip(full, low, strides, strict=True)):
        raise ValueError(f"logits of shape {low} are no strided reduction of a target of shape {full}")
    return tuple(slice(None, None, s) for s in strides)


# ---------------------------------------------------------------------------------------------------------------------
# For labels that may be wrong


def exclusive_choices(
    logits: Logits, target: Target, exclusive: bool
) -> tuple[Float[Array, "b *s f c"], Float[Array, "b *s f c"]]:
    """Log-probabilities and targets as f independent choices among c: one softmax among k, or k sigmoids among two."""
    if exclusive:
        return jax.nn.log_softmax(logits, axis=-1)[..., None, :], target[..., None, :]
    both = jnp.stack([jax.nn.log_sigmoid(-logits), jax.nn.log_sigmoid(logits)], -1)
    return both, jnp.stack([1 - target, target], -1)


def generalised_cross_entropy(
    logits: Logits, target: Target, weight: Weight = None, *, exclusive: bool = True, q: float = 0.7
) -> Float[Array, ""]:
    """Mean of `(1 - p_true^q) / q`: cross entropy for q -> 0, mean absolute error for q = 1. Range [0, 1 / q].

    p_true is the probability of the target (its mean where the target is soft); for sigmoids the mean over channels.
    Source: Zhang & Sabuncu 2018, eq. 6, with their q = 0.7.
    """
    if not 0 < q <= 1:
        raise ValueError(f"q must lie in (0, 1], not {q}")
    logits, target, weight = _prepare(logits, target, weight)
    log_p, chosen = exclusive_choices(logits, target, exclusive)
    powered = (chosen * jnp.exp(q * log_p)).sum(-1)  # [b, *s, f]; exp(q log p) has a finite slope where p vanishes
    return _mean(((1 - powered) / q).mean(-1), weight)


def smooth_labels(target: Target, share: float, *, exclusive: bool = True) -> Target:
    """`(1 - share) target + share / k`, or `share / 2` for sigmoids (Szegedy et al. 2016, section 7)."""
    return (1 - share) * target + share / (target.shape[-1] if exclusive else 2)


def confusion_loss(
    logits: Logits, target: Target, weight: Weight = None, *, confusion: Float[Array, "f c c"], exclusive: bool = True
) -> Float[Array, ""]:
    """One step of expectation-maximisation for flips that are independent of each other and of the image.

    `-Σ_k q_k (log A_k,y + log p_k)`, mean over voxels, with A = softmax over the rows of `confusion`, P(label y | truth
    k), and responsibilities q_k ∝ A_k,y p_k that carry no gradient. Minimised in network and `confusion` alike.

    Args:
        confusion: [1, k, k] logits for exclusive classes, [k, 2, 2] for sigmoids; rows are the truth.
    """
    logits, target, weight = _prepare(logits, target, weight)
    log_p, chosen = exclusive_choices(logits, target, exclusive)
    joint = log_p + jnp.einsum("...fy,fky->...fk", chosen, jax.nn.log_softmax(confusion, -1), precision="highest")
    responsibility = jax.lax.stop_gradient(jax.nn.softmax(joint, axis=-1))
    return _mean(-(responsibility * joint).sum(-1).mean(-1), weight)


def student_t_loss(
    error: Float[Array, "b *s k"], nu: Float[Array, ""], weight: Weight = None, *, size: int | None = None
) -> Float[Array, ""]:
    """T-Loss: negative log-likelihood of an image's errors under one Student t distribution; mean over b and channels.

        -lgamma((v + D) / 2) + lgamma(v / 2) - D / 2 + D / 2 log(pi v) + (v + D) / 2 log(1 + e Σ error^2 / v)

    with v = exp(nu) + 1e-8 learned, and D the counted voxels of the image. An image that is wrong as a whole costs the
    logarithm of its error only. Source: Gonzalez-Jimenez et al., MICCAI 2023, with their scale of e^-1 everywhere.

    Args:
        error: probability - target.
        nu: logarithm of the degrees of freedom; they start at 1.
        size: D, where it is not the number of counted voxels.
    """
    dtype = error.dtype
    weight = jnp.ones(error.shape[:-1], dtype) if weight is None else weight.astype(dtype)
    axes = tuple(range(1, error.ndim - 1))
    count = (weight > 0).sum(axes)[:, None].astype(dtype) if size is None else jnp.asarray(size, dtype)  # [b, 1]
    v = jnp.exp(nu) + 1e-8
    squares = (jnp.square(error) * weight[..., None]).sum(axes)  # [b, k]
    normaliser = jax.lax.lgamma(v / 2) - jax.lax.lgamma((v + count) / 2)
    normaliser = normaliser + count / 2 * (jnp.log(v) + math.log(math.pi) - 1)
    return (normaliser + (v + count) / 2 * jnp.log1p(math.e * squares / v)).mean()

"""Learning from labels that are wrong in patches: a Bayesian model of spatially correlated label errors.

    y* ~ softmax(f(x))                        the true label of a voxel, as the network sees it
    eta ~ N(mu, s^2 K(rho))                   logit of the probability that the label is wrong: a field over the image
    y = y* with probability 1 - sigmoid(eta), else any other class                            what the annotator wrote

K is the Kronecker product of one Kac-Murdock-Szegő matrix an axis (ops/kms.py). Each training image has a posterior
q(eta) = N(m, diag(g) K(rho) diag(g)), and the negative evidence lower bound per voxel is

    L = 1/N Σ_i { (1 - r_i) (-log p_y) + r_i / (C - 1) Σ_(k != y) (-log p_k) } + 1/N KL( q(eta) || p(eta) )

with r = E_q sigmoid(eta), for any number of classes C: the two other terms of the bound cancel. A step is an E-step
(Adam on m and g of the batch's images, the network's output held fixed) and an M-step (cross entropy with the soft
target that r makes). Where the network disagrees with the label over a whole region, r rises there; lone voxels are
held back by their neighbours.

With C > 2 the bound is loose: q spreads a doubted label evenly over the other classes, so that one improbable class
outweighs the probable one, and labels may be doubted too little. With C = 2 this does not arise.

Classes that overlap have a field each, with C = 2. Ignored voxels have no cross entropy. The posterior lies on the
preprocessed case; a training patch works on its window of it, which is a field of the same kind, and augmentation is
undone voxel by voxel (the log-probabilities of the patch are averaged over the voxels that they came from), so any
augmentation may be used. Voxels that the patch did not show keep their posterior.

Source: Tadokoro, Takagi, Maeda, "A Bayesian Approach to Segmentation with Noisy Labels via Spatially Correlated
Distributions", TMLR 2026, and its code. Where we depart from them:

* The network runs once a step: the E-step uses the logits of the M-step (theirs runs it eleven times), and comes first.
* E_q sigmoid(eta) by Gauss-Hermite quadrature instead of one random sample (`nodes=0` samples as they do).
* `variance="as_written"`: the code that was published samples with the standard deviation sqrt(g) while its KL takes g
  for the standard deviation. `"as_run"` repeats that.
* `whiten`: m = mu + s L U and Adam on U, which converges at every rho; on m itself (theirs) it crawls above .75. [our
  choice]
* `warmup` steps of plain cross entropy, in which no posterior is inferred. A network that knows nothing yet would teach
  the posterior its own mistakes; they rely on the start m = -5 alone, and on many epochs. [our choice]
* `begin`: the same for each class, by what the network has learned instead of by the step: a class is doubted while the
  network agrees with its labels to that soft Dice (over about ten batches), so that a structure which it does not find
  yet, or no longer, is learned from the labels as they are. [our choice]
* `learn_rho`: rho by gradient on the same bound, in (0, .95); fixed in the paper.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from medseg_jax import losses
from medseg_jax.methods.objective import Fn, Objective, Task, Tree, probabilities
from medseg_jax.methods.robust_losses import without_noise
from medseg_jax.models.network import Network
from medseg_jax.models.unet import UNet
from medseg_jax.ops import kms
from medseg_jax.types import Batch, Labels, UserError

HIGHEST_RHO = 0.95  # of a learned rho
MEMORY = 0.9  # of the agreement of network and labels: about ten batches
ROWS = 64  # the store's rows are a multiple of this, so that it can be split over as many devices


class Posterior(NamedTuple):
    """Mean m and raw scale (g = softplus(raw)) of the field of each voxel, [b, f, *s]."""

    m: Array
    raw: Array

    @property
    def g(self) -> Array:
        """Standard deviation."""
        return jax.nn.softplus(self.raw)


class Prior(NamedTuple):
    """Mean, standard deviation and correlation of neighbours; `rho_g` is the posterior's correlation."""

    mu: float = -2.0
    s: float = 1.3132616875182228  # softplus(1)
    rho: float | Array = 0.75
    rho_g: float | Array = 0.75


@dataclass(frozen=True)
class KMSNoise(Objective):
    """Segmentation from noisy labels, with a posterior of the label errors of every training case.

    Attributes:
        net: the network's config; None fields are filled in from the plan.
        rho: correlation of the label errors of neighbouring voxels.
        mu, s: prior mean and standard deviation of the logit of the error probability; the defaults expect 18 % errors.
        start: m of a case that was never seen: labels are trusted at first.
        e_steps, e_lr: Adam steps and learning rate of an E-step.
        whiten: infer innovations instead of the field itself.
        nodes: of the quadrature for E[sigmoid(eta)]; 0 for one random sample.
        variance: standard deviation that eta is drawn with: g, or sqrt(g) as the published code did.
        learn_rho: start from `rho` and learn it.
        warmup: steps of plain cross entropy before the first E-step.
        begin: soft Dice of network and labels from which on the labels of a class (of all, if they exclude each other)
            are doubted; 0, as theirs, to doubt them from `warmup` on.
    """

    batch_spec: ClassVar[tuple[str, ...]] = ("image", "label", "case", "start")
    tracks_voxels: ClassVar[bool] = True

    net: Network = UNet()
    rho: float = 0.75
    mu: float = -2.0
    s: float = 1.3132616875182228
    start: float = -5.0
    e_steps: int = 10
    e_lr: float = 0.1
    whiten: bool = True
    nodes: int = 5
    variance: Literal["as_written", "as_run"] = "as_written"
    learn_rho: bool = False
    warmup: int = 0
    begin: float = 0.5

    def __post_init__(self):
        if not 0 <= self.rho <= HIGHEST_RHO + 0.04 or (self.learn_rho and not 0 < self.rho < HIGHEST_RHO):
            raise UserError(
                "KMSNoise.rho is no correlation", found=self.rho, expected="0 to 0.99; to learn it, 0 to 0.95"
            )
        if not 0 <= self.begin < 1:
            raise UserError("KMSNoise.begin is a Dice", found=self.begin, expected="0 or more, and below 1")
        if self.e_steps < 1 or self.s <= 0 or self.nodes < 0 or self.variance not in ("as_written", "as_run"):
            raise UserError(
                "KMSNoise cannot be trained with these settings",
                found=f"e_steps={self.e_steps}, s={self.s}, nodes={self.nodes}, variance={self.variance!r}",
                expected='e_steps >= 1, s > 0, nodes >= 0, variance "as_written" or "as_run"',
            )

    def complete(self, task: Task) -> Self:
        return replace(self, net=self.net.from_plan(task.plan))

    @cached_property
    def fn(self) -> Fn:
        """The network as pure functions."""
        task = self.task
        return Fn(lambda rngs: self.net.build(task.in_channels, task.labels.channels, rngs))

    @cached_property
    def store(self) -> "Store":
        """Where the posteriors of all cases lie."""
        return Store.of(self.task)

    # ----------------------------------------------------------------------------------------------- the four functions

    def init(self, key: Array, batch: Batch) -> tuple[Tree, Tree]:
        del batch
        params, stats = self.fn.init(key)
        shape = self.store.shape
        cases = {"m": jnp.full(shape, self.start, jnp.float32), "raw": jnp.full(shape, _inverse_softplus(self.s))}
        if self.learn_rho:
            params = {**params, "noise": {"rho": jnp.float32(math.log(self.rho / (HIGHEST_RHO - self.rho)))}}
        agreement = jnp.zeros((2, shape[1]))  # twice the overlap of network and labels, and their size, of each field
        return params, {"stats": stats, "cases": cases, "step": jnp.int32(0), "agreement": agreement}

    def pretrained(self, params: Tree, aux: Tree, load) -> tuple[Tree, Tree]:
        net, stats = load(self.net, without_noise(params), aux["stats"])
        return {**params, **net}, {**aux, "stats": stats}

    def loss(self, params: Tree, aux: Tree, frozen: Tree, batch: Batch, key: Array):
        net_key, noise_key = jax.random.split(key)
        logits, stats = self.fn.apply(without_noise(params), aux["stats"], batch["image"], train=True, key=net_key)
        labels, dim = self.task.labels, self.task.plan.dim
        target = jnp.asarray(labels.table)[batch["label"]]  # [b, *s, k]
        weight = None if labels.ignore is None else jnp.asarray(labels.weights)[batch["label"]]
        prior = self.prior(params)

        # E-step, in the frame of the case
        unit, corner = self.store.place(batch["case"], batch["start"])
        rows = {name: store[unit] for name, store in aux["cases"].items()}  # [b, f, *grid]
        old = Posterior(*(self.store.window(rows[name], corner) for name in ("m", "raw")))  # [b, f, *window]
        gap = jax.lax.stop_gradient(cost_of_flip(logits[0], target, labels))  # [b, *s, f]
        gap, counted, shown = to_window(gap, weight, batch["voxel"], self.store.window_shape)
        agreement = MEMORY * aux["agreement"] + jax.lax.stop_gradient(_agreement(logits[0], target, weight, labels))
        started = (self.known(agreement) & (aux["step"] >= self.warmup)).reshape(-1, *(1,) * dim)  # [f, 1, ..]
        posterior = jax.lax.stop_gradient(
            jax.lax.cond(
                started.any(),
                lambda: infer(
                    old,
                    gap,
                    counted,
                    jax.tree.map(jax.lax.stop_gradient, prior),
                    lambda now, index: self.flip(now, jax.random.fold_in(noise_key, index)),
                    optax.adam(self.e_lr),
                    self.e_steps,
                    self.whiten,
                ),
                lambda: old,
            )
        )
        new = shown[:, None] & started
        posterior = Posterior(*(jnp.where(new, n, o) for n, o in zip(posterior, old, strict=True)))

        # M-step, in the frame of the patch
        flip = jnp.where(started, self.flip(posterior, jax.random.fold_in(noise_key, self.e_steps)), 0)
        target = soften(target, to_patch(flip, batch["voxel"]), labels)
        entropy = losses.cross_entropy if labels.exclusive else losses.binary_cross_entropy
        loss = losses.deep_supervision(entropy, logits, target, weight)
        metrics = {
            "doubted": started.mean(),
            "wrong": (flip * counted[:, None]).sum() / jnp.maximum(counted.sum() * flip.shape[1], 1),
        }
        if self.learn_rho:
            divergence = kms.kl(posterior.m, posterior.g, *prior, dim=dim)  # [b, f]
            loss += jnp.where(started.ravel(), divergence, 0).mean() / math.prod(self.store.window_shape)
            metrics["rho"] = jnp.asarray(prior.rho)

        for name, value in zip(("m", "raw"), posterior, strict=True):
            rows[name] = self.store.put(rows[name], value, corner)
        cases = {name: self.store.write(aux["cases"][name], rows[name], unit) for name in rows}
        return loss, ({**aux, "stats": stats, "cases": cases, "agreement": agreement}, metrics)

    def after_update(self, params: Tree, aux: Tree, step: Array) -> Tree:
        return {**aux, "step": aux["step"] + 1}

    def predict(self, params: Tree, aux: Tree, frozen: Tree, image: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        logits, _ = self.fn.apply(without_noise(params), aux["stats"], image, train=False)
        return probabilities(logits[0], self.task.labels.exclusive)

    # ---------------------------------------------------------------------------------------------------------- details

    def known(self, agreement: Float[Array, "2 f"]) -> Array:
        """[f] whether the network knows a class well enough for its labels to be doubted."""
        return agreement[0] >= self.begin * agreement[1]

    def prior(self, params: Tree) -> Prior:
        """The prior, with the learned rho if there is one."""
        rho = HIGHEST_RHO * jax.nn.sigmoid(params["noise"]["rho"]) if self.learn_rho else self.rho
        return Prior(self.mu, self.s, rho, rho)

    def flip(self, posterior: Posterior, key: Array | None = None) -> Array:
        """E_q[sigmoid(eta)], the probability that the label of a voxel is wrong, [b, f, *s]; `key` is for a sample."""
        noise = None if self.nodes or key is None else jax.random.normal(key, posterior.m.shape, posterior.m.dtype)
        deviation = posterior.g if self.variance == "as_written" else jnp.sqrt(posterior.g)
        return expected_flip(posterior.m, deviation, self.nodes, noise)


def _inverse_softplus(y: float) -> float:
    return math.log(math.expm1(y))


# ---------------------------------------------------------------------------------------------------------------------
# The bound
# ---------------------------------------------------------------------------------------------------------------------


def expected_flip(m: Array, deviation: Array, nodes: int, noise: Array | None = None) -> Array:
    """E sigmoid(m + deviation z), z ~ N(0, 1): by quadrature with `nodes` nodes, or from the one sample z = `noise`."""
    if noise is not None:
        return jax.nn.sigmoid(m + deviation * noise)
    at, weights = np.polynomial.hermite_e.hermegauss(nodes)
    pairs = zip(at, weights / weights.sum(), strict=True)
    return sum((float(w) * jax.nn.sigmoid(m + deviation * float(z)) for z, w in pairs), jnp.zeros((), m.dtype))


def cost_of_flip(logits: Array, target: Array, labels: Labels) -> Float[Array, "b *s f"]:
    """log p of the label minus the mean log p of the other classes: what a flip costs."""
    log_p, chosen = losses.exclusive_choices(logits, target, labels.exclusive)
    own = (log_p * chosen).sum(-1)
    return own - (log_p.sum(-1) - own) / (log_p.shape[-1] - 1)


def _agreement(logits: Array, target: Array, weight: Array | None, labels: Labels) -> Float[Array, "2 f"]:
    """Twice the overlap of the network's probabilities with the labels, and the sum of both; foreground together if
    classes exclude each other."""
    p = probabilities(logits, labels.exclusive)[..., labels.exclusive :]
    y = target[..., labels.exclusive :]
    w = 1.0 if weight is None else weight[..., None]
    sums = jnp.stack([2 * w * p * y, w * (p + y)]).sum(range(1, p.ndim))  # [2, k]
    return sums.sum(-1, keepdims=True) if labels.exclusive else sums


def soften(target: Float[Array, "b *s k"], flip: Float[Array, "b *s f"], labels: Labels) -> Float[Array, "b *s k"]:
    """The soft target q(y* | y): 1 - r for the label, r / (C - 1) for each other class; any network can learn it."""
    others = target.shape[-1] - 1 if labels.exclusive else 1
    return (1 - flip) * target + flip * (1 - target) / others


def error_probability(flip: Array, p_label: Array, others: int = 1) -> Array:
    """Probability that a label is wrong, given the field and what the network sees at the voxel itself, by Bayes' rule.

    The bound's q(y* | y, eta) leaves the network out: r alone is what the neighbourhood says. With both,

        odds = r / (1 - r) * (1 - p_y) / ((C - 1) p_y)

    r was inferred from the same network, this voxel included, so that its evidence counts twice here. [our choice]

    Args:
        flip: r, in (0, 1).
        p_label: p_y, the network's probability of the label, of the same shape.
        others: C - 1.
    """
    wrong, right = flip * (1 - p_label) / others, (1 - flip) * p_label
    return wrong / (wrong + right)


def infer(
    posterior: Posterior,
    gap: Float[Array, "b f *s"],
    counted: Float[Array, "b *s"],
    prior: Prior,
    flip: Callable[[Posterior, Array], Array],
    optimizer: optax.GradientTransformation,
    steps: int,
    whiten: bool,
) -> Posterior:
    """The E-step: descent on the bound of each image from a fresh optimiser state, the network fixed.

    Args:
        posterior: where to start.
        gap: what a flip costs, see `cost_of_flip`.
        counted: 1 where a voxel is seen and not ignored, else 0.
        prior: of the field.
        flip: (posterior, number of the step) -> E_q[sigmoid(eta)].
        optimizer: Adam; it sees the gradient of the sum over voxels (not their mean), so that the posterior of one
            image does not depend on how many there are.
        steps: how many.
        whiten: descend on the innovations U of m = mu + s L U.
    """
    dim = counted.ndim - 1
    weighted = gap * counted[:, None]

    def mean(free: Array) -> Array:
        return prior.mu + prior.s * kms.correlate(free, prior.rho, dim) if whiten else free

    def bound(free: Posterior, index: Array) -> Array:
        now = Posterior(mean(free.m), free.raw)
        if whiten:
            divergence = kms.kl_of_innovations(free.m, now.g, prior.s, prior.rho, prior.rho_g, dim)
        else:
            divergence = kms.kl(now.m, now.g, *prior, dim=dim)
        return (flip(now, index) * weighted).sum() + divergence.sum()

    def step(carry: tuple, index: Array) -> tuple:
        free, state = carry
        updates, state = optimizer.update(jax.grad(bound)(free, index), state)
        return (optax.apply_updates(free, updates), state), None

    free = posterior
    if whiten:
        free = Posterior(kms.whiten((posterior.m - prior.mu) / prior.s, prior.rho, dim), posterior.raw)
    (free, _), _ = jax.lax.scan(step, (free, optimizer.init(free)), jnp.arange(steps))
    return Posterior(mean(free.m), free.raw)


# ---------------------------------------------------------------------------------------------------------------------
# Where the posteriors lie
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """The posteriors of all cases as one array [rows, f, *grid], and the windows of it that training patches show.

    A row is a case, or a slice of one where a flat network is trained on volumes. The grid holds the largest case with
    as much margin as samples reach outside, so that every window lies inside.

    Attributes:
        shape: of the array.
        window_shape: *s of a sample as the pipeline cuts it, before augmentation.
        margin: voxels of the grid before a case's first one, an axis.
        slices: rows a case.
    """

    shape: tuple[int, ...]
    window_shape: tuple[int, ...]
    margin: tuple[int, ...]
    slices: int

    @classmethod
    def of(cls, task: Task) -> Self:
        """The store that a task needs."""
        if task.extent is None or task.sample_size is None:
            raise RuntimeError("the task does not say how large its cases and samples are")
        dim, patch, window = task.plan.dim, task.plan.patch_size, task.sample_size
        smallest, largest = (sides[-dim:] for sides in task.extent)
        margin = tuple(
            -(-(s - p) // 2) + max(0, -(-(p - n) // 2)) for s, p, n in zip(window, patch, smallest, strict=True)
        )
        grid = tuple(max(n + 2 * m, s) for n, m, s in zip(largest, margin, window, strict=True))
        slices = task.extent[1][0] if dim == 2 else 1
        rows = -(-task.cases * slices // ROWS) * ROWS
        fields = 1 if task.labels.exclusive else len(task.labels.names)
        return cls((rows, fields, *grid), window, margin, slices)

    def place(self, case: Int[Array, " b"], start: Int[Array, "b 3"]) -> tuple[Int[Array, " b"], Int[Array, "b n"]]:
        """Rows of the samples that start at voxel `start` (d, h, w) of their cases, and their windows' corners."""
        unit = case if len(self.margin) == 3 else case * self.slices + start[:, 0]
        return unit, start[:, -len(self.margin) :] + jnp.asarray(self.margin)

    def window(self, rows: Float[Array, "b f *g"], corner: Int[Array, "b n"]) -> Float[Array, "b f *s"]:
        """The windows of rows."""
        if rows.shape[2:] == self.window_shape:
            return rows
        size = (rows.shape[1], *self.window_shape)
        return jax.vmap(lambda row, at: jax.lax.dynamic_slice(row, (0, *at), size))(rows, corner)

    def put(self, rows: Array, values: Float[Array, "b f *s"], corner: Int[Array, "b n"]) -> Array:
        """Rows with new values in their windows."""
        if rows.shape == values.shape:
            return values
        return jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (0, *at)))(rows, values, corner)

    def write(self, store: Float[Array, "r f *g"], rows: Float[Array, "b f *g"], unit: Int[Array, " b"]) -> Array:
        """The array with new rows. Where a batch shows a case twice, the later sample counts, on every device."""
        later = (unit[:, None] == unit[None]) & (jnp.arange(len(unit))[:, None] < jnp.arange(len(unit)))
        return store.at[jnp.where(later.any(1), len(store), unit)].set(rows, mode="drop")


def to_window(
    values: Float[Array, "b *p f"],
    weight: Float[Array, "b *p"] | None,
    voxel: Int[Array, "b *p"],
    shape: tuple[int, ...],
) -> tuple[Float[Array, "b f *s"], Float[Array, "b *s"], Float[Array, "b *s"]]:
    """Undoes the augmentation of the patch: every voxel of the window gets the mean of the patch's voxels that show it.

    Args:
        values: one number a voxel of the patch and field.
        weight: of the patch's voxels, 0 = ignored.
        voxel: flat index + 1 of the window's voxel that each voxel of the patch was taken from, 0 = none.
        shape: *s of the window.

    Returns:
        the means, 1 where a counted voxel of the patch shows the voxel, 1 where any does (else 0).
    """
    ones = jnp.ones(voxel.shape, values.dtype)
    counted = ones if weight is None else (weight > 0).astype(values.dtype)
    seen = jnp.where(counted[..., None] > 0, values, 0)
    stacked = jnp.concatenate([seen, counted[..., None], ones[..., None]], -1)  # [b, *p, f + 2]
    flat = stacked.reshape(len(voxel), -1, stacked.shape[-1])  # [b, p, f + 2]
    size = math.prod(shape)
    index = jnp.where(voxel > 0, voxel - 1, size).reshape(len(voxel), -1)  # [b, p]
    sums = jax.vmap(lambda at, row: jnp.zeros((size, row.shape[-1]), row.dtype).at[at].add(row, mode="drop"))(
        index, flat
    )
    sums = jnp.moveaxis(sums, -1, 1).reshape(len(voxel), -1, *shape)  # [b, f + 2, *s]
    total, shown = sums[:, -2], sums[:, -1]
    means = sums[:, :-2] / jnp.maximum(total, 1)[:, None]
    return means, (total > 0).astype(values.dtype), shown > 0


def to_patch(values: Float[Array, "b f *s"], voxel: Int[Array, "b *p"]) -> Float[Array, "b *p f"]:
    """What the augmentation does to a label, done to values of the window; 0 outside of it."""
    flat = values.reshape(*values.shape[:2], -1)  # [b, f, s]
    index = jnp.maximum(voxel - 1, 0).reshape(len(voxel), -1)  # [b, p]
    moved = jnp.take_along_axis(flat, index[:, None], axis=-1)  # [b, f, p]
    moved = jnp.moveaxis(moved, 1, -1).reshape(*voxel.shape, -1)  # [b, *p, f]
    return jnp.where((voxel > 0)[..., None], moved, 0)

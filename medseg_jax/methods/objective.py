"""The one interface that all methods share (design section 4), and `Fn`, which turns an NNX module into pure functions.

A method is a frozen dataclass. What a user writes in a config is unbound: it knows hyper-parameters only. `bind` gives
a copy that also knows the task (plan, label set, channels), and from then on four pure functions say everything:

    init(key, batch)                          -> params, aux           params receive gradients, aux is any pytree
    loss(params, aux, frozen, batch, key)     -> scalar, (aux, metrics)
    after_update(params, aux, step)           -> aux                   teacher EMA, queue, prototypes
    predict(params, aux, frozen, image)       -> probabilities         [b, *s, c] -> [b, *s, k]

What `aux` keeps under the key "cases" is one row a case, [rows, ...]: it is split over all devices by rows where their
number allows, and prediction does without it.

`frozen` holds what is read but never trained (SAM, a text encoder, a LoRA base): it is not donated and not written at
each checkpoint; its sha256 and source are.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from medseg_jax.data.plan import Plan
from medseg_jax.types import Batch, Labels, UserError

type Tree = Any
"""A pytree of arrays; parameters and statistics are plain nested dicts."""


@dataclass(frozen=True)
class Task:
    """What a method must know of the data before it can be built.

    Attributes:
        extent: smallest and largest side of the preprocessed training cases along (d, h, w); only for methods whose
            `batch_spec` names "start".
        sample_size: *s of a sample before augmentation cuts the patch out of it; likewise.
    """

    plan: Plan
    labels: Labels
    in_channels: int
    cases: int = 0
    domains: tuple[str, ...] = ("",)
    extent: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    sample_size: tuple[int, ...] | None = None


class Fn:
    """An NNX module as pure functions over plain dicts: `init(key)` and `apply(params, stats, *inputs)`.

    The module is merged from its dicts inside the trace only, so that the training state is a plain pytree and no NNX
    transform stands between the loop and `jax.jit`.
    """

    def __init__(self, make: Callable[[nnx.Rngs], nnx.Module]):
        self.make = make
        self.graph, self._params, self._stats = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))), nnx.Param, ...)

    def init(self, key: Array) -> tuple[Tree, Tree]:
        """Random parameters and initial statistics (batch norm), as nested dicts."""
        _, params, stats = nnx.split(self.make(nnx.Rngs(key)), nnx.Param, ...)
        return _plain(params), _plain(stats)

    def apply(
        self, params: Tree, stats: Tree, *inputs: Any, key: Array | None = None, **options: Any
    ) -> tuple[Any, Tree]:
        """Calls the module; returns its output and the new statistics. `key` feeds dropout."""
        new_params, new_stats = jax.tree.map(lambda v: v, (self._params, self._stats))
        nnx.replace_by_pure_dict(new_params, nnx.restore_int_paths(params))
        nnx.replace_by_pure_dict(new_stats, nnx.restore_int_paths(stats))
        module = nnx.merge(self.graph, new_params, new_stats)
        rngs = None if key is None else nnx.Rngs(dropout=key)
        output = module(*inputs, rngs=rngs, **options)  # type: ignore[operator]
        return output, _plain(nnx.state(module, nnx.Not(nnx.Param)))


def _plain(state: nnx.State) -> Tree:
    """Nested dicts with text keys, the form that every checkpoint format keeps."""

    def text(tree: Tree) -> Tree:
        return {str(k): text(v) for k, v in tree.items()} if isinstance(tree, dict) else tree

    return text(nnx.to_pure_dict(state))


@dataclass(frozen=True)
class Objective:
    """Base of all methods; see the module's docstring for the four functions."""

    batch_spec: ClassVar[tuple[str, ...]] = ("image", "label")
    """Fields that a batch must have; checked before anything compiles."""

    tracks_voxels: ClassVar[bool] = False
    """True: the loss also gets "voxel" [b, *s] int32, which voxel of the sample each voxel of the augmented patch is
    (its flat index + 1, 0 where it comes from outside), so that state of a case can be kept in the case's frame."""

    def bind(self, task: Task) -> Self:
        """A copy that knows its task."""
        bound = self.complete(task)
        object.__setattr__(bound, "_task", task)
        return bound

    def complete(self, task: Task) -> Self:
        """A copy with everything filled in that depends on the task, such as the None fields of a network's config."""
        del task
        return replace(self)

    @property
    def task(self) -> Task:
        """The task; an error if `bind` was never called."""
        if "_task" not in self.__dict__:
            raise RuntimeError(f"{type(self).__name__} is not bound to a task: call bind(task) first")
        return self.__dict__["_task"]

    def frozen(self) -> Tree:
        """Arrays that are read but never trained."""
        return {}

    def init(self, key: Array, batch: Batch) -> tuple[Tree, Tree]:
        """Initial (params, aux)."""
        raise NotImplementedError(f"{type(self).__name__} must define init")

    def pretrained(
        self, params: Tree, aux: Tree, load: Callable[[Any, Tree, Tree], tuple[Tree, Tree]]
    ) -> tuple[Tree, Tree]:
        """(params, aux) that start from published weights.

        Args:
            params, aux: as `init` gives them.
            load: (network's config, its params, its statistics) -> both with the file's values.
        """
        raise UserError(f"{type(self).__name__} cannot start from a weight file", remedy="leave Config.pretrained out")

    def loss(
        self, params: Tree, aux: Tree, frozen: Tree, batch: Batch, key: Array
    ) -> tuple[Array, tuple[Tree, Mapping]]:
        """Scalar to minimise, new aux, and scalars to log."""
        raise NotImplementedError(f"{type(self).__name__} must define loss")

    def after_update(self, params: Tree, aux: Tree, step: Array) -> Tree:
        """New aux after the optimiser's update."""
        del params, step
        return aux

    def predict(self, params: Tree, aux: Tree, frozen: Tree, image: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        """Probabilities [b, *s, k] of an image [b, *s, c]."""
        raise NotImplementedError(f"{type(self).__name__} must define predict")


def check_batch(objective: Objective, batch: Batch) -> None:
    """Raises a UserError if the pipeline does not give what the method needs."""
    missing = [name for name in objective.batch_spec if name not in batch]
    if missing:
        raise UserError(
            f"{type(objective).__name__} needs data that the pipeline does not give",
            found=f"batch with {', '.join(sorted(batch))}",
            expected=f"also {', '.join(missing)}",
            remedy="set the stage's mix (for unlabelled rows: Mix(unlabelled=2)) or use a data set that has them",
        )


def probabilities(logits: Float[Array, "*b k"], exclusive: bool) -> Float[Array, "*b k"]:
    """Softmax over classes, or one sigmoid a class; float32."""
    logits = logits.astype(jnp.float32)
    return jax.nn.softmax(logits) if exclusive else jax.nn.sigmoid(logits)


def check_numbers(method: object, shares: tuple[str, ...] = (), amounts: tuple[str, ...] = ()) -> None:
    """For fields of a method's config.

    Raises:
        UserError: one of `shares` does not lie in 0 to 1, or one of `amounts` is negative or no number.
    """
    for name in (*shares, *amounts):
        value = getattr(method, name)
        if not (0 <= value <= 1 if name in shares else 0 <= value < math.inf):
            expected = "0 to 1" if name in shares else "0 or more"
            raise UserError(f"{type(method).__name__}: {name} cannot be used", found=str(value), expected=expected)

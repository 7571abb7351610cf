"""What the config of every network offers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from flax import nnx
from jaxtyping import Array

from medseg_jax.data.plan import Plan

type Perturb = Callable[[Array], Array]
"""Changes features on their way through a network (LSA, MixStyle, DSU): n features of one kind at once, [n, b, *s, c],
each with draws of its own. A network calls it at several places, always in the same order, so that it can count them
and draw each time from another key."""


@dataclass(frozen=True)
class Network(ABC):
    """Config of a network: a frozen dataclass; `build` makes the NNX module that it describes.

    The module is called as `module(x, train=False, rngs=None, perturb=None)` with x [b, *s, c] and returns a tuple of
    float32 logits [b, *s, k], full resolution first; more than one only in training with deep supervision.
    """

    @abstractmethod
    def from_plan(self, plan: Plan) -> Self:
        """A copy whose None fields are filled in from the plan."""

    @abstractmethod
    def build(self, in_channels: int, out_channels: int, rngs: nnx.Rngs) -> nnx.Module:
        """The network itself, randomly initialised from `rngs.params()`."""

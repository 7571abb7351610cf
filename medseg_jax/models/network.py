"""What the config of every network offers."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

from flax import nnx
from jaxtyping import Array

from medseg_jax.data.plan import Plan
from medseg_jax.types import UserError

type Perturb = Callable[[Array], Array]
"""Changes features [b, *s, c] on their way through a network (LSA, MixStyle, DSU). A network calls it at several
places, always in the same order, so that it can count its calls and draw each time from another key."""


@dataclass(frozen=True)
class Network(ABC):
    """Config of a network: a frozen dataclass; `build` makes the NNX module that it describes.

    The module is called as `module(x, train=False, rngs=None, perturb=None)` with x [b, *s, c] and returns a tuple of
    float32 logits [b, *s, k], full resolution first; more than one only in training with deep supervision.
    """

    plan_dim: ClassVar[int | None] = None
    """The one number of axes that the network is made for, if it is."""

    def from_plan(self, plan: Plan) -> Self:
        """A copy whose None fields are filled in from the plan; itself, where nothing depends on that.

        Raises:
            UserError: the network is made for another number of axes.
        """
        if self.plan_dim not in (None, plan.dim):
            raise UserError(
                f"{type(self).__name__} is a {self.plan_dim}-D network",
                found=f"a {plan.dim}-D plan",
                remedy=f"plan with --dim {self.plan_dim}, or choose another network",
            )
        return self

    @abstractmethod
    def build(self, in_channels: int, out_channels: int, rngs: nnx.Rngs) -> nnx.Module:
        """The network itself, randomly initialised from `rngs.params()`."""

"""Supervised segmentation: the honest baseline that every method is compared with.

    loss = sum_i w_i [CE(z_i, y_i) + Dice(z_i, y_i)],    w_i ~ 1/2^i over the scales of deep supervision

as in nnU-Net (Isensee et al., Nature Methods 2021): softmax for exclusive classes, one sigmoid a class for regions and
overlapping classes, ignored voxels take no part.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from medseg_jax import losses
from medseg_jax.methods.objective import Fn, Objective, Task, Tree, probabilities
from medseg_jax.models.network import Network
from medseg_jax.models.unet import UNet
from medseg_jax.types import Batch


@dataclass(frozen=True)
class Supervised(Objective):
    """Dice + cross entropy on labelled images.

    Attributes:
        net: the network's config; None fields are filled in from the plan.
        batch_dice: Dice over the whole batch instead of per image; steadier where a class is often absent.
    """

    net: Network = UNet()
    batch_dice: bool = True

    def complete(self, task: Task) -> Self:
        return replace(self, net=self.net.from_plan(task.plan))

    @cached_property
    def fn(self) -> Fn:
        """The network as pure functions."""
        task = self.task
        return Fn(lambda rngs: self.net.build(task.in_channels, task.labels.channels, rngs))

    def init(self, key: Array, batch: Batch) -> tuple[Tree, Tree]:
        del batch
        params, stats = self.fn.init(key)
        return params, {"stats": stats}

    def pretrained(self, params: Tree, aux: Tree, load) -> tuple[Tree, Tree]:
        params, stats = load(self.net, params, aux["stats"])
        return params, {**aux, "stats": stats}

    def target(self, label: Int[Array, "*b"]) -> tuple[Float[Array, "*b k"], Float[Array, "*b"] | None]:
        """Label map -> target [*b, k] and voxel weights [*b] (None without an ignore label)."""
        labels = self.task.labels
        weight = None if labels.ignore is None else jnp.asarray(labels.weights)[label]
        return jnp.asarray(labels.table)[label], weight

    def forward(self, params: Tree, stats: Tree, image: Array, key: Array) -> tuple[tuple[Array, ...], Tree]:
        """Logits and new statistics in training; what methods change that only augment."""
        return self.fn.apply(params, stats, image, train=True, key=key)

    def loss(self, params: Tree, aux: Tree, frozen: Tree, batch: Batch, key: Array):
        logits, stats = self.forward(params, aux["stats"], batch["image"], key)
        target, weight = self.target(batch["label"])

        def one_scale(z, y, w):
            return losses.dice_ce(z, y, w, exclusive=self.task.labels.exclusive, batch=self.batch_dice)

        return losses.deep_supervision(one_scale, logits, target, weight), ({"stats": stats}, {})

    def predict(self, params: Tree, aux: Tree, frozen: Tree, image: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
        logits, _ = self.fn.apply(params, aux["stats"], image, train=False)
        return probabilities(logits[0], self.task.labels.exclusive)

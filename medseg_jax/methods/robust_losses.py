"""What learning from wrong labels is compared with: one network, one engine, another loss.

    Robust(loss_name=...)
        "ce"          cross entropy (softmax, or one sigmoid a class): the plain baseline
        "dice_ce"     Dice + cross entropy, which `Supervised` trains with
        "gce"         generalised cross entropy (Zhang & Sabuncu 2018): wrong labels pull less, correct ones too
        "smoothing"   label smoothing (Szegedy et al. 2016)
        "em"          a learned confusion matrix P(label | truth), flips independent of each other: the model of
                      `KMSNoise` without space. Rows start at .9 on the diagonal, as in Tadokoro et al. 2026
        "t_loss"      Student's t over the errors of an image (Gonzalez-Jimenez et al. 2023), degrees of freedom
                      learned; divided by the number of pixels

Cross entropy on clean labels is the ceiling: the same config on the data set as it was before `medseg data corrupt`.

The copy of the T-Loss in the code of Tadokoro et al. sums over classes and rows and leaves the columns apart; ours sums
over the image, as its authors do, one distribution a foreground channel (softmax or sigmoid).
"""

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from medseg_jax import losses
from medseg_jax.methods.objective import Tree, probabilities
from medseg_jax.methods.supervised import Supervised
from medseg_jax.types import Batch, UserError

LOSSES = ("ce", "dice_ce", "gce", "smoothing", "em", "t_loss")
DIAGONAL = 0.9  # of EM's first confusion matrix


@dataclass(frozen=True)
class Robust(Supervised):
    """Supervised training with a loss that claims to bear wrong labels; see `Supervised` for the other fields.

    Attributes:
        loss_name: "ce", "dice_ce", "gce", "smoothing", "em" or "t_loss".
        q: exponent of "gce".
        share: of "smoothing", probability given to the uniform distribution.
    """

    loss_name: Literal["ce", "dice_ce", "gce", "smoothing", "em", "t_loss"] = "ce"
    q: float = 0.7
    share: float = 0.1

    def __post_init__(self):
        if self.loss_name not in LOSSES:
            raise UserError("No such robust loss", found=self.loss_name, expected=", ".join(LOSSES))

    def init(self, key: Array, batch: Batch) -> tuple[Tree, Tree]:
        params, aux = super().init(key, batch)
        labels = self.task.labels
        if self.loss_name == "em":
            fields, classes = (1, labels.channels) if labels.exclusive else (labels.channels, 2)
            off = math.log((1 - DIAGONAL) / (classes - 1))
            matrix = off + (math.log(DIAGONAL) - off) * jnp.eye(classes)
            params = {**params, "noise": {"confusion": jnp.tile(matrix, (fields, 1, 1))}}
        if self.loss_name == "t_loss":
            params = {**params, "noise": {"nu": jnp.ones(())}}
        return params, aux

    def pretrained(self, params: Tree, aux: Tree, load) -> tuple[Tree, Tree]:
        net, aux = super().pretrained(without_noise(params), aux, load)
        return {**params, **net}, aux

    def loss(self, params: Tree, aux: Tree, frozen: Tree, batch: Batch, key: Array):
        exclusive = self.task.labels.exclusive
        noise = params.get("noise", {})
        logits, stats = self.fn.apply(without_noise(params), aux["stats"], batch["image"], train=True, key=key)
        target, weight = self.target(batch["label"])
        entropy = losses.cross_entropy if exclusive else losses.binary_cross_entropy

        def one_scale(z, y, w):
            match self.loss_name:
                case "ce":
                    return entropy(z, y, w)
                case "smoothing":
                    return entropy(z, losses.smooth_labels(y, self.share, exclusive=exclusive), w)
                case "gce":
                    return losses.generalised_cross_entropy(z, y, w, exclusive=exclusive, q=self.q)
                case "em":
                    return losses.confusion_loss(z, y, w, confusion=noise["confusion"], exclusive=exclusive)
                case "t_loss":
                    error = probabilities(z, exclusive) - y
                    foreground = error[..., 1:] if exclusive else error
                    size = math.prod(foreground.shape[1:-1])
                    return losses.student_t_loss(foreground, noise["nu"], w) / size
                case _:
                    return losses.dice_ce(z, y, w, exclusive=exclusive, batch=self.batch_dice)

        return losses.deep_supervision(one_scale, logits, target, weight), ({"stats": stats}, {})

    def predict(self, params: Tree, aux: Tree, frozen: Tree, image: Array) -> Array:
        return super().predict(without_noise(params), aux, frozen, image)


def without_noise(params: Tree) -> Tree:
    """The network's parameters alone; a method keeps those of its noise model under "noise"."""
    return {name: value for name, value in params.items() if name != "noise"}

"""Lesions of diabetic retinopathy (Boulaabi et al., AICCSA 2024, arXiv 2504.17306): a binary network for each of them.

The article trains four DeepLabv3+ networks, one for each of microaneurysms (MA), haemorrhages (HE), hard and soft
exudates (EX, SE), on fundus photographs cropped to the field of view, their contrast equalised in `L*a*b*`, and draws
what they find into one image. Here

    crop and CLAHE           are the plan's (`Plan.crop_field`, `Plan.clahe`)
    a network a lesion       `medseg train CONFIG --class all` (training/by_class.py)
    one image of all         inference/merge.py
    one network for all      the same objective without `--class`: a sigmoid a lesion on shared features

and this file holds the loss for what fills a thousandth of the image:

    L = BCE_u(z, y) + Dice(z, y),     u = min(sqrt(negative / positive), 20) of the batch, for each lesion

or, with `tversky`, the focal Tversky loss (alpha 0.3, beta 0.7, exponent 3/4) in place of Dice.

OUR CHOICE, since the article's opening is all that could be read: loss, weights, patches, sampling, CLAHE's constants,
thresholds and rules of merging. The exponent of the focal loss is 3/4 as in the article that it comes from (Abraham &
Khan 2019), which writes its inverse, 4/3. Patches without the lesion count like all others; what they teach is not to
see it there.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array

from medseg_jax import losses
from medseg_jax.methods.objective import Tree
from medseg_jax.methods.supervised import Supervised
from medseg_jax.types import Batch, UserError


@dataclass(frozen=True)
class DRLesions(Supervised):
    """Weighted BCE + Dice (or focal Tversky), one sigmoid a class.

    Attributes:
        largest_weight: cap on the weight of positive pixels; 1 weighs all pixels alike.
        tversky: focal Tversky loss instead of Dice; for the smallest lesions.
    """

    largest_weight: float = 20.0
    tversky: bool = False

    def loss(self, params: Tree, aux: Tree, frozen: Tree, batch: Batch, key: Array):
        if self.task.labels.exclusive:
            raise UserError(
                "DRLesions learns classes that may overlap",
                found=f"exclusive classes {', '.join(self.task.labels.names)}",
                expected="bit masks or regions (medseg data convert --multilabel)",
                remedy="use Supervised",
            )
        logits, stats = self.forward(params, aux["stats"], batch["image"], key)
        target, weight = self.target(batch["label"])
        counted = jnp.ones(target.shape[:-1]) if weight is None else weight
        positive = (counted[..., None] * target).reshape(-1, target.shape[-1]).sum(0)  # [k]
        pos_weight = jnp.sqrt((counted.sum() - positive) / jnp.maximum(positive, 1))
        pos_weight = jnp.clip(pos_weight, 1, self.largest_weight)

        def one_scale(z, y, w):
            bce = losses.binary_cross_entropy(z, y, w, pos_weight=pos_weight)
            options = {"exclusive": False, "batch": self.batch_dice}
            if self.tversky:
                return bce + losses.tversky_loss(z, y, w, gamma=0.75, **options)
            return bce + losses.dice_loss(z, y, w, **options)

        return losses.deep_supervision(one_scale, logits, target, weight), ({"stats": stats}, {})

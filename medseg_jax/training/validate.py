"""Validation while training: Dice of whole cases in preprocessed space, cheap enough to be done often.

The scores that are reported are computed after training, in the space of the files (`train.final_scores`).
"""

from collections.abc import Sequence

import numpy as np

from medseg_jax.data.cache import Cache
from medseg_jax.data.pipeline import with_neighbours
from medseg_jax.data.plan import Plan
from medseg_jax.evaluation.metrics.overlap import dice
from medseg_jax.inference.sliding_window import predict_slabs
from medseg_jax.runtime.run import Predict
from medseg_jax.types import Case, Labels


def validate(predict: Predict, cache: Cache, cases: Sequence[Case], plan: Plan, labels: Labels) -> dict[str, float]:
    """Mean Dice of the cases: {"dice": over classes, "dice/<class>": ...}.

    A class that is absent from reference and prediction of a case takes no part in that case's mean.
    """
    judged = labels.judged
    scores = np.full((len(cases), len(judged.names)), np.nan)
    for i, case in enumerate(cases):
        cached = cache.case(case.id)
        image = with_neighbours(np.asarray(cached.image), plan.neighbours)
        slabs = predict_slabs(predict, image, plan.patch_size, labels.channels, batch_size=plan.batch_size)
        predicted = np.concatenate([labels.decode(probabilities) for _, probabilities in slabs])
        reference = np.asarray(cached.label)
        valid = np.ones(reference.shape, bool) if labels.ignore is None else reference != labels.ignore
        pairs = zip(judged.masks(predicted), judged.masks(reference), strict=True)
        for k, (p, r) in enumerate(pairs):
            p, r = p & valid, r & valid
            if p.any() or r.any():
                scores[i, k] = dice(p, r)
    per_class = {
        f"dice/{n}": float(np.nanmean(s)) for n, s in zip(judged.names, scores.T, strict=True) if np.isfinite(s).any()
    }
    return {"dice": float(np.mean(list(per_class.values()))) if per_class else 0.0, **per_class}

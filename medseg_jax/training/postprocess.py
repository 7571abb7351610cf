"""Choosing post-processing on validation cases: for each class by itself, and only where it helps.

For every class the mean Dice over the validation cases is computed after each of

    none; keep the largest component; fill holes; both; remove components below v,  v = 1, 5, 20 % of the class's
    median volume in the references

and the best one is taken if it beats "none" by more than MARGIN, of equally good ones the first of this list. That is
nnU-Net's rule (apply only what helps; Isensee et al., Nature Methods 2021) with a margin, because a handful of
validation cases says little about a third digit. Test cases take no part. A class empty in prediction and reference
scores 1, empty in one of them 0; ignored voxels count as outside.

Since the choice is made on these cases, their score after post-processing is optimistic; both are reported.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset
from medseg_jax.evaluation.evaluate import evaluate
from medseg_jax.evaluation.metrics.overlap import dice, volume
from medseg_jax.inference import postprocess
from medseg_jax.inference.postprocess import Cleaning
from medseg_jax.paths import write
from medseg_jax.runtime.log import say
from medseg_jax.types import Labels

MARGIN = 0.001
"""By how much mean Dice must grow before a class is post-processed."""

SHARES = (0.01, 0.05, 0.2)
"""Of a class's median volume: components below are removed."""


def choose_and_score(folder: Path, dataset: Dataset, predictions: Mapping[str, Path]) -> None:
    """Chooses for every checkpoint, writes FOLDER/postprocessing.json, and scores what changes.

    Args:
        folder: of a run or of a cross-validation.
        dataset: with the references.
        predictions: checkpoint -> folder of unprocessed label maps. If its choice changes anything, the cleaned ones
            and their scores are written to <folder>_postprocessed.
    """
    content = {}
    for checkpoint, source in predictions.items():
        files = {io.stem(path): path for path in io.list_files(source)}
        pairs = [(files[c.id], c.label) for c in dataset.cases if c.id in files and c.label is not None]
        content[checkpoint] = choose(pairs, dataset.labels)
        for name, about in content[checkpoint]["classes"].items():
            words, scores = str(Cleaning(**about["choice"])), about["dice"]
            if words != "none":
                gain = f"Dice {scores['none']:.4f} -> {scores[words]:.4f}"
                unit = f" {_unit(pairs[0][1])}" if about["choice"]["smallest"] else ""
                say(f"post-processing ({checkpoint}): {name}: {words}{unit} ({gain} on {len(pairs)} validation cases)")
    write(folder / postprocess.FILE, json.dumps(content, indent=1, ensure_ascii=False))
    for checkpoint, source in predictions.items():
        choice = postprocess.load([folder], checkpoint)
        if not choice:
            say(f"post-processing ({checkpoint}): none helps")
            continue
        target = source.with_name(f"{source.name}_postprocessed")
        for path in io.list_files(source):
            label, geometry = io.read_label(path)
            io.write_label(
                target / path.name, postprocess.clean(label, dataset.labels, choice, geometry.spacing), geometry
            )
        evaluate(target, dataset, target)


def choose(pairs: Sequence[tuple[Path, Path]], labels: Labels) -> dict[str, Any]:
    """The choice for every class with the numbers behind it, as in postprocessing.json.

    Args:
        pairs: (prediction, reference) label maps of each validation case.
    """
    volumes: list[list[float]] = [[] for _ in labels.names]
    for _, reference in pairs:
        label, geometry = io.read_label(reference)
        for k, mask in enumerate(labels.masks(label)):
            if mask.any():
                volumes[k].append(volume(mask, geometry.spacing))
    candidates = [_candidates(found) for found in volumes]
    scores: list[dict[str, list[float]]] = [{str(c): [] for c in found} for found in candidates]
    for prediction, reference in pairs:
        (predicted, geometry), (truth, _) = io.read_label(prediction), io.read_label(reference)
        valid = True if labels.ignore is None else truth != labels.ignore
        member = [labels.masks(label) for label in (predicted, truth)]
        for k, name in enumerate(labels.names):
            for candidate in candidates[k]:
                # The whole label map is cleaned, as `predict` does it: what a class may gain depends on the others.
                cleaned = postprocess.clean(predicted, labels, {name: candidate}, geometry.spacing)
                mask = member[0][k] if candidate == Cleaning() else labels.masks(cleaned)[k]
                scores[k][str(candidate)].append(dice(mask & valid, member[1][k] & valid))
    classes = {}
    for k, name in enumerate(labels.names):
        means = {words: float(np.mean(values)) for words, values in scores[k].items()}
        best = max(candidates[k], key=lambda candidate: means[str(candidate)])  # the first of equally good ones
        choice = best if means[str(best)] > means["none"] + MARGIN else Cleaning()
        classes[name] = {"choice": asdict(choice), "dice": means}
    return {"cases": len(pairs), "margin": MARGIN, "classes": classes}


def _unit(label: Path) -> str:
    """Of the volumes of components, which lie in files like this one."""
    geometry = io.read_label(label)[1]
    return "px" if geometry.unit == "px" else {2: "mm²", 3: "mm³"}[len(geometry.shape)]


def _candidates(volumes: Sequence[float]) -> list[Cleaning]:
    small = [Cleaning(smallest=share * float(np.median(volumes))) for share in SHARES] if volumes else []
    return [Cleaning(), Cleaning(largest=True), Cleaning(fill=True), Cleaning(largest=True, fill=True), *small]

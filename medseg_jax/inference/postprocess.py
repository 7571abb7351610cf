"""Post-processing of label maps, class by class, as it was chosen on validation cases (training/postprocess.py).

Kept in RUN/postprocessing.json: {"best": {"classes": {"<class>": {"choice": {"largest": true, ...}, ...}}}, ...}
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medseg_jax.ops import components
from medseg_jax.types import Labels, UserError

FILE = "postprocessing.json"


@dataclass(frozen=True)
class Cleaning:
    """What is done to the mask of a class, in this order.

    Attributes:
        smallest: components of less than this volume are removed, in mm³ (mm² or px for pictures).
        largest: only the largest component stays.
        fill: holes are filled.
    """

    smallest: float = 0.0
    largest: bool = False
    fill: bool = False

    def __str__(self) -> str:
        words = [f"remove components below {self.smallest:.4g}"] if self.smallest else []
        words += ["keep the largest component"] if self.largest else []
        words += ["fill holes"] if self.fill else []
        return " and ".join(words) or "none"

    def apply(self, mask: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
        """The cleaned mask [*s] of a boolean mask [*s]."""
        if self.smallest:
            mask = components.remove_small(mask, self.smallest / float(np.prod(spacing)))
        mask = components.keep_largest(mask) if self.largest else mask
        return components.fill_holes(mask) if self.fill else mask


def clean(label: np.ndarray, labels: Labels, choice: Mapping[str, Cleaning], spacing: Sequence[float]) -> np.ndarray:
    """A label map [*s] after the cleaning of every class.

    Voxels taken from a class become background; what a class gains it gains from the background, never from another
    exclusive class, so that the classes' choices do not depend on each other. Classes that may overlap, regions among
    them, are cleaned as masks of their own and coded anew.
    """
    chosen = {name: cleaning for name, cleaning in choice.items() if cleaning != Cleaning()}
    if not chosen:
        return label
    if not labels.exclusive:
        masks = labels.masks(label)  # [classes, *s]
        for i, name in enumerate(labels.names):
            if name in chosen:
                masks[i] = chosen[name].apply(masks[i], spacing)
        return labels.decode(np.moveaxis(masks, 0, -1))
    result = label.copy()
    for name, values in zip(labels.names, labels.values, strict=True):
        if name in chosen:
            before = label == values[0]
            after = chosen[name].apply(before, spacing)
            result[before & ~after] = 0
            result[after & ~before & (result == 0)] = values[0]
    return result


def load(folders: Sequence[Path], checkpoint: str) -> dict[str, Cleaning]:
    """The choice of a run, or that on which all runs agree; nothing where there is none.

    Args:
        folders: of runs or of cross-validations.
        checkpoint: "best" or "last": the choice was made for its predictions.

    Raises:
        UserError: the file is damaged, or runs have chosen differently.
    """
    choices = [_read(folder / FILE, checkpoint) for folder in folders]
    if any(choice != choices[0] for choice in choices):
        words = [f"{folder.name}: {describe(choice)}" for folder, choice in zip(folders, choices, strict=True)]
        raise UserError(
            "The runs have chosen different post-processing",
            found="; ".join(words),
            remedy="--postprocessing none predicts without",
        )
    return choices[0] if choices else {}


def _read(file: Path, checkpoint: str) -> dict[str, Cleaning]:
    try:
        classes = json.loads(file.read_text(encoding="utf-8"))[checkpoint]["classes"]
        choices = {name: Cleaning(**about["choice"]) for name, about in classes.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "The choice of post-processing cannot be read",
            file=file,
            found=f"{type(error).__name__}: {error}",
            remedy="--postprocessing none predicts without",
        ) from error
    return {name: choice for name, choice in choices.items() if choice != Cleaning()}


def describe(choice: Mapping[str, Cleaning]) -> str:
    """In words, one class after the other."""
    return ", ".join(f"{name}: {cleaning}" for name, cleaning in choice.items()) or "none"


def to_json(choice: Mapping[str, Cleaning]) -> dict[str, dict]:
    """For journals: what `Cleaning(**...)` reads back."""
    return {name: dataclasses.asdict(cleaning) for name, cleaning in choice.items()}

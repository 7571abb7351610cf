"""The recipe that the golden numbers' weights and inputs are made by, loaded from the folder of golden numbers."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np


def load(golden: Path) -> ModuleType:
    """golden/recipe.py as a module."""
    spec = importlib.util.spec_from_file_location("recipe", golden / "recipe.py")
    assert spec is not None
    assert spec.loader is not None
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    return recipe


def read(file: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and meta of a golden file."""
    with np.load(file, allow_pickle=False) as found:
        arrays = dict(found)
    return arrays, json.loads(str(arrays.pop("meta")))


def draw(recipe: ModuleType, entry: dict[str, Any], salt: str) -> np.ndarray:
    """An input: what the recipe makes of an entry of a file's meta (tag, shape, and a range if it is not [-1, 1))."""
    return recipe.array(entry["tag"], tuple(entry["shape"]), salt, entry.get("low"), entry.get("high", 1.0))


def kept(stored: str) -> tuple[Any, ...]:
    """The index that a text such as "logits[..., ::2, ::2]" of a file's meta writes."""

    def one(part: str) -> Any:
        if ":" in part:
            return slice(*(int(n) if n.strip() else None for n in part.split(":")))
        return ... if part.strip() == "..." else int(part)

    return tuple(map(one, stored.partition("[")[2].rstrip("]").split(",")))

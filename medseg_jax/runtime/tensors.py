"""Pytrees of arrays as one safetensors file: every tensor under its path, the tree's shape beside them as JSON.

params/encoder/stages/0/convs/0/kernel and the like are names that any safetensors reader understands; the shape, kept
in the file's metadata, brings back what names alone cannot say: empty branches, and lists.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from medseg_jax.paths import write
from medseg_jax.types import UserError

PARTS = ("params", "aux")


def save_tree(path: Path, params: Any, aux: Any, said: Mapping[str, str]) -> None:
    """Writes (params, aux), nested dicts and lists of arrays, and metadata of the caller's; atomically."""
    tensors = {}

    def shape_of(value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            return {str(key): shape_of(inner, f"{name}/{key}") for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [shape_of(inner, f"{name}/{i}") for i, inner in enumerate(value)]
        tensors[name] = np.array(jax.device_get(value), order="C")
        return None

    shapes = {part: shape_of(value, part) for part, value in zip(PARTS, (params, aux), strict=True)}
    write(path, save(tensors, {**said, "tree": json.dumps(shapes)}))


def load_tree(path: Path) -> tuple[tuple[Any, Any], dict[str, str]]:
    """((params, aux), metadata) of a file of `save_tree`.

    Raises:
        UserError: the file is damaged, or another program's.
    """

    def fill(shape: Any, name: str) -> Any:
        if isinstance(shape, dict):
            return {key: fill(inner, f"{name}/{key}") for key, inner in shape.items()}
        if isinstance(shape, list):
            return [fill(inner, f"{name}/{i}") for i, inner in enumerate(shape)]
        return file.get_tensor(name)

    try:
        with safe_open(path, "numpy") as file:
            said = file.metadata() or {}
            shapes = json.loads(said["tree"])
            params, aux = (fill(shapes[part], part) for part in PARTS)
    except (SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            "These are no weights that medseg export wrote, or they are damaged",
            file=path,
            found=f"{type(error).__name__}: {error}",
            remedy="export the run again, or fetch the file again",
        ) from error
    return (params, aux), said

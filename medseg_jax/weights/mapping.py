"""Published weights into our parameters: read the file, name by name, refuse what does not fit.

    tensors = read_weights("vmamba_small.pth")
    loaded = load(net, params, stats, tensors)

What a name of the file means in our network says a `KeyMap`; for a network of `models/<file>.py` it is made by
`key_map(net)` in `weights/<file>.py`.
"""

import importlib
import importlib.util
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from medseg_jax.methods.objective import Tree
from medseg_jax.models.network import Network
from medseg_jax.types import UserError
from medseg_jax.weights.torch_file import read_torch

type Tensors = dict[str, np.ndarray]
type Layout = Literal["keep", "linear", "conv", "conv_transpose"] | Callable[[np.ndarray], np.ndarray]

HOLDERS = ("state_dict", "model", "model_state_dict", "net", "params")
"""Where a checkpoint keeps its tensors, the first that is there."""


# ---------------------------------------------------------------- reading


def read_weights(path: str | Path, say: Callable[[str], None] = lambda text: None) -> Tensors:
    """The tensors of a .safetensors, .npz, or PyTorch file (.pth, .pt, .bin, ...) by name.

    A PyTorch file that holds more than one set of tensors (say `model` and `model_ema`) is read at `state_dict` or
    `model`; `file.pth#model_ema` reads another one, and `say` is told of it.

    Raises:
        UserError: no such file, a damaged one, or no tensors where they are looked for.
    """
    file, entry = weight_file(path), str(path).partition("#")[2]
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except SafetensorError as error:
            raise UserError("This safetensors file is damaged", file=file, found=str(error)) from error
    if file.suffix == ".npz":
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
                return dict(archive)
        except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
            raise UserError("This npz file cannot be read", file=file, found=str(error)) from error
    return _tensors(read_torch(file), file, entry, say)


def weight_file(path: str | Path) -> Path:
    """The file that `FILE` or `FILE#ENTRY` means."""
    file = Path(str(path).partition("#")[0])
    if not file.is_file():
        raise UserError("There is no such weight file", file=file, remedy="check the path")
    return file


def _tensors(tree: Any, file: Path, entry: str, say: Callable[[str], None]) -> Tensors:
    """The flat set of tensors in a checkpoint's object."""
    sets = _sets(tree)
    chosen = entry or next((k for k in ("", *HOLDERS) if k in sets), next(iter(sets)) if len(sets) == 1 else None)
    if chosen not in sets:
        raise UserError(
            "It is not clear which tensors of this file to read" if sets else "There are no tensors in this file",
            file=file,
            found=", ".join(sets) or "none",
            expected=f"one of them named {entry}" if entry else "a dict of tensors, or one under state_dict or model",
            remedy=f"{file.name}#NAME reads one of them" if sets else None,
        )
    twins = [name for name, tensors in sets.items() if name != chosen and tensors.keys() & sets[chosen].keys()]
    if twins and not entry:
        say(f"{file.name}: {chosen or 'the outermost tensors'} read; {file.name}#{twins[0]} reads another set")
    return sets[chosen]


def _sets(tree: Any, name: str = "") -> dict[str, Tensors]:
    """Dicts that directly hold named tensors, by the dotted path to them."""
    if not isinstance(tree, dict):
        return {}
    here = {k: v for k, v in tree.items() if isinstance(k, str) and isinstance(v, np.ndarray)}
    found = {name: here} if here else {}
    for key, value in tree.items():
        found |= _sets(value, f"{name}.{key}" if name else str(key))
    return found


# ---------------------------------------------------------------- naming


@dataclass(frozen=True)
class Rule:
    """Where the tensors of some names go.

    Attributes:
        pattern: regular expression that the whole name in the file must match.
        to: path in our parameters or statistics ("encoder/stages/\\1/kernel", groups filled in), or several: the same
            tensor goes to each.
        layout: how PyTorch's axes become ours: "keep"; "linear" [out, in] -> [in, out]; "conv" [out, in, *k] ->
            [*k, in, out]; "conv_transpose" [in, out, *k] -> [*k, in, out]; or a function.
    """

    pattern: str
    to: str | tuple[str, ...]
    layout: Layout = "keep"


@dataclass(frozen=True)
class KeyMap:
    """How a published network's tensors become ours.

    Attributes:
        rules: first match wins.
        ignore: regular expressions of names in the file that are of no use (num_batches_tracked, an ImageNet head).
        may_stay: regular expressions of our paths that may keep their initial values where the file has nothing, or
            something of another shape (the head of another number of classes).
        adapt: changes names before anything else (prefixes, variants), or refuses the file with a UserError.
        name: of what is expected, for messages.
    """

    name: str
    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    may_stay: tuple[str, ...] = ()
    adapt: Callable[[Tensors], Tensors] = field(default=lambda tensors: tensors)


@dataclass(frozen=True)
class Loaded:
    """What `load` gives back.

    Attributes:
        params, stats: copies with the file's values.
        filled: our path -> name in the file.
        stayed: our paths that kept their initial values.
        unused: names in the file that were ignored on purpose.
    """

    params: Tree
    stats: Tree
    filled: Mapping[str, str]
    stayed: tuple[str, ...]
    unused: tuple[str, ...]


def key_map(net: Network) -> KeyMap:
    """The key map of a network.

    Raises:
        UserError: no published weights are known for it.
    """
    name = f"medseg_jax.weights.{type(net).__module__.rpartition('.')[2]}"
    if importlib.util.find_spec(name) is None:
        raise UserError(
            f"No published weights are known for {type(net).__name__}",
            remedy="leave Config.pretrained out, or choose a network that has a file in medseg_jax/weights",
        )
    return importlib.import_module(name).key_map(net)


def load(net: Network | KeyMap, params: Tree, stats: Tree, tensors: Tensors, file: str | Path | None = None) -> Loaded:
    """Puts a file's tensors into a network's parameters and statistics.

    Args:
        net: the network's config, or a key map.
        params, stats: initial values as `Fn.init` gives them; not changed.
        tensors: as `read_weights` gives them.
        file: named in errors.

    Raises:
        UserError: lists every tensor that is missing, unknown, or of another shape.
    """
    mapping = net if isinstance(net, KeyMap) else key_map(net)
    tensors = mapping.adapt(tensors)
    ours = {**_flat(params), **_flat(stats)}
    filled: dict[str, str] = {}
    values: dict[str, np.ndarray] = {}
    unused, problems = [], []
    for name, tensor in tensors.items():
        targets = _targets(mapping, name)
        if targets is None:
            known = any(re.fullmatch(p, name) for p in mapping.ignore)
            unused.append(name) if known else problems.append(f"{name} {tensor.shape}: not known")
            continue
        for path, layout in targets:
            value = _arrange(tensor, layout)
            if path not in ours:
                problems.append(f"{name}: the network has no {path}")
            elif value.shape != ours[path].shape:
                if not _may_stay(mapping, path):
                    problems.append(f"{name}: {value.shape} does not fit {path} {ours[path].shape}")
            elif path in filled:
                problems.append(f"{name} and {filled[path]} both go to {path}")
            else:
                filled[path], values[path] = name, value
    stayed = tuple(path for path in ours if path not in filled)
    problems += [f"{path} {ours[path].shape}: not in the file" for path in stayed if not _may_stay(mapping, path)]
    if not filled or problems:
        shown = "\n".join(f"    {line}" for line in problems[:20])
        more = f"\n    ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise UserError(
            f"These weights do not fit the network, in {len(problems)} places:\n{shown}{more}",
            file=file,
            found=f"{len(tensors)} tensors, {len(filled)} of them fit",
            expected=mapping.name,
        )
    return Loaded(_filled(params, values), _filled(stats, values), filled, stayed, tuple(unused))


def without_prefix(tensors: Tensors, *prefixes: str) -> Tensors:
    """The same tensors with the longest of these prefixes that all names share taken off."""
    common = [p for p in sorted(prefixes, key=len, reverse=True) if all(name.startswith(p) for name in tensors)]
    return {name.removeprefix(common[0]): v for name, v in tensors.items()} if common else tensors


def _targets(mapping: KeyMap, name: str) -> list[tuple[str, Layout]] | None:
    for rule in mapping.rules:
        match = re.fullmatch(rule.pattern, name)
        if match:
            paths = (rule.to,) if isinstance(rule.to, str) else rule.to
            return [(match.expand(path), rule.layout) for path in paths]
    return None


def _may_stay(mapping: KeyMap, path: str) -> bool:
    return any(re.fullmatch(p, path) for p in mapping.may_stay)


def _arrange(tensor: np.ndarray, layout: Layout) -> np.ndarray:
    if callable(layout):
        return layout(tensor)
    if layout == "linear":
        return tensor.T
    if layout == "conv":
        return np.moveaxis(tensor, (0, 1), (-1, -2))
    if layout == "conv_transpose":
        return np.moveaxis(tensor, (0, 1), (-2, -1))
    return tensor


def _flat(tree: Tree, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {path: tree}
    return {k: v for key, child in tree.items() for k, v in _flat(child, f"{path}/{key}" if path else key).items()}


def _filled(tree: Tree, values: Mapping[str, np.ndarray], path: str = "") -> Tree:
    """The tree with the new values, in the old types."""
    if isinstance(tree, dict):
        return {key: _filled(child, values, f"{path}/{key}" if path else key) for key, child in tree.items()}
    return values[path].astype(tree.dtype) if path in values else tree

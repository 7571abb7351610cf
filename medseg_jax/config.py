"""What a run is: frozen dataclasses, loaded from a .py file or made for a data set, overridden on the command line.

A config file holds dataclass instances, so Python's imports are the registry and a typo is an import error:

    from medseg_jax import Config, Stage, Supervised, UNet
    config = Config(data="hippocampus", stages=(Stage(Supervised(UNet()), steps=2000),))

JSON (in run.json) names classes of this package only; opening it runs no code of anybody else.
"""

import dataclasses
import difflib
import importlib
import runpy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from medseg_jax.data.augment import Augment
from medseg_jax.data.pipeline import Mix
from medseg_jax.data.synthetic import EMBEDDED
from medseg_jax.methods.objective import Objective
from medseg_jax.methods.supervised import Supervised
from medseg_jax.paths import read_record
from medseg_jax.types import UserError


def _check_words(part: Any, *names: str) -> None:
    """Raises a UserError unless each of these fields holds a word of its `Literal`: a .py file may say any."""
    hints = get_type_hints(type(part))
    for name in names:
        if (value := getattr(part, name)) not in (words := get_args(hints[name])):
            expected = ", ".join(f'"{word}"' for word in words)
            raise UserError(f"Unknown {type(part).__name__}.{name}", found=f'"{value}"', expected=expected)


@dataclass(frozen=True)
class Group:
    """Parameters whose path matches `pattern` (re.search; the first group that matches wins).

    Attributes:
        pattern: regular expression over paths like "encoder/stages/0/convs/0/kernel".
        lr: multiplier of the learning rate; 0 freezes.
        weight_decay: multiplier of the weight decay.
    """

    pattern: str
    lr: float = 1.0
    weight_decay: float = 1.0


@dataclass(frozen=True)
class Optim:
    """Optimiser and schedule of a stage.

    Attributes:
        name: "adamw"; "sgd" with Nesterov momentum (nnU-Net's); "muon", orthogonalised momentum for kernels and AdamW
            for the rest.
        lr: peak learning rate.
        weight_decay: decoupled for adamw and muon, added to the gradient for sgd; never on biases and norms.
        schedule: what follows the warm-up: "poly" (1 - t)^0.9, "cosine" or "constant".
        warmup: steps of linear warm-up.
        momentum: of sgd and muon.
        clip_norm: largest global norm of the gradient.
        accumulate: the batch is taken in this many equal parts whose gradients are averaged, to save memory.
        groups: regular expressions with multipliers of both rates; one that matches nothing is an error.
    """

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 1e-2
    schedule: Literal["poly", "cosine", "constant"] = "poly"
    warmup: int = 50
    momentum: float = 0.99
    clip_norm: float = 12.0
    accumulate: int = 1
    groups: tuple[Group, ...] = ()

    def __post_init__(self):
        _check_words(self, "name", "schedule")


@dataclass(frozen=True)
class Stage:
    """One training stage: an objective with its own data mix, optimiser and steps.

    Attributes:
        objective: the method.
        steps: optimiser steps; None = the plan's.
        optim: optimiser and schedule.
        mix: what a batch is made of.
        augment: augmentation on the device.
        name: name of the stage's folder under checkpoints/.
        start: which weights of the stage before it starts from.
    """

    objective: Objective = Supervised()
    steps: int | None = None
    optim: Optim = Optim()
    mix: Mix = Mix()
    augment: Augment = Augment()
    name: str = "train"
    start: Literal["last", "best"] = "last"

    def __post_init__(self):
        _check_words(self, "start")


@dataclass(frozen=True)
class Rule:
    """How state whose path matches `pattern` lies on the mesh: whole on each device, or split along an axis."""

    pattern: str
    how: Literal["replicate", "fsdp"]

    def __post_init__(self):
        _check_words(self, "how")


@dataclass(frozen=True)
class Config:
    """A whole run.

    Attributes:
        data: folder of the data set (with dataset.json), or "phantoms2d" or "phantoms3d": synthetic, made when needed.
        stages: the stages, in order.
        pretrained: weight file (.safetensors, .npz, .pth; `file.pth#model_ema` for one of several sets in it) that the
            first stage's networks start from.
        plan: path of a plan.json; None = the data set's own, or one made now if it has none, labels are hidden or a
            domain is held out.
        seed: of initialisation, data order, augmentation and dropout.
        workers: processes that read patches; 0 is enough, since augmentation runs on the device.
        ema: decay of an exponential moving average of the weights, which then predicts; 0 = off.
        fsdp: devices along the mesh axis that splits parameters (1 = replicate everything).
        spatial: devices that share each sample, cut along its longest side, for patches that one device cannot hold.
        rules: overrides of where state lies, first match wins; one that matches nothing is an error.
        log_every: steps between log lines.
        validate_every: steps between validations; None = a twentieth of the stage.
        checkpoint_every: steps between checkpoints; None = as validate_every.
        max_bad_steps: after so many consecutive non-finite steps the run stops and names the batch.
        cache: folder of preprocessed cases; None = the user's cache folder.
        tensorboard: also write TensorBoard files (extra `tensorboard`).
        fold: which fold of a cross-validation this run is, from 0; None = the data set's own split.
        folds: how many folds there are.
        labelled: training patients or cases that keep their labels (names, or the first so many patients in sorted
            order), while all others become unlabelled; None = all that have one.
        classes: the classes that are learned and scored, in this order; all others count as background. None = all.
        hold_out: domain that takes no part in training and selection, and is scored at the end; None = no domain is.
        oracle: choose the best weights on the domain that is held out, as many articles do; only to compare with them.
    """

    data: str = "phantoms2d"
    stages: tuple[Stage, ...] = (Stage(),)
    pretrained: str | None = None
    plan: str | None = None
    seed: int = 0
    workers: int = 0
    ema: float = 0.0
    fsdp: int = 1
    spatial: int = 1
    rules: tuple[Rule, ...] = ()
    log_every: int = 10
    validate_every: int | None = None
    checkpoint_every: int | None = None
    max_bad_steps: int = 10
    cache: str | None = None
    tensorboard: bool = False
    fold: int | None = None
    folds: int = 5
    labelled: int | tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    hold_out: str | None = None
    oracle: bool = False


# ---------------------------------------------------------------- loading


def load(source: str | Path) -> Config:
    """The config of a .py file (its `config`), of a run (folder or run.json), or the default one of a data set."""
    path = Path(source)
    if str(source) in EMBEDDED and not path.exists():
        return Config(data=str(source))
    if path.is_dir() and (path / "dataset.json").exists() and not (path / "run.json").exists():
        return Config(data=str(path))
    if path.is_dir():
        path = path / "run.json"
    if not path.exists():
        near = difflib.get_close_matches(str(path), [str(p) for p in path.parent.glob("*.py")], 1, 0.5)
        raise UserError(
            "No such config",
            file=source,
            expected=f"a config .py file, a data set folder with dataset.json, a run folder, {' or '.join(EMBEDDED)}",
            remedy=f"did you mean {near[0]}?" if near else "medseg info lists the configs",
        )
    if path.suffix == ".json":
        return from_json(read_record(path, "config")["config"])
    found = runpy.run_path(str(path)).get("config")
    if not isinstance(found, Config):
        raise UserError(
            "The config file defines no config", file=path, found=type(found).__name__, expected="config = Config(...)"
        )
    return found


def override(config: Config, args: list[str], prog: str = "medseg train CONFIG") -> Config:
    """Applies command-line overrides such as `--seed 3 --stages.0.optim.lr 1e-3`; did-you-mean on wrong names."""
    if not args:
        return config
    import tyro

    return tyro.cli(Config, default=config, args=args, prog=prog)


# ---------------------------------------------------------------- JSON


def to_json(value: Any) -> Any:
    """Dataclasses -> JSON-able dicts that name their class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"class": f"{type(value).__module__}:{type(value).__qualname__}", **fields}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"A config holds dataclasses, tuples, dicts, numbers and strings; found {type(value).__name__}")


def from_json(value: Any) -> Any:
    """The inverse of `to_json`. Only dataclasses of this package are made; anything else is refused."""
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    if not isinstance(value, dict):
        return value
    if "class" not in value:
        return {k: from_json(v) for k, v in value.items()}
    module, _, name = value["class"].partition(":")
    cls = getattr(importlib.import_module(module), name, None) if module.split(".")[0] == "medseg_jax" else None
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise UserError(
            "A config in JSON may name dataclasses of medseg_jax only",
            found=value["class"],
            remedy="if it is your own class, load the run's .py config and pass it to the Python API",
        )
    known = {f.name for f in dataclasses.fields(cls)}
    if unknown := set(value) - known - {"class"}:
        raise UserError(f"Unknown fields of {name} in a config", found=sorted(unknown), expected=sorted(known))
    return cls(**{k: from_json(v) for k, v in value.items() if k != "class"})


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """What differs between two configs in JSON form, one line a field."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [d for k in sorted(old.keys() | new.keys()) for d in differences(old.get(k), new.get(k), f"{path}.{k}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [d for i, (a, b) in enumerate(zip(old, new, strict=True)) for d in differences(a, b, f"{path}.{i}")]
    return [] if old == new else [f"{path.lstrip('.')}: {old!r} -> {new!r}"]

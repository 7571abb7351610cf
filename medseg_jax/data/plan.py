"""A plan: how cases are preprocessed, and which network is trained on what. planning.py makes it; plan.json keeps it.

Whoever edits the file is told at once what does not fit.
"""

import dataclasses
import difflib
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg_jax.paths import write
from medseg_jax.types import UserError

SCHEMES: dict[str, frozenset[str]] = {
    "ct": frozenset({"low", "high", "mean", "std"}),
    "fixed": frozenset({"mean", "std"}),
    "zscore": frozenset({"nonzero"}),
    "minmax": frozenset(),
    "none": frozenset(),
}
"""Normalisation schemes and the keys that each needs.

ct: clip to [low, high], then (x - mean) / std; fixed: (x - mean) / std; none: as stored;
zscore: (x - mean) / std with the image's own mean and std (over its non-zero voxels if `nonzero`);
minmax: the image's own range to [0, 1].
"""


@dataclass(frozen=True)
class Plan:
    """How to preprocess the cases of a data set and which network to train on them; kept as plan.json.

    Attributes:
        dim: 2 or 3, spatial rank of the network. 2 on volumes: slice by slice along the first canonical axis.
        spacing: (d, h, w) to which cases are resampled, mm (px for pictures). None as a whole or for an axis: as it is.
        patch_size: `dim` entries, divisible by the product of the strides.
        batch_size: cases a step, over all processes.
        normalization: one dict a channel, {"scheme": one of SCHEMES, ...its numbers}.
        strides: per stage, per axis; the first stage's are ones.
        kernel_sizes: per stage, per axis; odd.
        features: channels of each stage, full resolution first.
        crop_nonzero: crop volumes to the bounding box of what is not 0.
        steps: training steps.
        classes: foreground classes in the order of the network's outputs.
        in_channels: channels of the image.
        reasons: one sentence a choice; nothing reads it but people.
        working_size: (h, w) to which every picture is resized whatever its size, or None.
        neighbours: slices above and below that a 2-D network sees as further channels (2.5-D); those of the border
            are repeated.
        crop_field: crop pictures to the field of view, the largest area that is not black (fundus photographs).
        clahe: contrast-limited equalisation of the lightness of 8-bit colour pictures, before they are normalised:
            {"clip": limit, "grid": (columns, rows)} as in `ops.clahe.clahe`; or None.
    """

    dim: int
    spacing: tuple[float | None, ...] | None
    patch_size: tuple[int, ...]
    batch_size: int
    normalization: tuple[dict[str, Any], ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    features: tuple[int, ...]
    crop_nonzero: bool
    steps: int
    classes: tuple[str, ...]
    in_channels: int
    reasons: dict[str, str] = field(default_factory=dict)
    working_size: tuple[int, int] | None = None
    neighbours: int = 0
    crop_field: bool = False
    clahe: dict[str, Any] | None = None

    def __post_init__(self):
        _validate(self)

    @property
    def channels_seen(self) -> int:
        """Channels that the network sees: those of the image, once for each slice."""
        return self.in_channels * (1 + 2 * self.neighbours)

    @property
    def divisor(self) -> tuple[int, ...]:
        """Total stride of the network along each axis."""
        return tuple(math.prod(stage[axis] for stage in self.strides) for axis in range(self.dim))

    @property
    def patch_spacing(self) -> tuple[float, ...]:
        """Of a patch's axes; 1 where they stay as they are in the files."""
        return tuple(s or 1.0 for s in self.spacing or (1.0,) * 3)[-self.dim :]

    def save(self, path: str | Path) -> None:
        """Writes JSON meant for editing by hand."""
        write(Path(path), _to_json(self))

    @classmethod
    def load(cls, path: str | Path) -> "Plan":
        """Reads and validates plan.json.

        Raises:
            UserError: not JSON, unknown or missing key, or a value that cannot be trained with.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(
                "Cannot read the plan", file=path, found=error, remedy="medseg data plan DATASET"
            ) from error
        try:
            return cls.from_dict(values)
        except UserError as error:
            error.file = path
            raise

    @classmethod
    def from_dict(cls, values: Any) -> "Plan":
        """The inverse of `dataclasses.asdict` after a trip through JSON."""
        if not isinstance(values, dict):
            raise UserError("A plan is a JSON object", found=type(values).__name__, remedy="medseg data plan DATASET")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                close = difflib.get_close_matches(key, fields, 1)
                hint = f'did you mean "{close[0]}"?' if close else "delete it"
                raise UserError(f'Unknown key "{key}" in the plan', expected=", ".join(fields), remedy=hint)
        optional = ("reasons", "working_size", "neighbours", "crop_field", "clahe")
        required = [name for name in fields if name not in optional]
        if missing := [name for name in required if name not in values]:
            raise UserError(
                f"The plan lacks {', '.join(missing)}", remedy="medseg data plan DATASET writes a whole one"
            )
        if isinstance(values.get("clahe"), dict):
            values = {**values, "clahe": {key: _tuples(value) for key, value in values["clahe"].items()}}
        return cls(**{key: value if key == "reasons" else _tuples(value) for key, value in values.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def _to_json(plan: Plan) -> str:
    """One key a line: what is written by hand is edited by hand."""
    lines = []
    for key, value in dataclasses.asdict(plan).items():
        if key in ("reasons", "normalization"):
            lines.append(f'  "{key}": {json.dumps(value, indent=2, ensure_ascii=False)}'.replace("\n", "\n  "))
        else:
            lines.append(f'  "{key}": {json.dumps(value, ensure_ascii=False)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _is_int(value: Any, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _validate(plan: Plan) -> None:
    def require(fine: bool, key: str, expected: str) -> None:
        if not fine:
            raise UserError(f'The plan\'s "{key}" cannot be used', found=getattr(plan, key), expected=expected)

    def ints(value: Any, length: int) -> bool:
        return isinstance(value, tuple) and len(value) == length and all(_is_int(v) for v in value)

    require(plan.dim in (2, 3) and _is_int(plan.dim), "dim", "2 or 3")
    require(ints(plan.patch_size, plan.dim), "patch_size", f"{plan.dim} positive whole numbers")
    for key in ("batch_size", "steps", "in_channels"):
        require(_is_int(getattr(plan, key)), key, "a positive whole number")
    require(isinstance(plan.crop_nonzero, bool), "crop_nonzero", "true or false")
    names = isinstance(plan.classes, tuple) and all(isinstance(name, str) for name in plan.classes)
    require(names and len(plan.classes) == len(set(plan.classes)) > 0, "classes", "different names, at least one")
    require(
        plan.spacing is None
        or (
            isinstance(plan.spacing, tuple)
            and len(plan.spacing) == 3
            and all(v is None or (_is_number(v) and v > 0) for v in plan.spacing)
        ),
        "spacing",
        "three positive numbers (d, h, w), null for an axis that stays as it is, or null for all",
    )
    require(
        plan.working_size is None or (ints(plan.working_size, 2) and plan.dim == 2 and plan.spacing is None),
        "working_size",
        "two positive whole numbers (h, w), with dim 2 and spacing null; or null",
    )

    fine = _is_int(plan.neighbours, 0) and (plan.dim == 2 or plan.neighbours == 0)
    require(fine, "neighbours", "a whole number of slices with dim 2; 0 otherwise")

    require(isinstance(plan.crop_field, bool), "crop_field", "true or false")
    fine = isinstance(plan.clahe, dict) and set(plan.clahe) == {"clip", "grid"} and plan.in_channels == 3
    fine = fine and plan.clahe is not None and _is_number(plan.clahe["clip"]) and ints(plan.clahe["grid"], 2)
    expected = 'null, or with three channels {"clip": number, "grid": [columns, rows]}'
    require(plan.clahe is None or fine, "clahe", expected)

    stages = len(plan.features) if isinstance(plan.features, tuple) else 0
    require(stages > 0 and ints(plan.features, stages), "features", "positive whole numbers, one a stage")
    for key in ("strides", "kernel_sizes"):
        value = getattr(plan, key)
        fine = isinstance(value, tuple) and len(value) == stages and all(ints(v, plan.dim) for v in value)
        require(fine, key, f"{stages} stages (as many as features) of {plan.dim} positive whole numbers")
    odd = all(k % 2 for stage in plan.kernel_sizes for k in stage)
    require(odd, "kernel_sizes", "odd numbers")
    divisible = all(p % d == 0 for p, d in zip(plan.patch_size, plan.divisor, strict=True))
    require(divisible, "patch_size", f"divisible by the product of the strides, {plan.divisor}")

    fine = isinstance(plan.normalization, tuple) and len(plan.normalization) == plan.in_channels
    require(fine, "normalization", f"one entry for each of {plan.in_channels} channels")
    for entry in plan.normalization:
        _validate_normalization(entry)


def _validate_normalization(entry: Any) -> None:
    if not isinstance(entry, dict) or entry.get("scheme") not in SCHEMES:
        expected = f'{{"scheme": one of {", ".join(SCHEMES)}, ...}}'
        raise UserError('The plan\'s "normalization" cannot be used', found=entry, expected=expected)
    needs = SCHEMES[entry["scheme"]]
    numbers = {key: value for key, value in entry.items() if key not in ("scheme", "nonzero")}
    fine = set(entry) - {"scheme"} == needs and all(_is_number(v) for v in numbers.values())
    if not fine or not isinstance(entry.get("nonzero", False), bool) or entry.get("std", 1) <= 0:
        expected = ", ".join(sorted(needs)) or "no other key"
        raise UserError(f'Normalisation "{entry["scheme"]}" cannot be used', found=entry, expected=expected)

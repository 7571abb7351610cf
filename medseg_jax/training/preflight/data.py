"""What is known of the data: of a data set on this disk, a plan, or what the user says of them."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medseg_jax.config import Config
from medseg_jax.data.cache import target_grid
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.fingerprint import fingerprint
from medseg_jax.data.plan import Plan
from medseg_jax.data.planning import plan_for
from medseg_jax.data.synthetic import EMBEDDED
from medseg_jax.runtime.chips import Topology
from medseg_jax.types import Labels, UserError


@dataclass(frozen=True)
class DataFacts:
    """All that shapes depend on.

    Attributes:
        extent: smallest and largest side of the preprocessed cases.
        notes: what was assumed, a sentence each.
    """

    plan: Plan
    labels: Labels
    cases: int
    training: int
    domains: tuple[str, ...]
    extent: tuple[tuple[int, ...], tuple[int, ...]]
    notes: tuple[str, ...] = field(default=())

    def request(self) -> dict[str, Any]:
        """For the other process."""
        return {
            "plan": dataclasses.asdict(self.plan),
            "labels": dataclasses.asdict(self.labels),
            "cases": self.cases,
            "domains": self.domains,
            "extent": self.extent,
        }

    def describe(self) -> dict[str, Any]:
        """For the user."""
        return {
            "patch_size": list(self.plan.patch_size),
            "channels": self.plan.channels_seen,
            "classes": list(self.labels.names),
            "training_cases": self.training,
            "notes": list(self.notes),
        }


def know_data(
    config: Config,
    topology: Topology,
    plan: str | Path | None = None,
    *,
    patch_size: Sequence[int] | None = None,
    channels: int | None = None,
    classes: int | None = None,
    overlapping: bool = False,
    cases: int | None = None,
) -> DataFacts:
    """What the data set, a plan, or the user says of the data; data on this disk are looked at, never preprocessed."""
    from medseg_jax.training.prepare import open_data, open_plan

    if cases is not None and cases < 1:
        raise UserError("There is no such number of training cases", found=str(cases), expected="1 or more")
    notes, whole, dataset = [], None, None
    if config.data in EMBEDDED or Path(config.data).exists():
        whole, dataset = open_data(config)
    else:
        notes.append(f"{config.data} is not on this disk")
    if plan is not None:
        chosen = Plan.load(plan)
    elif dataset is not None and whole is not None:
        budget = {"cpu": "cpu", "cuda": "gpu", "tpu": "tpu"}[topology.platform]
        chosen = open_plan(config, whole if config.labelled is None else dataset, budget=budget)
    elif config.plan and Path(config.plan).exists():
        chosen = Plan.load(config.plan)
    elif patch_size is not None:
        chosen = plan_for(patch_size, channels or 1, [f"class {i + 1}" for i in range(classes or 1)])
        notes.append(f"a plan made for the patch alone: batches of {chosen.batch_size}, {chosen.steps} steps")
    else:
        raise UserError(
            "Nothing is known of the data",
            file=config.data,
            found="no data set of that name on this disk, and no plan" + (f" at {config.plan}" if config.plan else ""),
            expected="its sizes",
            remedy="--patch-size 256 256 --channels 3 --classes 2, or --plan plan.json, or --data FOLDER",
        )
    chosen = _adapted(chosen, patch_size, channels, classes)
    if dataset is None or classes is not None or overlapping:
        labels = Labels.overlapping(*chosen.classes) if overlapping else Labels.simple(*chosen.classes)
    else:
        labels = dataset.labels
    if dataset is not None:
        training = cases or len(dataset.subset("train", labelled=True) or dataset.subset("train"))
        extent = _extent(config, dataset, chosen)
        return DataFacts(chosen, labels, cases or len(dataset.cases), training, dataset.domains, extent, tuple(notes))
    if cases is None:
        notes.append("100 training cases are assumed, as large as the patch (--cases)")
        cases = 100
    side = (1, *chosen.patch_size)[-3:]
    return DataFacts(chosen, labels, cases, cases, ("",), (side, side), tuple(notes))


def _adapted(plan: Plan, patch_size: Sequence[int] | None, channels: int | None, classes: int | None) -> Plan:
    """The plan with what the user says in place of its own."""
    if patch_size is not None and tuple(patch_size) != plan.patch_size:
        if len(patch_size) != plan.dim:
            raise UserError(
                "The patch does not fit the plan", found=f"{len(patch_size)} sides", expected=f"{plan.dim} of them"
            )
        plan = dataclasses.replace(plan, patch_size=tuple(patch_size))
    if channels is not None and channels != plan.in_channels:
        plan = dataclasses.replace(plan, in_channels=channels, normalization=({"scheme": "none"},) * channels)
    if classes is not None and classes != len(plan.classes):
        plan = dataclasses.replace(plan, classes=tuple(f"class {i + 1}" for i in range(classes)))
    return plan


def _extent(config: Config, dataset: Dataset, plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Smallest and largest side of the cases after resampling; they are read only if a method asks for it."""
    if not any("start" in stage.objective.batch_spec for stage in config.stages):
        side = (1, *plan.patch_size)[-3:]
        return side, side
    seen = fingerprint(dataset)
    grids = [target_grid(tuple(s), tuple(p), plan)[0] for s, p in zip(seen.shapes.tolist(), seen.spacings, strict=True)]
    sides = list(zip(*grids, strict=True))
    return tuple(min(s) for s in sides), tuple(max(s) for s in sides)

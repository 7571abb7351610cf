"""Batches for training: a pure function of (seed, step).

    stream(cache, dataset, plan, mix, ...) -> iterator of batches from any step
    batch_at(..., step=k)                  -> batch k alone

No state is kept and none is saved: to resume is to start at another step. A row's crop is drawn from a generator seeded
by (seed, part, step, row), its case from a permutation of the epoch that it falls in. grain turns that function into a
prefetching iterator, in threads (workers = 0) or in processes; the bits are the same.
"""

import functools
import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from medseg_jax.data.cache import Cache, CachedCase
from medseg_jax.data.plan import Plan
from medseg_jax.types import Batch, Case, UserError

if TYPE_CHECKING:
    from medseg_jax.data.dataset import Dataset

LABELLED, UNLABELLED = 0, 1
"""The parts of a batch, each with its own epochs."""

FIELDS = (("image", "case", "domain"), ("unlabelled", "unlabelled_case", "unlabelled_domain"))
"""What the fields of each part are called."""

ROW, ORDER, EPOCH = 0, 1, 2
"""What a random stream decides: the crop of a row, the order of rows in a batch, the order of cases in an epoch."""


@dataclass(frozen=True)
class Mix:
    """What a batch is made of.

    Attributes:
        labelled: labelled cases a batch, over all processes; None: the plan's batch size.
        unlabelled: unlabelled cases a batch.
        balance: "case": every case equally often; "domain": every domain equally often, in a batch to within one row.
        foreground: share of labelled rows (the last ones) whose patch is placed on a random voxel of a random class.
    """

    labelled: int | None = None
    unlabelled: int = 0
    balance: Literal["case", "domain"] = "case"
    foreground: float = 0.33

    def rows(self, plan: Plan) -> tuple[int, int]:
        """Labelled and unlabelled cases a batch, over all processes."""
        return plan.batch_size if self.labelled is None else self.labelled, self.unlabelled


def stream(
    cache: Cache,
    dataset: "Dataset",
    plan: Plan,
    mix: Mix,
    *,
    sample_size: tuple[int, ...],
    seed: int,
    split: str = "train",
    workers: int = 0,
    start: int = 0,
    process: tuple[int, int] = (0, 1),
) -> Iterator[Batch]:
    """Endless batches from step `start`; see types.Batch. Close the iterator to end its workers.

    Args:
        sample_size: `dim` entries, at least the patch size: the crop that is read, so that augmentation can rotate it
            and still cut a patch out of its middle. Outside the case image and label are 0.
        workers: processes that read ahead; 0: two threads of this one.
        process: (index, count): this process yields rows [index * B / count, (index + 1) * B / count) of each part.

    Raises:
        UserError: no case for a part of the mix, or rows that cannot be shared equally among the processes.
    """
    return _iterate(_source(cache, dataset, plan, mix, sample_size, seed, split, process), workers, start)


def batch_at(
    cache: Cache,
    dataset: "Dataset",
    plan: Plan,
    mix: Mix,
    *,
    sample_size: tuple[int, ...],
    seed: int,
    step: int,
    split: str = "train",
    process: tuple[int, int] = (0, 1),
) -> Batch:
    """The batch of one step, equal to what `stream` yields there."""
    return _source(cache, dataset, plan, mix, sample_size, seed, split, process).batch(step)


def batch_shapes(
    plan: Plan, sample_size: tuple[int, ...], rows: tuple[int, int]
) -> dict[str, tuple[tuple[int, ...], Any]]:
    """(shape, dtype) of every field of a batch of so many (labelled, unlabelled) rows; no data is needed."""
    fields: dict[str, tuple[tuple[int, ...], Any]] = {}
    for names, count in zip(FIELDS, rows, strict=True):
        if count:
            image, case, domain = names
            fields[image] = (count, *sample_size, plan.channels_seen), np.float32
            fields |= dict.fromkeys((case, domain), ((count,), np.int32))
    if rows[LABELLED]:
        fields["label"] = (rows[LABELLED], *sample_size), np.int32
        fields["start"] = (rows[LABELLED], 3), np.int32
    return fields


def _iterate(source: "_Source", workers: int, start: int) -> Iterator[Batch]:
    import grain

    steps = grain.MapDataset.range(start, 2**40).map(source.batch)
    batches = steps.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
    if workers:
        from absl import flags

        # grain's worker processes read absl's flags, which nobody parses outside absl.app.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS(["medseg"])
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        batches = batches.mp_prefetch(options, worker_init_fn=_end_with_parent)
    iterator = iter(batches)
    try:
        yield from iterator
    finally:
        iterator.close()


def _end_with_parent(index: int, count: int) -> None:
    """Ends a worker when its parent is gone: after a kill -9 it would wait for ever, holding memory and open pipes."""
    del index, count
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()


# --------------------------------------------------------------------------------------------------------- the function


@dataclass(frozen=True)
class _Part:
    """Where the rows of one part come from: `rows` a batch over all processes, out of `pools` of case indices."""

    tag: int
    rows: int
    pools: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class _Source:
    """Everything that batch(step) depends on, small enough to be sent to worker processes."""

    cache: Cache
    ids: tuple[str, ...]
    domains: tuple[int, ...]
    classes: tuple[str, ...]
    patch_size: tuple[int, ...]
    sample_size: tuple[int, ...]
    neighbours: int
    foreground: float
    seed: int
    process: tuple[int, int]
    parts: tuple[_Part, ...] = field(default=())

    def batch(self, step: int) -> dict[str, Any]:
        index, count = self.process
        batch = {}
        for part in self.parts:
            share = part.rows // count
            rows = [self._row(part, int(step), row) for row in range(index * share, (index + 1) * share)]
            batch |= {name: np.stack([row[name] for row in rows]) for name in rows[0]}  # [b, ...]
        return batch

    def _row(self, part: _Part, step: int, row: int) -> dict[str, Any]:
        """The fields of one row, without the batch axis."""
        index = pick(self.seed, part.tag, part.pools, part.rows, step, row)
        case = self.cache.case(self.ids[index])
        rng = np.random.default_rng([self.seed, part.tag, ROW, step, row])
        forced = part.tag == LABELLED and row >= round(part.rows * (1 - self.foreground))
        voxel = foreground_voxel(rng, case, self.classes) if forced else None
        start, size = place(rng, case.image.shape[:3], self.patch_size, self.sample_size, voxel)
        here = 0 if len(self.sample_size) == 2 else slice(None)  # a flat network sees [h, w], not [1, h, w]
        image = [cut(case.image, at, size)[here] for at in beside(start, len(case.image), self.neighbours)]
        values = (
            np.concatenate(image, -1) if self.neighbours else image[0],
            np.int32(index),
            np.int32(self.domains[index]),
        )
        fields: dict[str, Any] = dict(zip(FIELDS[part.tag], values, strict=True))
        if part.tag == LABELLED and case.label is not None:
            fields["label"] = cut(case.label, start, size)[here].astype(np.int32)
            fields["start"] = np.array(start, np.int32)
        return fields


def _source(
    cache: Cache,
    dataset: "Dataset",
    plan: Plan,
    mix: Mix,
    sample_size: tuple[int, ...],
    seed: int,
    split: str,
    process: tuple[int, int],
) -> _Source:
    if len(sample_size) != plan.dim or any(s < p for s, p in zip(sample_size, plan.patch_size, strict=False)):
        raise ValueError(f"sample_size {sample_size} must have {plan.dim} entries, each at least {plan.patch_size}")
    if mix.balance not in ("case", "domain"):
        raise UserError("Unknown balance of the mix", found=mix.balance, expected='"case" or "domain"')
    if not 0 <= mix.foreground <= 1:
        raise UserError("The share of foreground rows is not a share", found=mix.foreground, expected="0 to 1")
    if seed < 0:
        raise UserError("A seed is not negative", found=seed)
    index, count = process
    if not 0 <= index < count:
        raise ValueError(f"process {process} is not (index, count)")

    index_of = {case.id: i for i, case in enumerate(dataset.cases)}
    domain_of = {name: i for i, name in enumerate(dataset.domains)}
    parts = []
    for tag, what, rows in zip((LABELLED, UNLABELLED), ("labelled", "unlabelled"), mix.rows(plan), strict=True):
        if not rows:
            continue
        cases = dataset.subset(split, labelled=tag == LABELLED)
        if not cases:
            remedy = "unlabelled cases belong into imagesUn" if tag else "name others in dataset.json"
            raise UserError(f"The data set has no {what} {split} cases", file=dataset.root, remedy=remedy)
        if rows % count:
            raise UserError(
                f"{rows} {what} rows a batch cannot be shared equally by {count} processes",
                expected=f"a multiple of {count}",
                remedy="change batch_size in plan.json, or the mix",
            )
        parts.append(_Part(tag, rows, _pools(cases, index_of, mix.balance)))
    return _Source(
        cache=cache,
        ids=tuple(case.id for case in dataset.cases),
        domains=tuple(domain_of[case.domain] for case in dataset.cases),
        classes=plan.classes,
        patch_size=plan.patch_size,
        sample_size=tuple(sample_size),
        neighbours=plan.neighbours,
        foreground=mix.foreground,
        seed=seed,
        process=process,
        parts=tuple(parts),
    )


def _pools(cases: tuple[Case, ...], index_of: dict[str, int], balance: str) -> tuple[tuple[int, ...], ...]:
    pools: dict[str, list[int]] = {}
    for case in cases:
        pools.setdefault(case.domain if balance == "domain" else "", []).append(index_of[case.id])
    return tuple(tuple(pools[name]) for name in sorted(pools))


# ------------------------------------------------------------------------------------------------------ pure arithmetic


@functools.lru_cache(maxsize=64)
def _permutation(key: tuple[int, ...], n: int) -> np.ndarray:
    return np.random.default_rng(list(key)).permutation(n)


def pick(seed: int, tag: int, pools: tuple[tuple[int, ...], ...], rows: int, step: int, row: int) -> int:
    """Case index of one row.

    The rows of all steps are dealt to the pools in turn; each pool goes through all its cases in a new order every
    epoch. Rows of a batch are permuted, so that no domain owns the foreground rows.
    """
    slot = _permutation((seed, tag, ORDER, step), rows)[row]
    position = step * rows + int(slot)
    pool = position % len(pools)
    epoch, rank = divmod(position // len(pools), len(pools[pool]))
    return pools[pool][_permutation((seed, tag, EPOCH, pool, epoch), len(pools[pool]))[rank]]


def foreground_voxel(rng: np.random.Generator, case: CachedCase, classes: tuple[str, ...]) -> np.ndarray | None:
    """A random voxel [3] of a random class among those present, or None if the case has no foreground."""
    present = [name for name in classes if len(case.foreground.get(name, ()))]
    if not present:
        return None
    voxels = case.foreground[present[rng.integers(len(present))]]
    return voxels[rng.integers(len(voxels))]


def place(
    rng: np.random.Generator,
    shape: tuple[int, ...],
    patch_size: tuple[int, ...],
    sample_size: tuple[int, ...],
    voxel: np.ndarray | None,
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(start, size) of a sample in a case of `shape` (d, h, w); it may reach outside. 2-D: one slice, size (1, h, w).

    What is placed is the patch in the sample's middle: inside the case where it fits and centred where it does not;
    uniformly, or around `voxel` with a jitter of a quarter patch. The sample adds its margin on both sides.
    """
    flat = (1,) * (3 - len(patch_size))
    patch, sample = (*flat, *patch_size), (*flat, *sample_size)
    start = []
    for axis in range(3):
        free = shape[axis] - patch[axis]
        if free <= 0:
            low = -(-free // 2)
        elif voxel is None:
            low = int(rng.integers(free + 1))
        else:
            jitter = int(rng.integers(-(patch[axis] // 4), patch[axis] // 4 + 1))
            low = min(max(int(voxel[axis]) - patch[axis] // 2 + jitter, 0), free)
        start.append(low - (sample[axis] - patch[axis]) // 2)
    return tuple(start), sample


def beside(start: tuple[int, ...], slices: int, neighbours: int) -> list[tuple[int, ...]]:
    """Where a sample's slices begin, from the lowest to the highest; beyond the border the last one is repeated."""
    steps = range(-neighbours, neighbours + 1)
    return [(min(max(start[0] + step, 0), slices - 1) if neighbours else start[0], *start[1:]) for step in steps]


def with_neighbours(image: np.ndarray, neighbours: int) -> np.ndarray:
    """[d, h, w, c] -> [d, h, w, c (1 + 2 neighbours)]: each slice with those below and above it (`Plan.neighbours`)."""
    if not neighbours:
        return image
    slices = np.arange(len(image))
    steps = range(-neighbours, neighbours + 1)
    return np.concatenate([image[np.clip(slices + step, 0, len(image) - 1)] for step in steps], -1)


def cut(array: np.ndarray, start: tuple[int, ...], size: tuple[int, ...]) -> np.ndarray:
    """array[start : start + size] along the first three axes, 0 where that lies outside. Reads no other bytes."""
    out = np.zeros((*size, *array.shape[3:]), array.dtype)
    low = [max(s, 0) for s in start]
    high = [min(s + n, m) for s, n, m in zip(start, size, array.shape[:3], strict=True)]
    if all(a < b for a, b in zip(low, high, strict=True)):
        source = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        target = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
        out[target] = array[source]
    return out

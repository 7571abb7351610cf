"""The mesh and where things lie on it: rows of the batch are split over devices, or each sample over several of them;
state is replicated or split by rule.

`AxisType.Auto` is named explicitly: the compiler places intermediates, we place what enters and leaves a step. State
out_shardings are pinned, so that a resumed run compiles to the same program and gives the same bits.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from medseg_jax.config import Rule
from medseg_jax.types import Batch, UserError

ROWS = ("data", "fsdp")
"""Axes of the mesh over which rows of the batch are split."""


def make_mesh(fsdp: int = 1, spatial: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A ("data", "fsdp", "spatial") mesh over all devices, in the order of their processes.

    So a row of the batch has its place whichever process reads it, and neighbours that share a sample are of one. The
    order of `jax.make_mesh`, along the links of a slice, mixes the hosts of 16 chips and more.

    Args:
        fsdp: devices that share one copy of the parameters.
        spatial: devices that share one sample, all of one process, which reads it.
        devices: all of JAX's by default.

    Raises:
        UserError: the product does not divide the devices, or `spatial` those of a process.
    """
    devices = jax.devices() if devices is None else list(devices)
    if fsdp < 1 or spatial < 1 or len(devices) % (fsdp * spatial):
        raise UserError(
            "fsdp and spatial do not divide the devices",
            found=f"fsdp={fsdp}, spatial={spatial}",
            expected=f"a product that divides {len(devices)}",
        )
    shape = (len(devices) // (fsdp * spatial), fsdp, spatial)
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    mesh = Mesh(np.array(ordered).reshape(shape), (*ROWS, "spatial"), axis_types=(AxisType.Auto,) * 3)
    if any(len({device.process_index for device in group}) > 1 for group in mesh.devices.reshape(-1, spatial)):
        raise UserError(
            "Devices of several processes would share a sample",
            found=f"spatial={spatial}",
            expected=f"a divisor of the {sum(d.process_index == 0 for d in devices)} devices of a process",
        )
    return mesh


def rows_at_once(mesh: Mesh) -> int:
    """Of how many rows the batch must be a multiple."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def within(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, traced with the mesh in use: kernels, which no compiler can split, then split themselves."""

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of the batch split over the devices; those that share a sample get all of it, and `augment` cuts it."""
    return NamedSharding(mesh, PartitionSpec(ROWS))


def path_name(path: tuple) -> str:
    """Path of a leaf as text: params/encoder/stages/0/convs/0/kernel."""
    return "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)


def state_shardings(state: Any, rules: Sequence[Rule], mesh: Mesh) -> Any:
    """Sharding of every leaf of an (abstract) state: the first rule that matches its path, else replicated.

    "fsdp" splits the largest axis that the mesh's fsdp axis divides. A rule that matches nothing is an error.
    Without a rule, what a method keeps for each case (aux/cases) is split by rows if the devices divide their number.
    """
    used = set()
    size = mesh.shape["fsdp"]

    def one(path, leaf):
        rule = next((r for r in rules if re.search(r.pattern, path_name(path))), None)
        used.add(rule)
        if rule is None and path_name(path).startswith("aux/cases/") and leaf.shape[0] % rows_at_once(mesh) == 0:
            return batch_sharding(mesh)
        if rule is None or rule.how == "replicate" or size == 1:
            return replicated(mesh)
        axes = [i for i, n in enumerate(leaf.shape) if n % size == 0]
        if not axes:
            return replicated(mesh)
        split = max(axes, key=lambda i: leaf.shape[i])
        return NamedSharding(mesh, PartitionSpec(*("fsdp" if i == split else None for i in range(leaf.ndim))))

    shardings = jax.tree_util.tree_map_with_path(one, state)
    if idle := [r.pattern for r in rules if r not in used]:
        names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(state)]
        raise UserError("A sharding rule matches nothing", found=idle, expected=f"a pattern in e.g. {names[:3]}")
    return shardings


def put_batch(batch: Batch, mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows -> global arrays split over the mesh."""
    sharding = batch_sharding(mesh)
    rows = {name: len(value) * jax.process_count() for name, value in batch.items()}
    if uneven := [f"{count} rows of {name}" for name, count in rows.items() if count % rows_at_once(mesh)]:
        raise UserError(
            "The batch does not divide over the devices",
            found=", ".join(uneven),
            expected=f"a multiple of {rows_at_once(mesh)}",
            remedy="change batch_size in plan.json, or the stage's mix",
        )
    return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()}

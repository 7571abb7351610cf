"""The selective scan of Mamba-1, for every platform. `selective_scan` checks, chooses a backend and calls it."""

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Float

from medseg_jax.ops.plain import plain_wanted
from medseg_jax.ops.scan.choice import chosen_backend
from medseg_jax.ops.scan.chunked import chunked
from medseg_jax.ops.scan.problem import Parameters, Sequences, check_array, pick, state_dtype
from medseg_jax.ops.scan.reference import associative, reference

type Backend = Literal["auto", "reference", "associative", "chunked", "pallas_tpu", "mosaic_gpu"]

BACKENDS: tuple[str, ...] = get_args(Backend.__value__)


def selective_scan(
    u: Float[Array, "b l cu"],
    delta: Float[Array, "b l cr"],
    A: Float[Array, "c n"],
    B: Float[Array, "b l k n"],
    C: Float[Array, "b l k n"],
    D: Float[Array, " c"],
    delta_bias: Float[Array, " c"],
    *,
    delta_weight: Float[Array, "k r d"] | None = None,
    reverse: bool | Sequence[bool] = False,
    backend: Backend = "auto",
    chunk: int | None = None,
    mesh: Mesh | None = None,
    rows: str | tuple[str, ...] | None = None,
    channels: str | None = None,
) -> Float[Array, "b l c"]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t, y_t = C_t . h_t + D u_t, with delta = softplus(delta + bias).

    This is mamba-ssm's `selective_scan_fn(..., delta_softplus=True)` with channels last. The c = k * d channels are in
    k groups of d; group i (channels i * d to (i + 1) * d) reads B[:, :, i] and C[:, :, i]. The state starts at zero.

    Args:
        u: input. It may hold fewer groups than c: group i then reads u's group i modulo their number, so that scans
            over one sequence in both directions share one copy of it.
        delta: step sizes before bias and softplus (the identity above 20), cr = c; with `delta_weight`, cr = k * r.
        A: negative decay rates, kept in float32 whatever the dtype of the rest; so is the state.
        B, C: input and output maps of each group.
        D: skip connection.
        delta_bias: added to delta.
        delta_weight: maps each group's r low-rank step sizes to its d channels: "chunked" does so for a chunk at a
            time, the others for all of l beforehand.
        reverse: run time backwards, for all groups or one flag a group. Nothing is flipped: y_t stays at t.
        backend: "reference" (`lax.scan`) and "associative" keep all states for the backward pass; "chunked" runs
            everywhere and keeps chunk boundaries; "pallas_tpu" and "mosaic_gpu" (Hopper or newer) are kernels. "auto"
            is decided when the program is lowered, by the platform it is lowered for: `chosen_backend(platform)` says
            what is taken and why. Where b or d is symbolic (`jax.export`) it is "chunked", within
            `ops.plain.plain_forms` "reference", the one backend that also takes a symbolic l.
        chunk: steps between the states kept for the backward pass (every backend has a default that suits it).
        mesh: with `rows` and/or `channels`, run one scan per device of this mesh (kernels cannot be split by the
            compiler): `rows` names the axes that split b, `channels` the axis that splits d within each group; the
            gradients of B and C are then summed over it. Without them, the mesh in use, as training sets it
            (`runtime.sharding.within`), splits b over all its devices if they divide it; else each device does all.

    Returns:
        y [b, l, c] in u's dtype.

    Raises:
        ValueError: shapes, dtypes or options do not fit, or the backend cannot take them.
    """
    seq, par, flags = _checked(u, delta, A, B, C, D, delta_bias, delta_weight, reverse)
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is the number of steps between kept states, at least 1, not {chunk}")
    if (mesh is None) != (rows is None and channels is None):
        raise ValueError("rows= and channels= name axes of mesh=: pass the mesh and at least one of them, or neither")
    scan = _auto if backend == "auto" else functools.partial(_one_device, backend=backend)
    scan = functools.partial(scan, flags=flags, chunk=chunk)

    ambient = jax.sharding.get_abstract_mesh()
    if mesh is not None:
        scan = _sharded(scan, par, mesh, rows, channels)
    elif ambient.size > 1 and all(kind == AxisType.Auto for kind in ambient.axis_types):
        scan = _sharded(scan, par, ambient, None if len(u) % ambient.size else ambient.axis_names, None)
    y = scan(seq, par)
    return y.reshape(*y.shape[:2], -1)


def _auto(seq: Sequences, par: Parameters, flags: tuple[bool, ...], chunk: int | None) -> Array:
    """All kernels that could be meant are traced; the lowering keeps that of its platform."""
    scan = functools.partial(_one_device, flags=flags, chunk=chunk)
    if plain_wanted():
        return scan(seq, par, backend="reference")
    sizes_known = all(isinstance(size, int) for x in seq for size in x.shape)
    _, channels, states = par.A.shape
    asked = {"states": states, "channels": channels, "dtype": state_dtype(*seq, par.A), "chunk": chunk}
    chosen = {platform: chosen_backend(platform, **asked).backend for platform in ("tpu", "cuda") if sizes_known}
    kernels = {p: functools.partial(scan, backend=name) for p, name in chosen.items() if name != "chunked"}
    default = functools.partial(scan, backend="chunked")
    return lax.platform_dependent(seq, par, **kernels, default=default) if kernels else default(seq, par)


@functools.partial(jax.jit, static_argnames=("flags", "backend", "chunk"))
def _one_device(seq: Sequences, par: Parameters, flags: tuple[bool, ...], backend: str, chunk: int | None) -> Array:
    """y [b, l, k, d]. The plain forms scan one time direction at a time, the others all groups in one call."""
    if backend == "pallas_tpu":
        from medseg_jax.ops.scan.pallas_tpu import pallas_tpu

        return pallas_tpu(seq, par, flags, chunk)
    if backend == "mosaic_gpu":
        from medseg_jax.ops.scan.mosaic_gpu import mosaic_gpu

        return mosaic_gpu(seq, par, flags, chunk)

    if backend == "chunked":
        return chunked(seq, par, flags, chunk)

    def one_way(groups: list[int], backwards: bool) -> Array:
        part, own = _groups(seq, par, groups)
        return {"reference": reference, "associative": associative}[backend](part, own, backwards)

    order = [[i for i, flag in enumerate(flags) if flag == backwards] for backwards in (False, True)]
    parts = [one_way(groups, bool(backwards)) for backwards, groups in enumerate(order) if groups]
    y = parts[0] if len(parts) == 1 else jnp.concatenate(parts, 2)
    home = [[*order[0], *order[1]].index(i) for i in range(len(flags))]
    return pick(y, 2, home).astype(seq.u.dtype)


def _groups(seq: Sequences, par: Parameters, groups: list[int]) -> tuple[Sequences, Parameters]:
    """The arrays of some groups; u's groups repeated where it has fewer."""
    u = pick(seq.u, 2, [i % seq.u.shape[2] for i in groups])
    part = Sequences(u, *(pick(x, 2, groups) for x in seq[1:]))
    return part, jax.tree.map(lambda p: pick(p, 0, groups), par)


def _sharded(scan, par: Parameters, mesh: Mesh | AbstractMesh, rows, channels):
    """One scan a device. What an axis does not split is summed over it in the backward pass: dB and dC over
    `channels`, the parameters' gradients over `rows`."""
    spec = PartitionSpec
    wide = spec(rows, None, None, channels)
    delta = wide if par.delta_weight is None else spec(rows)
    weight = None if par.delta_weight is None else spec(None, None, channels)
    sequences = Sequences._make((wide, delta, spec(rows), spec(rows)))
    parameters = Parameters._make((*(spec(None, channels),) * 3, weight))
    return jax.shard_map(scan, mesh=mesh, in_specs=(sequences, parameters), out_specs=wide, check_vma=False)


# --------------------------------------------------------------------------------------------------------- the inputs


def _checked(u, delta, A, B, C, D, delta_bias, delta_weight, reverse):
    """The arrays by group, or a ValueError that says which one does not fit."""
    arrays = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "delta_bias": delta_bias}
    arrays |= {} if delta_weight is None else {"delta_weight": delta_weight}
    axes = {"u": 3, "delta": 3, "A": 2, "B": 4, "C": 4, "D": 1, "delta_bias": 1, "delta_weight": 3}
    for name, x in arrays.items():
        check_array(name, x, axes[name])
    (b, length, cu), (c, n), k = u.shape, A.shape, B.shape[2]
    if not (b and length and k and n and cu and c) or c % k:
        raise ValueError(f"A {A.shape} has {c} channels for {k} groups of B {B.shape}: expected k * d, none empty")
    d = c // k
    if cu % d or k % (cu // d):
        raise ValueError(f"u {u.shape} must have {c} channels, or the {d} of each of fewer groups that divide {k}")
    r = d if delta_weight is None else delta_weight.shape[1]
    expected = {
        "delta": (b, length, k * r),
        "B": (b, length, k, n),
        "C": (b, length, k, n),
        "D": (c,),
        "delta_bias": (c,),
    }
    expected |= {} if delta_weight is None else {"delta_weight": (k, r, d)}
    for name, shape in expected.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} has shape {arrays[name].shape}, expected {shape} beside u {u.shape}, A {A.shape}")
    flags = (bool(reverse),) * k if np.ndim(reverse) == 0 else tuple(bool(f) for f in reverse)
    if len(flags) != k:
        raise ValueError(f"reverse has {len(flags)} flags for {k} groups")
    seq = Sequences(u.reshape(b, length, cu // d, d), delta.reshape(b, length, k, r), B, C)
    return seq, Parameters(A.reshape(k, d, n), D.reshape(k, d), delta_bias.reshape(k, d), delta_weight), flags

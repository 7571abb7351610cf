"""What all backends of the selective scan share: the arrays in one layout, the step size, padding in time.

Inside this folder channels are split into groups, [b, l, k, d] with c = k * d: a group is the set of channels that
share B and C (for a 2-D network one scan direction). All sequences run over the same time axis l; a reversed group runs
its recurrence from the last position to the first, on data that stay where they are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Sequences(NamedTuple):
    """What changes with time."""

    u: Array  # [b, l, k, d]
    delta: Array  # [b, l, k, d] before bias and softplus, or [b, l, k, r] where Parameters.delta_weight maps r to d
    B: Array  # [b, l, k, n]
    C: Array  # [b, l, k, n]


class Parameters(NamedTuple):
    """What does not."""

    A: Array  # [k, d, n]
    D: Array  # [k, d]
    delta_bias: Array  # [k, d]
    delta_weight: Array | None = None  # [k, r, d]


def check_array(name: str, x, axes: int) -> None:
    """A ValueError unless x is an array of a floating dtype with so many axes."""
    if not hasattr(x, "shape"):
        raise ValueError(f"{name} is a {type(x).__name__}, expected an array")
    if len(x.shape) != axes:
        raise ValueError(f"{name} has shape {x.shape}, expected {axes} axes")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} has dtype {x.dtype}, expected a floating dtype")


def state_dtype(*arrays: Array):
    """float64 where an input has it, else float32: the decays of a long sequence need it."""
    return jnp.float64 if any(a.dtype == jnp.float64 for a in arrays) else jnp.float32


def step_size(seq: Sequences, par: Parameters) -> Array:
    """Softplus of (projected delta + bias), the identity above 20 as in the published kernels -> [b, l, k, d]."""
    dtype = state_dtype(*seq, par.A)
    delta = seq.delta.astype(dtype)
    if par.delta_weight is not None:
        delta = jnp.einsum("blkr,krd->blkd", delta, par.delta_weight.astype(dtype), precision="highest")
    delta = delta + par.delta_bias.astype(dtype)
    return jnp.where(delta > 20, delta, jnp.log1p(jnp.exp(jnp.minimum(delta, 20))))


def pad_time(seq: Sequences, par: Parameters, multiple: int) -> tuple[Sequences, Parameters]:
    """Appends steps of size zero, over which the state stands still, until l is a multiple.

    A raw delta of -1e30 gives a step size, and a gradient, of exactly zero. A projected delta cannot be given that
    value, so it gets one more column, the weight's row for which is one: 0 at real steps, -1e30 at appended ones.
    """
    b, length, k = seq.delta.shape[:3]
    more = -length % multiple
    if not more:
        return seq, par

    def pad(x, value=0.0):
        return jnp.pad(x, ((0, 0), (0, more), (0, 0), (0, 0)), constant_values=value)

    if par.delta_weight is None:
        delta = pad(seq.delta, -1e30)
    else:
        switch = pad(jnp.zeros((b, length, k, 1), seq.delta.dtype), -1e30)
        delta = jnp.concatenate([pad(seq.delta), switch], -1)
        weight = jnp.pad(par.delta_weight, ((0, 0), (0, 1), (0, 0)), constant_values=1)
        par = par._replace(delta_weight=weight)
    return Sequences(pad(seq.u), delta, pad(seq.B), pad(seq.C)), par


def pad_channels(seq: Sequences, par: Parameters, more: int) -> tuple[Sequences, Parameters]:
    """Appends channels of zeros to each group: they add nothing to dB and dC."""
    if not more:
        return seq, par

    def pad(x, axis):
        return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])

    seq = seq._replace(u=pad(seq.u, 3), delta=pad(seq.delta, 3))
    return seq, jax.tree.map(lambda p: pad(p, 1), par)


def pad_states(seq: Sequences, par: Parameters, more: int) -> tuple[Sequences, Parameters]:
    """Appends states that nothing enters or leaves."""
    if not more:
        return seq, par

    def pad(x):
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, more)])

    return seq._replace(B=pad(seq.B), C=pad(seq.C)), par._replace(A=pad(par.A))


def project_delta(seq: Sequences, par: Parameters) -> tuple[Sequences, Parameters]:
    """delta for all of l, for the kernels that do not project it themselves."""
    if par.delta_weight is None:
        return seq, par
    weight = par.delta_weight.astype(jnp.float32)
    delta = jnp.einsum("blkr,krd->blkd", seq.delta.astype(jnp.float32), weight, precision="highest")
    return seq._replace(delta=delta), par._replace(delta_weight=None)


def flattened(seq: Sequences, par: Parameters) -> tuple[Array, ...]:
    """For the kernels: u, delta [b, l, c], and in float32 BC [b, l, k, 2n], A [n, c], the pair D and bias [2, c]."""
    u, delta = (x.reshape(*x.shape[:2], -1) for x in (seq.u, seq.delta))
    BC, A = jnp.concatenate([seq.B, seq.C], -1), jnp.moveaxis(par.A, -1, 0).reshape(par.A.shape[-1], -1)
    pair = jnp.stack([par.D, par.delta_bias]).reshape(2, -1)
    return u, delta, *(x.astype(jnp.float32) for x in (BC, A, pair))


def pick(x: Array, axis: int, indices: list[int]) -> Array:
    """Static take, as slices side by side: their transpose adds in a fixed order, that of `jnp.take` is a scatter."""
    if indices == list(range(x.shape[axis])):
        return x
    starts = [i for i, index in enumerate(indices) if not i or index != indices[i - 1] + 1]  # runs of neighbours
    runs = zip(starts, [*starts[1:], len(indices)], strict=True)
    parts = [lax.slice_in_dim(x, indices[i], indices[j - 1] + 1, axis=axis) for i, j in runs]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis)

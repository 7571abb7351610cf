"""The portable form: one pass over time that keeps the state at chunk boundaries only, and a backward pass by hand.

Forward, h and y of a step are two kernels over [n, b, k, d], channels in the fastest axis, so that the n products that
make one y are summed between vectors and not inside them. Casts, the projection of delta, bias and softplus are done
for a chunk at a time: no array of the whole length is made besides y.

Backward, the chunks are visited against time. A chunk's states are computed again from its boundary and kept while the
adjoint g_t = C_t dy_t + a_{t+1} g_{t+1} walks back over it (a_t = exp(delta_t A), q_t = g_t a_t h_{t-1}):

    dC_t = sum_d dy_t h_t           ddelta_t = u_t sum_n g_t B_t + sum_n q_t A
    dB_t = sum_d g_t delta_t u_t    du_t     = delta_t sum_n g_t B_t + D dy_t         dA = sum_t q_t delta_t

Groups that run backwards in time take their chunks from the end, each turned round in the cache, so that all groups
advance in one loop: a step costs a few microseconds besides its work, whatever its width.

Nothing is divided by a decay, which may underflow. Memory: (l / chunk + chunk) states instead of l.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from medseg_jax.ops.scan.problem import Parameters, Sequences, pad_time, pick, state_dtype, step_size


def chunked(seq: Sequences, par: Parameters, flags: tuple[bool, ...], chunk: int | None = None) -> Array:
    """y [b, l, k, d] in u's dtype. `flags`: groups that run backwards. `chunk`: steps between kept states."""
    length = seq.u.shape[1]
    if not isinstance(length, int):
        raise ValueError(f"l is the symbol {length}: export a program for each l, or take backend='reference'")
    # The parameters' gradients are sums over all chunks and blocks: in half precision these would stand still.
    par = jax.tree.map(lambda p: p.astype(state_dtype(*seq, par.A)), par)
    chunk = min(chunk or (16 if length <= 16384 else 64), length)
    inputs = pad_time(seq, par, chunk)
    whole = partial(_scan, flags=flags, chunk=chunk)
    b, _, k, n = seq.B.shape
    d = seq.u.shape[3]
    known = isinstance(b, int) and isinstance(d, int)  # an exported program may leave them open
    rows, width = _block(b, d, STEP // (k * n)) if known else (b, d)
    if (rows, width) == (b, d):
        return whole(*inputs)[:, :length]
    blocks = partial(_in_blocks, scan=whole, rows=rows, width=width)
    return lax.platform_dependent(*inputs, cpu=blocks, default=whole)[:, :length]


STEP = 2**15
"""States that a CPU advances at a time. Beyond that XLA divides each kernel of a step among the cores, which costs more
than it saves: 49,152 states take 1.3 times as long as twice half of them, and 1.7 times the CPU time."""


def _block(b: int, d: int, most: int) -> tuple[int, int]:
    """Rows, and channels of each group, of which a step holds at most `most` together: whole rows where these fit."""
    if d <= most:
        return max(r for r in range(1, b + 1) if b % r == 0 and r * d <= most), d
    return 1, max((w for w in range(1, most + 1) if d % w == 0 and w >= 16), default=d)


def _in_blocks(seq: Sequences, par: Parameters, scan, rows: int, width: int) -> Array:
    """The scan of some rows and channels of each group after the other."""
    b, d = len(seq.B), seq.u.shape[3]

    def of_rows(x: Array) -> Array:
        return x.reshape(b // rows, rows, *x.shape[1:])

    def of_channels(x: Array, axis: int) -> Array:
        x = x.reshape(*x.shape[:axis], d // width, width, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    projected = par.delta_weight is not None
    weight = None if par.delta_weight is None else of_channels(par.delta_weight, 2)
    parameters = Parameters(of_channels(par.A, 1), of_channels(par.D, 1), of_channels(par.delta_bias, 1), weight)

    def one_of_rows(seq: Sequences) -> Array:
        def one(part) -> Array:
            u, delta, par = part
            return scan(seq._replace(u=u, delta=seq.delta if projected else delta), par)

        y = lax.map(one, (of_channels(seq.u, 3), None if projected else of_channels(seq.delta, 3), parameters))
        return jnp.moveaxis(y, 0, 3).reshape(*seq.delta.shape[:3], d)

    y = lax.map(one_of_rows, Sequences(*map(of_rows, seq)))
    return y.reshape(b, *y.shape[2:])


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _scan(seq: Sequences, par: Parameters, flags: tuple[bool, ...], chunk: int) -> Array:
    return _forward(seq, par, flags, chunk, keep=False)[0]


def _forward(seq: Sequences, par: Parameters, flags, chunk: int, keep: bool) -> tuple[Array, Array | None]:
    """y, and where `keep` the state that enters each chunk [l / chunk, n, b, k, d]."""
    b, length, k = seq.delta.shape[:3]
    d = seq.u.shape[3]
    A = _over_channels(par.A)

    def one_chunk(carry, i):
        state, y = carry
        inputs = _prepare(Sequences(*(_take(x, i, chunk, flags) for x in seq)), par)
        end, part = lax.scan(partial(_step, A), state, inputs)
        part = part + par.D * inputs[0]  # [chunk, b, k, d]
        return (end, _add(y, jnp.moveaxis(part, 0, 1), i, flags)), state if keep else None

    start = jnp.zeros((A.shape[0], b, k, d), A.dtype), jnp.zeros((b, length, k, d), seq.u.dtype)
    (_, y), boundaries = lax.scan(one_chunk, start, jnp.arange(length // chunk))
    return y, boundaries


def _backward(flags, chunk: int, saved, dy: Array) -> tuple[Sequences, Parameters]:
    seq, par, boundaries = saved
    A = jnp.broadcast_to(_over_channels(par.A), boundaries.shape[1:])

    def one_chunk(carry, i_and_state):
        g, dA, dseq, dpar = carry
        i, state = i_and_state
        inputs, undo = jax.vjp(_prepare, Sequences(*(_take(x, i, chunk, flags) for x in seq)), par)
        dy_part = jnp.moveaxis(_take(dy, i, chunk, flags), 1, 0).astype(A.dtype)  # [chunk, b, k, d]

        def again(h, now):
            *now, dy = now
            after, _ = _step(A, h, now)
            return after, (h, _over_d(after, dy))

        _, (before, dC) = lax.scan(again, state, (*inputs, dy_part))  # before: h_{t-1}, [chunk, n, b, k, d]
        (g, dA), grads = lax.scan(partial(_step_back, A), (g, dA), (*inputs, before, dy_part), reverse=True)
        grads = (*grads, dC)
        dseq_part, dpar_part = undo((grads[0] + par.D * dy_part, *grads[1:]))
        dpar_part = dpar_part._replace(D=(dy_part * inputs[0]).sum((0, 1)))
        dseq = jax.tree.map(lambda whole, part: _add(whole, part, i, flags), dseq, dseq_part)
        return (g, dA, dseq, jax.tree.map(jnp.add, dpar, dpar_part)), None

    zeros = jax.tree.map(jnp.zeros_like, (seq, par))
    start = (jnp.zeros_like(boundaries[0]), jnp.zeros_like(boundaries[0]), *zeros)
    chunks = (jnp.arange(len(boundaries)), boundaries)
    (_, dA, dseq, dpar), _ = lax.scan(one_chunk, start, chunks, reverse=True)
    return dseq, dpar._replace(A=jnp.moveaxis(dA.sum(1), 0, -1))  # [k, d, n]


def _step(A: Array, h: Array, now) -> tuple[Array, Array]:
    u, delta, B, C = now  # [b, k, d] twice, [n, b, k] twice
    h = jnp.exp(delta * A) * h + (delta * u) * B[..., None]  # [n, b, k, d]
    return h, (h * C[..., None]).sum(0)


def _step_back(A: Array, carry, now):
    later, dA = carry
    u, delta, B, C, before, dy = now
    g = later + dy * C[..., None]  # [n, b, k, d]
    ag = jnp.exp(delta * A) * g
    q = ag * before
    gB = (g * B[..., None]).sum(0)
    dB = _over_d(g, delta * u)
    return (ag, dA + q * delta), (delta * gB, u * gB + (q * A).sum(0), dB)


def _over_d(x: Array, y: Array) -> Array:
    return jnp.einsum("nbkd,bkd->nbk", x, y, precision="highest")


def _keep(seq, par, flags, chunk):
    y, boundaries = _forward(seq, par, flags, chunk, keep=True)
    return y, (seq, par, boundaries)


_scan.defvjp(_keep, _backward)

# ------------------------------------------------------------------------------------------------- chunks of sequences


def _over_channels(A: Array) -> Array:
    return jnp.moveaxis(A, -1, 0)[:, None]  # [n, 1, k, d]


def _prepare(seq: Sequences, par: Parameters) -> tuple[Array, Array, Array, Array]:
    """One chunk in the state's dtype, time first: u, delta [chunk, b, k, d], B, C [chunk, n, b, k]."""
    dtype = par.A.dtype
    u, delta = (jnp.moveaxis(x, 1, 0) for x in (seq.u.astype(dtype), step_size(seq, par)))
    B, C = (jnp.transpose(x.astype(dtype), (1, 3, 0, 2)) for x in (seq.B, seq.C))
    return u, delta, B, C


def _runs(flags: tuple[bool, ...], i: Array, chunk: int, length: int):
    """Neighbouring groups of one direction, and where their chunk i begins: (groups, backwards, first step)."""
    for backwards, run in itertools.groupby(range(len(flags)), key=lambda g: flags[g]):
        yield list(run), backwards, (length - (i + 1) * chunk if backwards else i * chunk)


def _of_groups(x: Array, groups: list[int], backwards: bool) -> Array:
    """A chunk [b, chunk, groups of x, ...] of some groups in their own order of time. u may have fewer groups."""
    x = pick(x, 2, [g % x.shape[2] for g in groups])
    return x[:, ::-1] if backwards else x


def _take(x: Array, i: Array, chunk: int, flags) -> Array:
    """Chunk i of all groups, each in its own order of time, [b, chunk, k, ...]."""
    runs = _runs(flags, i, chunk, x.shape[1])
    parts = [_of_groups(lax.dynamic_slice_in_dim(x, at, chunk, 1), groups, way) for groups, way, at in runs]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, 2)


def _add(whole: Array, part: Array, i: Array, flags) -> Array:
    """The transpose of `_take`: adds chunk i of all groups to where it came from."""
    chunk = part.shape[1]
    for groups, backwards, at in _runs(flags, i, chunk, whole.shape[1]):
        now = lax.dynamic_slice_in_dim(whole, at, chunk, 1)
        _, undo = jax.vjp(partial(_of_groups, groups=groups, backwards=backwards), now)
        (more,) = undo(pick(part, 2, groups).astype(whole.dtype))
        whole = lax.dynamic_update_slice_in_dim(whole, now + more, at, 1)
    return whole

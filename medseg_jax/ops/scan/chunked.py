"""The portable form: one pass over time that keeps the state at chunk boundaries only, and a backward pass by hand.

Forward, h and y of a step are two kernels over [n, b, k, d], channels in the fastest axis, so that the n products that
make one y are summed between vectors and not inside them. Casts, the projection of delta, bias and softplus are done
for a chunk at a time: no array of the whole length is made besides y.

Backward, the chunks are visited against time. A chunk's states are computed again from its boundary and kept while the
adjoint g_t = C_t dy_t + a_{t+1} g_{t+1} walks back over it (a_t = exp(delta_t A), q_t = g_t a_t h_{t-1}):

    dC_t = sum_d dy_t h_t           ddelta_t = u_t sum_n g_t B_t + sum_n q_t A
    dB_t = sum_d g_t delta_t u_t    du_t     = delta_t sum_n g_t B_t + D dy_t         dA = sum_t q_t delta_t

Nothing is divided by a decay, which may underflow. Memory: (l / chunk + chunk) states instead of l.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

from medseg_jax.ops.scan.problem import Parameters, Sequences, pad_time, state_dtype, step_size


def chunked(seq: Sequences, par: Parameters, reverse: bool, chunk: int | None = None) -> Array:
    """Scan in one time direction -> y [b, l, k, d] in u's dtype. `chunk`: steps between kept states, sqrt(l) or so."""
    length = seq.u.shape[1]
    chunk = chunk or (64 if length >= 2048 else 32 if length >= 512 else 16)
    return _scan(*pad_time(seq, par, min(chunk, length)), reverse, min(chunk, length))[:, :length]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _scan(seq: Sequences, par: Parameters, reverse: bool, chunk: int) -> Array:
    return _forward(seq, par, reverse, chunk, keep=False)[0]


def _forward(seq: Sequences, par: Parameters, reverse: bool, chunk: int, keep: bool) -> tuple[Array, Array | None]:
    """y, and where `keep` the state that enters each chunk [l / chunk, n, b, k, d]."""
    b, length, k, d = seq.u.shape
    A = _over_channels(par.A, seq)

    def one_chunk(carry, i):
        state, y = carry
        inputs = _prepare(_take(seq, i, chunk), par)
        end, part = lax.scan(partial(_step, A), state, inputs, reverse=reverse)
        part = part + par.D.astype(part.dtype) * inputs[0]  # [chunk, b, k, d]
        return (end, _put(y, part, i)), state if keep else None

    start = jnp.zeros((A.shape[0], b, k, d), A.dtype)
    (_, y), boundaries = lax.scan(
        one_chunk, (start, jnp.zeros_like(seq.u)), jnp.arange(length // chunk), reverse=reverse
    )
    return y, boundaries


def _backward(reverse: bool, chunk: int, saved, dy: Array) -> tuple[Sequences, Parameters]:
    seq, par, boundaries = saved
    A = _over_channels(par.A, seq)

    def one_chunk(carry, i_and_state):
        g, dA, dseq, dpar = carry
        i, state = i_and_state
        inputs, undo = jax.vjp(_prepare, _take(seq, i, chunk), par)
        u = inputs[0]
        dy_part = jnp.moveaxis(_slice(dy, i, chunk), 1, 0).astype(A.dtype)  # [chunk, b, k, d]

        def again(h, now):
            after, _ = _step(A, h, now)
            return after, h

        last, before = lax.scan(again, state, inputs, reverse=reverse)  # before: h_{t-1}, [chunk, n, b, k, d]
        start = (g, dA, last)
        (g, dA, _), grads = lax.scan(partial(_step_back, A), start, (*inputs, before, dy_part), reverse=not reverse)
        D = par.D.astype(A.dtype)
        dseq_part, dpar_part = undo((grads[0] + D * dy_part, *grads[1:]))
        dpar_part = dpar_part._replace(D=(dy_part * u).sum((0, 1)).astype(par.D.dtype))
        dseq = jax.tree.map(lambda whole, part: _put_batch_first(whole, part, i), dseq, dseq_part)
        return (g, dA, dseq, jax.tree.map(jnp.add, dpar, dpar_part)), None

    zeros = jax.tree.map(jnp.zeros_like, (seq, par))
    start = (jnp.zeros_like(boundaries[0]), jnp.zeros_like(boundaries[0]), *zeros)
    chunks = (jnp.arange(len(boundaries)), boundaries)
    (_, dA, dseq, dpar), _ = lax.scan(one_chunk, start, chunks, reverse=not reverse)
    dA = jnp.moveaxis(dA.sum(1), 0, -1)  # [k, d, n]
    return dseq, dpar._replace(A=dA.astype(par.A.dtype))


def _step(A: Array, h: Array, now) -> tuple[Array, Array]:
    u, delta, B, C = now  # [b, k, d] twice, [n, b, k] twice
    h = jnp.exp(delta * A) * h + (delta * u) * B[..., None]  # [n, b, k, d]
    return h, (h * C[..., None]).sum(0)


def _step_back(A: Array, carry, now):
    later, dA, h = carry
    u, delta, B, C, before, dy = now
    g = later + dy * C[..., None]  # [n, b, k, d]
    ag = jnp.exp(delta * A) * g
    q = ag * before
    gB = (g * B[..., None]).sum(0)
    dB = (g * (delta * u)).sum(-1)  # [n, b, k]
    dC = (h * dy).sum(-1)
    return (ag, dA + q * delta, before), (delta * gB, u * gB + (q * A).sum(0), dB, dC)


def _keep(seq, par, reverse, chunk):
    y, boundaries = _forward(seq, par, reverse, chunk, keep=True)
    return y, (seq, par, boundaries)


_scan.defvjp(_keep, _backward)

# ------------------------------------------------------------------------------------------------- chunks of sequences


def _over_channels(A: Array, seq: Sequences) -> Array:
    return jnp.moveaxis(A, -1, 0)[:, None].astype(state_dtype(*seq, A))  # [n, 1, k, d]


def _prepare(seq: Sequences, par: Parameters) -> tuple[Array, Array, Array, Array]:
    """One chunk in the state's dtype, time first: u, delta [chunk, b, k, d], B, C [chunk, n, b, k]."""
    dtype = state_dtype(*seq, par.A)
    u, delta = (jnp.moveaxis(x, 1, 0) for x in (seq.u.astype(dtype), step_size(seq, par)))
    B, C = (jnp.transpose(x.astype(dtype), (1, 3, 0, 2)) for x in (seq.B, seq.C))
    return u, delta, B, C


def _slice(x: Array, i: Array, chunk: int) -> Array:
    return lax.dynamic_slice_in_dim(x, i * chunk, chunk, 1)


def _take(seq: Sequences, i: Array, chunk: int) -> Sequences:
    return Sequences(*(_slice(x, i, chunk) for x in seq))


def _put_batch_first(whole: Array, part: Array, i: Array) -> Array:
    return lax.dynamic_update_slice_in_dim(whole, part.astype(whole.dtype), i * part.shape[1], 1)


def _put(whole: Array, part: Array, i: Array) -> Array:
    return _put_batch_first(whole, jnp.moveaxis(part, 0, 1), i)

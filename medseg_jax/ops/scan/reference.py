"""The two plain forms of the selective scan, differentiated by JAX: what the fast backends are tested against.

h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t,    y_t = C_t . h_t + D u_t

Both keep every state for the backward pass, n times the memory of u.
"""

import jax.numpy as jnp
from jax import Array, lax

from medseg_jax.ops.scan.problem import Parameters, Sequences, state_dtype, step_size


def reference(seq: Sequences, par: Parameters, reverse: bool) -> Array:
    """Step by step, by `lax.scan` -> y [b, l, k, d] in the state's dtype."""
    u, delta, A, B, C = _inputs(seq, par)

    def step(h, now):
        u, delta, B, C = now  # [b, k, d] twice, [b, k, n] twice
        h = jnp.exp(delta[..., None] * A) * h + (delta * u)[..., None] * B[:, :, None]  # [b, k, d, n]
        return h, (h * C[:, :, None]).sum(-1)

    b, _, k, d = u.shape
    start = jnp.zeros((b, k, d, A.shape[-1]), u.dtype)
    over_time = tuple(jnp.moveaxis(x, 1, 0) for x in (u, delta, B, C))
    _, y = lax.scan(step, start, over_time, reverse=reverse)
    return jnp.moveaxis(y, 0, 1) + par.D.astype(u.dtype) * u


def associative(seq: Sequences, par: Parameters, reverse: bool) -> Array:
    """All steps at once, by `lax.associative_scan` over pairs (decay, input) -> y [b, l, k, d] in the state's dtype."""
    u, delta, A, B, C = _inputs(seq, par)

    def then(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    pairs = jnp.exp(delta[..., None] * A), (delta * u)[..., None] * B[:, :, :, None]  # [b, l, k, d, n]
    _, h = lax.associative_scan(then, pairs, axis=1, reverse=reverse)
    return (h * C[:, :, :, None]).sum(-1) + par.D.astype(u.dtype) * u


def _inputs(seq: Sequences, par: Parameters) -> tuple[Array, ...]:
    dtype = state_dtype(*seq, par.A)
    return seq.u.astype(dtype), step_size(seq, par), *(x.astype(dtype) for x in (par.A, seq.B, seq.C))

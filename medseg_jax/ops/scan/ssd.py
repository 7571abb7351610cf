"""Mamba-2's state-space duality: a scan whose decay is one scalar a head and step, done as matrix products.

Within a chunk of q steps y is a masked attention, between chunks the state is carried:

    s_ij = exp(sum of the log decays after j up to i) for j <= i, else 0
    y_i = sum_j s_ij (C_i . B_j) x_j  +  exp(sum up to i) C_i . S,     S <- exp(sum of all) S + sum_j s_qj B_j x_j

Every exponent is a difference of cumulative sums, masked before it is exponentiated, so nothing overflows whatever the
decay. Source: Dao and Gu, "Transformers are SSMs" (2024), section 6; spec section 5.9.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from medseg_jax.ops.scan.problem import check_array


def ssd(
    x: Float[Array, "b l h p"],
    log_decay: Float[Array, "b l h"],
    B: Float[Array, "b l k n"],
    C: Float[Array, "b l k n"],
    *,
    chunk: int = 128,
) -> Float[Array, "b l h p"]:
    """S_t = exp(log_decay_t) S_{t-1} + B_t x_t^T, y_t = S_t^T C_t, for each head; S starts at zero.

    Args:
        x: input of each head, already times its step size (Mamba-2's delta_t x_t); p is the head's width.
        log_decay: at most 0 (Mamba-2's delta_t A).
        B, C: input and output maps; h / k neighbouring heads share one of the k groups.
        chunk: steps that are done as one matrix product. The chunks' inner values are computed again in the backward
            pass; one state a chunk is kept.

    Returns:
        y in x's dtype; sums, decays and states are float32 (float64 for float64 inputs).

    Raises:
        ValueError: shapes or dtypes do not fit, or the chunk has no step.
    """
    for name, a, axes in (("x", x, 4), ("log_decay", log_decay, 3), ("B", B, 4), ("C", C, 4)):
        check_array(name, a, axes)
    if chunk < 1:
        raise ValueError(f"chunk is the number of steps done as one product, at least 1, not {chunk}")
    if 0 in (*x.shape, *B.shape):
        raise ValueError(f"x {x.shape} and B {B.shape} may not be empty")
    (b, length, h, p), (k, n) = x.shape, B.shape[2:]
    if log_decay.shape != (b, length, h) or B.shape != (b, length, k, n) or B.shape != C.shape or h % k:
        raise ValueError(
            f"log_decay {log_decay.shape}, B {B.shape}, C {C.shape} do not fit x {x.shape}: expected "
            f"{(b, length, h)} and twice {(b, length)} + (groups that divide the {h} heads, states)"
        )
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    q = min(chunk, length)
    more = -length % q

    def chunks(a):  # [b, l, ...] -> [l / q, b, q, ...]; an appended step adds nothing and does not decay
        a = jnp.pad(a, ((0, 0), (0, more)) + ((0, 0),) * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(b, -1, q, *a.shape[2:]), 1, 0)

    heads = chunks(x.reshape(b, length, k, h // k, p)), chunks(log_decay.reshape(b, length, k, h // k))
    causal = jnp.tril(jnp.ones((q, q), bool))

    def product(spec, *operands):
        return jnp.einsum(spec, *operands, precision="highest", preferred_element_type=dtype)

    @jax.checkpoint
    def one_chunk(state, now):  # state [b, k, g, n, p] with g = h / k
        x, log_decay, B, C = (a.astype(dtype) for a in now)
        total = jnp.cumsum(jnp.moveaxis(log_decay, 1, -1), -1)  # [b, k, g, q]
        between = total[..., :, None] - total[..., None, :]
        decay = jnp.exp(jnp.where(causal, between, -jnp.inf))  # [b, k, g, q, q]
        scores = product("bikn,bjkn->bkij", C, B)[:, :, None] * decay
        y = product("bkgij,bjkgp->bikgp", scores, x)
        y += product("bikn,bkgi,bkgnp->bikgp", C, jnp.exp(total), state)
        state = jnp.exp(total[..., -1])[..., None, None] * state + product(
            "bjkn,bkgj,bjkgp->bkgnp", B, decay[..., -1, :], x
        )
        return state, y

    start = jnp.zeros((b, k, h // k, n, p), dtype)
    _, y = lax.scan(one_chunk, start, (*heads, chunks(B), chunks(C)))
    return jnp.moveaxis(y, 0, 1).reshape(b, -1, h, p)[:, :length].astype(x.dtype)

"""Gaussian fields with Kac-Murdock-Szegő covariance on a grid: inverse, determinant, Cholesky factor, KL.

K_n(rho)_ij = rho^|i-j| is the correlation of a stationary AR(1) chain; a field on a grid has the Kronecker product of
one such matrix an axis, so its correlation falls with the city-block distance. In closed form, along one axis:

    K^-1 = tridiagonal(-rho | 1, 1 + rho^2, ..., 1 + rho^2, 1 | -rho) / (1 - rho^2)
    det K = (1 - rho^2)^(n - 1)
    L: x_0 = z_0,  x_t = rho x_(t-1) + sqrt(1 - rho^2) z_t          (K = L L^T; its inverse is two terms a voxel)

A field [..., *s] has its grid on the last `dim` axes, two or three of any length; those before are independent fields.
Arithmetic has the type of the field: give float32 or float64, since 1 - rho^2 cancels digits. 0 <= rho < 1, a number or
a traced scalar. Everything takes memory in proportion to the voxels, and so does the time of all but `correlate`.
A window cut out of such a field is such a field: training on patches needs nothing else.

Source: Kac, Murdock, Szegő 1953; Tadokoro et al. 2026, "A Bayesian Approach to Segmentation with Noisy Labels via
Spatially Correlated Distributions".
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

type Field = Float[Array, "..."]
type Scalar = float | Array


def precision_times(x: Field, rho: Scalar, dim: int) -> Field:
    """K^-1 x."""
    for axis in range(-dim, 0):
        x = _tridiagonal(x, rho, 1.0, axis)
    return x


def whiten(x: Field, rho: Scalar, dim: int) -> Field:
    """L^-1 x: the innovations of the field, independent and of variance 1 where x is a sample of K."""
    for axis in range(-dim, 0):
        change = (x - rho * _shift(x, 1, axis)) / jnp.sqrt(1 - jnp.square(rho))
        x = jnp.where(_position(x, axis) == 0, x, change)
    return x


def correlate(z: Field, rho: Scalar, dim: int) -> Field:
    """L z, the inverse of `whiten`: a sample of K where z is white noise.

    One small matrix product an axis. The recurrence itself, unrolled by doubling, is fused by XLA into something twenty
    times slower, and as a loop it is no faster on a CPU and far slower elsewhere.
    """
    for axis in range(-dim, 0):
        factor = cholesky(z.shape[axis], rho, z.dtype)
        product = jnp.tensordot(factor, z, (1, z.ndim + axis), precision="highest")  # [n, ...]
        z = jnp.moveaxis(product, 0, z.ndim + axis)
    return z


def cholesky(n: int, rho: Scalar, dtype: Any = jnp.float32) -> Float[Array, "n n"]:
    """L of one axis: L_i0 = rho^i, L_ij = sqrt(1 - rho^2) rho^(i - j) for 1 <= j <= i."""
    lag = np.subtract.outer(np.arange(n), np.arange(n))
    powers = jnp.where(lag >= 0, jnp.asarray(rho, dtype) ** np.maximum(lag, 0), 0)
    return powers * jnp.where(np.arange(n) == 0, 1, jnp.sqrt(1 - jnp.square(jnp.asarray(rho, dtype))))


def quadratic(x: Field, rho: Scalar, dim: int) -> Array:
    """x^T K^-1 x of each field [...], as a sum of squares, which keeps its digits at high rho."""
    return jnp.square(whiten(x, rho, dim)).sum(tuple(range(-dim, 0)))


def trace(g: Field, rho: Scalar, rho_g: Scalar, dim: int) -> Array:
    """tr(diag(g) K(rho_g) diag(g) K(rho)^-1) of each field [...]."""
    x = g
    for axis in range(-dim, 0):
        x = _tridiagonal(x, rho, rho_g, axis)
    return (g * x).sum(tuple(range(-dim, 0)))


def log_determinant(shape: Sequence[int], rho: Scalar, dtype: Any = jnp.float32) -> Array:
    """log det K of a grid of this shape."""
    size = math.prod(shape)
    return sum(size // n * (n - 1) for n in shape) * jnp.log1p(-jnp.square(jnp.asarray(rho, dtype)))


def kl(m: Field, g: Field, mu: Scalar, s: Scalar, rho: Scalar, rho_g: Scalar, dim: int) -> Array:
    """KL( N(m, diag(g) K(rho_g) diag(g)) || N(mu, s^2 K(rho)) ) of each field [...], in nats.

    Args:
        m, g: mean and standard deviation of every voxel, [..., *s].
        mu, s: mean and standard deviation of the prior.
    """
    return 0.5 * (cross_term(m, g, mu, s, rho, rho_g, dim) - entropy_term(g, rho_g, dim)) - 0.5 * _size(g, dim)


def kl_of_innovations(u: Field, g: Field, s: Scalar, rho: Scalar, rho_g: Scalar, dim: int) -> Array:
    """`kl` for m = mu + s L u: the quadratic form is then the sum of squares of u, and mu falls out."""
    form = jnp.square(u).sum(tuple(range(-dim, 0)))
    cross = trace(g, rho, rho_g, dim) / jnp.square(s) + form + _log_determinant_of_prior(g, s, rho, dim)
    return 0.5 * (cross - entropy_term(g, rho_g, dim)) - 0.5 * _size(g, dim)


def cross_term(m: Field, g: Field, mu: Scalar, s: Scalar, rho: Scalar, rho_g: Scalar, dim: int) -> Array:
    """-2 E_q[log p] - N log 2 pi = (tr + quadratic form) / s^2 + log det Sigma of each field [...]."""
    spread = (trace(g, rho, rho_g, dim) + quadratic(m - mu, rho, dim)) / jnp.square(s)
    return spread + _log_determinant_of_prior(g, s, rho, dim)


def entropy_term(g: Field, rho_g: Scalar, dim: int) -> Array:
    """log det Gamma of each field [...]."""
    return 2 * jnp.log(g).sum(tuple(range(-dim, 0))) + log_determinant(g.shape[-dim:], rho_g, g.dtype)


def _log_determinant_of_prior(g: Field, s: Scalar, rho: Scalar, dim: int) -> Array:
    return 2 * _size(g, dim) * jnp.log(s) + log_determinant(g.shape[-dim:], rho, g.dtype)


def _size(x: Field, dim: int) -> int:
    return math.prod(x.shape[-dim:])


def _position(x: Field, axis: int) -> Array:
    """Index along `axis`, broadcastable to x."""
    return jax.lax.broadcasted_iota(
        jnp.int32, tuple(n if a == x.ndim + axis else 1 for a, n in enumerate(x.shape)), x.ndim + axis
    )


def _shift(x: Field, step: int, axis: int) -> Field:
    """x[t - step] along an axis, 0 before the beginning; backwards for a negative step."""
    width = [(0, 0)] * x.ndim
    width[axis] = (max(step, 0), max(-step, 0))
    n = x.shape[axis]
    kept = jax.lax.slice_in_dim(x, max(-step, 0), n - max(step, 0), axis=axis % x.ndim)
    return jnp.pad(kept, width)


def _tridiagonal(x: Field, rho: Scalar, rho_g: Scalar, axis: int) -> Field:
    """(K(rho)^-1 o K(rho_g)) x along one axis (o: entry by entry); rho_g = 1 gives K(rho)^-1 x."""
    n, rest = x.shape[axis], 1 - jnp.square(rho)
    if n == 1:
        return x
    position = _position(x, axis)
    diagonal = jnp.where((position == 0) | (position == n - 1), 1, 1 + jnp.square(rho)).astype(x.dtype)
    return (diagonal * x - rho * rho_g * (_shift(x, 1, axis) + _shift(x, -1, axis))) / rest

"""Kac-Murdock-Szegő fields against dense matrices, in two and three dimensions."""

from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_jax.ops import kms

GRIDS = st.sampled_from([(1, 1), (1, 5), (4, 4), (3, 7), (2, 3, 4), (3, 1, 2)])
RHOS = st.sampled_from([0.0, 0.1, 0.5, 0.75, 0.9, 0.99])


def dense(shape, rho):
    """Kronecker product of one K an axis, row-major voxels."""
    factors = [float(rho) ** np.abs(np.subtract.outer(np.arange(n), np.arange(n))) for n in shape]
    return reduce(np.kron, factors)


@settings(max_examples=40, deadline=None)
@given(shape=GRIDS, rho=RHOS, rho_g=RHOS, seed=st.integers(0, 100))
def test_everything_equals_the_dense_matrices(shape, rho, rho_g, seed):
    rng = np.random.default_rng(seed)
    dim, n = len(shape), int(np.prod(shape))
    m, z = rng.normal(-2, 1, shape), rng.normal(size=shape)
    g, mu, s = rng.uniform(0.5, 1.5, shape), -1.5, 1.3
    prior, noise = dense(shape, rho), dense(shape, rho_g)
    sigma, gamma = s**2 * prior, np.diag(g.ravel()) @ noise @ np.diag(g.ravel())
    inverse = np.linalg.inv(sigma)
    d = (m - mu).ravel()
    kl = np.trace(inverse @ gamma) + d @ inverse @ d - n + np.linalg.slogdet(sigma)[1] - np.linalg.slogdet(gamma)[1]

    def close(found, expected):  # of the largest value: at rho = .99 the matrices have condition numbers of 1e9
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8 * max(1, np.abs(expected).max()))

    with jax.enable_x64(True):
        close(kms.kl(m, jnp.asarray(g), mu, s, rho, rho_g, dim), kl / 2)
        inverted = np.linalg.solve(prior, z.ravel()).reshape(shape)
        close(kms.precision_times(jnp.asarray(z), rho, dim), inverted)
        sample = (np.linalg.cholesky(prior) @ z.ravel()).reshape(shape)
        close(kms.correlate(jnp.asarray(z), rho, dim), sample)
        close(kms.whiten(jnp.asarray(sample), rho, dim), z)
        innovations = kms.whiten((jnp.asarray(m) - mu) / s, rho, dim)
        close(kms.kl_of_innovations(innovations, jnp.asarray(g), s, rho, rho_g, dim), kl / 2)


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 100))
def test_flips_change_no_term(seed):
    rng = np.random.default_rng(seed)
    m, g = rng.normal(-2, 1, (5, 6)), rng.uniform(0.5, 1.5, (5, 6))
    with jax.enable_x64(True):
        value = kms.kl(m, jnp.asarray(g), -2, 1.3, 0.75, 0.6, 2)
        for axis in (0, 1):
            flipped = kms.kl(np.flip(m, axis), jnp.asarray(np.flip(g, axis)), -2, 1.3, 0.75, 0.6, 2)
            np.testing.assert_allclose(flipped, value, rtol=1e-12)


def test_a_window_is_a_field_of_the_same_kind():
    whole = dense((4, 6), 0.7).reshape(4, 6, 4, 6)
    np.testing.assert_allclose(whole[1:3, 2:5, 1:3, 2:5].reshape(6, 6), dense((2, 3), 0.7))


@pytest.mark.parametrize("rho", [0.75, 0.95])
def test_float32_keeps_five_digits(rho):
    rng = np.random.default_rng(0)
    m, g = rng.normal(-2, 1, (24, 24)), rng.uniform(0.5, 1.5, (24, 24))
    single = kms.kl(jnp.asarray(m, jnp.float32), jnp.asarray(g, jnp.float32), -2.0, 1.3, rho, rho, 2)
    with jax.enable_x64(True):
        double = kms.kl(m, jnp.asarray(g), -2, 1.3, rho, rho, 2)
    np.testing.assert_allclose(single, double, rtol=2e-5)


def test_the_kl_vanishes_where_posterior_and_prior_agree():
    shape = (2, 3, 8, 9)
    value = kms.kl(jnp.full(shape, -2.0), jnp.full(shape, 1.3), -2.0, 1.3, 0.75, 0.75, 2)
    np.testing.assert_allclose(value, np.zeros((2, 3)), atol=1e-3)

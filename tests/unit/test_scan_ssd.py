"""Mamba-2's scan against its recurrence in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medseg_jax.ops.scan import ssd


def problem(b=2, length=11, h=4, p=3, k=2, n=5, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (b, length, h, p), (b, length, k, n), (b, length, k, n)
    x, B, C = (rng.normal(size=s) for s in shapes)
    return x, -rng.uniform(0, 2, size=(b, length, h)), B, C


def by_definition(x, log_decay, B, C):
    (b, length, h, p), (k, n) = x.shape, B.shape[2:]
    B, C = (np.repeat(a, h // k, 2) for a in (B, C))
    state, y = np.zeros((b, h, n, p)), np.zeros_like(x)
    for t in range(length):
        state = np.exp(log_decay[:, t])[..., None, None] * state + np.einsum("bhn,bhp->bhnp", B[:, t], x[:, t])
        y[:, t] = np.einsum("bhn,bhnp->bhp", C[:, t], state)
    return y


@pytest.mark.parametrize("chunk", [1, 4, 11, 128])
def test_the_definition(chunk, x64):
    arrays = problem()
    found = ssd(*map(jnp.asarray, arrays), chunk=chunk)
    np.testing.assert_allclose(found, by_definition(*arrays), rtol=1e-12, atol=1e-12)


def test_gradients_do_not_depend_on_the_chunk(x64):
    arrays = tuple(map(jnp.asarray, problem()))

    def gradients(chunk):
        return jax.jit(jax.grad(lambda *a: jnp.sin(ssd(*a, chunk=chunk)).sum(), (0, 1, 2, 3)))(*arrays)

    for a, b in zip(gradients(1), gradients(4), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_equal_decays_make_it_a_selective_scan(x64):
    """With p = 1 and one decay for all states of a head, Mamba-1's scan gives the same."""
    from medseg_jax.ops.scan import selective_scan

    rng = np.random.default_rng(3)
    u, delta = rng.normal(size=(1, 9, 2)), rng.uniform(-2, 1, size=(1, 9, 2))
    A = -np.array([0.5, 1.5])
    _, _, B, C = map(jnp.asarray, problem(b=1, length=9, k=2, n=5))
    step = np.log1p(np.exp(delta))
    ours = ssd(jnp.asarray(step * u)[..., None], jnp.asarray(step * A), B, C, chunk=4)[..., 0]
    other = selective_scan(
        *map(jnp.asarray, (u, delta, np.repeat(A[:, None], 5, 1))), B, C, jnp.zeros(2), jnp.zeros(2), backend="chunked"
    )
    np.testing.assert_allclose(ours, other, rtol=1e-11, atol=1e-11)


def test_strong_decay_and_half_precision():
    x, log_decay, B, C = (jnp.asarray(a, jnp.bfloat16) for a in problem(length=40))
    y, undo = jax.vjp(lambda *a: ssd(*a, chunk=16), x, 200 * log_decay, B, C)
    assert y.dtype == jnp.bfloat16
    for a in (y, *undo(jnp.ones_like(y))):
        assert jnp.isfinite(a).all()


def test_misuse_is_named():
    x, log_decay, B, C = map(jnp.asarray, problem())
    with pytest.raises(ValueError, match="do not fit x"):
        ssd(x, log_decay, B[:, :, :, :2], C)
    with pytest.raises(ValueError, match="do not fit x"):
        ssd(x[:, :, :3], log_decay[:, :, :3], B, C)
    with pytest.raises(ValueError, match="x has dtype int32"):
        ssd(x.astype(jnp.int32), log_decay, B, C)
    with pytest.raises(ValueError, match=r"B has shape .* expected 4 axes"):
        ssd(x, log_decay, B[:, :, 0], C)
    for chunk in (0, -1):
        with pytest.raises(ValueError, match=f"at least 1, not {chunk}"):
            ssd(x, log_decay, B, C, chunk=chunk)
    for empty in ((x, log_decay, B[:, :, :0], C[:, :, :0]), tuple(a[:, :0] for a in (x, log_decay, B, C))):
        with pytest.raises(ValueError, match="may not be empty"):
            ssd(*empty)

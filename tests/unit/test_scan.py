"""The selective scan against the recurrence written out in NumPy float64, and the laws that it obeys."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export

from medseg_jax.ops.scan import chunked as portable
from medseg_jax.ops.scan import selective_scan

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")
FAST = ("associative", "chunked")


def problem(b=2, length=7, k=2, d=3, n=4, ku=None, r=None, seed=0, low=-4.0):
    rng = np.random.default_rng(seed)
    c = k * d
    arrays = {
        "u": rng.normal(size=(b, length, (ku or k) * d)),
        "delta": rng.uniform(low, 2, size=(b, length, k * (r or d))),
        "A": -rng.uniform(0.5, 4, size=(c, n)),
        "B": rng.normal(size=(b, length, k, n)),
        "C": rng.normal(size=(b, length, k, n)),
        "D": rng.normal(size=c),
        "delta_bias": rng.uniform(-2, 1, size=c),
    }
    return arrays | ({"delta_weight": rng.normal(size=(k, r, d))} if r else {})


def by_definition(u, delta, A, B, C, D, delta_bias, delta_weight=None, reverse=()):
    """Loops over everything but channels and states."""
    (b, length, _), (c, n), k = u.shape, A.shape, B.shape[2]
    d = c // k
    y = np.zeros((b, length, c))
    for row, i in itertools.product(range(b), range(k)):
        own = slice(i * d, (i + 1) * d)
        j = i % (u.shape[2] // d)
        source, h = u[row, :, j * d : (j + 1) * d], np.zeros((d, n))
        for t in range(length - 1, -1, -1) if reverse and reverse[i] else range(length):
            raw = delta[row, t].reshape(k, -1)[i]
            raw = raw if delta_weight is None else raw @ delta_weight[i]
            raw = raw + delta_bias[own]
            step = np.where(raw > 20, raw, np.log1p(np.exp(np.minimum(raw, 20))))
            h = np.exp(step[:, None] * A[own]) * h + (step * source[t])[:, None] * B[row, t, i]
            y[row, t, own] = h @ C[row, t, i] + D[own] * source[t]
    return y


def on(arrays, dtype):
    return {name: jnp.asarray(x, dtype) for name, x in arrays.items()}


def gradients(arrays, weight, **options):
    """Gradients of sum(y * weight) by every input."""

    def loss(arrays):
        return (selective_scan(**arrays, **options).astype(weight.dtype) * weight).sum()

    return jax.jit(jax.grad(loss))(arrays)


@pytest.mark.parametrize("backend", ["reference", *FAST])
@pytest.mark.parametrize("reverse", [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("r", [None, 2])
def test_the_definition(backend, reverse, r, x64):
    for length in (1, 7):
        arrays = problem(length=length, r=r)
        y = selective_scan(**on(arrays, jnp.float64), reverse=reverse, backend=backend, chunk=4)
        np.testing.assert_allclose(y, by_definition(**arrays, reverse=reverse), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 16, 33])
@pytest.mark.parametrize("reverse", [(False, False, True, True), (True, False, True, False)])
@pytest.mark.parametrize("r", [None, 2])
def test_the_hand_written_gradient_in_double_precision(length, reverse, r, x64):
    arrays = on(problem(length=length, k=4, ku=2, r=r), jnp.float64)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, length, 12)))
    expected = gradients(arrays, weight, reverse=reverse, backend="reference")
    for chunk in (4, None):
        found = gradients(arrays, weight, reverse=reverse, backend="chunked", chunk=chunk)
        assert set(found) == set(arrays)
        for name in found:
            scale = float(jnp.abs(expected[name]).max())
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-12 * max(scale, 1), err_msg=name)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_reversing_time_is_flipping_in_and_out(length, k, d, n, seed):
    arrays = on(problem(b=1, length=length, k=k, d=d, n=n, seed=seed), jnp.float32)
    flipped = {name: x[:, ::-1] if x.ndim > 2 else x for name, x in arrays.items()}
    found = selective_scan(**arrays, reverse=True, backend="chunked", chunk=4)
    there_and_back = selective_scan(**flipped, backend="chunked", chunk=4)[:, ::-1]
    np.testing.assert_allclose(found, there_and_back, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["chunked", pytest.param("associative", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("length", "d"), [(144, 128), (65, 192)])
def test_single_precision(backend, length, d):
    arrays = problem(b=1, length=length, k=2, d=d, n=16)
    flags, weight = (False, True), np.random.default_rng(1).normal(size=(1, length, 2 * d))
    with jax.enable_x64(True):
        exact = on(arrays, jnp.float64)
        y = selective_scan(**exact, reverse=flags, backend="reference")
        expected = gradients(exact, jnp.asarray(weight), reverse=flags, backend="reference") | {"y": y}
        expected = jax.tree.map(np.asarray, expected)
    single = on(arrays, jnp.float32)
    found = gradients(single, jnp.float32(weight), reverse=flags, backend=backend)
    found["y"] = selective_scan(**single, reverse=flags, backend=backend)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-5 * np.abs(expected[name]).max())


@pytest.mark.slow
@pytest.mark.parametrize(("length", "d"), [(1, 128), (9216, 192), (2304, 384), (576, 768), (144, 1536), (1023, 200)])
def test_single_precision_at_the_sizes_of_real_networks(length, d):
    arrays = problem(b=1, length=length, k=2, d=d, n=16)
    flags, weight = (False, True), np.random.default_rng(1).normal(size=(1, length, 2 * d))
    with jax.enable_x64(True):
        exact = on(arrays, jnp.float64)
        y = np.asarray(selective_scan(**exact, reverse=flags, backend="reference"))
        # In double precision the hand-written gradient is the reference's to 1e-12, at a thousandth of its memory.
        expected = jax.tree.map(np.asarray, gradients(exact, jnp.asarray(weight), reverse=flags, backend="chunked"))
    single = on(arrays, jnp.float32)
    found = gradients(single, jnp.float32(weight), reverse=flags, backend="chunked")
    found["y"] = selective_scan(**single, reverse=flags, backend="chunked")
    for name, value in (expected | {"y": y}).items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)


@pytest.mark.parametrize("backend", ["chunked", pytest.param("associative", marks=pytest.mark.slow)])
def test_half_precision_inputs_are_scanned_in_single_precision(backend):
    arrays = on(problem(b=1, length=300, d=8, n=16), jnp.bfloat16) | on({"A": problem(d=8, n=16)["A"]}, jnp.float32)
    widened = {name: x.astype(jnp.float32) for name, x in arrays.items()}
    y, exact = (selective_scan(**x, reverse=(False, True), backend=backend) for x in (arrays, widened))
    assert y.dtype == jnp.bfloat16
    # Only the result is rounded: half a unit in the last of 8 bits.
    np.testing.assert_allclose(np.float32(y), exact, rtol=2**-8, atol=1e-5)
    weight = jnp.ones_like(exact)
    found, expected = (gradients(x, weight, reverse=(False, True), backend=backend) for x in (arrays, widened))
    for name in NAMES:
        assert found[name].dtype == arrays[name].dtype
        scale = float(jnp.abs(expected[name]).max())
        np.testing.assert_allclose(np.float32(found[name]), expected[name], rtol=0, atol=2**-6 * scale, err_msg=name)


@pytest.mark.parametrize("r", [None, 1])
def test_gradients_of_half_precision_parameters_do_not_stand_still(r):
    """They are sums over thousands of steps: of ones in bfloat16 such a sum stops at 256."""
    arrays = on(problem(b=1, length=16384, k=1, d=2, n=1, r=r), jnp.float32)
    arrays |= {"u": jnp.abs(arrays["u"]), "B": jnp.abs(arrays["B"]), "C": jnp.abs(arrays["C"])}
    parameters = ["D", "delta_bias", *(["delta_weight"] if r else [])]
    half = arrays | {name: arrays[name].astype(jnp.bfloat16) for name in parameters}
    exact = half | {name: half[name].astype(jnp.float32) for name in half}
    weight = jnp.ones((1, 16384, 2))
    found, expected = (gradients(x, weight, backend="chunked") for x in (half, exact))
    for name, gradient in found.items():
        assert gradient.dtype == half[name].dtype
        np.testing.assert_allclose(np.float32(gradient), expected[name], rtol=2**-8, atol=1e-4, err_msg=name)


@pytest.mark.parametrize("backend", ["reference", *FAST])
def test_groups_that_share_a_sequence_add_their_gradients_in_a_fixed_order(backend):
    """No scatter, which a GPU may do with atomics: neither for one sequence of four groups nor for two in turns."""
    for ku, reverse in ((1, False), (2, (False, False, True, True)), (2, (False, True, True, False))):
        arrays = on(problem(length=40, k=4, ku=ku), jnp.float32)
        step = jax.jit(partial(gradients, reverse=reverse, backend=backend))
        assert "scatter" not in step.lower(arrays, jnp.ones((2, 40, 12))).as_text()


@pytest.mark.parametrize("backend", ["chunked", pytest.param("associative", marks=pytest.mark.slow)])
def test_decay_that_underflows_leaves_all_finite(backend):
    arrays = on(problem(b=1, length=257, k=1, d=4, n=2), jnp.float32)
    arrays |= {"delta": jnp.full_like(arrays["delta"], 20.0), "A": jnp.full_like(arrays["A"], -16.0)}
    y = selective_scan(**arrays, backend=backend)
    assert jnp.isfinite(y).all()
    # exp(-320) is 0: the state is the last input alone.
    step = 20 + arrays["delta_bias"]
    step = jnp.where(step > 20, step, jnp.log1p(jnp.exp(step)))
    alone = (arrays["B"] * arrays["C"]).sum(-1) * step * arrays["u"] + arrays["D"] * arrays["u"]
    np.testing.assert_allclose(y, alone, rtol=1e-5, atol=1e-4)
    for name, gradient in gradients(arrays, jnp.ones_like(y), backend=backend).items():
        assert jnp.isfinite(gradient).all(), name
    assert (gradients(arrays, jnp.ones_like(y), backend=backend)["A"] == 0).all()


@pytest.mark.slow
def test_a_sequence_of_65536_stays_finite():
    arrays = on(problem(b=1, length=65536, k=1, d=8, n=2), jnp.float32)
    for strong in (False, True):
        if strong:
            arrays |= {"delta": jnp.full_like(arrays["delta"], 20.0), "A": jnp.full_like(arrays["A"], -16.0)}
        y = selective_scan(**arrays, backend="chunked")
        assert jnp.isfinite(y).all()
        for name, gradient in gradients(arrays, jnp.ones_like(y), backend="chunked").items():
            assert jnp.isfinite(gradient).all(), name


def test_chunk_length_changes_nothing_but_memory():
    arrays = on(problem(length=96, d=8, n=16), jnp.float32)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, 96, 16)), jnp.float32)
    expected = gradients(arrays, weight, backend="chunked", chunk=96)
    for chunk in (16, 32, 64):
        found = gradients(arrays, weight, backend="chunked", chunk=chunk)
        for name in NAMES:
            scale = float(jnp.abs(expected[name]).max())
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-6 * scale, err_msg=name)


@pytest.mark.parametrize("r", [None, 2])
@pytest.mark.parametrize(
    ("b", "step", "blocks"),
    [(6, 200, (3, 32)), (5, 200, (1, 32)), (2, 32, (1, 16)), (2, 8, (1, 32)), (3, 1000, (3, 32))],
)
def test_a_cpu_takes_rows_and_channels_in_blocks(b, step, blocks, r, x64, monkeypatch):
    monkeypatch.setattr(portable, "STEP", step)
    assert portable._block(b, 32, step // 2) == blocks
    arrays = on(problem(b=b, length=9, k=2, d=32, n=1, ku=1, r=r), jnp.float64)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(b, 9, 64)))
    options = {"reverse": (False, True)}
    jax.clear_caches()  # the size of a step is no argument
    for found, expected in [
        [call(backend=name, **options) for name in ("chunked", "reference")]
        for call in (partial(selective_scan, **arrays), partial(gradients, arrays, weight))
    ]:
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-12), found, expected)


def test_same_bits_every_time():
    arrays = on(problem(length=40, d=8, n=16), jnp.float32)
    weight = jnp.ones((2, 40, 16))
    first, second = (gradients(arrays, weight, backend="chunked") for _ in range(2))
    for name in NAMES:
        assert (first[name] == second[name]).all()


@pytest.mark.parametrize("backend", ["chunked", pytest.param("associative", marks=pytest.mark.slow)])
def test_vmap_over_everything_and_over_rows(backend):
    many = [on(problem(length=9, seed=seed), jnp.float32) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *many)

    def run(arrays):
        y, undo = jax.vjp(lambda a: selective_scan(**a, reverse=(True, False), backend=backend, chunk=4), arrays)
        return y, undo(jnp.ones_like(y))[0]

    found = jax.vmap(run)(stacked)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *map(run, many))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)
    shared = {name: many[0][name] for name in ("A", "D", "delta_bias")}
    rows = {name: stacked[name] for name in ("u", "delta", "B", "C")}
    y = jax.vmap(lambda rows: selective_scan(**rows, **shared, backend=backend))(rows)
    folded = {name: x.reshape(-1, *x.shape[2:]) for name, x in rows.items()}
    together = selective_scan(**folded, **shared, backend=backend)
    np.testing.assert_allclose(y.reshape(together.shape), together, rtol=1e-5, atol=1e-5)


def test_the_backward_pass_keeps_chunk_boundaries_only():
    shapes = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32) for name, x in problem(1, 1024, 1, 16, 16).items()}

    def memory(backend):
        step = jax.jit(lambda a: jax.grad(lambda a: selective_scan(**a, backend=backend).sum())(a))
        return step.lower(shapes).compile().memory_analysis().temp_size_in_bytes

    assert memory("chunked") < memory("associative") / 8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": (2, 7, 5)}, "u .* must have 6 channels"),
        ({"u": (2, 7)}, "u has shape .* expected 3 axes"),
        ({"delta": (2, 8, 6)}, r"delta has shape \(2, 8, 6\), expected \(2, 7, 6\)"),
        ({"A": (5, 4)}, "A .* 5 channels for 2 groups"),
        ({"A": (0, 4)}, "A .* 0 channels for 2 groups"),
        ({"B": (2, 7, 0, 4)}, "6 channels for 0 groups"),
        ({"B": (2, 7, 2, 3)}, "B has shape"),
        ({"C": (1, 7, 2, 4)}, "C has shape"),
        ({"D": (3,)}, "D has shape"),
        ({"delta_bias": (2,)}, "delta_bias has shape"),
        ({"delta_weight": (2, 2, 3)}, "delta has shape"),
    ],
)
def test_misuse_is_named(change, message):
    arrays = on(problem(), jnp.float32) | {name: jnp.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        selective_scan(**arrays)


def test_misuse_of_options_is_named():
    arrays = on(problem(), jnp.float32)
    with pytest.raises(ValueError, match="B has dtype int32"):
        selective_scan(**arrays | {"B": jnp.zeros((2, 7, 2, 4), int)})
    with pytest.raises(ValueError, match="3 flags for 2 groups"):
        selective_scan(**arrays, reverse=(True, False, True))
    with pytest.raises(ValueError, match="unknown backend 'cuda'; choose one of auto"):
        selective_scan(**arrays, backend="cuda")
    with pytest.raises(ValueError, match="at least 1"):
        selective_scan(**arrays, chunk=0)
    with pytest.raises(ValueError, match="D is a NoneType, expected an array"):
        selective_scan(**arrays | {"D": None})
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    for alone in ({"rows": "data"}, {"channels": "data"}, {"mesh": mesh}):
        with pytest.raises(ValueError, match="name axes of mesh="):
            selective_scan(**arrays, **alone)


def test_one_flag_may_be_of_numpy():
    arrays = on(problem(), jnp.float32)
    assert (selective_scan(**arrays, reverse=np.bool_(True)) == selective_scan(**arrays, reverse=True)).all()


def test_a_symbolic_length_is_for_the_reference_alone():
    (length,) = export.symbolic_shape("length")
    sizes = {name: [length if size == 7 else size for size in x.shape] for name, x in problem(length=7).items()}
    arrays = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in sizes.items()}
    values = on(problem(length=5), jnp.float32)
    exported = export.export(jax.jit(lambda a: selective_scan(**a, backend="reference")))(arrays)
    np.testing.assert_allclose(exported.call(values), selective_scan(**values), atol=1e-5)
    with pytest.raises(ValueError, match="l is the symbol length"):
        export.export(jax.jit(lambda a: selective_scan(**a)))(arrays)

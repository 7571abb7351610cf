"""The TPU and GPU kernels: interpreted on a CPU against the reference, and compiled where wheels are."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from medseg_jax.ops.scan import selective_scan
from medseg_jax.ops.scan.mosaic_gpu import mosaic_gpu
from medseg_jax.ops.scan.pallas_tpu import pallas_tpu
from medseg_jax.ops.scan.selective import _checked

ROOT = Path(__file__).parents[2]


def problem(b, length, k, d, n, ku, r=None, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    arrays = {
        "u": rng.normal(size=(b, length, ku * d)),
        "delta": rng.uniform(-4, 2, size=(b, length, k * (r or d))),
        "A": -rng.uniform(0.5, 4, size=(k * d, n)),
        "B": rng.normal(size=(b, length, k, n)),
        "C": rng.normal(size=(b, length, k, n)),
        "D": rng.normal(size=k * d),
        "delta_bias": rng.uniform(-2, 1, size=k * d),
    }
    arrays |= {"delta_weight": rng.normal(size=(k, r, d))} if r else {}
    return {name: jnp.asarray(x, jnp.float32 if name == "A" else dtype) for name, x in arrays.items()}


def interpreted(kernel, arrays, reverse, chunk=8):
    seq, par, flags = _checked(**{"delta_weight": None} | arrays, reverse=reverse)
    y = kernel(seq, par, flags, chunk, interpret=True)
    return y.reshape(*y.shape[:2], -1)


def compare(kernel, arrays, reverse, tolerance=1e-5):
    """y and all gradients, relative to their largest value."""
    weight = jnp.asarray(np.random.default_rng(1).normal(size=selective_scan(**arrays).shape), arrays["u"].dtype)
    y, undo = jax.vjp(lambda a: interpreted(kernel, a, reverse), arrays)
    expected, undo_expected = jax.vjp(lambda a: selective_scan(**a, reverse=reverse, backend="reference"), arrays)
    found, wanted = undo(weight)[0] | {"y": y}, undo_expected(weight)[0] | {"y": expected}
    for name in wanted:
        a, b = np.float32(found[name]), np.float32(wanted[name])
        assert found[name].dtype == wanted[name].dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize(
    ("shape", "reverse"),
    [
        ((2, 24, 2, 128, 2, 2), (False, True)),  # one group a block
        ((3, 12, 4, 64, 2, 2), (False, False, True, True)),  # two groups a block, u shared, odd length
        pytest.param((2, 9, 2, 3, 4, 1), (True, False), marks=pytest.mark.slow),  # channels padded
        ((11, 16, 1, 8, 2, 1), True),  # two row tiles, the second of which lacks a row
        pytest.param((1, 9, 2, 8, 2, 2, 3), (False, True), marks=pytest.mark.slow),  # projected delta
    ],
)
def test_tpu_kernels(shape, reverse):
    compare(pallas_tpu, problem(*shape), reverse)


def test_tpu_kernels_take_bfloat16():
    compare(pallas_tpu, problem(2, 16, 2, 8, 2, 1, dtype=jnp.bfloat16), (False, True), 2**-6)


@pytest.mark.parametrize(
    ("shape", "reverse"),
    [
        ((1, 16, 2, 8, 5, 1), (False, True)),  # channels and states padded
        pytest.param((2, 20, 1, 130, 16, 1), True, marks=pytest.mark.slow),
        pytest.param((1, 9, 1, 8, 20, 1), False, marks=pytest.mark.slow),  # 20 states run as 32
    ],
)
def test_gpu_kernels(shape, reverse):
    compare(mosaic_gpu, problem(*shape), reverse)


def test_gpu_kernels_take_bfloat16():
    compare(mosaic_gpu, problem(1, 8, 2, 8, 2, 1, dtype=jnp.bfloat16), (False, True), 2**-6)


KERNELS = [pytest.param(pallas_tpu, 2, id="tpu"), pytest.param(mosaic_gpu, 8, id="gpu")]


@pytest.mark.parametrize(("kernel", "n"), KERNELS)
@pytest.mark.parametrize("shared", [("A", "B", "D", "delta_bias"), ()], ids=["rows", "everything"])
def test_vmap_of_kernels(kernel, n, shared):
    """Over rows, where the parameters (and here B too) are shared, and over everything. u is shared by two groups."""
    many = [problem(1, 8, 2, 64, n, 1, seed=seed) for seed in range(2)]
    axes = {name: None if name in shared else 0 for name in many[0]}
    stacked = {name: many[0][name] if name in shared else jnp.stack([a[name] for a in many]) for name in axes}
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, 1, 8, 128)), jnp.float32)

    def run(scan):
        def one(arrays, weight):
            y, undo = jax.vjp(scan, arrays)
            return undo(weight)[0] | {"y": y}

        return jax.jit(jax.vmap(one, in_axes=(axes, 0)))(stacked, weight)

    found = run(lambda a: interpreted(kernel, a, (False, True)))
    expected = run(lambda a: selective_scan(**a, reverse=(False, True), backend="reference"))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)


def test_vmap_folds_into_one_call():
    """Eight mapped single rows fill one tile of the TPU kernel: its grid is that of one row."""
    rows = problem(8, 8, 1, 128, 2, 1)
    shared = {name: rows.pop(name) for name in ("A", "D", "delta_bias")}
    single = {name: x[:, None] for name, x in rows.items()}
    scan = jax.vmap(lambda rows: interpreted(pallas_tpu, rows | shared, False))

    def grids(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "pallas_call":
                yield eqn.params["grid_mapping"].grid
            for inner in jax.extend.core.jaxprs_in_params(eqn.params):
                yield from grids(inner)

    assert list(grids(jax.make_jaxpr(scan)(single).jaxpr)) == [(1, 1, 1)]


def test_what_the_kernels_cannot_take_is_named(x64):
    arrays = {name: x.astype(jnp.float64) for name, x in problem(1, 8, 1, 8, 8, 1).items()}
    for backend in ("pallas_tpu", "mosaic_gpu"):
        with pytest.raises(ValueError, match="use backend='chunked' for float64"):
            selective_scan(**arrays, backend=backend)
    with pytest.raises(ValueError, match=r"up to 32 states, .* not 33 states"):
        selective_scan(**problem(1, 8, 1, 8, 33, 1), backend="mosaic_gpu")
    with pytest.raises(ValueError, match=r"at most 256 states in all, .* chunks of 24"):
        selective_scan(**problem(1, 8, 1, 8, 16, 1), backend="mosaic_gpu", chunk=24)
    with pytest.raises(ValueError, match="multiple of 8 on a TPU"):
        selective_scan(**problem(1, 8, 1, 8, 8, 1), backend="pallas_tpu", chunk=12)
    with pytest.raises(ValueError, match=r"MiB for 512 states, .* use backend='chunked'"):
        selective_scan(**problem(1, 8, 1, 8, 512, 1), backend="pallas_tpu")


# A kernel is slow to interpret: lengths of thousands are left to test_scan.py. They add grid cells, of which these have
# several.
TPU = [(1, 128), (145, 128), (64, 384), (33, 1536), (65, 192)]
GPU = [(1, 128), (33, 192)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "length", "d"), [(pallas_tpu, *shape) for shape in TPU] + [(mosaic_gpu, *shape) for shape in GPU]
)
def test_kernels_at_the_sizes_of_real_networks(kernel, length, d):
    """Against double precision, one group forwards in time and one backwards."""
    arrays, flags = problem(1, length, 2, d, 16, 1), (False, True)
    weight = np.random.default_rng(1).normal(size=(1, length, 2 * d))

    def everything(scan, arrays, weight):
        y, undo = jax.vjp(jax.jit(scan), arrays)
        return jax.tree.map(np.asarray, undo(weight)[0] | {"y": y})

    with jax.enable_x64(True):
        exact = {name: jnp.asarray(x, jnp.float64) for name, x in arrays.items()}
        scan = partial(selective_scan, reverse=flags, backend="chunked")  # the reference to 1e-12 (test_scan.py)
        expected = everything(lambda a: scan(**a), exact, jnp.asarray(weight))
    seq_to_y = partial(interpreted, kernel, reverse=flags, chunk=None)
    found = everything(seq_to_y, arrays, jnp.float32(weight))
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-5 * np.abs(value).max(), err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("kernel", "length"), [(pallas_tpu, 1024), (mosaic_gpu, 64)])
def test_decay_that_underflows_leaves_all_finite(kernel, length):
    """delta 20, A -16: exp(-320) is 0 at each step, so that more steps add nothing but more chunks."""
    arrays = problem(1, length, 1, 8, 2, 1)
    arrays |= {"delta": jnp.full_like(arrays["delta"], 20.0), "A": jnp.full_like(arrays["A"], -16.0)}
    y, undo = jax.vjp(jax.jit(lambda a: interpreted(kernel, a, True, chunk=None)), arrays)
    expected = selective_scan(**arrays, reverse=True, backend="chunked")
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * float(jnp.abs(expected).max()))
    (gradients,) = undo(jnp.ones_like(y))
    for name, gradient in gradients.items():
        assert jnp.isfinite(gradient).all(), name
    assert (gradients["A"] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wheel", "target"),
    [("libtpu", t) for t in ("v5e", "v5p", "v6e", "tpu7x")] + [("jax_cuda13_plugin", "h100")],
)
def test_kernels_compile_for_the_real_target(wheel, target):
    if importlib.util.find_spec(wheel) is None:
        pytest.skip(f"the wheel of {wheel} is not installed")
    command = (sys.executable, str(ROOT / "benchmarks" / "scan.py"), "one", target, "8", "64", "192", "backward")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    if target == "h100":
        assert report["registers"]
        assert report["spill_bytes"] == 0
        return
    forward, backward = (report["bundles_per_step"][kind] for kind in ("forward", "backward"))
    assert len(backward) == 2 * len(forward) > 0  # a pass forward again, one back
    assert max(forward) <= 32
    assert max(map(sum, zip(backward[::2], backward[1::2], strict=True))) <= 100


@pytest.mark.parametrize(
    ("backend", "sides"), [("auto", (2, 2)), ("pallas_tpu", (2, 2)), ("mosaic_gpu", (1, 1))], ids=lambda x: str(x)
)
def test_rows_and_channels_split_over_devices(backend, sides):
    """On four virtual devices: the same y and gradients as on one. (JAX's interpreter of GPU kernels keeps one state
    for all devices of a process, so that kernel runs as the only shard of a mesh of one device.)"""
    code = f"""
import jax, jax.numpy as jnp, numpy as np, sys
sys.path.insert(0, "tests/unit")
from functools import partial
from test_scan import gradients, on, problem
from medseg_jax.ops.scan import mosaic_gpu, pallas_tpu, selective_scan
for kernels in (mosaic_gpu, pallas_tpu):
    name = kernels.__name__.split(".")[-1]
    setattr(kernels, name, partial(getattr(kernels, name), interpret=True))
mesh = jax.make_mesh({sides}, ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
both = {{"rows": "data", "channels": "model"}}
every = [both, {{"rows": "data"}}, {{"channels": "model"}}] if {backend == "auto"} else [both]
for r in (None, 2) if {backend == "auto"} else (None,):
    arrays = on(problem(b=2, length=8, k=2, d=4, n=8 if {backend == "mosaic_gpu"} else 2, ku=1, r=r), jnp.float32)
    weight = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8, 8)), jnp.float32)
    expected = gradients(arrays, weight, reverse=(False, True), backend="reference")
    for split in every:
        options = dict(backend={backend!r}, mesh=mesh, reverse=(False, True), chunk=8, **split)
        y = selective_scan(**arrays, reverse=(False, True), backend="reference")
        np.testing.assert_allclose(jax.jit(partial(selective_scan, **options))(**arrays), y, atol=1e-5)
        found = gradients(arrays, weight, **options)
        for name in arrays:
            np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=f"{{split}} {{name}}")
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | flags
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_mesh_in_use_splits_the_rows():
    """As in training: no argument says so; the result is the same, also where the devices do not divide the rows."""
    code = """
import jax, jax.numpy as jnp, numpy as np, sys
sys.path.insert(0, "tests/unit")
from functools import partial
from test_scan import on, problem
from medseg_jax.ops.scan import selective_scan
from medseg_jax.runtime import sharding
mesh = sharding.make_mesh()
assert mesh.size == 4
for b in (4, 3):
    arrays = on(problem(b=b, length=8, k=2, d=4, n=2, ku=1), jnp.float32)
    scan = partial(selective_scan, reverse=(False, True))
    split = sharding.within(mesh, lambda arrays: scan(**arrays))
    assert "shard_map" in str(jax.make_jaxpr(split)(arrays))
    placed = jax.device_put(arrays, sharding.replicated(mesh))
    np.testing.assert_allclose(jax.jit(split)(placed), scan(**arrays), atol=1e-5)
"""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=os.environ | flags
    )
    assert done.returncode == 0, done.stderr[-2000:]

"""The selective scan against mamba-ssm's reference (golden/mamba_sea/selective_scan.npz): y and all seven gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_files
from medseg_jax.ops.scan import selective_scan
from medseg_jax.ops.scan.mosaic_gpu import mosaic_gpu
from medseg_jax.ops.scan.pallas_tpu import pallas_tpu
from medseg_jax.ops.scan.selective import _checked

NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


@pytest.fixture(scope="module")
def reference(golden):
    recipe = golden_files.load(golden)
    arrays, meta = golden_files.read(golden / "mamba_sea" / "selective_scan.npz")
    inputs = {
        name: golden_files.draw(recipe, i, meta["salt"]) * (-1 if i.get("then") == "A = -value" else 1)
        for name, i in meta["recipe_inputs"].items()
    }
    return arrays, meta, inputs


def ours(name: str, x: np.ndarray) -> np.ndarray:
    """mamba-ssm keeps time last: [b, c, l] -> [b, l, c], [b, k, n, l] -> [b, l, k, n]."""
    axes = {"u": (0, 2, 1), "delta": (0, 2, 1), "y": (0, 2, 1), "w": (0, 2, 1), "B": (0, 3, 1, 2), "C": (0, 3, 1, 2)}
    return x.transpose(axes[name]) if name in axes else x


@functools.cache
def compiled(backend):
    """One function for all cases, so that it is compiled once. A kernel is interpreted."""
    if isinstance(backend, str):
        return jax.jit(functools.partial(selective_scan, backend=backend))

    def interpreted(*arrays):
        seq, par, flags = _checked(*arrays, None, False)
        return backend(seq, par, flags, interpret=True).reshape(arrays[0].shape)

    return jax.jit(interpreted)


def part(name: str, x: np.ndarray, k: int, groups: int | None, states: int | None) -> np.ndarray:
    """Groups do not meet: what belongs to the first ones is what a scan of them alone gives. Neither do states, in the
    gradients of A, B and C."""
    if name in ("B", "C"):
        return x[:, :, :groups, :states]
    x = x[: len(x) // k * (groups or k)] if x.ndim != 3 else x[..., : x.shape[-1] // k * (groups or k)]
    return x[:, :states] if name == "A" else x


def check(reference, case, backend, dtype, groups=None, states=None, outputs=("y", *(f"d_{name}" for name in NAMES))):
    arrays, meta, inputs = reference
    k = inputs[f"{case}/B"].shape[1]

    def ready(name, x):
        return part(name, ours(name, x), k, groups, states)

    given = {name: jnp.asarray(ready(name, inputs[f"{case}/{name}"]), dtype) for name in (*NAMES, "w")}
    w = given.pop("w")
    if outputs == ("y",):
        found = {"y": compiled(backend)(*given.values())}
    else:
        y, undo = jax.vjp(compiled(backend), *given.values())
        found = {"y": y} | dict(zip((f"d_{name}" for name in NAMES), undo(w), strict=True))
    for key in outputs:
        expected = ready(name := key.removeprefix("d_"), arrays[f"{case}/{key}"])
        assert found[key].shape == expected.shape, name
        tolerance = meta["outputs"][f"{case}/{key}"]["tolerance"]["atol"]
        if dtype == jnp.float64:
            tolerance = 1e-12 * max(1.0, float(np.abs(expected).max()))
        np.testing.assert_allclose(found[key], expected, rtol=0, atol=tolerance, err_msg=f"{case}/{key}")


@pytest.mark.parametrize("case", ["main", "edge"])
@pytest.mark.parametrize("backend", ["reference", "associative", "chunked"])
def test_selective_scan(reference, case, backend):
    check(reference, case, backend, jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [pallas_tpu, mosaic_gpu])
def test_interpreted_kernels_on_all_groups(reference, kernel):
    for case in ("main", "edge"):
        check(reference, case, kernel, jnp.float32)


def test_interpreted_gpu_kernel(reference):
    check(reference, "main", mosaic_gpu, jnp.float32, groups=1)
    check(reference, "edge", mosaic_gpu, jnp.float32, groups=1, outputs=("y",))


def test_interpreted_tpu_kernel(reference):
    """y with all states, the gradients with the first ones alone (quick to compile): what these give to A, B and C is
    theirs alone."""
    for case in ("main", "edge"):
        check(reference, case, pallas_tpu, jnp.float32, groups=1, outputs=("y",))
    for case in ("main", "edge"):
        check(reference, case, pallas_tpu, jnp.float32, groups=1, states=2, outputs=("d_A", "d_B", "d_C"))


@pytest.mark.parametrize("case", ["main", "edge"])
def test_selective_scan_in_double_precision(reference, case, x64):
    check(reference, case, "chunked", jnp.float64)

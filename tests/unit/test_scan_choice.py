"""What `backend="auto"` stands for on each platform: decided at lowering, and said in words."""

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from medseg_jax.ops.scan import chosen_backend, selective_scan
from medseg_jax.ops.scan.choice import tpu_chunk, tpu_vmem


def gpu(kind):
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(kind, 132, "gpu")))


def tpu(kind):
    return use_abstract_mesh(AbstractMesh((1,), ("x",), abstract_device=AbstractDevice(kind, 1, "tpu")))


def shapes(b=1, length=16, d=128, n=8):
    wide, narrow = (b, length, d), (b, length, 1, n)
    return [jax.ShapeDtypeStruct(s, jnp.float32) for s in (wide, wide, (d, n), narrow, narrow, (d,), (d,))]


def lowered(platform, arrays, what=selective_scan):
    return jax.jit(what).trace(*arrays).lower(lowering_platforms=(platform,)).as_text()


def gradient(*arrays):
    return jax.grad(lambda *a: selective_scan(*a).sum(), tuple(range(7)))(*arrays)


@pytest.mark.parametrize(
    ("platform", "options", "backend", "why"),
    [
        ("cpu", {}, "chunked", "no kernel for cpu"),
        ("rocm", {}, "chunked", "no kernel for rocm"),
        ("tpu", {}, "pallas_tpu", "a TPU"),
        ("tpu", {"dtype": "float64"}, "chunked", "float64"),
        ("tpu", {"chunk": 12}, "chunked", "multiple of 8, not 12"),
        (
            "tpu",
            {"chunk": 1024},
            "chunked",
            "MiB for 16 states, 128 channels and chunks of 1024, and may",
        ),
        ("tpu", {"states": 512}, "chunked", "MiB for 512 states, 128 channels and chunks of 8"),
        ("tpu", {"channels": 2**14}, "chunked", "MiB for 16 states, 16384 channels"),
        ("gpu", {}, "chunked", "no GPU is visible"),
        ("cuda", {"states": 33}, "chunked", "up to 32 states"),
        ("cuda", {"chunk": 24}, "chunked", "chunks of 16, not 24"),
    ],
)
def test_the_choice_is_said(platform, options, backend, why):
    choice = chosen_backend(platform, **options)
    assert choice.backend == backend
    assert why in choice.why


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        ("NVIDIA H100 80GB HBM3", "mosaic_gpu"),
        ("NVIDIA GH200 480GB", "mosaic_gpu"),
        ("NVIDIA B200", "mosaic_gpu"),
        ("NVIDIA A100-SXM4-80GB", "chunked"),
        ("NVIDIA GeForce RTX 4090", "chunked"),
    ],
)
def test_the_gpu_is_that_of_the_mesh(kind, backend):
    with gpu(kind):
        choice = chosen_backend("cuda")
    assert choice.backend == backend
    assert kind in choice.why


@pytest.mark.parametrize(
    ("states", "channels", "chunk", "reported"),
    [(16, 384, 32, 17.05), (16, 768, 32, 21.84), (64, 384, 16, 29.67), (128, 384, 8, 33.72)],
)
def test_what_the_tpu_kernel_needs_is_what_its_compiler_reports(states, channels, chunk, reported):
    """In MiB, for a v4: `python benchmarks/scan.py one v4 8 4096 384 backward 32` and others."""
    assert reported <= tpu_vmem(states, channels, chunk) / 2**20 <= 1.07 * reported


@pytest.mark.parametrize(
    ("kind", "states", "channels", "length", "chunk"),
    [
        ("TPU v4", 16, 192, 4096, 8),
        ("TPU v4", 16, 384, 1024, 16),
        ("TPU v4", 16, 384, 2304, 24),
        ("TPU v4", 16, 1536, 64, 8),
        ("TPU v4", 128, 384, 1024, 0),
        ("TPU v5 lite", 16, 192, 4096, 32),
        ("TPU v5 lite", 16, 384, 9, 16),
        ("TPU v5", 16, 1536, 144, 24),
        ("TPU7x", 128, 384, 1024, 16),
    ],
)
def test_the_chunk_is_the_largest_that_the_tpu_has_room_for(kind, states, channels, length, chunk):
    with tpu(kind):
        assert tpu_chunk(states, channels, length) == chunk
        choice = chosen_backend("tpu", states=states, channels=channels)
    assert choice.backend == ("pallas_tpu" if chunk else "chunked")
    assert kind in choice.why


def test_the_default_is_the_platform_of_this_process():
    assert chosen_backend() == chosen_backend("cpu")


@pytest.mark.parametrize("what", [selective_scan, gradient])
def test_the_kernel_is_chosen_at_lowering(what):
    """On this CPU: lowered for a TPU it is the TPU's kernel, for an H100 the GPU's, each without the others."""
    arrays = shapes()
    assert "custom_call" not in lowered("cpu", arrays, what)
    assert "tpu_custom_call" in lowered("tpu", arrays, what)
    assert "custom_call" not in lowered("cuda", arrays, what)
    with gpu("NVIDIA H100 80GB HBM3"):
        on_gpu = lowered("cuda", arrays, what)
    assert "mosaic_gpu" in on_gpu
    assert "tpu_custom_call" not in on_gpu


def test_what_the_kernel_has_no_room_for_is_lowered_without_it():
    arrays = shapes(d=4096)
    assert "tpu_custom_call" in lowered("tpu", arrays)
    with tpu("TPU v4"):
        assert "custom_call" not in lowered("tpu", arrays)


def test_auto_costs_nothing_on_a_cpu():
    """The branches of other platforms leave nothing behind, no zeros among what the backward pass keeps either."""

    def memory(backend):
        step = jax.jit(lambda *a: jax.grad(lambda *a: selective_scan(*a, backend=backend).sum(), (0, 1, 2))(*a))
        found = step.lower(*shapes(2, 256)).compile().memory_analysis()
        return found.temp_size_in_bytes, found.output_size_in_bytes

    assert memory("auto") == memory("chunked")


def test_sizes_may_be_symbolic():
    (b,) = export.symbolic_shape("b")
    arrays = [jax.ShapeDtypeStruct((b, *s.shape[1:]) if len(s.shape) > 2 else s.shape, s.dtype) for s in shapes(d=8)]
    exported = export.export(jax.jit(selective_scan))(*arrays)
    values = [jax.random.normal(jax.random.key(i), s.shape) for i, s in enumerate(shapes(3, d=8))]
    assert jnp.allclose(exported.call(*values), selective_scan(*values), atol=1e-5)

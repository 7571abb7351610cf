"""Counting what a compiled program does: against arithmetic by hand, on one device and on four virtual ones."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from medseg_jax.runtime.hlo import count

FOUR_DEVICES = """
import json, dataclasses
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding
from medseg_jax.runtime.hlo import count
from medseg_jax.runtime.sharding import batch_sharding, make_mesh, replicated, within

mesh = make_mesh()
rows, whole = batch_sharding(mesh), replicated(mesh)
x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=rows)
w = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=whole)

def looped(w, x):
    return jax.lax.fori_loop(0, 7, lambda i, t: t + jax.lax.psum((x @ w * t).sum(), ("data", "fsdp")), 0.0)

programs = {
    "gradient": jax.jit(jax.grad(lambda w, x: ((x @ w) ** 2).sum()), out_shardings=whole),
    "gather": jax.jit(lambda w, x: x + 1, out_shardings=whole),
    "loop": jax.jit(jax.shard_map(looped, mesh=mesh, in_specs=(jax.P(), rows.spec), out_specs=jax.P())),
}
found = {k: dataclasses.asdict(count(p.lower(w, x).compile().as_text(), 4)) for k, p in programs.items()}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def on_four():
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    done = subprocess.run([sys.executable, "-c", FOUR_DEVICES], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def counted(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    return count(jax.jit(function).lower(*arrays).compile().as_text())


def test_a_product():
    found = counted(jnp.matmul, (64, 96), (96, 32))
    assert found.matmul_flops == 2 * 64 * 96 * 32
    assert found.matmul_by_dtype == {"f32": found.matmul_flops}
    assert not found.collectives


def test_a_loop_counts_as_often_as_it_runs():
    def steps(n):
        return counted(lambda x, w: jax.lax.scan(lambda c, _: (c @ w, None), x, None, length=n)[0], (64, 64), (64, 64))

    assert steps(11).matmul_flops == 11 * 2 * 64**3
    assert steps(11).unknown_loops == 0


def test_a_loop_of_unknown_length_is_said():
    found = counted(lambda x: jax.lax.while_loop(lambda v: v.sum() < 3, lambda v: v @ v, x), (64, 64))
    assert found.unknown_loops == 1


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
def test_a_convolution_without_its_padding(stride, dilation):
    """As many multiply-adds as a convolution of ones has in its sum."""

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride,) * 2, "SAME", rhs_dilation=(dilation,) * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    shapes = (2, 9, 12, 5), (3, 3, 5, 7)
    by_hand = float(conv(*(jnp.ones(s) for s in shapes)).sum())
    assert counted(conv, *shapes).matmul_flops == 2 * by_hand


def test_bytes_of_a_sum():
    found = counted(lambda a, b: a + b, (1000,), (1000,))
    assert found.bytes == 3 * 4000
    assert found.vector_flops == 1000


def test_a_slice_does_not_read_its_whole_operand():
    found = counted(lambda x: jax.lax.dynamic_slice(x, (3, 0), (1, 8)) * 2, (100_000, 8))
    assert found.bytes < 1000


def test_slices_that_a_tpu_fetches_ahead_are_read_once():
    """Two halves of an array into VMEM: not twice the array and what the pair's type names beside it."""
    text = """
ENTRY %main (a: f32[8,128]) -> f32[4,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %s.0 = ((f32[8,128]{1,0:T(8,128)}), f32[4,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[0:4], [0:128]}
  %s.1 = ((f32[8,128]{1,0:T(8,128)}), f32[4,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%a), slice={[4:8], [0:128]}
  %d.0 = f32[4,128]{1,0:T(8,128)S(1)} slice-done(%s.0)
  %d.1 = f32[4,128]{1,0:T(8,128)S(1)} slice-done(%s.1)
  ROOT %y = f32[4,128]{1,0:T(8,128)} add(%d.0, %d.1)
}
"""  # noqa: E501
    assert count(text).bytes == (8 + 4) * 128 * 4


def test_gradients_are_summed_over_the_devices(on_four):
    """One all-reduce of the weights; in a ring of 4 each device sends 2 x 3/4 of them. Work is shared."""
    found = on_four["gradient"]
    assert found["collectives"] == {"all-reduce": [1, 16 * 32 * 4, 1.5 * 16 * 32 * 4]}
    assert found["matmul_flops"] == 2 * 2 * 2 * 16 * 32


def test_a_gather(on_four):
    """Each device gives its 2 rows, and sends them to 3 others."""
    assert on_four["gather"]["collectives"] == {"all-gather": [1, 2 * 16 * 4, 3 * 2 * 16 * 4]}


def test_collectives_in_a_loop(on_four):
    number, size, _ = on_four["loop"]["collectives"]["all-reduce"]
    assert (number, size) == (7, 28)


def test_what_compilers_of_accelerators_write():
    """Layouts with tiles, VMEM, notations of groups, asynchronous pairs, cuDNN's calls, declared costs of kernels."""
    tpu = """
HloModule m

%cond (p.0: (s32[])) -> pred[] {
  %p.0 = (s32[]{:T(128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p.0), index=0
  %n = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[]{:T(512)} compare(%i, %n), direction=LT
}

%body (p.1: (s32[])) -> (s32[]) {
  %p.1 = (s32[]{:T(128)}) parameter(0)
  %x = f32[8,128]{1,0:T(8,128)S(1)} custom-call(), custom_call_target="Sharding"
  %r = f32[8,128]{1,0:T(8,128)} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %t = (s32[]{:T(128)}) tuple(%p.1)
}

ENTRY %main (a: f32[8,128]) -> f32[32,128] {
  %a = f32[8,128]{1,0:T(8,128)} parameter(0)
  %z = (s32[]{:T(128)}) tuple()
  %w = (s32[]{:T(128)}) while(%z), condition=%cond, body=%body
  %k = f32[8,128]{1,0:T(8,128)S(1)} custom-call(%a), custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"cost_estimate":{"flops":"500","transcendentals":"3"}}}
  %g = (f32[8,128]{1,0:T(8,128)}, f32[32,128]{1,0:T(8,128)}) all-gather-start(%a), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  ROOT %d = f32[32,128]{1,0:T(8,128)} all-gather-done(%g)
}
"""  # noqa: E501
    found, size = count(tpu, 8), 8 * 128 * 4
    assert found.collectives == {"all-reduce": [5, 5 * size, 5 * 1.5 * size], "all-gather": [1, size, 3 * size]}
    assert (found.kernels, found.kernel_flops, found.unknown_loops) == (1, 500, 0)
    assert found.bytes == 5 * size + size + (size + 4 * size)  # nothing of what lies in VMEM: S(1)

    cudnn = """
ENTRY %main (x: f32[2,8,8,3], w: f32[16,3,3,3]) -> f32[2,8,8,16] {
  %x = f32[2,8,8,3]{3,2,1,0} parameter(0)
  %w = f32[16,3,3,3]{3,2,1,0} parameter(1)
  %c = (f32[2,8,8,16]{3,2,1,0}, u8[0]{0}) custom-call(%x, %w), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convForward"
  ROOT %y = f32[2,8,8,16]{3,2,1,0} get-tuple-element(%c), index=0
}
"""  # noqa: E501
    assert count(cudnn).matmul_flops == 2 * 2 * 8 * 8 * 16 * 27

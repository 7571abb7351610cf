"""The selective scan as two Mosaic GPU kernels (Hopper or newer), forward and backward.

One warpgroup walks over time for 128 channels of one batch row, a channel a thread, the n states of a channel in n
registers. Tiles of u and delta come to shared memory by asynchronous copies; B and C of a step are scalars that all
threads read. The forward pass has no traffic between threads. The grid is b * k * ceil(d / 128) warpgroups: 64 at the
first stage of VM-UNet at batch 8, and 8 at batch 1, too few for an H100's 132 multiprocessors. Neither the states nor
time are split to have more (spec 5.6).

Backward, the states of a chunk are computed again from its boundary and kept in shared memory. dB and dC are sums over
channels: the products of 64 / n steps are put into shared memory as 64 rows of 128 and summed row by row. Each block of
128 channels writes its own partial sums, which are added outside. There are no atomics: same inputs, same bits.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from medseg_jax.ops.scan.choice import gpu_states
from medseg_jax.ops.scan.fold import Axes, Layout, Tiles, differentiable
from medseg_jax.ops.scan.problem import (
    Parameters,
    Sequences,
    flattened,
    pad_channels,
    pad_states,
    pad_time,
    project_delta,
    state_dtype,
)

LANES = 128
SLAB = 64
"""Rows of the register layout that sums over channels."""
LOG2E = math.log2(math.e)
CHANNEL = plgpu.Layout.WG_STRIDED((LANES,), 1)


def mosaic_gpu(
    seq: Sequences, par: Parameters, flags: tuple[bool, ...], chunk: int | None = None, *, interpret: bool = False
) -> Array:
    """All groups in one call -> y [b, l, k, d] in u's dtype. n is at most 32, `chunk` a multiple of 8."""
    if state_dtype(*seq, par.A) == jnp.float64:
        raise ValueError("the GPU kernel has float32 states; use backend='chunked' for float64")
    states = par.A.shape[-1]
    n, chunk = gpu_states(states), chunk or (16 if states <= 16 else 8)
    if not n or chunk % 8 or chunk * n > 256:
        raise ValueError(
            "the GPU kernel takes up to 32 states, rounded up to 8, 16 or 32, and chunks of a multiple of 8 with at "
            f"most 256 states in all, not {states} states and chunks of {chunk}; use backend='chunked'"
        )
    seq, par = pad_states(seq, par, n - states)
    seq, par = project_delta(seq, par)
    _, length, k, d = seq.delta.shape
    seq, par = pad_time(*pad_channels(seq, par, -d % LANES), chunk)
    u, delta, BC, A, pair = flattened(seq, par)
    tiles = Tiles(flags, par.A.shape[1], chunk, interpret=interpret)
    scan = differentiable(_forward, _forward_and_keep, _backward, tiles, _layout(tiles))
    y = scan(u, delta, BC.swapaxes(1, 2), A, pair)  # BC [b, k, l, 2n]
    return y.reshape(*y.shape[:2], k, -1)[:, :length, :, :d]


def _layout(tiles: Tiles) -> Layout:
    """Rows and groups of u [b, l, c], BC [b, k, l, 2n], A [n, c] and boundaries [t, b, n, c]."""
    width = tiles.width
    return Layout(Axes(0, 2, width), Axes(0, 1), Axes(None, 1, width), Axes(1, 3, width))


def _forward(tiles: Tiles, *inputs: Array) -> tuple[Array, ...]:
    return _run_forward(tiles, *inputs, keep=False)


def _forward_and_keep(tiles: Tiles, *inputs: Array) -> tuple[Array, ...]:
    """y, and the state [t, b, n, c] that enters each chunk of steps."""
    return _run_forward(tiles, *inputs, keep=True)


def _run_forward(tiles: Tiles, u, delta, BC, A, pair, keep: bool) -> tuple[Array, ...]:
    (b, length, c), n = delta.shape, A.shape[0]
    boundaries = jax.ShapeDtypeStruct((length // tiles.chunk, b, n, c), jnp.float32)
    tile, narrow = _tile(tiles, 2), plgpu.SMEM((2, tiles.chunk, 2 * n), jnp.float32)
    return _call(
        functools.partial(_forward_kernel, tiles, BC.shape[1], n, keep),
        (jax.ShapeDtypeStruct(delta.shape, u.dtype), *([boundaries] if keep else [])),
        (b, c // LANES),
        [tile(u), tile(delta), narrow, _tile(tiles)(u), plgpu.Barrier(num_arrivals=3, num_barriers=2)],
        tiles,
    )(u, delta, BC, A, pair)


def _backward(tiles: Tiles, u, delta, BC, A, pair, boundaries, dy) -> tuple[Array, ...]:
    """du, ddelta, dBC, and of each row dA [b, n, c], d(skip and bias) [b, 2, c]."""
    (b, length, c), (k, n), f32 = delta.shape, (BC.shape[1], A.shape[0]), jnp.float32
    blocks = c // LANES
    tile, shared = _tile(tiles), u.shape != delta.shape
    more = jax.ShapeDtypeStruct(delta.shape, f32 if shared else u.dtype)
    du, ddelta, dBC, dA, dpair = _call(
        functools.partial(_backward_kernel, tiles, k, n),
        (
            more,
            jax.ShapeDtypeStruct(delta.shape, delta.dtype),
            jax.ShapeDtypeStruct((b, blocks, 2, length * n), f32),
            jax.ShapeDtypeStruct((b, n, c), f32),
            jax.ShapeDtypeStruct((b, 2, c), f32),
        ),
        (b, blocks),
        [
            *(tile(x) for x in (u, delta, dy)),
            plgpu.SMEM((tiles.chunk, 2 * n), f32),
            *(tile(x) for x in (more, delta)),
            plgpu.SMEM((tiles.chunk, n, LANES), f32),  # h before each step
            plgpu.SMEM((SLAB, LANES), f32),
            plgpu.Barrier(num_arrivals=4),
        ],
        tiles,
    )(u, delta, BC, A, pair, boundaries, dy)
    if shared:
        du = du.reshape(b, length, -1, u.shape[-1]).sum(2).astype(u.dtype)
    dBC = dBC.reshape(b, k, blocks // k, 2, length, n).sum(2)  # [b, k, 2, l, n]
    return du, ddelta, jnp.concatenate([dBC[:, :, 0], dBC[:, :, 1]], -1), dA, dpair


def _tile(tiles: Tiles, *buffers: int):
    return lambda x: plgpu.SMEM((*buffers, tiles.chunk, LANES), x.dtype)


def _call(kernel, out_type, grid, scratch, tiles: Tiles):
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        grid=grid,
        grid_names=("row", "block"),
        scratch_types=scratch,
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=plgpu.InterpretGPUParams() if tiles.interpret else False,
    )


# ------------------------------------------------------------------------------------------------------------- kernels


def _where(tiles: Tiles, k: int, channels: int, channels_of_u: int):
    """This warpgroup's row, block, channels, those of u, group, and whether the group's time runs backwards."""
    row, block = lax.axis_index("row"), lax.axis_index("block")
    group = block // (channels // LANES // k)
    backwards = functools.reduce(jnp.logical_or, [group == i for i, f in enumerate(tiles.flags) if f], group < 0)
    lanes, source = (pl.ds(i * LANES, LANES) for i in (block, block % (channels_of_u // LANES)))
    return row, block, lanes, source, group, backwards


def _load(ref, *index) -> Array:
    return plgpu.load(ref.at[index], layout=CHANNEL).astype(jnp.float32)


def _zeros() -> Array:
    return plgpu.layout_cast(jnp.zeros((LANES,), jnp.float32), CHANNEL)


def _exp(x):
    return jnp.exp2(x * LOG2E)


def _softplus(x):
    e = _exp(-jnp.abs(x))
    w = 1 + e
    log1p = jnp.where(w == 1, e, jnp.log(w) * e / jnp.where(w == 1, 1.0, w - 1))  # without the rounding of 1 + e
    return jnp.maximum(x, 0.0) + log1p


def _forward_kernel(tiles: Tiles, k, n, keep, u_in, delta_in, BC_in, A_in, pair_in, y_out, *rest):
    h_out, (u_ref, delta_ref, BC_ref, y_ref, arrived) = (rest[0] if keep else None), rest[-5:]
    row, _, lanes, source, group, backwards = _where(tiles, k, delta_in.shape[-1], u_in.shape[-1])
    chunk, count = tiles.chunk, u_in.shape[1] // tiles.chunk
    A = [_load(A_in, m, lanes) * LOG2E for m in range(n)]
    skip, bias = _load(pair_in, 0, lanes), _load(pair_in, 1, lanes)

    def when(i):
        return jnp.where(backwards, count - 1 - i, i)

    def fetch(i):
        slot, steps = i % 2, pl.ds(when(i) * chunk, chunk)
        plgpu.copy_gmem_to_smem(u_in.at[row, steps, source], u_ref.at[slot], arrived.at[slot])
        plgpu.copy_gmem_to_smem(delta_in.at[row, steps, lanes], delta_ref.at[slot], arrived.at[slot])
        plgpu.copy_gmem_to_smem(BC_in.at[row, group, steps], BC_ref.at[slot], arrived.at[slot])

    def one_chunk(i, h):
        @pl.when(i + 1 < count)
        def _():
            fetch(i + 1)  # while this one is scanned

        slot = i % 2
        if h_out is not None:
            for m in range(n):
                h_out[when(i), row, m, lanes] = h[m]
        plgpu.barrier_wait(arrived.at[slot])
        plgpu.wait_smem_to_gmem(0)  # y of the chunk before has left

        def step(s, h):
            t = jnp.where(backwards, chunk - 1 - s, s)
            u, delta = _load(u_ref, slot, t), _softplus(_load(delta_ref, slot, t) + bias)
            x, y, new = delta * u, skip * u, []
            for m in range(n):
                hm = jnp.exp2(delta * A[m]) * h[m] + x * BC_ref[slot, t, m]
                y += hm * BC_ref[slot, t, n + m]
                new.append(hm)
            y_ref[t] = y.astype(y_ref.dtype)
            return tuple(new)

        h = lax.fori_loop(0, chunk, step, h)
        plgpu.commit_smem()  # all threads have read this slot, too
        plgpu.copy_smem_to_gmem(y_ref, y_out.at[row, pl.ds(when(i) * chunk, chunk), lanes])
        return h

    fetch(0)
    lax.fori_loop(0, count, one_chunk, (_zeros(),) * n)
    plgpu.wait_smem_to_gmem(0)


def _backward_kernel(
    tiles: Tiles, k, n, u_in, delta_in, BC_in, A_in, pair_in, h_in, dy_in,
    du_out, ddelta_out, dBC_out, dA_out, dpair_out,
    u_ref, delta_ref, dy_ref, BC_ref, du_ref, ddelta_ref, h_ref, slab_ref, arrived,
):  # fmt: skip
    row, block, lanes, source, group, backwards = _where(tiles, k, delta_in.shape[-1], u_in.shape[-1])
    chunk, count = tiles.chunk, u_in.shape[1] // tiles.chunk
    A = [_load(A_in, m, lanes) * LOG2E for m in range(n)]
    skip, bias = _load(pair_in, 0, lanes), _load(pair_in, 1, lanes)
    some = SLAB // n  # steps whose products are summed over channels together

    def sum_channels(which, first):
        """Rows of the slab -> steps first .. first + some of dB (which = 0) or dC (1)."""
        plgpu.commit_smem()
        rows = plgpu.load(slab_ref, layout=plgpu.Layout.WGMMA, optimized=False)
        dBC_out[row, block, which, pl.ds(first * n, SLAB)] = rows.sum(1)
        plgpu.commit_smem()  # before the slab is filled again

    def one_chunk(i, carry):
        g, dA, dskip, dbias = carry
        i = jnp.where(backwards, i, count - 1 - i)
        steps = pl.ds(i * chunk, chunk)
        plgpu.copy_gmem_to_smem(u_in.at[row, steps, source], u_ref, arrived)
        for whole, part in ((delta_in, delta_ref), (dy_in, dy_ref)):
            plgpu.copy_gmem_to_smem(whole.at[row, steps, lanes], part, arrived)
        plgpu.copy_gmem_to_smem(BC_in.at[row, group, steps], BC_ref, arrived)
        plgpu.barrier_wait(arrived)
        plgpu.wait_smem_to_gmem(0)

        def again(q, h):
            q = jnp.where(backwards, chunk // some - 1 - q, q)
            for s in range(some):
                inside = jnp.where(backwards, some - 1 - s, s)
                t = q * some + inside
                dy, delta = _load(dy_ref, t), _softplus(_load(delta_ref, t) + bias)
                x, new = delta * _load(u_ref, t), []
                for m in range(n):
                    h_ref[t, m] = h[m]
                    hm = jnp.exp2(delta * A[m]) * h[m] + x * BC_ref[t, m]
                    slab_ref[inside * n + m] = dy * hm
                    new.append(hm)
                h = tuple(new)
            sum_channels(1, i * chunk + q * some)
            return h

        lax.fori_loop(0, chunk // some, again, tuple(_load(h_in, i, row, m, lanes) for m in range(n)))

        def back(q, carry):
            g, dA, dskip, dbias = carry
            q = jnp.where(backwards, q, chunk // some - 1 - q)
            for s in range(some):
                inside = jnp.where(backwards, s, some - 1 - s)
                t = q * some + inside
                raw = _load(delta_ref, t) + bias
                u, dy, delta = _load(u_ref, t), _load(dy_ref, t), _softplus(raw)
                x, gB, qA, new, sums = delta * u, _zeros(), _zeros(), [], []
                for m in range(n):
                    gm = g[m] + dy * BC_ref[t, n + m]
                    slab_ref[inside * n + m] = gm * x
                    gB += gm * BC_ref[t, m]
                    gm *= jnp.exp2(delta * A[m])
                    product = gm * _load(h_ref, t, m)
                    qA += product * A[m]
                    sums.append(dA[m] + product * delta)
                    new.append(gm)
                g, dA = tuple(new), tuple(sums)
                draw = (u * gB + qA * (1 / LOG2E)) / (1 + _exp(-raw))
                du_ref[t] = (skip * dy + delta * gB).astype(du_ref.dtype)
                ddelta_ref[t] = draw.astype(ddelta_ref.dtype)
                dskip, dbias = dskip + dy * u, dbias + draw
            sum_channels(0, i * chunk + q * some)
            return g, dA, dskip, dbias

        carry = lax.fori_loop(0, chunk // some, back, (g, dA, dskip, dbias))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(du_ref, du_out.at[row, steps, lanes])
        plgpu.copy_smem_to_gmem(ddelta_ref, ddelta_out.at[row, steps, lanes])
        return carry

    nothing = (_zeros(),) * n
    _, dA, dskip, dbias = lax.fori_loop(0, count, one_chunk, (nothing, nothing, _zeros(), _zeros()))
    for m in range(n):
        dA_out[row, m, lanes] = dA[m]
    dpair_out[row, 0, lanes], dpair_out[row, 1, lanes] = dskip, dbias
    plgpu.wait_smem_to_gmem(0)

"""The selective scan as two Mosaic TPU kernels, forward and backward.

Layout. Arrays stay as they come, [b, l, c]: time on sublanes, channels on lanes, nothing padded in memory. A kernel
works on tiles of up to 8 batch rows, as few tiles as there can be; the last may lack rows, which are then computed from
whatever is in VMEM and read by nobody. It turns 8 steps of 8 rows at a time, so that one vector register holds one step
(rows on sublanes, 128 channels on lanes), and adds bias and softplus on the way. The n states of these channels are n
registers, and y = sum_n C_n h_n is a sum of registers. Channels are looped over inside a grid cell, so that B and C,
which every channel of a group needs as whole registers of equal lanes, are spread over the lanes once per cell.

Grid: (row tiles, blocks of channels, blocks of time); the state (backward: its adjoint) is carried over time in VMEM. A
block of channels is one group, or two groups of 64-lane remainder (d = 192: 3 registers of channels instead of 4; the
middle one takes B and C of both groups). The time direction is a flag per block that the index maps read.

Sums over channels (dB, dC) and over time (dA, dD, dbias) are taken inside a grid cell in a fixed order; sums over rows
outside the kernel. There are no atomics: the same inputs give the same bits.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from medseg_jax.ops.scan.choice import chosen_backend, tpu, tpu_chunk
from medseg_jax.ops.scan.fold import Axes, Layout, Tiles, differentiable
from medseg_jax.ops.scan.problem import (
    Parameters,
    Sequences,
    flattened,
    pad_channels,
    pad_time,
    project_delta,
    state_dtype,
)

LANES = 128
LOG2E = math.log2(math.e)


def pallas_tpu(
    seq: Sequences, par: Parameters, flags: tuple[bool, ...], chunk: int | None = None, *, interpret: bool = False
) -> Array:
    """All groups in one call -> y [b, l, k, d] in u's dtype. `chunk`: a multiple of 8, see `tpu_chunk`."""
    if state_dtype(*seq, par.A) == jnp.float64:
        raise ValueError("the TPU kernel has float32 states; use backend='chunked' for float64")
    seq, par = project_delta(seq, par)
    _, length, k, d = seq.delta.shape
    chunk = chunk or tpu_chunk(par.A.shape[-1], d, length)
    if not chunk:
        raise ValueError(f"{chosen_backend('tpu', states=par.A.shape[-1], channels=d).why}; use backend='chunked'")
    if chunk % 8:
        raise ValueError(f"chunk must be a multiple of 8 on a TPU, not {chunk}")
    paired = d % LANES == LANES // 2 and k % 2 == 0 and flags[::2] == flags[1::2] and seq.u.shape[2] % 2 == 0
    if d % LANES and not paired:
        seq, par = pad_channels(seq, par, -d % LANES)
    groups = 2 if paired else 1
    seq, par = pad_time(seq, par, chunk)
    u, delta, BC, A, pair = flattened(seq, par)
    BC = BC.reshape(*BC.shape[:2], k // groups, -1).transpose(2, 0, 1, 3)  # [k / groups, b, l, groups * 2n]
    tiles = Tiles(flags[::groups], groups * seq.delta.shape[3], chunk, groups, interpret)
    scan = differentiable(_forward, _forward_and_keep, _backward, tiles, _layout(tiles))
    y = scan(u, delta, BC, A, pair)
    return y.reshape(*y.shape[:2], k, -1)[:, :length, :, :d]


def _layout(tiles: Tiles) -> Layout:
    """Rows and blocks of u [b, l, c], BC [k, b, l, 2n], A [n, c] and boundaries [t, n, b, c]."""
    width = tiles.width
    return Layout(Axes(0, 2, width), Axes(1, 0), Axes(None, 1, width), Axes(2, 3, width))


def _forward(tiles: Tiles, *inputs: Array) -> tuple[Array, ...]:
    return _run_forward(tiles, *inputs, keep=False)


def _forward_and_keep(tiles: Tiles, *inputs: Array) -> tuple[Array, ...]:
    """y, and the state [t, n, b, c] that enters each chunk of steps."""
    y, boundaries = _run_forward(tiles, *inputs, keep=True)
    return y, _whole_rows(boundaries, 1, len(y))


def _run_forward(tiles: Tiles, u, delta, BC, A, pair, keep: bool) -> tuple[Array, ...]:
    at = _Specs(u, delta, BC, A, tiles, backward=False)
    out_shape, out_specs = [jax.ShapeDtypeStruct(delta.shape, u.dtype)], [at.wide]
    if keep:
        out_shape, out_specs = [*out_shape, at.boundary_shape], [*out_specs, at.boundary]
    return at.call(
        functools.partial(_forward_kernel, at, keep),
        "selective_scan_forward",
        in_specs=[at.source, at.wide, at.narrow, at.states, at.pair],
        out_specs=out_specs,
        out_shape=out_shape,
        scratch=[at.state_scratch, at.spread_scratch, at.step_scratch(3), at.step_scratch(1)],
    )(u, delta, BC, A, pair)


def _backward(tiles: Tiles, u, delta, BC, A, pair, boundaries, dy) -> tuple[Array, ...]:
    """du, ddelta, dBC, and of each row dA [b, n, c], d(skip and bias) [b, 2, c]."""
    at = _Specs(u, delta, BC, A, tiles, backward=True)
    f32, tiles_of_rows, b = jnp.float32, at.grid[0], len(u)
    boundaries = jnp.pad(boundaries, ((0, 0), (0, 0), (0, tiles_of_rows * at.rows - b), (0, 0)))
    boundaries = boundaries.reshape(*boundaries.shape[:2], -1, at.rows, A.shape[1]).swapaxes(1, 2)
    du, ddelta, dBC, dA, dpair = at.call(
        functools.partial(_backward_kernel, at),
        "selective_scan_backward",
        in_specs=[at.source, at.wide, at.narrow, at.states, at.pair, at.boundary, at.wide],
        out_specs=[at.wide, at.wide, at.narrow, at.state_sums, at.pair_sums],
        out_shape=[
            jax.ShapeDtypeStruct(delta.shape, u.dtype if u.shape == delta.shape else f32),
            jax.ShapeDtypeStruct(delta.shape, delta.dtype),
            jax.ShapeDtypeStruct(BC.shape, f32),
            jax.ShapeDtypeStruct((tiles_of_rows, *A.shape[:1], at.rows, A.shape[1]), f32),
            jax.ShapeDtypeStruct((tiles_of_rows, 2, at.rows, A.shape[1]), f32),
        ],
        scratch=[
            at.state_scratch,
            at.spread_scratch,
            pltpu.VMEM((tiles.chunk, at.n, at.rows, LANES), f32),  # h before each step
            at.sum_scratch,  # dB and dC before the sum over lanes
            at.step_scratch(3),
            at.step_scratch(2),
        ],
    )(u, delta, BC, A, pair, boundaries, dy)
    if u.shape != delta.shape:  # groups that share a sequence
        du = du.reshape(*du.shape[:2], -1, u.shape[-1]).sum(2).astype(u.dtype)
    return du, ddelta, dBC, *(jnp.moveaxis(_whole_rows(x, 0, b), 1, 0) for x in (dA, dpair))


def _whole_rows(x: Array, axis: int, b: int) -> Array:
    """Row tiles [.., tiles, n, rows, c] -> [.., n, b, c]."""
    x = jnp.moveaxis(x, axis, axis + 1)
    return x.reshape(*x.shape[: axis + 1], -1, x.shape[-1])[..., :b, :]


# ------------------------------------------------------------------------------------------- blocks, and where they lie


class _Specs:
    """Block shapes and index maps of both kernels. Grid indices: r row tile, j block of channels, t block of time."""

    def __init__(self, u: Array, delta: Array, BC: Array, A: Array, tiles: Tiles, backward: bool):
        self.tiles, self.n = tiles, A.shape[0]
        self.unroll = 1 if tiles.interpret else 8  # divides every chunk; hides the latency of the recurrence
        b, width, chunk, groups, count = len(delta), tiles.width, tiles.chunk, tiles.groups, len(tiles.flags)
        rows = self.rows = pl.cdiv(b, pl.cdiv(b, 8))
        self.grid = (pl.cdiv(b, rows), count, delta.shape[1] // chunk)
        sources, last = u.shape[-1] // width, self.grid[2] - 1

        def when(j, t, flags):
            return jnp.where(flags[j] == int(backward), t, last - t)

        n = self.n
        self.source = pl.BlockSpec((rows, chunk, width), lambda r, j, t, f: (r, when(j, t, f), j % sources))
        self.wide = pl.BlockSpec((rows, chunk, width), lambda r, j, t, f: (r, when(j, t, f), j))
        self.narrow = pl.BlockSpec((None, rows, chunk, groups * 2 * n), lambda r, j, t, f: (j, r, when(j, t, f), 0))
        self.states = pl.BlockSpec((n, width), lambda r, j, t, f: (0, j))
        self.pair = pl.BlockSpec((2, width), lambda r, j, t, f: (0, j))
        self.state_sums = pl.BlockSpec((None, n, rows, width), lambda r, j, t, f: (r, 0, 0, j))
        self.pair_sums = pl.BlockSpec((None, 2, rows, width), lambda r, j, t, f: (r, 0, 0, j))
        self.boundary = pl.BlockSpec((None, None, n, rows, width), lambda r, j, t, f: (when(j, t, f), r, 0, 0, j))
        self.boundary_shape = jax.ShapeDtypeStruct((self.grid[2], self.grid[0], n, rows, delta.shape[-1]), jnp.float32)
        self.state_scratch = pltpu.VMEM((n, rows, width), jnp.float32)
        slots = 1 if groups == 1 else 3  # of each group, and of the lanes where both meet
        self.spread_scratch = self.sum_scratch = pltpu.VMEM((slots, chunk, 2 * n, rows, LANES), jnp.float32)

    def step_scratch(self, count: int):
        """Room for some arrays of one lane block, [count, chunk, rows, 128]: a register a step."""
        return pltpu.VMEM((count, self.tiles.chunk, self.rows, LANES), jnp.float32)

    def call(self, kernel, name, *, in_specs, out_specs, out_shape, scratch):
        spec = pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=self.grid, in_specs=in_specs, out_specs=out_specs, scratch_shapes=scratch
        )
        params = pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=tpu()[1]
        )

        def call(*inputs):
            # XLA cannot look into a kernel: what it costs is told to its scheduler, and to `cost_analysis`.
            moved = sum(x.size * x.dtype.itemsize for x in (*inputs, *out_shape))
            elements, passes = inputs[1].size * self.n, 1 if name.endswith("forward") else 3
            cost = pl.CostEstimate(
                flops=6 * passes * elements, transcendentals=min(passes, 2) * elements, bytes_accessed=moved
            )
            return pl.pallas_call(
                kernel,
                grid_spec=spec,
                out_shape=out_shape,
                compiler_params=params,
                cost_estimate=cost,
                interpret=self.tiles.interpret,
                name=name,
            )(jnp.array(self.tiles.flags, jnp.int32), *inputs)

        return call

    def lane_blocks(self, body) -> None:
        """body(lanes, slot) for each 128 channels; slot 2 is where the second of two groups starts in the middle."""
        d = self.tiles.width // self.tiles.groups
        if self.tiles.groups == 1:

            def one(j, _):
                body(pl.ds(pl.multiple_of(j * LANES, LANES), LANES), 0)

            lax.fori_loop(0, self.tiles.width // LANES, one, None)
            return
        for j in range(self.tiles.width // LANES):
            first, last = j * LANES // d, (j * LANES + LANES - 1) // d
            body(pl.ds(j * LANES, LANES), first if first == last else 2)


def _eights(at: _Specs, body, together: bool = False) -> None:
    """body(steps) for 8 steps at a time; `together`: all side by side, which hides the latency of exp and log."""
    count = at.tiles.chunk // 8
    unroll = count if together and not at.tiles.interpret and count <= 4 else 1
    lax.fori_loop(0, count, lambda i, _: body(pl.ds(pl.multiple_of(i * 8, 8), 8)), None, unroll=unroll)


def _by_step(ref, *index) -> Array:
    """8 steps of a block [rows, 8, lanes] -> [8, rows, lanes] in float32."""
    return jnp.swapaxes(ref[index].astype(jnp.float32), 0, 1)


def _by_row(x: Array, dtype) -> Array:
    return jnp.swapaxes(x, 0, 1).astype(dtype)


def _spread(at: _Specs, BC_ref, spread_ref) -> None:
    """B and C of all steps as registers of equal lanes; of two groups also half and half, for where they meet."""
    first = lax.broadcasted_iota(jnp.int32, (at.rows, LANES), 1) < LANES // 2

    def body(steps):
        tile = _by_step(BC_ref, slice(None), steps)  # [8, rows, groups * 2n]
        for m in range(2 * at.n):
            for i in range(8):
                wide = []
                for group in range(at.tiles.groups):
                    column = group * 2 * at.n + m
                    wide.append(jnp.broadcast_to(tile[i, :, column : column + 1], (at.rows, LANES)))
                    spread_ref[group, steps.start + i, m] = wide[group]
                if at.tiles.groups == 2:
                    spread_ref[2, steps.start + i, m] = jnp.where(first, *wide)

    _eights(at, body)


def _softplus(x):
    return jnp.maximum(x, 0) + jnp.log1p(jnp.exp(-jnp.abs(x)))


def _per_channel(at: _Specs, A_ref, pair_ref, lanes):
    """A log2(e) of each state, D and the bias, one register each."""
    shape = at.rows, LANES
    A = [jnp.broadcast_to(A_ref[m : m + 1, lanes], shape) * LOG2E for m in range(at.n)]
    return A, *(jnp.broadcast_to(pair_ref[i : i + 1, lanes], shape) for i in (0, 1))


# ------------------------------------------------------------------------------------------------------------- kernels


def _forward_kernel(at: _Specs, keep, flags, u_ref, delta_ref, BC_ref, A_ref, pair_ref, y_ref, *rest):
    boundary_ref, (h_ref, spread_ref, step_ref, out_ref) = (rest[0] if keep else None), rest[-4:]
    n, chunk = at.n, at.tiles.chunk
    backwards = flags[pl.program_id(1)]

    @pl.when(pl.program_id(2) == 0)
    def _():
        h_ref[...] = jnp.zeros_like(h_ref)

    if boundary_ref is not None:
        boundary_ref[...] = h_ref[...]
    _spread(at, BC_ref, spread_ref)

    def block(lanes, slot):
        A, skip, bias = _per_channel(at, A_ref, pair_ref, lanes)

        def load(steps):
            u = _by_step(u_ref, slice(None), steps, lanes)
            delta = _softplus(_by_step(delta_ref, slice(None), steps, lanes) + bias)
            step_ref[0, steps], step_ref[1, steps], step_ref[2, steps] = delta, delta * u, skip * u

        def step(i, h):
            t = jnp.where(backwards == 1, chunk - 1 - i, i)
            delta, x, y = (step_ref[part, t] for part in range(3))
            new = []
            for m in range(n):
                hm = jnp.exp2(delta * A[m]) * h[m] + x * spread_ref[slot, t, m]
                y += hm * spread_ref[slot, t, n + m]
                new.append(hm)
            out_ref[0, t] = y
            return tuple(new)

        def store(steps):
            y_ref[:, steps, lanes] = _by_row(out_ref[0, steps], y_ref.dtype)

        _eights(at, load, together=True)
        h = lax.fori_loop(0, chunk, step, tuple(h_ref[m, :, lanes] for m in range(n)), unroll=at.unroll)
        for m in range(n):
            h_ref[m, :, lanes] = h[m]
        _eights(at, store, together=True)

    at.lane_blocks(block)


def _backward_kernel(
    at: _Specs, flags, u_ref, delta_ref, BC_ref, A_ref, pair_ref, boundary_ref, dy_ref,
    du_ref, ddelta_ref, dBC_ref, dA_ref, dpair_ref, g_ref, spread_ref, h_ref, sum_ref, step_ref, out_ref,
):  # fmt: skip
    n, chunk, rows = at.n, at.tiles.chunk, at.rows
    backwards = flags[pl.program_id(1)]

    @pl.when(pl.program_id(2) == 0)
    def _():
        for ref in (g_ref, dA_ref, dpair_ref):
            ref[...] = jnp.zeros_like(ref)

    sum_ref[...] = jnp.zeros_like(sum_ref)
    _spread(at, BC_ref, spread_ref)

    def block(lanes, slot):
        A, skip, bias = _per_channel(at, A_ref, pair_ref, lanes)

        def load(steps):
            delta = _softplus(_by_step(delta_ref, slice(None), steps, lanes) + bias)
            u, dy = (_by_step(ref, slice(None), steps, lanes) for ref in (u_ref, dy_ref))
            step_ref[0, steps], step_ref[1, steps], step_ref[2, steps] = delta, u, dy

        def again(i, h):
            t = jnp.where(backwards == 1, chunk - 1 - i, i)
            delta, u, dy = (step_ref[part, t] for part in range(3))
            x, new = delta * u, []
            for m in range(n):
                h_ref[i, m] = h[m]
                hm = jnp.exp2(delta * A[m]) * h[m] + x * spread_ref[slot, t, m]
                sum_ref[slot, t, n + m] += dy * hm
                new.append(hm)
            return tuple(new)

        def back(i, carry):
            g, dA = carry
            i = chunk - 1 - i
            t = jnp.where(backwards == 1, chunk - 1 - i, i)
            delta, u, dy = (step_ref[part, t] for part in range(3))
            x, gB, qA, new, sums = delta * u, jnp.zeros_like(u), jnp.zeros_like(u), [], []
            for m in range(n):
                gm = g[m] + dy * spread_ref[slot, t, n + m]
                sum_ref[slot, t, m] += gm * x
                gB += gm * spread_ref[slot, t, m]
                gm *= jnp.exp2(delta * A[m])
                q = gm * h_ref[i, m]
                qA += q * A[m]
                sums.append(dA[m] + q * delta)
                new.append(gm)
            out_ref[0, t] = delta * gB  # du without the skip
            out_ref[1, t] = u * gB + qA * (1 / LOG2E)  # gradient of the step size
            return tuple(new), tuple(sums)

        def store(steps):
            slope = jax.nn.sigmoid(_by_step(delta_ref, slice(None), steps, lanes) + bias)
            draw, dy = out_ref[1, steps] * slope, step_ref[2, steps]
            dpair_ref[0, :, lanes] += (dy * step_ref[1, steps]).sum(0)
            dpair_ref[1, :, lanes] += draw.sum(0)
            ddelta_ref[:, steps, lanes] = _by_row(draw, ddelta_ref.dtype)
            du_ref[:, steps, lanes] = _by_row(out_ref[0, steps] + skip * dy, du_ref.dtype)

        _eights(at, load, together=True)
        lax.fori_loop(0, chunk, again, tuple(boundary_ref[m, :, lanes] for m in range(n)), unroll=at.unroll)
        start = (tuple(ref[m, :, lanes] for m in range(n)) for ref in (g_ref, dA_ref))
        g, dA = lax.fori_loop(0, chunk, back, tuple(start), unroll=at.unroll)
        for m in range(n):
            g_ref[m, :, lanes], dA_ref[m, :, lanes] = g[m], dA[m]
        _eights(at, store)

    at.lane_blocks(block)
    columns = at.tiles.groups * 2 * n
    column = lax.broadcasted_iota(jnp.int32, (rows, columns), 1)
    first = lax.broadcasted_iota(jnp.int32, (rows, LANES), 1) < LANES // 2

    def sum_lanes(steps):
        totals = [jnp.zeros((rows, columns), jnp.float32)] * 8
        for i in range(columns):
            group, m = divmod(i, 2 * n)
            for s in range(8):
                lanes = sum_ref[group, steps.start + s, m]
                if at.tiles.groups == 2:
                    lanes += jnp.where(first == (group == 0), sum_ref[2, steps.start + s, m], 0.0)
                totals[s] = jnp.where(column == i, lanes.sum(1, keepdims=True), totals[s])
        dBC_ref[:, steps] = _by_row(jnp.stack(totals), jnp.float32)

    _eights(at, sum_lanes)

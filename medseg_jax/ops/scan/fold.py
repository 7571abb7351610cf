"""What the kernels of every platform share: their gradient, and vmap.

Under vmap the mapped axis becomes more rows, or more channels where the parameters are mapped too.

A kernel scans rows and blocks of channels that know nothing of each other, so that many calls are one with more of
them. (The batching rule that JAX has for kernels would add an axis to the grid instead: single rows then stay single,
and a register that holds eight of them is filled to an eighth.)
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array


class Tiles(NamedTuple):
    """How one call is cut, and whether Pallas interprets the kernel."""

    flags: tuple[bool, ...]  # time runs backwards, one a block of channels
    width: int  # channels of a block
    chunk: int  # steps between kept states
    groups: int = 1  # in a block, 1 or 2
    interpret: bool = False


class Axes(NamedTuple):
    """Where an array of a kernel has its batch rows (None: shared by all) and its blocks of channels, `width` wide."""

    rows: int | None
    blocks: int
    width: int = 1

    def folded(self, into_blocks: bool) -> int:
        """The axis that a mapped axis is folded into."""
        return self.blocks if into_blocks or self.rows is None else self.rows


@functools.cache
def foldable(kernel: Callable, tiles: Tiles, inputs: tuple[Axes, ...], outputs: tuple[Axes, ...]) -> Callable:
    """kernel(tiles, *arrays) -> tuple of arrays, for which vmap calls it once."""
    call = jax.custom_batching.custom_vmap(functools.partial(kernel, tiles))

    @call.def_vmap
    def _(size: int, mapped: list[bool], *arrays: Array):
        into_blocks = any(m for m, at in zip(mapped, inputs, strict=True) if at.rows is None)

        def fold(x: Array, is_mapped: bool, at: Axes) -> Array:
            if not into_blocks and at.rows is None:
                return x
            x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
            axis = at.folded(into_blocks)
            width = at.width if into_blocks else x.shape[axis + 1]
            x = x.reshape(*x.shape[: axis + 1], -1, width, *x.shape[axis + 2 :])
            x = jnp.moveaxis(x, 0, axis + 1)  # blocks of the same place become neighbours: u's may be fewer
            return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 3 :])

        def unfold(x: Array, at: Axes) -> Array:
            axis = at.folded(into_blocks)
            width = at.width if into_blocks else x.shape[axis] // size
            x = x.reshape(*x.shape[:axis], -1, size, width, *x.shape[axis + 1 :])
            x = jnp.moveaxis(x, axis + 1, 0)
            return x.reshape(*x.shape[: axis + 1], -1, *x.shape[axis + 3 :])

        flags = tuple(f for f in tiles.flags for _ in range(size)) if into_blocks else tiles.flags
        folded = foldable(kernel, tiles._replace(flags=flags), inputs, outputs)
        out = folded(*map(fold, arrays, mapped, inputs))
        return tuple(map(unfold, out, outputs)), (True,) * len(outputs)

    return call


class Layout(NamedTuple):
    """Axes of the arrays of a kernel.

    Attributes:
        wide: of u, delta and y, and of sums over time [b, ., c].
        narrow: of B and C side by side.
        shared: of A [n, c], and of the pair of D and the bias of delta [2, c].
        boundaries: of the states that enter the chunks.
    """

    wide: Axes
    narrow: Axes
    shared: Axes
    boundaries: Axes

    @property
    def inputs(self) -> tuple[Axes, ...]:
        """Of u, delta, BC, A and the pair."""
        return (self.wide, self.wide, self.narrow, self.shared, self.shared)


@functools.cache
def differentiable(forward: Callable, keep: Callable, backward: Callable, tiles: Tiles, at: Layout) -> Callable:
    """(u, delta, BC, A, pair) -> y, with its gradient and vmap, from three kernels.

    Args:
        forward: (tiles, *inputs) -> (y,).
        keep: (tiles, *inputs) -> (y, boundaries).
        backward: (tiles, *inputs, boundaries, dy) -> (du, ddelta, dBC, dA, dpair), the last two a sum for each row.
    """

    @jax.custom_vjp
    def scan(*inputs: Array) -> Array:
        return foldable(forward, tiles, at.inputs, (at.wide,))(*inputs)[0]

    def scan_and_keep(*inputs: Array):
        y, boundaries = foldable(keep, tiles, at.inputs, (at.wide, at.boundaries))(*inputs)
        return y, (*inputs, boundaries)

    def gradients(saved, dy: Array):
        outputs = (at.wide, at.wide, at.narrow, at.wide, at.wide)
        call = foldable(backward, tiles, (*at.inputs, at.boundaries, at.wide), outputs)
        du, ddelta, dBC, dA, dpair = call(*saved, dy)
        return du, ddelta, dBC, dA.sum(0), dpair.sum(0)

    scan.defvjp(scan_and_keep, gradients)
    return scan

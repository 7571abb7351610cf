"""vmap of the kernels: the mapped axis becomes more rows, or more channels where the parameters are mapped too.

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


class Axes(NamedTuple):
    """Where an array of a kernel has its batch rows (None: shared by all) and its blocks of channels, `width` wide."""

    rows: int | None
    blocks: int
    width: int = 1

    def folded(self, into_blocks: bool) -> int:
        """The axis that a mapped axis is folded into."""
        return self.blocks if into_blocks or self.rows is None else self.rows


@functools.cache
def foldable(kernel: Callable, tiles, inputs: tuple[Axes, ...], outputs: tuple[Axes, ...]) -> Callable:
    """kernel(tiles, *arrays) -> tuple of arrays, for which vmap calls it once. tiles.flags has one entry a block."""
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

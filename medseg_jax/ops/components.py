"""Connected components of masks: on the device for batches inside a jitted step, on the host for one large mask.

On the device a component's label is found by hooking and pointer jumping (Shiloach and Vishkin 1982, J. Algorithms
3:57): every node points at a node of its component with a smaller or equal index; in each round the node that it points
at is hooked to the smallest label among the neighbours, and paths are halved twice, until no neighbour has another
label. Shapes are static, nothing depends on the order of execution, and the rounds grow with the logarithm of the
longest path: 4 on blobs, 4 to 6 on noise, where spreading labels from neighbour to neighbour takes hundreds.

The nodes are blocks of voxels that cannot belong to two components: with connectivity through faces two voxels in a
row are always connected if both are in the mask, through edges also 2 x 2, through corners also 2 x 2 x 2. So labels
are found for a half, a quarter or an eighth of the voxels; blocks are asked once, beforehand, whether their voxels
meet.

On the host SciPy does the same for post-processing, with 8 or 26 neighbours, within the mask's bounding box.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int
from scipy import ndimage

from medseg_jax.types import UserError

RANKS = {2: {4: 1, 8: 2}, 3: {6: 1, 18: 2, 26: 3}}
"""Spatial axes -> neighbours of a voxel -> along how many axes at once a neighbour may differ."""

BIG = np.iinfo(np.int32).max

# ------------------------------------------------------------------------------------------------------- on the device


def label(mask: Bool[Array, "b *s"], neighbours: int) -> Int[Array, "b *s"]:
    """Components of each mask, numbered from 1 in reading order, 0 outside; equal to `scipy.ndimage.label`.

    Args:
        mask: pictures or volumes.
        neighbours: 4 or 8 in 2-D; 6, 18 or 26 in 3-D. UserError for another number.
    """
    nodes = _components(mask, neighbours)
    first, cells = _at(_first_cell(nodes), nodes.root), _cells(nodes)
    starts = _spread(first, (*nodes.block[:-1], 1), cells.shape) == cells
    numbers = jnp.cumsum(starts.reshape(len(mask), -1), 1, dtype=jnp.int32)
    number = _at(numbers, jnp.minimum(first, cells.size - 1))
    return jnp.where(mask, _spread(number, nodes.block, nodes.size), 0)


def largest_component(mask: Bool[Array, "b *s"], neighbours: int) -> Bool[Array, "b *s"]:
    """The largest component of each mask; of equally large ones the first in reading order; nothing of nothing."""
    nodes = _components(mask, neighbours)
    b = len(mask)
    voxels = sum(nodes.voxels.values(), jnp.int32(0))  # [b, *n]
    sizes = _scatter(lambda at, v: at.add(v, mode="promise_in_bounds"), jnp.zeros_like(voxels), nodes.root, voxels)
    sizes, first = sizes.reshape(b, -1), _first_cell(nodes).reshape(b, -1)
    best = jnp.where(sizes == sizes.max(1, keepdims=True), first, BIG).argmin(1)
    return mask & _spread(nodes.root == best.reshape(b, *(1,) * len(nodes.size)), nodes.block, nodes.size)


class _Nodes(NamedTuple):
    """Blocks of voxels [b, *n], the nodes of the graph."""

    root: Array  # [b, *n] the smallest index of a block of the same component; its own where the block is empty
    voxels: dict[tuple[int, ...], Array]  # place in the block -> whether the mask has that voxel, [b, *n]
    block: tuple[int, ...]
    size: tuple[int, ...]  # of the mask


def _components(mask: Array, neighbours: int) -> _Nodes:
    _, *size = mask.shape
    dim = len(size)
    rank = RANKS.get(dim, {}).get(neighbours)
    if rank is None:
        expected = f"{', '.join(map(str, RANKS[dim]))} in {dim}-D" if dim in RANKS else "a batch of 2-D or 3-D masks"
        raise UserError("No such neighbourhood", found=f"{neighbours} neighbours in {dim}-D", expected=expected)
    block = (1,) * (dim - rank) + (2,) * rank
    voxels = _split(mask, block, False)
    joined = _joined(voxels, block, rank)
    shape = next(iter(voxels.values())).shape

    def lowest(label: Array) -> Array:
        """The smallest label of a block and those that it is joined to."""
        low, padded = label, jnp.pad(label, [(0, 0), *((1, 1) for _ in size)])
        for way, meets in joined.items():
            there = padded[:, *(slice(1 + w, 1 + w + n) for w, n in zip(way, shape[1:], strict=True))]
            low = jnp.minimum(low, jnp.where(meets, there, label))
        return low

    def hook(state: tuple[Array, Array]) -> tuple[Array, Array]:
        label, low = state
        label = jnp.minimum(_scatter(lambda at, v: at.min(v, mode="promise_in_bounds"), label, label, low), low)
        for _ in range(2):  # a barrier, or XLA gathers the first time again for each element of the second
            label = lax.optimization_barrier(_at(label, label))
        return label, lowest(label)

    index = jnp.arange(math.prod(shape[1:]), dtype=jnp.int32).reshape(shape[1:])
    label = lowest(jnp.broadcast_to(index, shape))
    root, _ = lax.while_loop(lambda state: jnp.any(state[0] != state[1]), hook, (label, lowest(label)))
    return _Nodes(root, voxels, block, tuple(size))


def _joined(voxels: dict[tuple[int, ...], Array], block: tuple[int, ...], rank: int) -> dict[tuple[int, ...], Array]:
    """Way to a neighbour block -> whether a voxel there and a voxel here are neighbours, [b, *n]."""
    dim = len(block)
    steps = [step for step in itertools.product((-1, 0, 1), repeat=dim) if 0 < sum(map(abs, step)) <= rank]
    joined: dict[tuple[int, ...], Array] = {}
    for place, here in voxels.items():
        for step in steps:
            to = [i + s for i, s in zip(place, step, strict=True)]
            way = tuple(t // k for t, k in zip(to, block, strict=True))
            if way > (0,) * dim:
                there = _shift(voxels[tuple(t % k for t, k in zip(to, block, strict=True))], way)
                joined[way] = here & there | joined.get(way, jnp.zeros_like(here))
    back = {tuple(-w for w in way): meets for way, meets in joined.items()}
    return joined | {way: _shift(meets, way) for way, meets in back.items()}


def _first_cell(nodes: _Nodes) -> Array:
    """[b, *n] for each root the cell in which its component begins in reading order; `BIG` elsewhere."""
    cells = _split(_cells(nodes)[None], (*nodes.block[:-1], 1), BIG)
    first = jnp.full_like(nodes.root, BIG)
    for (*rows, _), here in nodes.voxels.items():
        first = jnp.minimum(first, jnp.where(here, cells[*rows, 0], BIG))
    at_root = jnp.full_like(nodes.root, BIG)
    return _scatter(lambda at, v: at.min(v, mode="promise_in_bounds"), at_root, nodes.root, first)


def _cells(nodes: _Nodes) -> Array:
    """Linear index of each cell: the one or two voxels in a row that lie in one block. No two components share one."""
    shape = (*nodes.size[:-1], -(-nodes.size[-1] // nodes.block[-1]))
    return jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)


def _split(x: Array, block: tuple[int, ...], fill: int | bool) -> dict[tuple[int, ...], Array]:
    """[b, *s] -> place in the block -> [b, *n], padded to whole blocks."""
    widths = [(0, 0), *((0, -n % k) for n, k in zip(x.shape[1:], block, strict=True))]
    x = jnp.pad(x, widths, constant_values=fill)
    places = itertools.product(*map(range, block))
    return {place: x[:, *(slice(i, None, k) for i, k in zip(place, block, strict=True))] for place in places}


def _spread(x: Array, block: tuple[int, ...], size: tuple[int, ...]) -> Array:
    """[b, *n] -> [b, *size]: each value at all places of its block."""
    for axis, k in enumerate(block, 1):
        x = jnp.repeat(x, k, axis)
    return x[:, *(slice(n) for n in size)]


def _shift(x: Array, way: tuple[int, ...]) -> Array:
    """y[b, i] = x[b, i + way]; zero beyond the border."""
    x = jnp.pad(x, [(0, 0), *((max(-w, 0), max(w, 0)) for w in way)])
    return x[:, *(slice(w, None) if w > 0 else slice(n + w) for w, n in zip(way, x.shape[1:], strict=True))]


def _at(x: Array, index: Array) -> Array:
    """y[b, i] = x[b, index[b, i]] with linear indices, in the shape of `index`."""
    b = len(x)
    found = jnp.take_along_axis(x.reshape(b, -1), index.reshape(b, -1), 1, mode="promise_in_bounds")
    return found.reshape(index.shape)


def _scatter(update: Callable, x: Array, index: Array, values: Array) -> Array:
    """`update(x.at[index], values)` with linear indices, for each element of the batch."""
    b = len(x)
    one = jax.vmap(lambda x, index, values: update(x.at[index], values))
    return one(x.reshape(b, -1), index.reshape(b, -1), values.reshape(b, -1)).reshape(x.shape)


# --------------------------------------------------------------------------------------------------------- on the host


def keep_largest(mask: np.ndarray) -> np.ndarray:
    """The largest component alone; of equally large ones the first in reading order."""

    def inside(box: np.ndarray) -> np.ndarray:
        components, count = _label(box)
        return box if count < 2 else components == 1 + int(np.argmax(_sizes(components)))

    return _in_box(mask, inside)


def remove_small(mask: np.ndarray, voxels: float) -> np.ndarray:
    """Without the components of fewer than so many voxels."""

    def inside(box: np.ndarray) -> np.ndarray:
        components, _ = _label(box)
        return np.concatenate([[False], _sizes(components) >= voxels])[components]

    return _in_box(mask, inside)


def fill_holes(mask: np.ndarray) -> np.ndarray:
    """With every cavity filled: what is outside the mask and cannot reach the border of the array through faces.

    An array one voxel thick is treated as the picture that it is.
    """
    flat = _in_box(mask.squeeze(), lambda box: np.asarray(ndimage.binary_fill_holes(box)))
    return flat.reshape(mask.shape)


def _label(mask: np.ndarray) -> tuple[np.ndarray, int]:
    """Components numbered from 1 in reading order: ([*s] int32, how many)."""
    components, count = ndimage.label(mask, np.ones((3,) * mask.ndim))  # pyright: ignore[reportGeneralTypeIssues]
    return components, count


def _sizes(components: np.ndarray) -> np.ndarray:
    """[count] voxels of each component; slice by slice, since counting takes eight bytes a voxel."""
    count = int(components.max())
    return sum((np.bincount(part.ravel(), minlength=count + 1) for part in components), np.zeros(count + 1, int))[1:]


def _in_box(mask: np.ndarray, change: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A copy of the mask in which `change` was applied to the bounding box of what is True."""
    result = np.array(mask, bool)
    found = ndimage.find_objects(result.view(np.uint8))
    if found:
        result[found[0]] = change(result[found[0]])
    return result

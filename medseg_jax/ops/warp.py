"""Geometry of a sample: affine maps and B-spline displacements, read at any place of an image and its label maps."""

from collections.abc import Sequence
from functools import reduce
from operator import and_, mul

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotation_matrix(degrees: Float[Array, " r"]) -> Float[Array, "n n"]:
    """One angle: 2 x 2. Three angles: 3 x 3, the product of the rotations about the first, second and third axis."""
    cosines, sines = jnp.cos(jnp.deg2rad(degrees)), jnp.sin(jnp.deg2rad(degrees))
    if degrees.shape == (1,):
        return jnp.array([[cosines[0], -sines[0]], [sines[0], cosines[0]]])
    matrix = jnp.eye(3)
    for axis, (i, j) in enumerate(((1, 2), (2, 0), (0, 1))):
        turn = (
            jnp.eye(3)
            .at[(i, i, j, j), (i, j, i, j)]
            .set(jnp.array([cosines[axis], -sines[axis], sines[axis], cosines[axis]]))
        )
        matrix = jnp.matmul(matrix, turn, precision="highest")
    return matrix


def resample(
    image: Float[Array, "*s c"],
    label: Int[Array, "*s m"] | None,
    matrix: Float[Array, "n n"],
    offset: Float[Array, " n"],
    displacement: Float[Array, "n *p"] | None,
    size: Sequence[int],
) -> tuple[Float[Array, "*p c"], Int[Array, "*p m"] | None]:
    """Read image (linearly) and label (nearest) at `matrix @ (o + displacement) + offset`, outside = 0.

    o is a voxel's place relative to the middle of the patch, the result relative to the middle of the centre crop that
    the identity would give; all in voxels. Equals SciPy's affine_transform with mode="grid-constant", order 1 and 0.
    """
    full, n = image.shape[:-1], len(size)
    middle = [(p - 1) / 2 for p in size]
    place = [jax.lax.broadcasted_iota(jnp.float32, tuple(size), i) - middle[i] for i in range(n)]
    if displacement is not None:
        place = [place[i] + displacement[i] for i in range(n)]
    start = [(s - p) // 2 + m for s, p, m in zip(full, size, middle, strict=True)]
    at = [sum(matrix[i, j] * place[j] for j in range(n)) + (offset[i] + start[i]) for i in range(n)]

    low = [jnp.floor(a) for a in at]
    out = jnp.zeros((), jnp.float32)
    for corner in np.ndindex(*(2,) * n):
        index = [low[i].astype(jnp.int32) + corner[i] for i in range(n)]
        share = [at[i] - low[i] if corner[i] else 1 - (at[i] - low[i]) for i in range(n)]
        weight = jnp.where(_inside(index, full), reduce(mul, share), 0)
        out += weight[..., None] * _gather(image, index)
    if label is None:
        return out, None
    index = [jnp.floor(a + 0.5).astype(jnp.int32) for a in at]
    return out, jnp.where(_inside(index, full)[..., None], _gather(label, index), 0)


def _inside(index: list[Array], size: Sequence[int]) -> Array:
    return reduce(and_, [(i >= 0) & (i < side) for i, side in zip(index, size, strict=True)])


def _gather(array: Array, index: list[Array]) -> Array:
    """array [*s, c] at clipped voxel indices [*p] each -> [*p, c]. One flat index: XLA's gather is fastest so."""
    flat = jnp.zeros((), jnp.int32)
    for i, side in zip(index, array.shape[:-1], strict=True):
        flat = flat * side + jnp.clip(i, 0, side - 1)
    return array.reshape(-1, array.shape[-1]).at[flat].get(mode="promise_in_bounds")


def elastic_field(points: Float[Array, "n *g"], size: Sequence[int]) -> Float[Array, "n *p"]:
    """Cubic B-spline through a coarse grid of control points: a displacement for every voxel of the patch."""
    for axis, side in enumerate(size):
        basis = _spline_basis(side, points.shape[axis + 1] - 3)  # [side, g]
        points = jnp.moveaxis(jnp.tensordot(basis, points, (1, axis + 1), precision="highest"), 0, axis + 1)
    return points


def _spline_basis(side: int, cells: int) -> np.ndarray:
    """[side, cells + 3]: weights of the control points of a uniform cubic B-spline for each voxel; rows sum to 1."""
    t = np.abs(np.linspace(1, cells + 1, side)[:, None] - np.arange(cells + 3))
    inner, outer = 2 / 3 - t**2 + t**3 / 2, np.clip(2 - t, 0, None) ** 3 / 6
    return np.where(t < 1, inner, outer).astype(np.float32)

"""Distances between the surfaces of two boolean masks: HD, HD95, ASSD, NSD, in the unit of the spacing.

A surface is a set of elements, each with a place and a size. Two kinds:

"subvoxel" (default)  Elements sit at the corners where 2 x 2 (x 2) voxels meet and are as large as the piece of surface
                      that marching cubes draws there (mm² in 3-D, mm of contour in 2-D). Percentiles, means and shares
                      weigh by that size. (Nikolov et al. 2018, arXiv 1809.04430; DeepMind's surface-distance package;
                      MONAI's NSD with use_subvoxels=True.)
"voxel"               Elements are the voxels of the mask that touch the outside, all of weight 1. (MONAI, MedPy.)

Why "subvoxel" is the default: counting voxels depends on how a surface lies in the grid (a slanted face has fewer
border voxels per mm² than a straight one) and, on anisotropic grids, weighs caps and walls by their number of voxels
instead of their area; border voxels also lie half a voxel inside the object, so that in thin structures all is border.
Elements with sizes suffer from neither.

With d(e) the distance from an element e of one surface to the nearest element of the other:

    HD_p = max over the two surfaces of the p-th percentile of d      HD = HD_100, HD95 = HD_95
    ASSD = sum of size x d over both surfaces / sum of sizes
    NSD  = size of all elements with d <= tolerance / sum of sizes

Two empty masks: HD = HD95 = ASSD = 0, NSD = 1. One empty mask: distances infinite, NSD = 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from scipy import ndimage
from scipy.spatial import KDTree


@dataclass(frozen=True, eq=False)
class SurfaceDistances:
    """Distance from each element of one surface to the nearest element of the other, infinite where that one is empty.

    Attributes:
        from_prediction: [n] distances of the prediction's elements to the reference's surface.
        from_reference: [m] distances of the reference's elements to the prediction's surface.
        prediction_size: [n] area (3-D) or length (2-D) of the prediction's elements; None on "voxel" surfaces.
        reference_size: [m] the same of the reference's elements.
    """

    from_prediction: np.ndarray
    from_reference: np.ndarray
    prediction_size: np.ndarray | None = None
    reference_size: np.ndarray | None = None

    @property
    def pooled(self) -> tuple[np.ndarray, np.ndarray]:
        """Distances and sizes [n + m] of both surfaces together."""
        distances = np.concatenate([self.from_prediction, self.from_reference])
        if self.prediction_size is None or self.reference_size is None:
            return distances, np.ones(len(distances))
        return distances, np.concatenate([self.prediction_size, self.reference_size])


def surface_distances(
    prediction: np.ndarray,
    reference: np.ndarray,
    spacing: Sequence[float],
    *,
    surface: str = "subvoxel",
    connectivity: int = 1,
    outside: bool = False,
) -> SurfaceDistances:
    """Measure the distances between the surfaces of two masks.

    Args:
        prediction, reference: boolean masks [h, w] or [d, h, w].
        spacing: distance between neighbouring voxels along each axis.
        surface: "subvoxel" or "voxel", see the head of this file.
        connectivity: for "voxel": a voxel lies on the surface if the mask lacks one of its neighbours, counting those
            that differ in up to this many coordinates (1: faces only; number of axes: corners, too).
        outside: for "voxel": whether what lies beyond the image counts as part of the mask. False: a mask that touches
            the image's border has a surface there.
    """
    prediction, reference = np.asarray(prediction, bool), np.asarray(reference, bool)
    if prediction.shape != reference.shape or prediction.ndim != len(spacing):
        raise ValueError(f"masks {prediction.shape} and {reference.shape} and spacing {tuple(spacing)} do not match")
    if prediction.ndim not in (2, 3):
        raise ValueError(f"masks have 2 or 3 axes, found {prediction.ndim}")
    box = ndimage.find_objects((prediction | reference).view(np.uint8))
    if not box:
        none = np.zeros(0)
        return SurfaceDistances(none, none, none, none)
    if surface == "voxel":
        edge_p, edge_r = (_border_voxels(mask, box[0], connectivity, outside) for mask in (prediction, reference))
        return SurfaceDistances(_distances(edge_p, edge_r, spacing), _distances(edge_r, edge_p, spacing))
    if surface != "subvoxel":
        raise ValueError(f'surface is "subvoxel" or "voxel", found "{surface}"')
    codes_p, codes_r = _corner_codes(prediction[box[0]]), _corner_codes(reference[box[0]])
    sizes = element_sizes(tuple(float(s) for s in spacing))
    # the two codes that see one kind of voxel only, all outside and all inside, have no surface
    edge_p, edge_r = (sizes[codes] > 0 for codes in (codes_p, codes_r))
    return SurfaceDistances(
        _distances(edge_p, edge_r, spacing),
        _distances(edge_r, edge_p, spacing),
        sizes[codes_p[edge_p]],
        sizes[codes_r[edge_r]],
    )


def hausdorff(distances: SurfaceDistances, percentile: float = 100.0, *, pooled: bool = False) -> float:
    """Hausdorff distance, or its robust form at a percentile (95: HD95).

    On "subvoxel" surfaces the percentile is the smallest distance that at least that share of the surface does not
    exceed; on "voxel" surfaces it interpolates linearly between distances (numpy.percentile).

    Args:
        pooled: take one percentile over both surfaces together (MedPy) instead of the larger of the two (MONAI,
            surface-distance).
    """
    if pooled:
        d, size = distances.pooled
        return _percentile(d, None if distances.prediction_size is None else size, percentile)
    return max(
        _percentile(distances.from_prediction, distances.prediction_size, percentile),
        _percentile(distances.from_reference, distances.reference_size, percentile),
    )


def assd(distances: SurfaceDistances) -> float:
    """Average symmetric surface distance: the mean over both surfaces together, weighted by size."""
    d, size = distances.pooled
    return float(np.sum(d * size) / np.sum(size)) if len(d) else 0.0


def nsd(distances: SurfaceDistances, tolerance: float) -> float:
    """Normalised surface distance (surface Dice): the share of both surfaces that lies within the tolerance, in [0, 1].

    Args:
        tolerance: largest distance that counts as agreement, in the unit of the spacing; best taken from how far human
            readers disagree.
    """
    d, size = distances.pooled
    return float(np.sum(size[d <= tolerance]) / np.sum(size)) if len(d) else 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Where the surface is
# ---------------------------------------------------------------------------------------------------------------------


def _border_voxels(mask: np.ndarray, box: tuple[slice, ...], connectivity: int, outside: bool) -> np.ndarray:
    """Voxels of a mask [*s] with a neighbour outside of it, cropped to the box."""
    # one voxel of surroundings, so that the erosion sees what the whole image would have shown it
    grown = tuple(slice(max(b.start - 1, 0), b.stop + 1) for b in box)
    inner = tuple(slice(b.start - g.start, b.stop - g.start) for b, g in zip(box, grown, strict=True))
    structure = ndimage.generate_binary_structure(mask.ndim, connectivity)
    eroded = np.asarray(ndimage.binary_erosion(mask[grown], structure, border_value=int(outside)), bool)
    return (mask[grown] & ~eroded)[inner]


def _corner_codes(mask: np.ndarray) -> np.ndarray:
    """Mask [*s] -> uint8 [*s + 1]: which of the voxels that meet at a corner are set; bit i is the i-th in C order."""
    padded = np.pad(mask, 1)
    codes = np.zeros([n + 1 for n in mask.shape], np.uint8)
    for bit, corner in enumerate(product((0, 1), repeat=mask.ndim)):
        view = padded[tuple(slice(o, o + n) for o, n in zip(corner, codes.shape, strict=True))]
        codes |= view.view(np.uint8) << np.uint8(bit)
    return codes


def _distances(source: np.ndarray, target: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """Distance from each set element of `source` [*s] (in C order) to the nearest one of `target` [*s]."""
    if not target.any():
        return np.full(np.count_nonzero(source), np.inf)
    distances = np.zeros(np.count_nonzero(source))
    apart = ~target[source]  # the rest lies on both surfaces
    points, others = np.argwhere(source)[apart], np.argwhere(target)  # [n, axes], [m, axes]
    if not len(points):
        return distances
    # A surface has few elements in its box, so a tree of them is quicker than a distance transform of the whole box.
    # The tree finds the neighbour; its distance is computed from whole voxels, so that equal distances stay equal.
    tree = KDTree(others * spacing, balanced_tree=False, compact_nodes=False)
    nearest = others[tree.query(points * spacing)[1]]
    distances[apart] = np.sqrt(np.sum(((nearest - points) * spacing) ** 2, 1))
    return distances


def _percentile(distances: np.ndarray, size: np.ndarray | None, percentile: float) -> float:
    if not len(distances):
        return 0.0
    if size is None:
        return float(np.percentile(distances, percentile)) if np.isfinite(distances[0]) else np.inf
    order = np.lexsort((size, distances))
    share = np.cumsum(size[order]) / np.sum(size)
    return float(distances[order][min(np.searchsorted(share, percentile / 100), len(order) - 1)])


# ---------------------------------------------------------------------------------------------------------------------
# How large a piece of it is: marching cubes on a binary image
# ---------------------------------------------------------------------------------------------------------------------


@cache
def element_sizes(spacing: tuple[float, ...]) -> np.ndarray:
    """[4] or [256] for each corner code: area (3-D) or length (2-D) of the surface among the voxels that meet there."""
    if len(spacing) == 2:
        rows, columns = spacing
        slanted = np.hypot(rows, columns) / 2
        # bits 0..3: upper left, upper right, lower left, lower right; one voxel apart cuts a corner, a pair cuts across
        sizes = np.full(16, slanted)
        sizes[[0, 15]] = 0
        sizes[[0b0011, 0b1100]] = columns
        sizes[[0b0101, 0b1010]] = rows
        sizes[[0b0110, 0b1001]] = 2 * slanted
        return sizes
    scale = np.prod(spacing) / np.array(spacing)
    return np.linalg.norm(_normals() * scale, axis=-1).sum(-1)


@cache
def _normals() -> np.ndarray:
    """[256, 4, 3]: for each code the normals of its triangles, as long as their area in the unit cube; 0 where unused.

    The surface cuts each edge of the cube that joins a set and an unset corner in its middle. Those cuts are joined
    across the faces into closed polygons; a face with two opposite corners set has both cut off on their own. For this
    the smaller half of the corners counts as set, so that a shape and its complement have the same surface. A polygon
    that is not flat is cut into triangles so that their area is largest, which gives every code one size, the one of
    Lorensen and Cline's table (1987) as used by surface-distance.
    """
    corners = np.array(list(product((0, 1), repeat=3)))
    normals = np.zeros((256, 4, 3))
    for code in range(1, 255):
        inside = [bool((code ^ (255 if code.bit_count() > 4 else 0)) >> i & 1) for i in range(8)]
        triangles = [
            normal
            for polygon in _polygons(inside)
            for normal in _triangulate([corners[[i, j]].mean(0) for i, j in polygon])
        ]
        normals[code, : len(triangles)] = triangles
    return normals


def _polygons(inside: list[bool]) -> list[list[tuple[int, int]]]:
    """Closed walks over the cut edges of a cube with those corners inside; an edge is two corners, outside first."""
    follow = {}
    for axis, side in product(range(3), (0, 1)):
        u, v, w = (4 >> axis, 4 >> (axis + 1) % 3, 4 >> (axis + 2) % 3)
        face = [side * u, side * u + v, side * u + v + w, side * u + w]
        face = face if side else face[::-1]  # seen from without, every face runs the same way round
        for i in range(4):
            if inside[face[i]] and not inside[face[i - 1]]:
                j = next(j for j in range(i, i + 4) if not inside[face[(j + 1) % 4]])
                follow[face[i - 1], face[i]] = (face[(j + 1) % 4], face[j % 4])
    polygons = []
    while follow:
        polygon = list(follow.popitem())
        while (edge := follow.pop(polygon[-1], None)) is not None:
            polygon.append(edge)
        polygons.append(polygon[1:])
    return polygons


def _triangulate(points: list[np.ndarray]) -> list[np.ndarray]:
    """Cut a polygon into the triangles of largest total area; their normals, as long as their area."""
    if len(points) < 3:
        return []
    first, last = points[0], points[-1]
    options = [
        [np.cross(points[k] - first, last - first) / 2, *_triangulate(points[: k + 1]), *_triangulate(points[k:])]
        for k in range(1, len(points) - 1)
    ]
    return max(options, key=lambda normals: sum(float(np.linalg.norm(n)) for n in normals))

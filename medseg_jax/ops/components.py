"""Connected components of masks: what post-processing does to a prediction. Pure functions of one boolean mask [*s].

Voxels are connected through faces, edges and corners (8 neighbours in a picture, 26 in a volume). Work is confined to
the mask's bounding box.
"""

from collections.abc import Callable

import numpy as np
from scipy import ndimage


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

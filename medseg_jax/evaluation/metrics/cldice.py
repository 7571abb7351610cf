"""clDice: do the centre lines of vessels and other tubes lie in each other's masks? And the skeleton that it needs.

With S the skeleton and V the mask of prediction (P) and reference (R) (Shit et al. 2021, arXiv 2003.07311):

    precision = |S_P in V_R| / |S_P|    sensitivity = |S_R in V_P| / |S_R|    clDice = their harmonic mean

Two empty masks score 1, one empty mask 0. Voxels are counted, so the spacing plays no part.

The skeleton is what is left after peeling: again and again, from each side in turn (up, down, left, ...), voxels of the
surface on that side are taken away if they are simple (taking them away changes no component, hole or cavity) and not
the end of a line (one neighbour). Voxels of one parity of coordinates never touch, so all simple ones of a parity go at
once, which equals taking them one after another. Hence the skeleton has the topology of the mask, in 2-D and 3-D.
Packages differ in the order of peeling and so in where, within a voxel or two, the line runs.
"""

from functools import cache
from itertools import product

import numpy as np
from scipy import ndimage


def cldice(prediction: np.ndarray, reference: np.ndarray) -> float:
    """clDice of two boolean masks [h, w] or [d, h, w], in [0, 1]; 1 if both are empty, 0 if one is."""
    prediction, reference = np.asarray(prediction, bool), np.asarray(reference, bool)
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} differ in shape")
    if not (prediction.any() and reference.any()):
        return float(not (prediction.any() or reference.any()))
    lines, others = (skeleton(prediction), skeleton(reference)), (reference, prediction)
    precision, sensitivity = (float(np.mean(mask[line])) for line, mask in zip(lines, others, strict=True))
    total = precision + sensitivity
    return 2 * precision * sensitivity / total if total else 0.0


def skeleton(mask: np.ndarray) -> np.ndarray:
    """Centre line of a boolean mask [h, w] or [d, h, w]: as thin as its topology allows, ends of lines kept."""
    mask = np.asarray(mask, bool)
    if mask.ndim not in (2, 3):
        raise ValueError(f"masks have 2 or 3 axes, found {mask.ndim}")
    box = ndimage.find_objects(mask.view(np.uint8))
    if not box:
        return mask.copy()
    inside = np.pad(mask[box[0]], 1)
    flat, shape = inside.reshape(-1), inside.shape
    offsets = np.array(_offsets(mask.ndim)) @ (np.array(inside.strides) // inside.itemsize)
    sides = [o for o, step in zip(offsets, _offsets(mask.ndim), strict=True) if np.abs(step).sum() == 1]
    parity = sum((np.arange(n) % 2).reshape(-1, *(1,) * (mask.ndim - 1 - a)) << a for a, n in enumerate(shape))
    parity = np.broadcast_to(parity, shape).reshape(-1)
    voxels, changed = np.flatnonzero(flat), True
    while changed:
        changed = False
        for side in sides:
            surface = voxels[~flat[voxels + side]]
            gone = np.zeros(len(flat), bool)
            surface = surface[_removable(flat, surface, offsets, mask.ndim)]
            for p in range(2**mask.ndim):
                some = surface[parity[surface] == p]
                some = some[_removable(flat, some, offsets, mask.ndim)]  # again: neighbours have gone meanwhile
                flat[some] = False
                gone[some] = True
                changed |= len(some) > 0
            voxels = voxels[~gone[voxels]]
    result = np.zeros_like(mask)
    result[box[0]] = inside[(slice(1, -1),) * mask.ndim]
    return result


@cache
def _offsets(ndim: int) -> tuple[tuple[int, ...], ...]:
    """Steps to the 8 or 26 neighbours, in C order."""
    return tuple(step for step in product((-1, 0, 1), repeat=ndim) if any(step))


def _removable(flat: np.ndarray, voxels: np.ndarray, offsets: np.ndarray, ndim: int) -> np.ndarray:
    """[n]: whether each voxel is simple and not the end of a line."""
    around = flat[voxels[:, None] + offsets]  # [n, neighbours]
    return is_simple(around, ndim) & (around.sum(1) > 1)


def is_simple(around: np.ndarray, ndim: int) -> np.ndarray:
    """Whether taking a voxel away keeps the topology, by its neighbours (Bertrand and Malandain 1994).

    The neighbours in the mask must form one component (8- or 26-connected), and those outside must form one component
    of those that touch a face of the voxel (4-connected among all 8, or 6-connected among the 18 without corners).

    Args:
        around: [n, 8] or [n, 26] boolean, neighbours in C order.
        ndim: 2 or 3.
    """
    steps = np.array(_offsets(ndim))
    distance = np.abs(steps[:, None] - steps)  # [neighbours, neighbours, axes]
    touch, share_face = distance.max(-1) == 1, distance.sum(-1) == 1
    if ndim == 3:
        corner = np.abs(steps).sum(-1) == 3
        share_face = share_face & ~corner & ~corner[:, None]
    faces = np.abs(steps).sum(-1) == 1
    weights = 1 << np.arange(len(steps), dtype=np.uint32)
    inside = around @ weights
    outside = ~around @ weights
    first = outside & np.uint32(weights[faces].sum())
    one_outside = (first & ~_flood(outside, first, share_face @ weights)) == 0
    return (inside > 0) & (first > 0) & one_outside & (_flood(inside, inside, touch @ weights) == inside)


def _flood(members: np.ndarray, starts: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """[n] bit sets: the component of `members` that holds the lowest bit of `starts`, bits joined by `neighbours`."""
    reached = starts & (~starts + np.uint32(1))
    while True:
        grown = reached.copy()
        for bit, around in enumerate(neighbours):
            grown |= np.where(reached >> np.uint32(bit) & np.uint32(1), np.uint32(around), np.uint32(0))
        grown &= members
        if (grown == reached).all():
            return reached
        reached = grown

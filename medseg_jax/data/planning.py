"""From the facts about the training cases to a plan: how to preprocess them, which network to train, and why.

The rules are nnU-Net's (Isensee et al., Nature Methods 2021, supplementary note 2): median spacing, patch from the
median shape shrunk to a memory budget, pooling per axis until the bottleneck would be smaller than 4. Ours are the
"cpu" budget, which picks a net that trains in about 15 minutes on two cores, and the working resolution of pictures,
which have no millimetres: they are shrunk to the budget as long as the thinnest class stays 4 pixels wide.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from medseg_jax.data.fingerprint import Fingerprint, fingerprint
from medseg_jax.data.plan import Plan
from medseg_jax.types import UserError

if TYPE_CHECKING:
    from medseg_jax.data.dataset import Dataset

MIN_FEATURE_MAP = 4


@dataclass(frozen=True)
class Budget:
    """What a machine affords.

    Attributes:
        features: channels of the first stage, for dim 2 and 3; doubled at each further one.
        max_features: their cap, for dim 2 and 3.
        activations: numbers that the feature maps of one batch may hold.
        batch: (least, most) cases a step, for dim 2 and 3.
        pixels: working area of a picture.
        cover: share of the median volume that a patch must see; spacing is coarsened until it does (0: never).
        steps: training steps at most.
        seconds: training time aimed at: fewer steps if they would take longer. None: no limit.
        flops: floating-point operations a second that training reaches.
    """

    features: dict[int, int]
    max_features: dict[int, int]
    activations: float
    batch: dict[int, tuple[int, int]]
    pixels: int
    cover: float
    steps: int
    seconds: float | None = None
    flops: float = 0.0


_ACCELERATOR = Budget({2: 32, 3: 32}, {2: 512, 3: 320}, 1.2e9, {2: (8, 64), 3: (2, 8)}, 512**2, 0.0, 250_000)
BUDGETS = {
    "cpu": Budget({2: 16, 3: 8}, {2: 128, 3: 128}, 5e7, {2: (8, 8), 3: (2, 4)}, 128**2, 1 / 8, 4_000, 900, 5e10),
    "gpu": _ACCELERATOR,
    "tpu": _ACCELERATOR,
}


def make_plan(dataset: "Dataset", *, dim: int | None = None, budget: str = "cpu") -> Plan:
    """Reads the training cases and decides everything that a training needs.

    Args:
        dim: 2 to train slice by slice on volumes; the default is the rank of the files.
        budget: a key of `BUDGETS`.

    Raises:
        UserError: see `fingerprint`; unknown budget; dim 3 on pictures.
    """
    if budget not in BUDGETS:
        raise UserError(f'Unknown budget "{budget}"', expected=", ".join(BUDGETS))
    if dim not in (None, 2, 3):
        raise UserError("Networks are 2-D or 3-D", found=f"dim={dim}", expected="2 or 3")
    facts = fingerprint(dataset)
    if facts.pictures and dim == 3:
        raise UserError("A 3-D network cannot be trained on pictures", file=dataset.root, remedy="leave dim out")
    return plan_from(facts, dataset.channels, dataset.labels.names, dim=dim, budget=budget)


def plan_from(
    facts: Fingerprint, channels: Sequence[str], classes: Sequence[str], *, dim: int | None = None, budget: str = "cpu"
) -> Plan:
    """The rules alone: no file is read."""
    limits = BUDGETS[budget]
    dim = dim or (2 if facts.pictures else 3)
    reasons = {"dim": _say_dim(facts, dim)}
    if facts.pictures:
        spacing, size, reasons["spacing"] = picture_resolution(facts, limits.pixels)
    else:
        spacing, reasons["spacing"] = target_spacing(facts.spacings, facts.shapes)
        size = None

    def network(spacing: Sequence[float]) -> tuple["Network", np.ndarray]:
        shapes = facts.shapes * facts.spacings / np.array(spacing)
        if size is not None:
            shapes = np.broadcast_to([1, *size], shapes.shape)
        median = np.maximum(np.round(np.median(shapes, 0)), 1)[3 - dim :]
        return design(median, spacing[3 - dim :], len(channels), len(classes) + 1, limits), median

    net, median = network(spacing or (1, 1, 1))
    if dim == 3 and limits.cover and spacing is not None:
        fine = spacing
        while math.prod(net.patch_size) < limits.cover * math.prod(median):
            spacing = tuple(round(1.03 * v, 4) for v in spacing)
            net, median = network(spacing)
        if spacing != fine:
            seen = f"a patch sees {limits.cover:.1%} of the median case"
            reasons["spacing"] += f" Coarsened from {_show(fine)} until {seen} ({budget} budget)."
    if dim == 2 and not facts.pictures and spacing is not None:
        spacing = (None, *spacing[1:])
        reasons["spacing"] += " Slices stay where they are (null): the network sees one at a time."
    if size is not None:
        reasons["working_size"] = reasons["spacing"]
        spacing = None

    batch_size = _batch_size(net, facts, limits.batch[dim], limits.activations, spacing)
    steps, reasons["steps"] = _steps(net, batch_size, limits, budget)
    normalization, reasons["normalization"] = _normalization(facts, channels)
    crop = not facts.pictures and bool((facts.kept < 1).any())
    reasons |= {
        "patch_size": f"Median case after resampling: {_show(median)}; {_fit(net, median)}, divisible by the strides.",
        "batch_size": f"What {limits.activations:.1g} activations hold, at most {limits.batch[dim][1]} and (beyond 4) "
        f"5 % of the data, at least 2: {net.activations * batch_size * 4 / 1e6:.0f} MB of feature maps in float32 "
        f"(about three times that in training).",
        "strides": f"Each axis is halved while at least {MIN_FEATURE_MAP} remain; coarse axes wait for the fine ones.",
        "kernel_sizes": "3, but 1 along an axis whose spacing is at least twice the finest one's.",
        "features": f"{limits.features[dim]} doubled at each stage up to {limits.max_features[dim]} ({budget} budget): "
        f"about {net.parameters / 1e6:.2f} M parameters.",
        "crop_nonzero": f"Cropping to what is not 0 keeps {np.median(facts.kept):.0%} of the median case.",
        "classes": "Share of voxels: " + ", ".join(f"{k} {v:.2%}" for k, v in facts.frequency.items()) + ".",
    }
    return Plan(
        dim=dim,
        spacing=spacing,
        patch_size=net.patch_size,
        batch_size=batch_size,
        normalization=normalization,
        strides=net.strides,
        kernel_sizes=net.kernel_sizes,
        features=net.features,
        crop_nonzero=crop,
        steps=steps,
        classes=tuple(classes),
        in_channels=len(channels),
        reasons=reasons,
        working_size=size,
    )


def plan_for(patch_size: Sequence[int], channels: int, classes: Sequence[str]) -> Plan:
    """A plan without data, from what a network must know: patches that are used as they are, spacing 1; for a GPU.

    Args:
        patch_size: two or three entries; padded until the strides divide them.
    """
    dim, limits = len(patch_size), BUDGETS["gpu"]
    if dim not in (2, 3):
        raise UserError("Networks are 2-D or 3-D", found=f"a patch of {dim} sides", expected="2 or 3")
    net = _sizes(patch_size, (1.0,) * dim, channels, len(classes) + 1, limits)
    return Plan(
        dim=dim,
        spacing=None,
        patch_size=net.patch_size,
        batch_size=limits.batch[dim][0],
        normalization=({"scheme": "none"},) * channels,
        strides=net.strides,
        kernel_sizes=net.kernel_sizes,
        features=net.features,
        crop_nonzero=False,
        steps=limits.steps,
        classes=tuple(classes),
        in_channels=channels,
    )


def _show(values: Sequence[float] | np.ndarray) -> str:
    return " x ".join(f"{v:.4g}" for v in values)


def _say_dim(facts: Fingerprint, dim: int) -> str:
    if facts.pictures:
        return "The files are pictures."
    if dim == 3:
        return "The files are volumes."
    spacing = np.median(facts.spacings, 0)
    coarse = int(spacing.argmax())
    if coarse and spacing[coarse] > 2 * spacing[0]:
        name = ("", "coronal", "sagittal")[coarse]
        return f"Asked for. Slices are axial though the volumes were acquired {name}: 3-D may do better."
    return "Asked for: slice by slice along the body axis."


def target_spacing(spacings: np.ndarray, shapes: np.ndarray) -> tuple[tuple[float, ...], str]:
    """Median spacing [3]; on a coarse axis (> 3 times the others in both spacing and extent) the 10th percentile."""
    target = np.median(spacings, 0)
    size = np.median(shapes, 0)
    worst = int(target.argmax())
    others = [axis for axis in range(3) if axis != worst]
    reason = f"Median spacing of {len(spacings)} cases."
    if target[worst] > 3 * target[others].max() and size[worst] * 3 < size[others].min():
        target[worst] = max(np.percentile(spacings[:, worst], 10), target[others].max())
        reason += f" Anisotropic: the 10th percentile along axis {'dhw'[worst]}."
    return tuple(round(float(v), 4) for v in target), reason


def picture_resolution(facts: Fingerprint, pixels: int) -> tuple[tuple[float, ...] | None, tuple[int, int] | None, str]:
    """(spacing in px | None, (h, w) | None, reason): how far pictures are shrunk, and whether all to one size.

    One size if the structures are more alike as a share of the picture than in pixels (the same organ photographed by
    different cameras), else one factor (microscopy).
    """
    sizes = facts.shapes[:, 1:]
    median = np.median(sizes, 0)
    wanted = max(1.0, math.sqrt(median.prod() / pixels))
    present = np.isfinite(facts.thickness)
    thinnest = min(
        (float(np.median(column[hit])) for column, hit in zip(facts.thickness.T, present.T, strict=True) if hit.any()),
        default=math.inf,
    )
    factor = min(wanted, max(1.0, thinnest / 4))
    factor = 1.0 if factor < 1.1 else round(factor, 2)
    limited = ""
    if factor < 0.9 * wanted:
        limited = f" Not further: the thinnest class is {thinnest:.1f} px and must stay 4 px wide."

    if (sizes != sizes[0]).any() and present.any():
        rows, columns = np.nonzero(present)
        width = np.log(facts.thickness[rows, columns])
        share = width - np.log(np.sqrt(sizes.prod(1)))[rows]
        classes = np.unique(columns)
        in_pixels, in_share = (float(np.mean([v[columns == c].std() for c in classes])) for v in (width, share))
        if in_share < 0.9 * in_pixels:
            size = tuple(max(16, 16 * round(v / factor / 16)) for v in median)
            reason = (
                f"Pictures differ in size, and structures are more alike as a share of the picture (sd of log "
                f"{in_share:.2f}) than in pixels ({in_pixels:.2f}): every picture is resized to {_show(size)}.{limited}"
            )
            return None, (size[0], size[1]), reason
    if factor == 1:
        return None, None, f"Pictures are used as they are (median {_show(median)}).{limited}"
    return (1.0, factor, factor), None, f"Pictures (median {_show(median)}) are shrunk by {factor:g}.{limited}"


# ---------------------------------------------------------------------------------------------------------- the network


@dataclass(frozen=True)
class Network:
    """Sizes of a U-Net with two convolutions a stage, and what one sample costs."""

    patch_size: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernel_sizes: tuple[tuple[int, ...], ...]
    features: tuple[int, ...]
    parameters: int
    activations: int
    flops: int


def topology(
    patch: Sequence[int], spacing: Sequence[float]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """(patch, strides, kernel_sizes): nnU-Net's pooling rule, with the patch padded up to be divisible.

    An axis is halved while it stays >= 4 and its spacing is less than twice the finest one's among those still halved.
    """
    axes = range(len(patch))
    size, gap = list(patch), list(spacing)
    strides, kernels, kernel = [(1,) * len(patch)], [], [1] * len(patch)
    while True:
        open_ = [a for a in axes if size[a] >= 2 * MIN_FEATURE_MAP]
        open_ = [a for a in open_ if gap[a] < 2 * min(gap[b] for b in open_)]
        if not open_ or (len(open_) == 1 and size[open_[0]] < 3 * MIN_FEATURE_MAP):
            break
        kernel = [3 if k == 3 or gap[a] < 2 * min(gap) else 1 for a, k in zip(axes, kernel, strict=True)]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if a in open_ else 1 for a in axes))
        for a in open_:
            size[a], gap[a] = math.ceil(size[a] / 2), 2 * gap[a]
    if len(strides) == 1:  # a U-Net has two stages, however small the image
        strides.append(tuple(2 if n > 1 else 1 for n in size) if max(size) > 1 else (2,) * len(patch))
        kernels.append((3,) * len(patch))
    kernels.append((3,) * len(patch))
    divisor = [math.prod(stage[a] for stage in strides) for a in axes]
    padded = tuple(math.ceil(p / d) * d for p, d in zip(patch, divisor, strict=True))
    return padded, tuple(strides), tuple(kernels)


def _sizes(patch: Sequence[int], spacing: Sequence[float], inputs: int, outputs: int, limits: Budget) -> Network:
    """Parameters, feature-map numbers and training flops (forward and backward) of one sample."""
    patch, strides, kernels = topology(patch, spacing)
    features = tuple(
        min(limits.max_features[len(patch)], limits.features[len(patch)] * 2**i) for i in range(len(strides))
    )
    voxels, size = [], list(patch)
    for stride in strides:
        size = [n // s for n, s in zip(size, stride, strict=True)]
        voxels.append(math.prod(size))

    weights, activations, multiplications = 0, 0, 0
    for i, (width, kernel) in enumerate(zip(features, kernels, strict=True)):
        above = features[i - 1] if i else inputs
        layers = [(above, math.prod(kernel), voxels[i]), (width, math.prod(kernel), voxels[i])]  # encoder
        if i + 1 < len(features):  # decoder: up-sampling, then two convolutions on the joined maps
            layers += [(features[i + 1], math.prod(strides[i + 1]), voxels[i + 1])]
            layers += [(2 * width, math.prod(kernel), voxels[i]), (width, math.prod(kernel), voxels[i])]
        for source, taps, places in layers:
            weights += source * taps * width + 3 * width
            multiplications += source * taps * width * places
        activations += width * voxels[i] * len(layers)
    weights += (features[0] + 1) * outputs
    return Network(tuple(patch), strides, kernels, features, weights, activations, 6 * multiplications)


def design(median: np.ndarray, spacing: Sequence[float], inputs: int, outputs: int, limits: Budget) -> Network:
    """The largest network whose least batch fits: patch = median shape, shrunk along its relatively longest axis."""
    # nnU-Net starts from a cube in millimetres of this many voxels where the case is larger than that.
    start = {2: 2048**2, 3: 256**3}[len(median)]
    even = 1 / np.array(spacing, np.float64)
    even *= (start / even.prod()) ** (1 / len(median))
    net = _sizes([int(v) for v in np.minimum(np.ceil(even), median)], spacing, inputs, outputs, limits)
    least = limits.batch[len(median)][0]
    while net.activations * least > limits.activations and max(net.patch_size) > 2 * MIN_FEATURE_MAP:
        patch = list(net.patch_size)
        longest = max(range(len(patch)), key=lambda a: (patch[a] / median[a], patch[a]))
        patch[longest] -= max(1, math.prod(stage[longest] for stage in net.strides))
        net = _sizes(patch, spacing, inputs, outputs, limits)
    return net


def _fit(net: Network, median: np.ndarray) -> str:
    return "padded" if all(p >= m for p, m in zip(net.patch_size, median, strict=True)) else "cut to the memory budget"


def _batch_size(
    net: Network,
    facts: Fingerprint,
    limits: tuple[int, int],
    activations: float,
    spacing: Sequence[float | None] | None,
) -> int:
    """Fills the budget, but beyond 4 not more than 5 % of all training voxels a step; at least 2."""
    scale = math.prod(s or 1 for s in spacing) if spacing else 1.0
    voxels = float((facts.shapes * (1 if facts.pictures else facts.spacings)).prod(1).sum()) / scale
    share = 0.05 * voxels / math.prod(net.patch_size)
    return int(max(2, min(limits[1], activations // net.activations, max(share, limits[0], 4))))


def _steps(net: Network, batch_size: int, limits: Budget, budget: str) -> tuple[int, str]:
    if limits.seconds is None:
        return limits.steps, f"nnU-Net's 1000 epochs of 250 steps ({budget} budget)."
    work = net.flops * batch_size
    affordable = limits.seconds * limits.flops / work
    steps = int(max(500, min(limits.steps, 100 * round(affordable / 100))))
    return steps, (
        f"{work / 1e9:.0f} GFLOP a step; at {limits.flops / 1e9:.0f} GFLOP/s about "
        f"{steps * work / limits.flops / 60:.0f} minutes ({budget} budget)."
    )


NAMED_SCHEMES: dict[str, dict[str, Any]] = {
    "nonorm": {"scheme": "none"},
    "rescale_to_0_1": {"scheme": "minmax"},
    "rgb_to_0_1": {"scheme": "fixed", "mean": 0.0, "std": 255.0},
}
"""Channel names by which nnU-Net v2 orders a normalisation, in small letters; "CT" and "zscore" are its others."""


def _normalization(facts: Fingerprint, channels: Sequence[str]) -> tuple[tuple[dict[str, Any], ...], str]:
    nonzero = not facts.pictures and bool(np.median(facts.kept) < 0.75)
    entries, reasons = [], []
    for name, inside, overall in zip(channels, facts.foreground, facts.overall, strict=True):
        if name.lower() in NAMED_SCHEMES:
            entries.append(dict(NAMED_SCHEMES[name.lower()]))
            reasons.append(f"{name}: nnU-Net's name for this normalisation, so it is used.")
        elif name.lower() == "ct":
            numbers = {key: round(inside[key], 4) for key in ("low", "high", "mean")}
            entries.append({"scheme": "ct", **numbers, "std": max(round(inside["std"], 4), 1e-4)})
            reasons.append(
                f"{name}: clipped to the 0.5 and 99.5 percentile of the foreground, whose mean and std scale it."
            )
        elif facts.eight_bit and len(channels) >= 3 and name.lower() != "zscore":
            entries.append(
                {"scheme": "fixed", "mean": round(overall["mean"], 4), "std": max(round(overall["std"], 4), 1e-4)}
            )
            reasons.append(f"{name}: 8-bit colour, scaled by the training set's mean and std.")
        else:
            entries.append({"scheme": "zscore", "nonzero": nonzero})
            where = "over what is not 0 (large empty borders)" if nonzero else "over the image"
            hint = ""
            if overall["low"] < -900:
                hint = ' Its values look like Hounsfield units: name the channel "CT" in dataset.json if they are.'
            reasons.append(f"{name}: z-score {where}, for scanners do not share a scale.{hint}")
    return tuple(entries), " ".join(reasons)

"""Phantoms: data sets out of nothing, so that everything can be tried without a download.

A phantom is a body with an `organ`, a `lesion` in it and a `vessel` (a curved tube) beside it. Nodules as bright as the
lesion lie outside the organ, so that intensity alone does not tell. Each site sees the same anatomy through another
machine: contrast, gamma, bias field, blur, noise and, in colour, a cast. Sites grow harder with their number; the last
one is the test set and looks like none of the others.

The same arguments write the same bytes.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter
from scipy.spatial import KDTree

from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset
from medseg_jax.paths import cache_home
from medseg_jax.types import Case, Geometry, Labels, UserError

EMBEDDED = {
    "phantoms2d": {"dim": 2, "cases": 36, "sites": 3, "unlabelled": 6, "size": 64},
    "phantoms3d": {"dim": 3, "cases": 18, "sites": 3, "unlabelled": 4, "size": 32},
}
"""Data sets that a config may name instead of a folder; made in the user's cache folder when they are first needed."""

VERSION = 1  # raised whenever the same arguments would write other bytes

LABELS = Labels.simple("organ", "lesion", "vessel")
TISSUES = ("air", "body", "organ", "lesion", "vessel")
# Of each tissue, before the site's machine. Volumes have no colour to tell tissues by, so their contrast is higher.
BRIGHTNESS = {2: np.array([0.05, 0.38, 0.5, 0.66, 0.85]), 3: np.array([0.05, 0.3, 0.54, 0.74, 0.95])}
FOREIGN = np.array([0, 0.08, 0.03, -0.06, -0.15])  # how the unseen site's machine changes the brightness of each tissue
TINT = np.array([[0, 0, 0], [0.03, 0, -0.02], [0.04, -0.03, 0], [0.08, 0.02, -0.1], [-0.1, 0, 0.06]])  # [tissue, rgb]


def open_data(source: str | Path) -> Dataset:
    """Opens a data set folder, or one of the `EMBEDDED` data sets by name (a folder of that name comes first)."""
    options = EMBEDDED.get(str(source))
    if options is None or (Path(source) / "dataset.json").exists():
        return Dataset.open(source)
    parts = [f"{key}{value}" for key, value in options.items()]
    folder = cache_home() / "phantoms" / "-".join([f"v{VERSION}", *parts])
    if not (folder / "dataset.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as draft:
            make_phantoms(Path(draft) / "data", **options)
            with contextlib.suppress(OSError):  # another process was faster
                (Path(draft) / "data").rename(folder)
    return Dataset.open(folder)


def make_phantoms(
    root: str | Path,
    *,
    dim: int = 2,
    cases: int = 30,
    sites: int = 3,
    unlabelled: int = 0,
    size: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Writes a data set of phantoms.

    Args:
        root: new folder.
        dim: 2 for RGB pictures (.png), 3 for volumes (.nii.gz): thick slices, a little oblique, any of 48 orientations.
        cases: labelled cases of all sites together; two cases in a row are of one patient.
        sites: domains "site0", "site1" ...; the last is the test set (unless it is the only one). Of the others every
            5th patient validates.
        unlabelled: further cases without labels, of the sites that train.
        size: typical length of a side, in pixels or mm; 64 for pictures, 40 for volumes by default. Sizes vary by 12 %.
        seed: of everything.

    Raises:
        UserError: the folder holds a data set already, or the numbers make no sense.
    """
    root, size = Path(root), size or (64 if dim == 2 else 40)
    if (root / "dataset.json").exists():
        raise UserError("There is a data set already", file=root, remedy="give a new folder")
    if dim not in (2, 3) or sites < 1 or cases < sites or unlabelled < 0 or size < 16:
        raise UserError(
            "No phantoms like these",
            found=f"dim={dim}, cases={cases}, sites={sites}, unlabelled={unlabelled}, size={size}",
            expected="dim 2 or 3, a case for each site, size 16 or more",
        )
    ending = ".png" if dim == 2 else ".nii.gz"
    for folder in ("imagesTr", "labelsTr", *(("imagesTs", "labelsTs") if sites > 1 else ())):
        (root / folder).mkdir(parents=True, exist_ok=True)
    if unlabelled:
        (root / "imagesUn").mkdir()
    planned = tuple(_plan_cases(root, cases, sites, unlabelled, ending))
    for number, case in enumerate(planned):
        image, label, geometry = make_phantom(case.patient, number, int(case.domain[4:]), sites, dim, size, seed)
        io.write_image(case.images[0], image, geometry)
        if case.label:
            io.write_label(case.label, label, geometry)
    channels = ("R", "G", "B") if dim == 2 else ("MR",)
    name, unit = f"Phantoms{dim}D", "px" if dim == 2 else "mm"
    Dataset(root, name, channels, LABELS, planned, ending, unit).save()
    return Dataset.open(root)


def _plan_cases(root: Path, cases: int, sites: int, unlabelled: int, ending: str) -> Iterator[Case]:
    """Cases in the order of their ids; sites in blocks, then the unlabelled ones."""
    trained = max(1, sites - 1)
    of_site = [site for site in range(sites) for _ in range(len(range(site, cases, sites)))]
    of_site += [number % trained for number in range(unlabelled)]
    validating = 0
    for number, site in enumerate(of_site):
        id, labelled = f"phantom_{number:04d}", number < cases
        first = number == 0 or site != of_site[number - 1] or not labelled
        place = 0 if first else place + 1
        patient = f"p{number - place % 2:04d}"
        if labelled and place % 2 == 0 and site < trained:
            validating += 1
        test = labelled and site >= trained
        split = "test" if test else "val" if labelled and validating % 5 == 2 else "train"
        folder = "Un" if not labelled else "Ts" if test else "Tr"
        image = root / f"images{folder}" / f"{id}_0000{ending}"
        label = root / f"labels{folder}" / f"{id}{ending}" if labelled else None
        yield Case(id, (image,), label, f"site{site}", patient, split)


def make_phantom(
    patient: str, case: int, site: int, sites: int, dim: int, size: int, seed: int
) -> tuple[np.ndarray, np.ndarray, Geometry]:
    """One case: image [h, w, 3] uint8 or [i, j, k, 1] int16, label of the same spatial shape, and its geometry.

    The patient gives the anatomy; the case posture, grid and noise; the site its machine.
    """
    rng = np.random.default_rng([seed, 1, case])
    anatomy = draw_anatomy(np.random.default_rng([seed, 2, *patient.encode()]), dim)
    machine = draw_machine(np.random.default_rng([seed, 3, site]), site, sites, dim)
    shape, spacing = _draw_grid(rng, dim, size)
    axes = [(np.arange(n) - (n - 1) / 2) * step * 2 / size for n, step in zip(shape, spacing, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1)  # [*s, dim], about -1 .. 1
    tissue = paint(_move(rng, points), anatomy, max(spacing) * 2 / size)  # [*s]
    image = expose(rng, tissue, machine, spacing)  # [*s, 3]
    label = np.where(tissue < 2, 0, tissue - 1).astype(np.uint8)
    if dim == 2:
        return (image * 255).round().astype(np.uint8), label, Geometry(shape, np.eye(4), "px")
    volume = (image.mean(-1, keepdims=True) * machine.scale).round().astype(np.int16)  # [d, h, w, 1]
    return _turn(rng, volume, label, spacing)


# -------------------------------------------------------------------------------------------------------------- anatomy


@dataclass(frozen=True)
class Blob:
    """An ellipsoid with a wavy surface, in units of half the picture's side."""

    centre: np.ndarray  # [dim]
    radii: np.ndarray  # [dim]
    axes: np.ndarray  # [dim, dim]
    waves: np.ndarray  # [3, dim]
    wave_height: float

    def depth(self, points: np.ndarray) -> np.ndarray:
        """points [*s, dim] -> [*s]: below 1 inside, 1 on the surface."""
        local = (points - self.centre) @ self.axes / self.radii
        length = np.linalg.norm(local, axis=-1)
        direction = local / np.maximum(length, 1e-6)[..., None]
        return length * (1 + self.wave_height * np.sin(3 * direction @ self.waves.T).mean(-1))


@dataclass(frozen=True)
class Anatomy:
    body: Blob
    organ: Blob
    lesion: Blob
    nodules: tuple[Blob, ...]
    vessel: np.ndarray  # [points, dim], the centre line
    vessel_radius: float


def draw_anatomy(rng: np.random.Generator, dim: int) -> Anatomy:
    """A patient. The organ sits left or right of the middle, vessel and nodules on the other side."""
    side = rng.choice([-1, 1])
    centre = np.append(rng.uniform(-0.12, 0.12, dim - 1), side * rng.uniform(0.15, 0.3))
    organ = _draw_blob(rng, centre, (0.38, 0.52), wave_height=0.25)
    inside = organ.axes @ (organ.radii * _unit(rng.normal(size=dim)) * rng.uniform(0.1, 0.4))
    lesion = _draw_blob(rng, organ.centre + inside, (0.16, 0.24) if dim == 2 else (0.2, 0.28), wave_height=0.15)
    nodules = []
    for _ in range(rng.integers(1, 4)):
        place = np.append(rng.uniform(-0.5, 0.5, dim - 1), -side * rng.uniform(0.35, 0.7))
        nodules.append(_draw_blob(rng, place, (0.08, 0.16), wave_height=0.15))
    # A quadratic Bézier curve from one end of the body to the other.
    ends = rng.uniform(-0.2, 0.2, (3, dim))
    ends[:, -1] -= side * rng.uniform(0.3, 0.5, 3)
    ends[0, -2], ends[2, -2] = -0.75, 0.75
    t = np.linspace(0, 1, 200)[:, None]
    vessel = (1 - t) ** 2 * ends[0] + 2 * t * (1 - t) * ends[1] + t**2 * ends[2]
    body = _draw_blob(rng, np.zeros(dim), (0.82, 0.95), wave_height=0.08)
    return Anatomy(body, organ, lesion, tuple(nodules), vessel, rng.uniform(0.05, 0.08))


def _draw_blob(rng: np.random.Generator, centre: np.ndarray, radii: tuple[float, float], wave_height: float) -> Blob:
    dim = len(centre)
    axes = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    return Blob(centre, rng.uniform(*radii, dim), axes, rng.normal(size=(3, dim)), wave_height)


def paint(points: np.ndarray, anatomy: Anatomy, step: float) -> np.ndarray:
    """points [*s, dim], at most `step` apart -> tissue [*s], an index into TISSUES, -1 for nodules.

    A vessel thinner than the grid is drawn as wide as the grid needs to show it.
    """
    tissue = np.zeros(points.shape[:-1], np.int8)
    tissue[anatomy.body.depth(points) < 1] = 1
    for nodule in anatomy.nodules:
        tissue[(nodule.depth(points) < 1) & (tissue == 1)] = -1
    organ = anatomy.organ.depth(points) < 1
    tissue[organ] = 2
    tissue[organ & (anatomy.lesion.depth(points) < 1)] = 3
    distance = KDTree(anatomy.vessel).query(points)[0]
    tissue[(distance < max(anatomy.vessel_radius, 0.75 * step)) & (tissue != 0) & (tissue != 3)] = 4
    return tissue


def _move(rng: np.random.Generator, points: np.ndarray) -> np.ndarray:
    """The patient lies a little differently in each case: turned, shifted, scaled. [*s, dim] -> [*s, dim]."""
    dim = points.shape[-1]
    turn = np.linalg.qr(np.eye(dim) + rng.normal(size=(dim, dim)) * 0.08)[0]
    turn = turn * np.sign(np.diag(turn))
    return (points @ turn + rng.uniform(-0.06, 0.06, dim)) * rng.uniform(0.95, 1.05)


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


# -------------------------------------------------------------------------------------------------------------- machine


@dataclass(frozen=True)
class Machine:
    """How a site's scanner or camera renders tissue."""

    brightness: np.ndarray  # [tissues]
    contrast: float
    gamma: float
    bias: float
    blur: float  # in voxels of the finest axis
    noise: float
    cast: np.ndarray  # [3], gain of red, green, blue
    scale: float  # largest intensity of a volume


def draw_machine(rng: np.random.Generator, site: int, sites: int, dim: int) -> Machine:
    """The sites that train stay close to the first one; the last one is another world."""
    unseen = sites > 1 and site == sites - 1
    strength = 1.0 if unseen else 0.4 * site / max(1, sites - 2)
    hue = np.array([[1, 0.85, 0.75], [0.9, 1, 0.8], [0.8, 0.9, 1]])[2 if unseen else site % 2]
    jitter = rng.uniform(0.9, 1.1, 5)
    return Machine(
        brightness=BRIGHTNESS[dim] + unseen * FOREIGN,
        contrast=(1 - 0.25 * strength) * jitter[0],
        gamma=1.5 ** (strength if unseen else rng.uniform(-0.4, 0.4)),
        bias=(0.1 + 0.1 * strength) * jitter[1],
        blur=(0.4 + 0.5 * strength) * jitter[2],
        noise=(0.04 + 0.05 * strength) * jitter[3],
        cast=hue,
        scale=(400 + 1200 * strength) * jitter[4],
    )


def expose(rng: np.random.Generator, tissue: np.ndarray, machine: Machine, spacing: tuple[float, ...]) -> np.ndarray:
    """tissue [*s] -> image [*s, 3] in 0 .. 1 as the site's machine sees it."""
    tissue = np.where(tissue < 0, TISSUES.index("lesion"), tissue)
    brightness = machine.brightness + rng.normal(size=len(TISSUES)) * 0.02
    mean = machine.brightness[1:].mean()
    light = np.where(tissue > 0, mean + machine.contrast * (brightness[tissue] - mean), brightness[0])
    light = light + 0.07 * _smooth_noise(rng, tissue.shape, 0.05) * (tissue > 0)
    light = light * np.exp(machine.bias * _smooth_noise(rng, tissue.shape, 0.4))
    image = (light[..., None] + TINT[tissue]) * machine.cast
    sigma = [machine.blur * min(spacing) / step for step in spacing]
    image = gaussian_filter(image, (*sigma, 0))
    image = np.clip(image, 0, 1) ** machine.gamma
    return np.clip(image + rng.normal(size=image.shape) * machine.noise, 0, 1)


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Noise [*s] of unit variance, smooth over `scale` of each side."""
    noise = gaussian_filter(rng.normal(size=shape), [scale * n for n in shape], mode="wrap")
    return (noise - noise.mean()) / max(noise.std(), 1e-6)


# ----------------------------------------------------------------------------------------------------------------- grid


def _draw_grid(rng: np.random.Generator, dim: int, size: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Shape and spacing, axes (h, w) or (d, h, w); volumes have slices two to three times as thick as their pixels."""
    sides = size * rng.uniform(0.88, 1.12, dim)
    if dim == 2:
        return tuple(round(side) for side in sides), (1.0, 1.0)
    in_plane = rng.uniform(0.83, 1.21)
    spacing = (float(rng.uniform(2.1, 3.3)), float(in_plane), float(in_plane))
    return tuple(max(4, round(side / step)) for side, step in zip(sides, spacing, strict=True)), spacing


def _turn(
    rng: np.random.Generator, image: np.ndarray, label: np.ndarray, spacing: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray, Geometry]:
    """Stores a volume [d, h, w, 1] whose axes point S, A, R in a random orientation, a few degrees oblique."""
    tilt = np.linalg.qr(np.eye(3) + rng.normal(size=(3, 3)) * 0.03)[0]
    tilt = tilt * np.sign(np.diag(tilt))
    affine = np.eye(4)
    affine[:3, :3] = tilt @ np.eye(3)[:, ::-1] * spacing  # columns: S, A, R
    affine[:3, 3] = rng.uniform(-100, 100, 3)
    order = list(permutations(range(3)))[rng.integers(6)]
    image, label, affine = image.transpose(*order, 3), label.transpose(order), affine[:, [*order, 3]]
    for axis in range(3):
        if rng.random() < 0.5:
            image, label = np.flip(image, axis), np.flip(label, axis)
            affine[:3, 3] += affine[:3, axis] * (label.shape[axis] - 1)
            affine[:3, axis] *= -1
    return np.ascontiguousarray(image), np.ascontiguousarray(label), Geometry(label.shape, affine, "mm")

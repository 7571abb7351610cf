"""Writes the canonical folder: case by case into a temporary folder beside the target, which is then renamed."""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from medseg_jax.data import geometry as space
from medseg_jax.data import io
from medseg_jax.data.convert.coding import Coding
from medseg_jax.data.convert.found import Found, Layout
from medseg_jax.data.convert.options import Ambiguous, Options, parse_numbers
from medseg_jax.data.dataset import Dataset
from medseg_jax.types import Case, Geometry, UserError

MARKER = ".medseg-convert"
"""Lies in a temporary folder, so that only our own leftovers are ever removed."""

FOLDERS = {"train": "Tr", "val": "Tr", "test": "Ts"}


# -------------------------------------------------------------------------------------------------------- the target


def check_target(src: Path, dst: Path, options: Options) -> None:
    """Refuses a target that exists, or that lies in the source."""
    if dst.resolve() == src.resolve() or dst.resolve().is_relative_to(src.resolve()):
        raise UserError(
            "The target lies in the source, which is left untouched", file=dst, remedy="choose another place"
        )
    if src.resolve().is_relative_to(dst.resolve()):
        raise UserError("The source lies in the target", file=src, remedy="choose another place")
    if not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return
    if not options.overwrite:
        raise UserError("The target exists", file=dst, remedy="--overwrite replaces it, or choose another name")
    if not (dst / "dataset.json").is_file():
        raise UserError("The target is no data set, so it is not replaced", file=dst, remedy="choose another place")


@contextmanager
def target(dst: Path) -> Iterator[Path]:
    """DST.tmp to write into; becomes DST if all went well, else is removed."""
    old = dst.with_name(dst.name + ".old")
    _remove_leftover(old)
    temporary = _fresh(dst.with_name(dst.name + ".tmp"))
    try:
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if dst.exists():
        os.replace(dst, old)
        (old / MARKER).touch()
    os.replace(temporary, dst)
    (dst / MARKER).unlink()
    _remove_leftover(old)


@contextmanager
def beside(dst: Path, ending: str) -> Iterator[Path]:
    """An empty folder on the disk of the target, removed in the end; what a killed run left of it is replaced."""
    folder = _fresh(dst.with_name(dst.name + ending))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fresh(folder: Path) -> Path:
    _remove_leftover(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).touch()
    return folder


def _remove_leftover(folder: Path) -> None:
    if not folder.exists():
        return
    if not (folder / MARKER).is_file():
        raise UserError("A folder is in the way", file=folder, expected="nothing there", remedy="move or delete it")
    shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------------------ format


def choose_ending(cases: Sequence[Found], layout: Layout) -> str:
    """One ending for all files: .nii.gz for volumes, .png for pictures of whole numbers, .tif for other pictures."""
    kinds = {io.kind(path) for case in cases for path in case.images}
    if kinds == {"nifti"}:
        return ".nii.gz"
    if kinds == {"picture"} and not any(io.suffix(p) in (".tif", ".tiff") for c in cases for p in c.images):
        return ".png"
    arrays, geometry = zip(*(read_channels(case, layout) for case in _sample(cases)), strict=True)
    ranks = {len(g.shape) for g in geometry}
    if len(ranks) > 1:
        raise UserError(
            "Pictures and volumes cannot be mixed in one data set", file=cases[0].file, found=f"{ranks} axes"
        )
    if ranks == {3}:
        return ".nii.gz"
    grey = all(array.shape[-1] == 1 for array in arrays)
    whole = all(array.dtype == np.uint8 or (array.dtype == np.uint16 and grey) for array in arrays)
    return ".png" if whole else ".tif"


def _sample(cases: Sequence[Found]) -> list[Found]:
    """The first case of each domain."""
    return list({case.domain: case for case in reversed(cases)}.values())


def choose_channels(cases: Sequence[Found], layout: Layout, options: Options) -> tuple[str, ...]:
    """Names of the input channels: as said, as the source says, R, G, B of coloured pictures.

    Pictures are looked at by their headers alone: grey ones among coloured ones become coloured.
    """
    given = tuple(name.strip() for name in (options.channels or "").split(",") if name.strip())
    if all(io.kind(case.file) == "picture" and len(case.images) == 1 for case in cases):
        number = max(picture_channels(case.file) for case in cases)
    else:
        number = read_channels(cases[0], layout)[0].shape[-1]
    names = given or layout.channels or {1: ("image",), 3: ("R", "G", "B")}.get(number, ())
    names = names or tuple(f"channel_{i}" for i in range(number))
    if len(names) != number:
        raise UserError(
            "The number of channels is not that of their names",
            file=cases[0].file,
            found=f"{number} channels, names {', '.join(names)}",
            remedy="--channels " + ",".join(f"NAME{i}" for i in range(number)),
        )
    return names


def picture_channels(path: Path) -> int:
    """1 or 3, without decoding the picture."""
    try:
        with Image.open(path) as image:
            if image.mode == "P":
                palette = np.array(image.getpalette() or [0], np.uint8).reshape(-1, 3)
                return 1 if (palette == palette[:, :1]).all() else 3
            return 3 if len([band for band in image.getbands() if band != "A"]) > 1 else 1
    except OSError as error:
        raise UserError(
            "The picture cannot be read", file=path, found=error, remedy="copy or download it again"
        ) from error


# ------------------------------------------------------------------------------------------------------------- cases


def read_channels(case: Found, layout: Layout) -> tuple[np.ndarray, Geometry]:
    """Image [*s, c] on the grid of the reference channel; others are resampled onto it (linearly) where they differ."""
    key = layout.keys[0] if layout.keys else None
    images, geometries = zip(*(io.read_image(path, key) for path in case.images), strict=True)
    geometry = geometries[layout.reference or 0]
    for path, other in zip(case.images, geometries, strict=True):
        if layout.reference is None and (differences := space.same_space(other, geometry)):
            raise UserError(
                "The channels of a case lie on different grids",
                file=path,
                found="; ".join(differences),
                expected=f"the grid of {case.file.name}",
                remedy="--layout cases --reference CHANNEL resamples the others, if there is a folder for each case",
            )
    placed = [
        space.resample_to(image, other, geometry, order=1) if space.same_space(other, geometry) else image
        for image, other in zip(images, geometries, strict=True)
    ]
    return (np.concatenate(placed, -1) if len(placed) > 1 else placed[0]), geometry


class Writer:
    """Writes cases below `root`; remembers what it did to their files."""

    def __init__(
        self, root: Path, ending: str, channels: int, sample: Found, layout: Layout, coding: Coding, options: Options
    ):
        self.root, self.ending, self.channels = root, ending, channels
        self.layout, self.coding, self.options = layout, coding, options
        self.spacing = parse_numbers("spacing", options.spacing)
        if self.spacing and (ending != ".nii.gz" or io.kind(sample.file) in io.PLACED):
            found = "these files say it themselves" if ending == ".nii.gz" else "pictures have none"
            raise UserError("--spacing is for arrays", file=sample.file, found=found)
        self.units: set[str] = set()
        self.resized = self.ignored = 0

    def write(self, case: Found) -> Case:
        """Writes image and label of one case.

        Raises:
            UserError: the label has another size than the image, or a file cannot be read.
        """
        folder = "Un" if not case.labelled and case.split != "test" else FOLDERS[case.split]
        images = self.root / f"images{folder}"
        images.mkdir(parents=True, exist_ok=True)
        paths, geometry, turn = self._write_images(case, images)
        self.units.add(geometry.unit)
        label = None
        if case.labelled:
            label = self.root / f"labels{folder}" / f"{case.name}{self.ending}"
            label.parent.mkdir(parents=True, exist_ok=True)
            io.write_label(label, self._label(case, geometry, turn), geometry)
        return Case(case.name, paths, label, case.domain, case.patient, case.split)

    def _write_images(self, case: Found, folder: Path) -> tuple[tuple[Path, ...], Geometry, tuple[int, ...] | None]:
        """Paths, geometry as written, and the order of axes that brought the array there (None: as read)."""
        image, geometry = read_channels(case, self.layout)
        if len(case.images) == 1 and self._can_copy(case.file, image):
            path = folder / f"{case.name}_0000{self.ending}"
            shutil.copyfile(case.file, path)
            return (path,), geometry, None
        if image.shape[-1] == 1 and self.channels == 3:
            image = np.repeat(image, 3, -1)  # [h, w, 3]
        if image.shape[-1] != self.channels:
            raise UserError(
                "An image has another number of channels than the first one",
                file=case.file,
                found=image.shape[-1],
                expected=self.channels,
            )
        turn = None
        if len(geometry.shape) == 3 and geometry.header is None and io.kind(case.file) != "dicom":
            turn = self._axes(geometry.shape)
            image = image.transpose(*turn, 3)
            geometry = self._place(image.shape[:3], geometry, turn)
        if self.ending != ".nii.gz":
            path = folder / f"{case.name}_0000{self.ending}"
            io.write_image(path, image, geometry)
            return (path,), geometry, turn
        paths = tuple(folder / f"{case.name}_{i:04d}{self.ending}" for i in range(image.shape[-1]))
        for i, path in enumerate(paths):
            io.write_image(path, image[..., i : i + 1], geometry)
        return paths, geometry, turn

    def _can_copy(self, path: Path, image: np.ndarray) -> bool:
        """Bytes are kept where the file says exactly this already: no palette, transparency or rotation."""
        if image.shape[-1] != self.channels or not path.name.endswith(self.ending):
            return False
        if self.ending == ".nii.gz":
            return self.channels == 1
        with Image.open(path) as stored:
            same_mode = (stored.mode, self.channels) in (("L", 1), ("RGB", 3), ("I;16", 1))
            return self.ending == ".png" and same_mode and np.array_equal(np.atleast_3d(np.asarray(stored)), image)

    def _axes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Order that brings a bare volume to [d, h, w]: the shortest axis is the slice axis."""
        axes = self.options.axes
        if axes == "auto":
            axes = "xyz" if shape[2] < min(shape[:2]) else "zyx"
        return (2, 1, 0) if axes == "xyz" else (0, 1, 2)

    def _place(self, shape: tuple[int, ...], geometry: Geometry, turn: tuple[int, ...]) -> Geometry:
        """Where the turned array lies: a stored affine is turned with it, a bare one's axes point S, A, R."""
        bare = np.eye(4)
        bare[:3, :3] = np.diag(geometry.spacing)[::-1]  # what `io` makes of a spacing without directions
        if not self.spacing and geometry.unit == "mm" and not np.allclose(geometry.affine, bare):
            return Geometry(shape, geometry.affine[:, [*turn, 3]], "mm")
        spacing = self.spacing or tuple(geometry.spacing[axis] for axis in turn)
        if len(spacing) != 3:
            raise UserError(
                "--spacing needs a number for each axis", found=self.options.spacing, expected="three numbers"
            )
        affine = np.eye(4)
        affine[:3, :3] = np.diag(spacing)[::-1]  # d, h, w point S, A, R
        return Geometry(shape, affine, "mm" if self.spacing else geometry.unit)

    def _label(self, case: Found, geometry: Geometry, turn: tuple[int, ...] | None) -> np.ndarray:
        if case.masks:
            label, found = self.coding.encode(case, self.layout, self.options)
            label = label.transpose(turn) if turn is not None else label
            label = self._place_label(case, label, found, geometry, turn)
        else:
            label = np.zeros(geometry.shape, np.uint8)
        ignore = self.coding.labels.ignore
        if case.roi is not None and ignore is not None:
            inside = self._field_of_view(case.roi, label.shape)
            label[~inside] = ignore
            self.ignored += 1
        return label

    def _place_label(
        self, case: Found, label: np.ndarray, found: Geometry, geometry: Geometry, turn: tuple[int, ...] | None
    ) -> np.ndarray:
        """Label on the image's grid; anything but the same grid needs the user's word."""
        if tuple(label.shape) == tuple(geometry.shape) and (turn is not None or self.options.same_grid):
            return label
        differences = space.same_space(found, geometry) if turn is None else ["another shape"]
        if not differences:
            return label
        same_shape = tuple(label.shape) == tuple(geometry.shape)
        if not self.options.resize_labels:
            choices: list[tuple[str, dict[str, object]]] = [
                ("masks are brought onto their images by nearest neighbour", {"resize_labels": True})
            ]
            if same_shape:
                choices.append(("the headers are wrong, the voxels belong together", {"same_grid": True}))
            sizes = f"mask {' x '.join(map(str, label.shape))}, image {' x '.join(map(str, geometry.shape))}"
            raise Ambiguous(
                "The mask does not lie where its image lies"
                if same_shape
                else "The mask has another size than its image",
                choices,
                file=case.masks[0].path,
                found="; ".join(differences) if same_shape else sizes,
            )
        self.resized += 1
        if turn is None and found.unit == geometry.unit == "mm":
            return space.resample_to(label[..., None], found, geometry, order="nearest")[..., 0]
        pad = (None,) * (3 - label.ndim)
        volume = label[*pad, ..., None]  # [d, h, w, 1]
        return space.resample(volume, (1,) * len(pad) + tuple(geometry.shape), "nearest").reshape(geometry.shape)

    def _field_of_view(self, path: Path, shape: tuple[int, ...]) -> np.ndarray:
        """True inside; palettes are read as the colours a person sees."""
        image, _ = io.read_image(path)
        seen = image.max(-1)
        inside = seen > seen.max() / 2
        if inside.shape != shape:
            raise UserError(
                "The field of view has another size than the image", file=path, found=inside.shape, expected=shape
            )
        if not inside.any():
            raise UserError("The field of view is empty", file=path)
        return inside


def write_dataset(
    root: Path,
    name: str,
    channels: tuple[str, ...],
    cases: Iterable[Case],
    writer: Writer,
    decisions: Sequence[tuple[str, str]],
) -> None:
    """dataset.json with what was decided on the way."""
    unit = "mm" if writer.units == {"mm"} else "px"
    lines = [f"{what}: {text}" for what, text in decisions]
    dataset = Dataset(
        root,
        name,
        channels,
        writer.coding.labels,
        tuple(sorted(cases, key=lambda case: case.id)),
        writer.ending,
        unit,
        {"converted": lines},
    )
    dataset.save()

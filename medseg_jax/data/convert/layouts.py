"""Recognises how a source is laid out and lists its cases."""

import json
import zipfile
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np

from medseg_jax.data import dicom, io
from medseg_jax.data.convert.archives import ARCHIVES
from medseg_jax.data.convert.found import Found, Layout, Mask
from medseg_jax.data.convert.options import Ambiguous, Options
from medseg_jax.data.convert.pairs import find_pairs
from medseg_jax.data.convert.series import find_series_cases
from medseg_jax.data.convert.words import IMAGE, MASK, natural, plain, read_name
from medseg_jax.data.dataset import Dataset, group_channels
from medseg_jax.types import UserError

CONTAINERS = (".h5", ".hdf5", ".npz")
IMAGE_KEYS = ("image", "img", "images", "data", "x", "raw", "volume")
LABEL_KEYS = ("label", "mask", "labels", "masks", "seg", "gt", "segmentation", "target", "y")


def recognise(src: Path, options: Options) -> Layout:
    """Finds out which layout `src` has and lists its cases.

    Raises:
        UserError: `src` is no folder, holds nothing readable, or is laid out in a way that is not understood.
    """
    if not src.is_dir():
        raise UserError(
            "The source must be a folder or an archive",
            file=src,
            found="a file of another kind" if src.exists() else "no such folder",
            expected=f"a folder, or a file that ends in {', '.join(ARCHIVES)}",
            remedy="unpack it first" if src.suffix in (".7z", ".rar", ".bz2", ".xz", ".gz", ".zst") else None,
        )
    if (src / "dataset.json").is_file() and options.layout in ("auto", "nnunet", "msd"):
        described = _read_description(src)
        return _find_nnunet(src) if "channel_names" in described else _find_msd(src, described)
    files = scan(src)
    if options.layout == "auto" and (series := dicom.find_series(src)):
        return find_series_cases(src, series, files, options)
    if not files:
        raise UserError(
            "No image found",
            file=src,
            found=f"{sum(1 for p in src.rglob('*') if p.is_file())} files of other kinds",
            expected=f"{', '.join(sorted(io.SUFFIXES))}, DICOM series",
        )
    containers = [path for path in files if io.suffix(path) in CONTAINERS]
    if options.layout == "arrays" or (options.layout == "auto" and len(containers) * 2 > len(files)):
        return _find_arrays(src, containers, options)
    if options.layout == "cases" or (options.layout == "auto" and _is_case_folders(src, files)):
        return _find_cases(src, files, options)
    return find_pairs(src, files, options)


def scan(src: Path) -> list[Path]:
    """Readable files below a folder in natural order, without hidden ones and what macOS and Windows leave behind."""
    paths = []
    for path in src.rglob("*"):
        parts = path.relative_to(src).parts
        hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
        if not hidden and io.suffix(path) in io.SUFFIXES and path.is_file():
            paths.append(path)
    return sorted(paths, key=lambda path: [natural(part) for part in path.relative_to(src).parts])


# ------------------------------------------------------------------------------------------ folders with dataset.json


def _read_description(src: Path) -> dict:
    file = src / "dataset.json"
    try:
        described = json.loads(file.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise UserError("dataset.json is not valid JSON", file=file, found=error) from error
    if not isinstance(described, dict) or not {"channel_names", "training", "modality"} & set(described):
        raise UserError(
            "dataset.json is neither nnU-Net's nor the Medical Segmentation Decathlon's",
            file=file,
            found=", ".join(described) if isinstance(described, dict) else type(described).__name__,
            expected='"channel_names" (nnU-Net v2) or "modality" and "training" (MSD)',
            remedy="--layout pairs looks at the folders alone",
        )
    return described


def _find_nnunet(src: Path) -> Layout:
    dataset = Dataset.open(src)
    missing = [case.id for case in dataset.cases if not case.images]
    if missing:
        raise UserError("dataset.json names cases without images", file=src / "dataset.json", found=missing[:5])
    cases = [
        Found(c.id, c.images, (Mask(c.label),) if c.label else (), bool(c.label), c.domain, c.patient, c.split)
        for c in dataset.cases
    ]
    return Layout("nnU-Net v2 folder", tuple(cases), dataset.channels, labels=dataset.labels)


def _find_msd(src: Path, described: dict) -> Layout:
    file = src / "dataset.json"

    def inside(text: object) -> Path:
        path = src / str(text)
        if not path.resolve().is_relative_to(src.resolve()):
            raise UserError("dataset.json points outside its folder", file=file, found=text)
        return path

    def images(text: object) -> tuple[Path, ...]:
        path = inside(text)
        if path.is_file():
            return (path,)
        # nnU-Net v1 lists case.nii.gz for the files case_0000.nii.gz, case_0001.nii.gz ...
        channels = group_channels(src, path.parent.name, io.suffix(path), ()) if path.parent.parent == src else {}
        if io.stem(path) not in channels:
            raise UserError("dataset.json names a file that is not there", file=path, expected="an image")
        return channels[io.stem(path)]

    cases = []
    for entry in described.get("training", []):
        if not isinstance(entry, dict) or not {"image", "label"} <= set(entry):
            raise UserError("An entry of training lacks image or label", file=file, found=entry)
        label = inside(entry["label"])
        if not label.is_file():
            raise UserError("dataset.json names a file that is not there", file=label, expected="a label map")
        cases.append(Found(io.stem(label), images(entry["image"]), (Mask(label),)))
    for entry in described.get("test", []):
        paths = images(entry["image"] if isinstance(entry, dict) else entry)
        cases.append(Found(io.stem(paths[0]).removesuffix("_0000"), paths, (), False, split="test"))
    if not cases:
        raise UserError("dataset.json lists no case", file=file, expected='"training": [{"image": ..., "label": ...}]')
    modality, labels = described.get("modality", {}), described.get("labels", {})
    channels = tuple(str(modality[key]) for key in sorted(modality, key=int)) if isinstance(modality, dict) else ()
    names = {int(value): str(name) for value, name in labels.items() if int(value)} if labels else None
    cases.sort(key=lambda case: natural(case.name))
    return Layout("Medical Segmentation Decathlon", tuple(cases), channels, names)


# ------------------------------------------------------------------------------------------------- h5 and npz arrays


def _find_arrays(src: Path, files: list[Path], options: Options) -> Layout:
    if not files:
        raise UserError("No h5 or npz file found", file=src, expected=", ".join(CONTAINERS))
    keys = _choose_keys(files[0], options)
    stems = [io.stem(path) for path in files]
    by_folder = len(set(stems)) == 1 and len(files) > 1
    places = [path.relative_to(src).parts[: -2 if by_folder else -1] for path in files]
    shared = set.intersection(*(set(place) for place in places))
    cases, shapes = [], defaultdict(list)
    for path, place in zip(files, places, strict=True):
        words = [read_name(folder) for folder in place]
        split = next((word.split for word in reversed(words) if word.split), "")
        domain = [f for f, word in zip(place, words, strict=True) if f not in shared and not word.split]
        name = path.parent.name if by_folder else io.stem(path)
        masks = (Mask(path),) if keys[1] else ()
        cases.append(Found(name, (path,), masks, bool(masks), plain("_".join(domain)) if domain else "", split=split))
        shape = array_shapes(path).get(keys[0])
        if shape is None or (keys[1] is not None and keys[1] not in array_shapes(path)):
            expected = " and ".join(filter(None, keys))
            raise UserError(
                "A file lacks an array that the others have", file=path, found=array_keys(path), expected=expected
            )
        shapes[len(shape)].append(path)
    if len(shapes) > 1:
        kinds = {dim: sorted({p.parent.relative_to(src).as_posix() for p in paths}) for dim, paths in shapes.items()}
        raise UserError(
            "Slices and volumes cannot be mixed in one data set",
            file=src,
            found="; ".join(f"{dim}-D arrays in {', '.join(folders)}" for dim, folders in sorted(kinds.items())),
            remedy=f"medseg data convert {src / next(iter(kinds.values()))[0]} DST, and so on for each",
        )
    if keys[1] is None and not options.unlabelled:
        raise _unknown_keys(files[0], options)
    notes = (("arrays", f"image {keys[0]!r}, label {keys[1]!r}, shape of the first {array_shapes(files[0])[keys[0]]}"),)
    return Layout("h5/npz arrays", tuple(cases), keys=keys, notes=notes)


def _choose_keys(path: Path, options: Options) -> tuple[str, str | None]:
    keys = array_keys(path)
    for given in (options.images, options.masks):
        if given is not None and given not in keys:
            raise UserError("No such array in the file", file=path, found=given, expected=", ".join(keys))
    image = options.images or next((key for key in IMAGE_KEYS if key in keys), None)
    label = options.masks or next((key for key in LABEL_KEYS if key in keys), None)
    if image is None:
        raise _unknown_keys(path, options)
    return image, label


def _unknown_keys(path: Path, options: Options) -> Ambiguous:
    keys = array_keys(path)
    given = {"images": options.images or "...", "masks": "..."}
    return Ambiguous("Which arrays are image and label?", [("names of two of them", given)], file=path, found=keys)


def array_keys(path: Path) -> list[str]:
    """Names of the arrays in an h5 or npz file."""
    return list(array_shapes(path))


def array_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the arrays in an h5 or npz file; nothing else of it is read."""
    try:
        if io.suffix(path) == ".npz":
            with zipfile.ZipFile(path) as archive:
                return {name[:-4]: _npy_shape(archive, name) for name in archive.namelist() if name.endswith(".npy")}
        with h5py.File(path, "r") as content:
            # Soft and external links may lead to other files of this machine.
            hard = [key for key in content if isinstance(content.get(key, getlink=True), h5py.HardLink)]
            arrays = ((str(key), content[key]) for key in hard)
            return {key: data.shape or () for key, data in arrays if isinstance(data, h5py.Dataset)}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            "The file cannot be read", file=path, found=error, remedy="copy or download it again"
        ) from error


def _npy_shape(archive: zipfile.ZipFile, name: str) -> tuple[int, ...]:
    with archive.open(name) as stream:
        old = np.lib.format.read_magic(stream) == (1, 0)
        return (np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0)(stream)[0]


# ------------------------------------------------------------------------------- a folder per case, a file per channel


def _parts(folder: Path, path: Path) -> str:
    """What a file's name says beyond its folder's: "seg" of BraTS_001/BraTS_001_seg.nii.gz."""
    stem = io.stem(path)
    return (stem.removeprefix(folder.name) or stem).strip("_-. ")


def _by_folder(files: list[Path]) -> dict[Path, dict[str, Path]]:
    folders: dict[Path, dict[str, Path]] = defaultdict(dict)
    for path in files:
        folders[path.parent][_parts(path.parent, path)] = path
    return folders


def _is_case_folders(src: Path, files: list[Path]) -> bool:
    """True if folders hold files of the same few names, one of them a mask, and no folder is called images or masks."""
    if any(read_name(part).role for path in files for part in path.relative_to(src).parts[:-1]):
        return False
    folders = _by_folder(files)
    names = Counter(name for parts in folders.values() for name in parts)
    several = len(folders) > 1 and src not in folders
    repeated = all(count * 2 > len(folders) for count in names.values())
    return several and repeated and any(read_name(name).role == MASK for name in names)


def _find_cases(src: Path, files: list[Path], options: Options) -> Layout:
    folders = _by_folder(files)
    names = sorted({name for parts in folders.values() for name in parts}, key=natural)
    channel_of = {name: _channel(name) for name in names if read_name(name).role in (None, IMAGE)}
    mask_of = {name: _channel(name) for name in names if read_name(name).role == MASK}
    if not channel_of or len(set(channel_of.values())) < len(channel_of):
        raise UserError("The channels of the cases cannot be told apart", file=src, found=", ".join(names))
    reference, note = _choose_reference(folders, channel_of, mask_of, options)
    own = {c.lower() for c in channel_of.values()}
    per_grid = len(mask_of) > 1 and all(tag.lower() in own for tag in mask_of.values())
    used = {n: t for n, t in mask_of.items() if not per_grid or t.lower() == channel_of[reference].lower()}
    order = list(channel_of)
    cases = []
    for folder, parts in folders.items():
        if lacking := [name for name in order if name not in parts]:
            raise UserError("A case lacks a channel", file=folder, found=", ".join(parts), expected=", ".join(lacking))
        tags = {name: (tag if len(used) > 1 else "") for name, tag in used.items()}
        masks = tuple(Mask(parts[name], tag) for name, tag in tags.items() if name in parts)
        if not masks and not (options.unlabelled or options.empty):
            choices = [("such cases are unlabelled", {"unlabelled": True}), ("nothing is on them", {"empty": True})]
            raise Ambiguous("A case has no mask", choices, file=folder, found=", ".join(parts))
        place = folder.relative_to(src).parts
        domain = plain("_".join(place[:-1])) if place[:-1] else ""
        images = tuple(parts[name] for name in order)
        cases.append(Found(folder.name, images, masks, bool(masks) or options.empty, domain))
    domains = {case.domain for case in cases}
    cases = [replace(case, domain=case.domain if len(domains) > 1 else "") for case in cases]
    channels = tuple(channel_of[name] for name in order)
    return Layout(
        "a folder per case, a file per channel",
        tuple(cases),
        channels,
        reference=order.index(reference) if note else None,
        notes=(note,) if note else (),
    )


def _channel(name: str) -> str:
    return "_".join(read_name(name).rest) or "image"


def _choose_reference(
    folders: dict[Path, dict[str, Path]], channel_of: dict[str, str], mask_of: dict[str, str], options: Options
) -> tuple[str, tuple[str, str] | None]:
    """File name of the channel whose grid the case gets: the only grid, the option's, or that of the only mask."""
    by_channel = {channel.lower(): name for name, channel in channel_of.items()}
    if options.reference is not None:
        if options.reference.lower() not in by_channel:
            raise UserError("--reference names no channel", found=options.reference, expected=list(channel_of.values()))
        return by_channel[options.reference.lower()], (
            "grid",
            f"of {options.reference}; other channels resampled to it",
        )
    folder, parts = next((f, p) for f, p in folders.items() if set(channel_of) <= set(p))
    shapes = {name: io.read_image(parts[name])[1].shape for name in channel_of}
    first = next(iter(channel_of))
    if len(set(shapes.values())) == 1:
        return first, None
    present = [name for name in mask_of if name in parts]
    if len(present) == 1:
        shape = io.read_label(parts[present[0]])[1].shape
        if fitting := [name for name in channel_of if shapes[name] == shape]:
            text = f"of {channel_of[fitting[0]]}, as the mask; other channels resampled to it"
            return fitting[0], ("grid", text)
    raise Ambiguous(
        "The channels of a case lie on different grids: on which shall all of them be?",
        [(f"{' x '.join(map(str, shapes[name]))} voxels", {"reference": channel_of[name]}) for name in channel_of],
        file=folder,
        found=", ".join(f"{channel_of[name]} {shapes[name]}" for name in channel_of),
    )

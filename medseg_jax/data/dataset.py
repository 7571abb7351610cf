"""The one form of a data set here: an nnU-Net v2 folder with its dataset.json.

    root/
      dataset.json
      imagesTr/<id>_0000.<ending>, <id>_0001.<ending> ...  one file per channel; or one file (<id>_0000 or <id>) for all
      labelsTr/<id>.<ending>
      imagesTs/, labelsTs/      test cases, labels optional
      imagesUn/                 cases without labels, for semi-supervised methods

dataset.json holds nnU-Net's keys, so that nnU-Net reads the folder and a plain nnU-Net folder opens here as it is:

    channel_names        {"0": "CT", "1": "PET"}
    labels               {"background": 0, "tumour": 1, "whole": [1, 2], "ignore": 3}
    regions_class_order  value to write for each region, where labels holds lists
    numTraining          labelled cases of imagesTr
    file_ending          ".nii.gz"
    dataset              optional: {"<id>": {"images": [...], "label": ...}}, instead of imagesTr

and one key of ours, every part of which is optional:

    medseg  {"version": 1, "unit": "mm" | "px", "overlapping": false, "scores": {"disc": [1, 2], "cup": 2},
             "cases": {"<id>": {"patient": "p1", "domain": "site0", "split": "train" | "val" | "test"}}}

"scores" says what is scored instead of the classes: disc and cup, say, where rim and cup are predicted.
With "overlapping" the classes are stored as bit masks (bit i = class i); the lists in `labels` say so to nnU-Net, too.
Where no split is given, patients are sorted and every 5th (the first, the sixth ...) validates; imagesTs is for tests.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

from medseg_jax.data import geometry as space
from medseg_jax.data import io
from medseg_jax.data.dataset_json import (
    KEYS,
    SPLITS,
    VERSION,
    check_id,
    did_you_mean,
    parse_description,
    parse_labels,
    required,
)
from medseg_jax.paths import file_sha256, write
from medseg_jax.types import Case, Geometry, Labels, UserError

FOLDERS = {"imagesTr": "labelsTr", "imagesTs": "labelsTs", "imagesUn": None}
"""Image folder -> its label folder."""

CHANNEL = re.compile(r"(?P<id>.+)_(?P<channel>\d{4})")


@dataclass(frozen=True)
class Dataset:
    """A data set on disk.

    Attributes:
        root: the folder that holds dataset.json.
        name: how people call it.
        channels: name of each input channel ("CT", "R" ...).
        labels: the classes and how label files encode them.
        cases: every case, sorted by id; `Batch["case"]` is an index into it.
        file_ending: of images and labels alike, e.g. ".nii.gz".
        unit: of spacings and surface distances, "mm" or "px".
        extra: further keys of dataset.json (licence, reference ...), kept as they are.
    """

    root: Path
    name: str
    channels: tuple[str, ...]
    labels: Labels
    cases: tuple[Case, ...]
    file_ending: str
    unit: str = "mm"
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @classmethod
    def open(cls, root: str | Path) -> "Dataset":
        """Reads dataset.json and lists the cases; opens no image.

        A case that dataset.json names but whose files are missing is kept, without images, so that `check_dataset` can
        list it beside all other problems and nothing trains on less than was meant.

        Raises:
            UserError: dataset.json is missing, malformed, of the old MSD form, or points outside the folder.
        """
        root = Path(root)
        file = root / "dataset.json"
        said = parse_description(file)
        cases = _find_cases(root, said.content, said.file_ending, said.notes)
        cases = _assign_splits([replace(case, **said.notes.get(case.id, {})) for case in cases], file)
        name = str(said.content.get("name") or root.resolve().name)
        extra = {key: value for key, value in said.content.items() if key not in KEYS}
        return cls(root, name, said.channels, said.labels, cases, said.file_ending, said.unit, extra)

    def save(self) -> None:
        """Writes dataset.json, whole or not at all.

        Raises:
            UserError: these labels or cases cannot be written so that they are read back equal.
        """
        file = self.root / "dataset.json"
        for case in self.cases:
            check_id(case.id, file)
            for path in (*case.images, *filter(None, [case.label])):
                if not path.is_relative_to(self.root):
                    raise UserError(
                        f"A file of case {case.id} lies outside the data set", file=path, expected=self.root
                    )
        content = self.description()
        order = None if self.labels.exclusive or self._overlapping else tuple(content["regions_class_order"])
        if parse_labels(content, self._overlapping, file) != replace(self.labels, order=order, scores=()):
            raise UserError(
                "dataset.json cannot express these labels",
                file=file,
                found=self.labels,
                expected="one value per class, regions with an order for each, or Labels.overlapping(...)",
            )
        self.root.mkdir(parents=True, exist_ok=True)
        write(file, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def description(self) -> dict[str, Any]:
        """What dataset.json says of this data set."""
        labels = self.labels
        classes = dict(zip(labels.names, labels.values, strict=True))
        regions = not labels.exclusive
        content: dict[str, Any] = {
            "name": self.name,
            "channel_names": {str(i): name for i, name in enumerate(self.channels)},
            "labels": {"background": 0} | {name: list(v) if regions else v[0] for name, v in classes.items()},
        }
        if labels.ignore is not None:
            content["labels"]["ignore"] = labels.ignore
        if regions:
            content["regions_class_order"] = list(labels.order or (vs[0] for vs in labels.values))
        training = [c for c in self.cases if c.images and _folder(c) not in ("imagesTs", "imagesUn")]
        content["numTraining"] = len(training)
        content["file_ending"] = self.file_ending
        if any(image.parent != self.root / "imagesTr" for c in training for image in c.images):
            content["dataset"] = {c.id: self._relative_paths(c) for c in training}
        notes = {c.id: {k: v for k in ("patient", "domain", "split") if (v := getattr(c, k))} for c in self.cases}
        ours: dict[str, Any] = {"version": VERSION, "unit": self.unit, "overlapping": self._overlapping}
        if labels.scores:
            ours["scores"] = {name: list(values) for name, values in labels.scores}
        ours["cases"] = notes
        return {**content, **self.extra, "medseg": ours}

    @property
    def _overlapping(self) -> bool:
        """True where the classes are stored as bit masks."""
        if self.labels.exclusive or len(self.labels.names) > 16:
            return False
        return self.labels.values == Labels.overlapping(*self.labels.names).values and self.labels.order is None

    def _relative_paths(self, case: Case) -> dict[str, Any]:
        images = [path.relative_to(self.root).as_posix() for path in case.images]
        return {"images": images, "label": case.label.relative_to(self.root).as_posix() if case.label else None}

    @cached_property
    def domains(self) -> tuple[str, ...]:
        """Every domain once, sorted; `Batch["domain"]` is an index into it."""
        return tuple(sorted({case.domain for case in self.cases}))

    def subset(self, split: str, labelled: bool | None = True) -> tuple[Case, ...]:
        """Cases of "train", "val" or "test": labelled ones, unlabelled ones (False) or both (None)."""
        if split not in SPLITS:
            raise UserError("No such split", found=split, expected=", ".join(SPLITS))
        return tuple(case for case in self.cases if case.split == split and labelled in (None, case.label is not None))

    def case(self, id: str) -> Case:
        """The case of this id."""
        for case in self.cases:
            if case.id == id:
                return case
        ids = [case.id for case in self.cases]
        raise UserError("No such case", file=self.root, found=id, expected=did_you_mean(id, ids) or f"{ids[:5]} ...")

    def load(self, case: Case) -> tuple[np.ndarray, np.ndarray | None, Geometry]:
        """Reads a case and makes sure that its parts belong together.

        Returns:
            image [*s, c] in the file's axis order, label [*s] or None, and the geometry of the (first) image.

        Raises:
            UserError: a file is missing or unreadable, channels or label lie elsewhere than the first image, the number
                of channels is not that of dataset.json, or the label holds a value that dataset.json does not name.
        """
        if not case.images:
            raise UserError(f"Case {case.id} has no image", file=self.root, remedy=f"medseg data check {self.root}")
        arrays, geometries = zip(*(io.read_image(path) for path in case.images), strict=True)
        for path, other in zip(case.images[1:], geometries[1:], strict=True):
            self._same_space(case, path, other, geometries[0])
        image = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, -1)  # [*s, c]
        if image.shape[-1] != len(self.channels):
            raise UserError(
                f"Case {case.id} has another number of channels than dataset.json",
                file=", ".join(path.name for path in case.images),
                found=image.shape[-1],
                expected=f"{len(self.channels)} ({', '.join(self.channels)})",
                remedy=f"medseg data check {self.root}",
            )
        if case.label is None:
            return image, None, geometries[0]
        label, other = io.read_label(case.label)
        self._same_space(case, case.label, other, geometries[0])
        if unknown := unknown_values(label, self.labels):
            raise UserError(
                f"The label of case {case.id} holds values that dataset.json does not name",
                file=case.label,
                found=", ".join(f"{value} ({count} voxels)" for value, count in unknown.items()),
                expected=sorted(self.labels.known)[:20],
                remedy=f"medseg data check {self.root}",
            )
        return image, label, geometries[0]

    def _same_space(self, case: Case, path: Path, found: Geometry, expected: Geometry) -> None:
        if differences := space.same_space(found, expected):
            raise UserError(
                f"The files of case {case.id} do not lie in the same space",
                file=path,
                found="; ".join(differences),
                expected=f"the space of {case.images[0].name}",
                remedy=f"medseg data check {self.root}",
            )

    @cached_property
    def content_hashes(self) -> dict[Path, str]:
        """sha256 of every file of every training and validation case; "missing" for a file that is not there.

        Files of test cases are not opened: nothing that is trained or chosen may depend on them.
        """
        used = [case for case in self.cases if case.split != "test"]
        files = sorted({path for case in used for path in (*case.images, case.label) if path is not None})
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            return dict(zip(files, pool.map(_sha256, files), strict=True))

    def fingerprint(self) -> str:
        """sha256 of what dataset.json means and of every training and validation file's name, size and content."""
        files = [
            [path.relative_to(self.root).as_posix(), path.stat().st_size if path.exists() else 0, digest]
            for path, digest in self.content_hashes.items()
        ]
        return hashlib.sha256(json.dumps([self.description(), files], sort_keys=True).encode()).hexdigest()


def read_description(file: str | Path) -> tuple[tuple[str, ...], Labels]:
    """(channels, labels) of a dataset.json alone, wherever its images are: runs and predictions keep a copy."""
    said = parse_description(Path(file))
    return said.channels, said.labels


def unknown_values(label: np.ndarray, labels: Labels) -> dict[int, int]:
    """Values of a label map [*s] that `labels` does not name -> number of voxels."""
    return {value: count for value, count in value_counts(label).items() if value not in labels.known}


def value_counts(label: np.ndarray) -> dict[int, int]:
    """Values of a label map [*s] -> number of voxels. In slabs, since counting takes eight bytes a voxel."""
    counts = np.zeros(int(label.max(initial=0)) + 1, np.int64)
    flat = label.reshape(-1)  # [voxels]
    for start in range(0, len(flat), 1 << 22):
        counts += np.bincount(flat[start : start + (1 << 22)], minlength=len(counts))
    return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}


def _folder(case: Case) -> str:
    """Name of the folder in which a case's images lie, "" if it has none."""
    return case.images[0].parent.name if case.images else ""


def _sha256(path: Path) -> str:
    return file_sha256(path) if path.is_file() else "missing"


# ----------------------------------------------------------------------------------------------------- cases and splits


def _find_cases(root: Path, content: dict[str, Any], ending: str, noted: Iterable[str]) -> list[Case]:
    """All cases of the folder, sorted; split is "test" for imagesTs and "" where it is still to be decided."""
    cases: list[Case] = []
    if "dataset" in content:
        cases += _listed_cases(root, required(content, "dataset", dict, root / "dataset.json"))
    for folder, label_folder in FOLDERS.items():
        if folder == "imagesTr" and "dataset" in content:
            continue
        split = "test" if folder == "imagesTs" else ""
        for id, images in group_channels(root, folder, ending, noted).items():
            check_id(id, root / folder)
            label = root / label_folder / f"{id}{ending}" if label_folder else None
            # A training case needs its label: the path is kept so that its absence is an error. A test case does not.
            if label and folder == "imagesTs" and not label.is_file():
                label = None
            cases.append(Case(id, images, label, split=split))
    found = [case.id for case in cases]
    if twice := sorted(id for id, times in Counter(found).items() if times > 1):
        raise UserError("A case is in two folders at once", file=root, found=", ".join(twice), expected="unique ids")
    if not cases:
        there = sorted({io.suffix(p) for f in FOLDERS if (root / f).is_dir() for p in (root / f).iterdir()})
        raise UserError(
            f"The data set holds no image that ends in {ending}",
            file=root / "imagesTr",
            found=f"files ending in {', '.join(there)}" if there else "no file",
            expected=f"imagesTr/<case>_0000{ending}",
        )
    cases += [Case(id, (), split="") for id in set(noted) - set(found)]
    return sorted(cases, key=lambda case: case.id)


def group_channels(root: Path, folder: str, ending: str, noted: Iterable[str] = ()) -> dict[str, tuple[Path, ...]]:
    """Files of an image folder by case: <id>_0000, <id>_0001 ... or <id> alone.

    `case_0001.png` is channel 1 of `case`, unless a label or dataset.json (`noted`) knows a case `case_0001`.
    """
    label_folder = FOLDERS[folder]
    labels = visible_files(root / label_folder) if label_folder else []
    known = {io.stem(path) for path in labels} | set(noted)
    groups: dict[str, list[Path]] = {}
    for path in visible_files(root / folder):
        if path.name.endswith(ending):
            stem = path.name.removesuffix(ending)
            match = None if stem in known else CHANNEL.fullmatch(stem)
            groups.setdefault(match["id"] if match else stem, []).append(path)
    return {id: tuple(paths) for id, paths in sorted(groups.items())}


def is_dataset(folder: Path) -> bool:
    """Whether a folder is a data set with nnU-Net's folders. Runs and predictions have a dataset.json, no images."""
    return (folder / "dataset.json").is_file() and any((folder / name).is_dir() for name in FOLDERS)


def visible_files(folder: Path) -> list[Path]:
    """Files of a folder, sorted, without hidden ones (.DS_Store, ._case.nii.gz of macOS)."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _listed_cases(root: Path, listed: dict[str, Any]) -> list[Case]:
    """Cases of nnU-Net's optional key "dataset"."""
    file = root / "dataset.json"

    def inside(text: Any) -> Path:
        if not isinstance(text, str) or not text:
            raise UserError('"dataset" in dataset.json must hold paths', file=file, found=json.dumps(text)[:80])
        path = PurePosixPath(text.replace("\\", "/"))
        if path.is_absolute() or PureWindowsPath(text).drive or ".." in path.parts:
            raise UserError(
                "dataset.json points outside its folder",
                file=file,
                found=text,
                expected="paths inside the folder, without ..",
                remedy="copy or link the files into the folder",
            )
        return root / path

    cases = []
    for id, entry in listed.items():
        check_id(id, file)
        if not isinstance(entry, dict) or not isinstance(entry.get("images"), list):
            raise UserError(
                f"Case {id!r} in dataset.json is not understood",
                file=file,
                found=json.dumps(entry)[:80],
                expected='{"images": ["path", ...], "label": "path"}',
            )
        label = entry.get("label")
        cases.append(Case(id, tuple(inside(p) for p in entry["images"]), inside(label) if label else None, split=""))
    return cases


def _assign_splits(cases: list[Case], file: Path) -> tuple[Case, ...]:
    """Fills in the splits that dataset.json leaves open; a patient never falls into two of them by our doing."""
    labelled = [case for case in cases if case.label is not None]
    open_ = [case for case in labelled if not case.split]
    given = [case for case in labelled if case.split and _folder(case) != "imagesTs"]
    if open_ and given:
        raise UserError(
            "dataset.json gives a split to some cases only",
            file=file,
            found=f"{len(given)} with, {len(open_)} without: {', '.join(c.id for c in open_[:5])} ...",
            expected="a split for every labelled case, or for none",
        )
    for case in cases:
        if _folder(case) == "imagesTs" and case.split != "test":
            raise UserError("A case of imagesTs is given another split", file=file, found=f"{case.id}: {case.split}")
    patients = sorted({case.patient or case.id for case in open_})
    validating = set(patients[::5]) if len(patients) > 1 else set()
    split = {patient: "val" if patient in validating else "train" for patient in patients}
    decided = {case.patient or case.id: case.split for case in cases if case.split}
    # Unlabelled cases go where their patient is.
    return tuple(
        case if case.split else replace(case, split=(split | decided).get(case.patient or case.id, "train"))
        for case in cases
    )

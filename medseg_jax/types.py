"""Words that every room shares: errors, geometry, cases, label sets, axis letters.

Axis letters: b batch, d depth, h height, w width (spatial, in this order), c input channels, k output channels,
l sequence, n states. Arrays are channels-last. `*s` stands for the spatial axes, (h, w) or (d, h, w).
"""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

type Batch = Mapping[str, Any]
"""What the pipeline hands to an objective: named arrays whose first axis is the batch.

image [b, *s, c] float32, label [b, *s] int32, case [b] int32 (stable index into `Dataset.cases`), domain [b] int32,
start [b, 3] int32 (the case's voxel (d, h, w) that is the sample's first one; negative where it reaches outside),
and for mixes with unlabelled cases: unlabelled [bu, *s, c], unlabelled_case [bu], unlabelled_domain [bu].
"""


class UserError(Exception):
    """Something the user can mend. Says which file, what was found, what was expected and what to do next."""

    exit_code = 1

    def __init__(
        self,
        problem: str,
        *,
        file: str | Path | None = None,
        found: object = None,
        expected: object = None,
        remedy: str | None = None,
    ):
        self.problem, self.file, self.found, self.expected, self.remedy = problem, file, found, expected, remedy
        super().__init__(problem)

    @classmethod
    def from_os(cls, error: OSError, folder: str | Path, remedy: str) -> "UserError":
        """What the operating system refused (disk full, read-only, no such folder ...), with the file it names."""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        full = full or (error.errno is None and "requested and" in str(error))  # np.save's words for a short write
        problem = "The disk is full" if full else "A file or folder cannot be used"
        return cls(problem, file=error.filename or folder, found=error.strerror or str(error), remedy=remedy)

    def __str__(self) -> str:
        lines = [self.problem]
        for name in ("file", "found", "expected", "remedy"):
            value = getattr(self, name)
            if value is not None:
                lines.append(f"  {'try' if name == 'remedy' else name}: {value}")
        return "\n".join(lines)

    def _render_traceback_(self) -> list[str]:
        """What notebooks show: the message without a traceback, as the command line does."""
        return [f"{type(self).__name__}: {self}"]


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where a file's voxels lie in the world, in the axis order in which its array was read.

    Attributes:
        shape: spatial shape of the array as read; (rows, columns) for a picture, (i, j, k) for a NIfTI volume.
        affine: 4 x 4, array index (i, j, k) to world millimetres, RAS+ (NIfTI's convention). The identity for pictures.
        unit: "mm", or "px" where the file does not say how large a pixel is.
        header: what the reader needs to write a file that looks like this one (a nibabel header), or None.
    """

    shape: tuple[int, ...]
    affine: np.ndarray = field(default_factory=lambda: np.eye(4))
    unit: str = "mm"
    header: Any = None

    @property
    def spacing(self) -> tuple[float, ...]:
        """Distance between neighbouring voxels along each array axis, in `unit`."""
        return tuple(float(v) for v in np.linalg.norm(self.affine[:3, : len(self.shape)], axis=0))


@dataclass(frozen=True)
class Case:
    """One case of a data set: its files and what is known of it.

    Attributes:
        id: unique name, also the stem of its files.
        images: one file per channel, or one file that holds several channels (RGB).
        label: label map, or None for an unlabelled case.
        domain: site, scanner or centre ("" if the data set has one only).
        patient: cases of one patient never fall into two splits.
        split: "train", "val" or "test".
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None = None
    domain: str = ""
    patient: str = ""
    split: str = "train"


@dataclass(frozen=True)
class Labels:
    """The classes of a data set and how a label map encodes them.

    A class (or region) is a set of label values. Exclusive classes have one value each, never overlap, and are
    predicted by softmax over background + classes. Anything else (BraTS regions, overlapping organs) is predicted by
    one sigmoid a class. Overlapping classes without natural values are stored as bit masks: class i covers all values
    with bit i set.

    Attributes:
        names: foreground classes, in the order of the network's output channels.
        values: label values of each class.
        ignore: value of voxels that take no part in loss and metrics, or None.
        exclusive: True for softmax.
        order: value written for each region where no value has exactly the predicted memberships; later regions
            overwrite earlier ones (nnU-Net's regions_class_order).
        scores: (name, values) of what the metrics judge instead of the classes, where these are not what one reports:
            rim and cup exclude each other and are predicted, disc (both) and cup are scored.
        rest: further values that a label map may hold, of classes that are left out (`only`).
    """

    names: tuple[str, ...]
    values: tuple[tuple[int, ...], ...]
    ignore: int | None = None
    exclusive: bool = True
    order: tuple[int, ...] | None = None
    scores: tuple[tuple[str, tuple[int, ...]], ...] = ()
    rest: tuple[int, ...] = ()

    @classmethod
    def simple(cls, *names: str, ignore: int | None = None) -> "Labels":
        """Exclusive classes with values 1, 2, ..."""
        return cls(names, tuple((i + 1,) for i in range(len(names))), ignore)

    @classmethod
    def overlapping(cls, *names: str) -> "Labels":
        """Classes that may overlap, stored as bit masks: at most 16."""
        bits = range(min(len(names), 16))
        values = tuple(tuple(v for v in range(2 ** len(bits)) if v >> i & 1) for i in bits)
        return cls(names, values, exclusive=False).storable()

    def storable(self, file: Path | None = None) -> Self:
        """These labels, if `decode` has a bit for each class.

        Raises:
            UserError: they are more than 16 that may overlap; `file` says so.
        """
        if not self.exclusive and len(self.names) > 16:
            raise UserError(
                "Too many overlapping classes for one label file",
                file=file,
                found=len(self.names),
                expected="at most 16",
                remedy="leave some out, or make them classes that do not overlap",
            )
        return self

    def only(self, names: Sequence[str]) -> "Labels":
        """Some of the classes, in this order; the same label maps encode them, and what else they hold is background.

        One class alone is predicted by a sigmoid.

        Raises:
            UserError: no such class, one that is named twice, or none at all.
        """
        if unknown := [name for name in names if name not in self.names]:
            raise UserError("No such class", found=", ".join(unknown), expected=", ".join(self.names))
        if not names or len(set(names)) < len(names):
            raise UserError("Classes are chosen once each", found=", ".join(names) or "none", expected="one or more")
        index = [self.names.index(name) for name in names]
        values = tuple(self.values[i] for i in index)
        order = None if self.order is None else tuple(self.order[i] for i in index)
        rest = self.known - {0, self.ignore, *(v for vs in values for v in vs)}
        exclusive = self.exclusive and len(names) > 1
        return Labels(tuple(names), values, self.ignore, exclusive, order, rest=tuple(sorted(rest)))

    @property
    def channels(self) -> int:
        """Output channels of a network: background + classes if exclusive, else one a class."""
        return len(self.names) + self.exclusive

    @cached_property
    def judged(self) -> "Labels":
        """The labels that the metrics go by: `scores` as regions, or the classes themselves."""
        if not self.scores:
            return self
        names, values = zip(*self.scores, strict=True)
        return Labels(names, values, self.ignore, exclusive=False, rest=self.rest)

    @cached_property
    def known(self) -> frozenset[int]:
        """All values that a label map may hold."""
        values = {0, *self.rest, *(v for vs in self.values for v in vs)}
        return frozenset(values | ({self.ignore} if self.ignore is not None else set()))

    @cached_property
    def table(self) -> np.ndarray:
        """[largest value + 1, channels] float32: row v is the target of a voxel labelled v."""
        member = np.zeros((max(self.known) + 1, len(self.names)), np.float32)
        for i, values in enumerate(self.values):
            member[list(values), i] = 1
        if not self.exclusive:
            return member
        return np.concatenate([1 - member.max(1, keepdims=True, initial=0), member], 1)

    @cached_property
    def weights(self) -> np.ndarray:
        """[largest value + 1] float32: 0 for the ignore label, else 1."""
        weights = np.ones(max(self.known) + 1, np.float32)
        if self.ignore is not None:
            weights[self.ignore] = 0
        return weights

    def masks(self, label: np.ndarray) -> np.ndarray:
        """Label map [*s] -> one boolean mask per class [classes, *s]."""
        return np.moveaxis(self.table[label][..., self.channels - len(self.names) :] > 0, -1, 0)

    @cached_property
    def _codes(self) -> np.ndarray:
        """[2 ** classes]: label value for every combination of memberships."""
        member = self.table[:, self.channels - len(self.names) :] > 0
        bits = 2 ** np.arange(len(self.names))
        codes = np.zeros(2 ** len(self.names), np.uint16)
        for code in range(1, len(codes)):
            for i in range(len(self.names)):
                if code >> i & 1:
                    codes[code] = self.order[i] if self.order else self.values[i][0]
        for value in sorted(self.known - {self.ignore}, reverse=True):
            codes[int(member[value] @ bits)] = value
        return codes

    def decode(self, probabilities: np.ndarray, thresholds: Sequence[float] | None = None) -> np.ndarray:
        """Probabilities [*s, channels] -> label map [*s], uint8 where it fits, else uint16.

        Args:
            thresholds: above which a voxel belongs to each class, where classes may overlap; 0.5 by default.
        """
        dtype = np.uint8 if max(self.storable().known) < 256 else np.uint16
        if self.exclusive:
            lookup = np.array([0, *(vs[0] for vs in self.values)], dtype)
            return lookup[probabilities.argmax(-1)]
        code = np.zeros(probabilities.shape[:-1], np.uint16)
        for i in range(len(self.names)):
            least = 0.5 if thresholds is None else thresholds[i]
            code |= (probabilities[..., i] > least).astype(np.uint16) << np.uint16(i)
        return self._codes[code].astype(dtype)

"""What recognising a layout yields: the cases as they lie in the source."""

from dataclasses import dataclass
from pathlib import Path

from medseg_jax.types import Labels


@dataclass(frozen=True)
class Mask:
    """A file with a mask. `tag` is the class that its folder or name speaks of, "" if it may hold all classes."""

    path: Path
    tag: str = ""


@dataclass(frozen=True)
class Found:
    """One case of the source. `labelled` with no masks at all means that every class is absent."""

    name: str
    images: tuple[Path, ...]
    masks: tuple[Mask, ...] = ()
    labelled: bool = True
    domain: str = ""
    patient: str = ""
    split: str = ""
    roi: Path | None = None

    @property
    def file(self) -> Path:
        return self.images[0]


@dataclass(frozen=True)
class Layout:
    """A recognised source.

    Attributes:
        kind: in words.
        cases: in natural order of their paths.
        channels: names of the input channels where the source says them.
        names: class of each value of the masks where the source's dataset.json says it.
        labels: label set to be kept as it is (nnU-Net v2).
        keys: image and label key inside h5 and npz files.
        reference: channel on whose grid a case lies; None where all channels must lie on one.
        instances: True where a case has one mask file per object.
        notes: (what, decision) to be shown.
    """

    kind: str
    cases: tuple[Found, ...]
    channels: tuple[str, ...] = ()
    names: dict[int, str] | None = None
    labels: Labels | None = None
    keys: tuple[str, str | None] | None = None
    reference: int | None = None
    instances: bool = False
    notes: tuple[tuple[str, str], ...] = ()

"""What is known of a public data set, and what its file needs to bring it into an order that the converter reads."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from medseg_jax.data.convert.options import Options
from medseg_jax.data.convert.words import natural
from medseg_jax.types import UserError


@dataclass(frozen=True)
class Source:
    """A public data set.

    Attributes:
        name: of its module; what the user types.
        title: what it is, in a line.
        licence: terms as its owners (or those who gave out the copy) state them.
        citation: what to cite.
        origin: where it is given out.
        access: how to get it.
        layout: the folder that `convert` expects, drawn as a tree.
        needs: patterns below the folder, each of which must match a file; "a|b" is either.
        split: who trains, validates and is tested, and who says so.
        options: what the general converter is told.
        scores: what is scored instead of the classes: name -> classes that it consists of.
        arrange: (folder, empty folder to work in) -> folder for the general converter, where the layout is one that
            it does not read; it links files rather than copies them.
    """

    name: str
    title: str
    licence: str
    citation: str
    origin: str
    access: str
    layout: str
    needs: tuple[str, ...]
    split: str
    options: Options = field(default_factory=Options)
    scores: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    arrange: Callable[[Path, Path], Path] | None = None

    def check(self, folder: Path) -> None:
        """Refuses a folder that is laid out in another way.

        Raises:
            UserError: shows the expected layout.
        """
        if not folder.is_dir():
            raise UserError("The source must be a folder or an archive", file=folder, found="no such folder")
        missing = [needed for needed in self.needs if not any(any(files(folder, p)) for p in needed.split("|"))]
        if missing:
            entries = sorted((path.name for path in folder.iterdir()), key=natural)
            raise UserError(
                f"This is not the layout of {self.name}: nothing matches {missing[0]}",
                file=folder,
                found=", ".join(entries[:8]) + (" ..." if len(entries) > 8 else "") or "an empty folder",
                expected="\n" + self.layout.strip("\n"),
                remedy=f"medseg data sources {self.name} says how to get it; name the folder that holds the above",
            )


def files(folder: Path, *patterns: str) -> list[Path]:
    """Files below a folder whose relative paths match, in upper or lower case, in natural order; no hidden ones."""
    found = {path for pattern in patterns for path in folder.glob(pattern, case_sensitive=False) if path.is_file()}
    seen = [p for p in found if not any(part[0] == "." or part == "__MACOSX" for part in p.relative_to(folder).parts)]
    return sorted(seen, key=lambda path: natural(path.relative_to(folder).as_posix()))


def link(file: Path, target: Path) -> None:
    """Puts a file of the source at another place; copies it where the system allows no links.

    Raises:
        UserError: something is there already.
    """
    if target.exists():
        raise UserError("Two files of the source mean the same", file=file, found=target.resolve(), remedy="remove one")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.symlink_to(file.resolve())
    except OSError:
        shutil.copyfile(file, target)

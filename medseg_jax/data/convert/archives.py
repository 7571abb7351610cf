"""Zip and tar archives: checked entry by entry before anything is written, then unpacked beside the target.

Nothing leaves the folder, nothing but plain files and folders is made, and nothing is larger than the archive's size
and the free disk space allow. One bad entry refuses the whole archive, by name.
"""

import gzip
import lzma
import shutil
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

from medseg_jax.data.convert.write import beside
from medseg_jax.types import UserError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")

MOST_ENTRIES = 500_000
LARGEST_RATIO = 250
"""Contents to archive, above the first MB; whole sets of images come to 1 to 20, zeros alone to 1000."""

LARGEST_HEADER = 1 << 20
BLOCK = 1 << 20
DAMAGED = (
    *(OSError, EOFError, ValueError, RuntimeError, OverflowError, struct.error),
    *(zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError),
)


@dataclass(frozen=True)
class Entry:
    """One entry as the archive declares it. `kind` is "file", "folder", or what it must not be."""

    name: str
    kind: str
    size: int
    open: Callable[[], IO[bytes] | None]


@contextmanager
def as_folder(src: Path, dst: Path) -> Iterator[Path]:
    """The source itself, or what is in it if it is an archive: unpacked beside `dst`, and removed in the end.

    Raises:
        UserError: the archive is damaged, protected by a password, too large for its size or for the disk, or has an
            entry that leads elsewhere, is a link or a device, or comes twice.
    """
    if not (src.is_file() and src.name.lower().endswith(ARCHIVES)):
        yield src
        return
    with beside(dst, ".unpacked") as folder:
        ending = next(ending for ending in ARCHIVES if src.name.lower().endswith(ending))
        inside = folder / (src.name[: -len(ending)] or "archive")
        inside.mkdir()
        unpack(src, inside)
        yield _single_folder(inside)


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a zip or tar file into an empty folder, in two passes: check everything, then write.

    Raises:
        UserError: see `as_folder`.
    """
    try:
        entries = _zip if archive.name.lower().endswith(".zip") else _tar
        paths = _check(archive, entries(archive), shutil.disk_usage(folder).free)
        for entry in entries(archive):
            _write(archive, entry, folder / paths[entry.name])
    except DAMAGED as error:
        raise UserError(
            "The archive cannot be unpacked", file=archive, found=error, remedy="download it again, or unpack it first"
        ) from error


# ----------------------------------------------------------------------------------------------------- what is inside


def _zip(archive: Path) -> Iterator[Entry]:
    with zipfile.ZipFile(archive) as content:
        for info in content.infolist():
            mode = info.external_attr >> 16
            kind = "folder" if info.is_dir() else "file"
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
                kind = "a link" if stat.S_ISLNK(mode) else "a device"
            elif info.flag_bits & 1:
                kind = "protected by a password"
            # `orig_filename` is what the archive says; `filename` ends at the first null byte.
            yield Entry(info.orig_filename, kind, info.file_size, partial(content.open, info))


def _tar(archive: Path) -> Iterator[Entry]:
    opened = gzip.open if archive.name.lower().endswith("gz") else open
    with opened(archive, "rb") as stream, tarfile.open(fileobj=_SmallReads(stream), mode="r:") as content:  # pyright: ignore
        for info in content:
            kind = "folder" if info.isdir() else "file" if info.isreg() else "a device"
            kind = "a link" if info.issym() or info.islnk() else kind
            yield Entry(info.name, kind, info.size, partial(content.extractfile, info))
            content.members.clear()  # else every header of a huge archive is kept
        stream.seek(content.offset)
        if not stream.read(1):
            raise tarfile.ReadError("the file is cut off: it lacks the mark of its end")


class _SmallReads:
    """A stream whose reads are bounded: tarfile reads a header of any declared length at once."""

    def __init__(self, stream: IO[bytes] | gzip.GzipFile):
        self.seek, self.tell, self._stream = stream.seek, stream.tell, stream

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= LARGEST_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return self._stream.read(size)


# -------------------------------------------------------------------------------------------------------------- checks


def _check(archive: Path, entries: Iterator[Entry], free: int) -> dict[str, Path]:
    """Relative path of each entry; refuses the archive at the first entry that is not as it should be."""
    packed = archive.stat().st_size
    allowed, disk = BLOCK + LARGEST_RATIO * packed, free // 2
    paths: dict[str, Path] = {}
    files: set[Path] = set()
    total = 0
    for entry in entries:
        path = _inside(archive, entry)
        if entry.name in paths or path in files:
            _refuse(archive, entry, "comes twice", "every name once")
        if entry.size < 0:
            _refuse(archive, entry, f"{entry.size} bytes", "0 bytes or more")
        paths[entry.name] = path
        if entry.kind == "file":
            files.add(path)
        total += entry.size
        if total > allowed or len(paths) > MOST_ENTRIES:
            bomb = f"{total} bytes in {len(paths)} entries so far, from an archive of {packed} bytes"
            expected = f"at most {allowed} bytes ({LARGEST_RATIO} times the archive) in {MOST_ENTRIES} entries"
            _refuse(archive, entry, bomb, expected, "unpack it yourself if you trust it")
        if total > disk:
            room = f"at most {disk} bytes: half of the free space, as the data set needs room as well"
            _refuse(archive, entry, f"{total} bytes so far", room, "choose a target on a larger disk")
    for entry, path in paths.items():
        if above := next((parent for parent in path.parents if parent in files), None):
            raise UserError(
                "An archive has an entry below a file", file=archive, found=entry, expected=f"{above} a folder"
            )
    return paths


def _inside(archive: Path, entry: Entry) -> Path:
    """The entry's path below the folder; "./a//b" is "a/b"."""
    if entry.kind not in ("file", "folder"):
        _refuse(archive, entry, f"is {entry.kind}", "plain files and folders")
    name, parts = entry.name, [part for part in entry.name.split("/") if part not in ("", ".")]
    if name.startswith("/") or "\\" in name or (name[1:2] == ":" and name[:1].isalpha()):
        _refuse(archive, entry, "is an absolute path, or one of another system", "a relative path with /")
    if ".." in parts:
        _refuse(archive, entry, "leads out of the folder", "a path without ..")
    unprintable = any(ord(sign) < 32 or 0xD800 <= ord(sign) < 0xE000 for sign in name)
    if unprintable or (not parts and entry.kind == "file") or any(len(part.encode()) > 200 for part in parts):
        _refuse(archive, entry, "is no name that every system takes", "1 to 200 printable characters")
    return Path(*parts)


def _refuse(archive: Path, entry: Entry, found: str, expected: str, remedy: str | None = None) -> None:
    raise UserError(
        "The archive is refused, and nothing was unpacked",
        file=archive,
        found=f"entry {entry.name!r}: {found}",
        expected=expected,
        remedy=remedy or "get it from where it was published, or unpack it yourself if you trust it",
    )


def _write(archive: Path, entry: Entry, path: Path) -> None:
    """Writes one entry, never over another one and never more than it declared."""
    if entry.kind == "folder":
        path.mkdir(parents=True, exist_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    stream, left = entry.open(), entry.size
    assert stream is not None, entry
    with stream, path.open("xb") as file:
        while block := stream.read(BLOCK):
            left -= len(block)
            if left < 0:
                break
            file.write(block)
    if left:
        raise UserError(
            "An entry of the archive has another size than it says", file=archive, found=entry.name, expected=entry.size
        )


def _single_folder(folder: Path) -> Path:
    """The set itself, where the archive holds one folder that holds everything."""
    while True:
        seen = [path for path in folder.iterdir() if not path.name.startswith(".") and path.name != "__MACOSX"]
        if len(seen) != 1 or not seen[0].is_dir():
            return folder
        folder = seen[0]

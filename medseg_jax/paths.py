"""Where this package keeps what it can make again (preprocessed cases, compiled programs, embedded phantoms), what
folders of domains and classes are called, files that are written whole or not at all, their hash, and reading records.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medseg_jax.types import UserError


def cache_home() -> Path:
    """$MEDSEG_CACHE, else $XDG_CACHE_HOME/medseg_jax, else ~/.cache/medseg_jax."""
    if own := os.environ.get("MEDSEG_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "medseg_jax"


def safe_name(text: str) -> str:
    """A domain's or class's name as part of a folder's name: letters of any script and digits stay."""
    return re.sub(r"[^\w.-]+", "_", text)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A draft beside the file, hidden and of the same suffix, that takes its place unless an error comes up."""
    draft = path.with_name(f".{path.name}")
    try:
        yield draft
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write(path: Path, content: str | bytes) -> Path:
    """Writes a file (text as UTF-8) whole or not at all."""
    with replacing(path) as draft:
        draft.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_record(path: Path, *needed: str) -> dict[str, Any]:
    """A JSON object that this package wrote into the folder of a run, of predictions or of an evaluation.

    Raises:
        UserError: it is missing or damaged, or has not all that is `needed`.
    """
    remedy = "restore it from a copy of this folder, or make the folder anew"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path.name} is missing or damaged", file=path, found=error, remedy=remedy) from error
    if not isinstance(content, dict) or (missing := [key for key in needed if key not in content]):
        found = f"no {', '.join(missing)}" if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path.name} is damaged", file=path, found=found, remedy=remedy)
    return content

"""Checkpoints: Orbax writes them asynchronously and renames them into place, our sha256 manifest proves them.

Orbax notices truncation but restores flipped bits silently, so every committed step gets a manifest of file hashes. A
step without one (the process was killed between the two) is incomplete by definition, one with a wrong hash is damaged;
both are named and skipped, and the step before is used.

    folder/<step>/...             Orbax's files
    folder/<step>.sha256.json     {"files": {relative path: sha256}, "self": sha256 of that table}
"""

import hashlib
import json
import logging
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from medseg_jax.types import UserError


class Checkpoints:
    """The checkpoints of one folder, newest last.

    Args:
        folder: created if missing; left-overs of a killed run are removed by process 0.
        keep: how many steps to keep.
        read_only: never create or remove anything.
    """

    def __init__(self, folder: str | Path, keep: int = 2, read_only: bool = False):
        self.folder, self.keep = Path(folder).absolute(), keep
        self._saving: threading.Thread | None = None
        self._error: BaseException | None = None
        if read_only:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if jax.process_index() == 0:
            for rest in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(rest, ignore_errors=True)
            for step in self.folder.iterdir():
                if step.name.isdigit() and not _manifest(step).exists():
                    shutil.rmtree(step, ignore_errors=True)
        options = ocp.CheckpointManagerOptions(create=False, enable_async_checkpointing=True)
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """Steps with a manifest, ascending."""
        if not self.folder.is_dir():
            return []
        found = (int(p.name) for p in self.folder.iterdir() if p.name.isdigit() and _manifest(p).exists())
        return sorted(found)

    def save(self, step: int, state: Any) -> None:
        """Starts writing; returns as soon as the arrays are copied. Waits for the save before this one."""
        self.wait()
        if (self.folder / str(step)).exists():
            return
        self._manager.save(step, args=ocp.args.StandardSave(state))
        self._saving = threading.Thread(target=self._finish, args=(step,), name=f"checkpoint-{step}")
        self._saving.start()

    def _finish(self, step: int) -> None:
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(self.folder / str(step))
                for old in self.steps()[: -self.keep]:
                    _manifest(self.folder / str(old)).unlink()
                    shutil.rmtree(self.folder / str(old))
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Blocks until the running save and its manifest are on disk; raises what went wrong in it."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        if self._error is not None:
            error, self._error = self._error, None
            raise UserError(
                "A checkpoint could not be written; earlier ones are untouched",
                file=self.folder,
                found=f"{type(error).__name__}: {error}",
                remedy="free disk space or choose another --out, then start the same command again: it resumes",
            ) from error

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any] | None:
        """The newest undamaged step (or the one asked for) as (step, state); None if there is none.

        Args:
            like: abstract state (jax.ShapeDtypeStruct with shardings) or arrays; says shapes, types and places.
        """
        for candidate in [step] if step is not None else reversed(self.steps()):
            folder = self.folder / str(candidate)
            if problems := verify_manifest(folder):
                logging.getLogger("medseg").warning(
                    "checkpoint %s is damaged and skipped: %s", folder, "; ".join(problems)
                )
                continue
            return candidate, restore_tree(folder, like)
        return None

    def close(self) -> None:
        """Waits for the last save and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            self._manager.close()


def restore_tree(folder: Path, like: Any = None) -> Any:
    """The pytree saved in one step folder; as NumPy arrays if `like` is None."""
    with warnings.catch_warnings(), ocp.StandardCheckpointer() as reader:
        warnings.simplefilter("ignore")  # Orbax warns that a topology is not given, which is what we want here.
        return reader.restore(folder / "default", like)


# ---------------------------------------------------------------- manifest


def _manifest(folder: Path) -> Path:
    return folder.with_name(folder.name + ".sha256.json")


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _table_sha256(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path) -> None:
    """Hashes every file under a folder into <folder>.sha256.json, atomically."""
    files = {p.relative_to(folder).as_posix(): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    draft = _manifest(folder).with_suffix(".tmp")
    draft.write_text(json.dumps({"files": files, "self": _table_sha256(files)}, indent=1))
    draft.rename(_manifest(folder))


def verify_manifest(folder: Path) -> list[str]:
    """What is wrong with a folder, by its manifest; empty if nothing is."""
    try:
        manifest = json.loads(_manifest(folder).read_text())
        files = manifest["files"]
        if manifest["self"] != _table_sha256(files):
            return [f"{_manifest(folder).name}: the manifest itself is damaged"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{_manifest(folder).name}: unreadable manifest ({type(error).__name__})"]
    problems = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            problems.append(f"{name}: missing")
        elif file_sha256(path) != expected:
            problems.append(f"{name}: wrong sha256")
    present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    return problems + [f"{name}: not in the manifest" for name in sorted(present - files.keys())]

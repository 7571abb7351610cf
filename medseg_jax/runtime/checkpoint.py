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
import os
import re
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from medseg_jax.paths import file_sha256
from medseg_jax.runtime.distributed import PeerLost, from_main, peer_is_lost, wait_for_all
from medseg_jax.types import UserError

REMNANT = re.compile(r"\d+(\.(orbax-checkpoint-tmp.*|damaged|sha256\.json|sha256\.tmp))?")
"""What this module and Orbax call files and folders of a step; nothing else is ever swept."""


class Checkpoints:
    """The checkpoints of one folder, newest last.

    Orbax's checkpointer is used without its CheckpointManager, whose policy silently declines a step that is not newer
    than all others on disk: after falling back from a damaged step, nothing would be saved until that step was passed.

    Args:
        folder: created if missing; left-overs of a killed run are removed by process 0.
        keep: how many steps to keep.
        read_only: never create or remove anything.
    """

    def __init__(self, folder: str | Path, keep: int = 2, read_only: bool = False):
        self.folder, self.keep, self.read_only = Path(folder).absolute(), keep, read_only
        self._saving: threading.Thread | None = None
        self._error: BaseException | None = None
        if read_only:
            return
        if jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
        wait_for_all(f"swept {self.folder}")
        # Barriers are named after the folder "default" that is written: two that are written at once need other names.
        prefix = "-".join(self.folder.parts[-2:])
        self._writer = ocp.StandardCheckpointer(
            multiprocessing_options=ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=prefix)
        )

    def _sweep(self) -> None:
        """Removes drafts, steps without a manifest, manifests without a step, and steps that were found damaged."""
        whole = {name for step in self.steps() for name in (str(step), _manifest(self.folder / str(step)).name)}
        for rest in self.folder.iterdir():
            if REMNANT.fullmatch(rest.name) and rest.name not in whole:
                _remove(rest)

    def steps(self) -> list[int]:
        """Steps with a manifest, ascending."""
        if not self.folder.is_dir():
            return []
        found = (
            int(p.name) for p in self.folder.iterdir() if p.name.isdigit() and p.is_dir() and _manifest(p).exists()
        )
        return sorted(found)

    def save(self, step: int, state: Any) -> None:
        """Starts writing; returns as soon as the arrays are copied. Waits for the save before this one.

        A step that is there and undamaged (a resumed run comes by again) is left as it is.
        """
        self.wait()
        folder = self.folder / str(step)
        if from_main(folder.exists() and not verify_manifest(folder)):
            return
        if jax.process_index() == 0 and folder.exists():
            _remove(_manifest(folder))
            _remove(folder)
        try:
            self._writer.save(folder / "default", state)
        except Exception as error:
            raise self._failed(error) from error
        self._saving = threading.Thread(target=self._finish, args=(step,), name=f"checkpoint-{step}")
        self._saving.start()

    def _finish(self, step: int) -> None:
        try:
            self._writer.wait_until_finished()
            if jax.process_index() == 0:
                write_manifest(self.folder / str(step))
                for old in self.steps()[: -self.keep]:
                    _remove(_manifest(self.folder / str(old)))
                    _remove(self.folder / str(old))
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        """Blocks until the running save and its manifest are on disk; raises what went wrong in it."""
        if self._saving is not None:
            self._saving.join()
            self._saving = None
        if self._error is not None:
            error, self._error = self._error, None
            raise self._failed(error) from error

    def _failed(self, error: BaseException) -> UserError:
        lost = peer_is_lost(error)
        return (PeerLost if lost else UserError)(
            "A checkpoint could not be written; earlier ones are untouched"
            + (f": another of the {jax.process_count()} processes is lost" if lost else ""),
            file=self.folder,
            found=f"{type(error).__name__}: {str(error)[:300]}",
            remedy="start all processes again: the run resumes"
            if lost
            else "free disk space or choose another --out, then start the same command again: it resumes",
        )

    def restore(self, like: Any, step: int | None = None) -> tuple[int, Any] | None:
        """The newest undamaged step (or the one asked for) as (step, state); None if there is none.

        A damaged step is named, and renamed to <step>.damaged unless read-only; the next start removes it.

        Args:
            like: abstract state (jax.ShapeDtypeStruct with shardings) or arrays; says shapes, types and places.

        Raises:
            UserError: an undamaged step holds another kind of state.
        """
        newest = self._newest_undamaged(step) if jax.process_index() == 0 else None
        chosen = from_main(-1 if newest is None else newest)
        if chosen < 0:
            return None
        folder = self.folder / str(chosen)
        try:
            return chosen, restore_tree(folder, like)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                "The checkpoint is undamaged but does not fit what is trained: the code has changed since",
                file=folder,
                found=str(error)[:300],
                remedy="use the version of medseg_jax that run.json names, another --out, or --fresh",
            ) from error

    def _newest_undamaged(self, step: int | None) -> int | None:
        for candidate in [step] if step is not None else reversed(self.steps()):
            folder = self.folder / str(candidate)
            problems = verify_manifest(folder)
            if not problems:
                return candidate
            logging.getLogger("medseg").warning("checkpoint %s is damaged and skipped: %s", folder, "; ".join(problems))
            if not self.read_only and folder.is_dir():
                aside = folder.with_name(f"{folder.name}.damaged")
                _remove(aside)
                folder.rename(aside)
                _remove(_manifest(folder))
        return None

    def close(self) -> None:
        """Waits for the last save and ends Orbax's threads."""
        try:
            self.wait()
        finally:
            self._writer.close()


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def restore_tree(folder: Path, like: Any = None) -> Any:
    """The pytree saved in one step folder; as NumPy arrays if `like` is None, whatever devices it was saved from.

    Without `like` each process reads for itself, so that one of several may do so alone.
    """
    place = folder.absolute() / "default"  # Orbax finds no metadata by a relative path
    own = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(own, {own}, f"read-by-{own}")
    together = ocp.options.MultiprocessingOptions()
    reading = ocp.StandardCheckpointer(multiprocessing_options=alone if like is None else together)
    with warnings.catch_warnings(), reading as reader:
        warnings.simplefilter("ignore")  # Orbax warns that a topology is not given, which is what we want here.
        if like is None:
            saved = reader.metadata(place).item_metadata.tree
            like = jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), saved)
        return reader.restore(place, like)


# ---------------------------------------------------------------- manifest


def _manifest(folder: Path) -> Path:
    return folder.with_name(folder.name + ".sha256.json")


def _table_sha256(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write_manifest(folder: Path) -> None:
    """Hashes every file under a folder into <folder>.sha256.json, atomically."""
    files = {p.relative_to(folder).as_posix(): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    if not files:
        raise FileNotFoundError(f"{folder}: nothing was written")
    draft = _manifest(folder).with_suffix(".tmp")
    with draft.open("w") as file:
        file.write(json.dumps({"files": files, "self": _table_sha256(files)}, indent=1))
        file.flush()
        os.fsync(file.fileno())
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

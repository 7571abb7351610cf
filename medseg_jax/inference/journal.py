"""OUT/predict.json: what made the predictions of a folder, and which cases are finished.

Whoever stops a prediction, and when: a file under its final name is whole, since every file is written under another
name and renamed; and a case counts as done only if the journal names it, which is rewritten after the files are there.
One process at a time works in a folder. What killed ones left under other names is removed at the next start.
"""

import dataclasses
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from medseg_jax.data import io
from medseg_jax.paths import file_sha256, write
from medseg_jax.runtime.run import WEIGHTS, Run
from medseg_jax.types import Case, UserError

DRAFT = re.compile(r"\.(\d+-.+|predict\.json|dataset\.json|.+\.npz)")
"""Names under which files are written before they are renamed."""


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Makes the folder if missing, keeps other predictions out of it, and removes what killed ones left behind.

    Raises:
        UserError: another process is predicting into it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                "Another prediction is working in this folder",
                file=folder,
                remedy="wait for it, stop it, or choose another folder",
            ) from None
        for place in (folder, folder / "probabilities", folder / "uncertainty"):
            for rest in place.glob(".*"):
                if DRAFT.fullmatch(rest.name):
                    rest.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


class Journal:
    """The predictions of one folder. Rewritten atomically after each case."""

    def __init__(self, folder: Path, content: dict[str, Any]):
        self.folder, self.content = folder, content

    @classmethod
    def open(cls, folder: Path, runs: Sequence[Run], settings: Mapping[str, Any], overwrite: bool) -> "Journal":
        """Starts or continues the predictions of a folder.

        Args:
            settings: what else changes the numbers.

        Raises:
            UserError: it holds predictions with other weights or settings, or files of unknown origin.
        """
        plans = [repr(dataclasses.replace(run.plan, reasons={})) for run in runs]
        weights = [weights_sha256(run) for run in runs]
        made_by = {
            "weights": weights if len(runs) > 1 else weights[0],
            "plan": hashlib.sha256("".join(plans).encode()).hexdigest(),
            **settings,
        }
        about = {
            "run": [str(run.path) for run in runs] if len(runs) > 1 else str(runs[0].path),
            "checkpoint": runs[0].checkpoint,
            "step": [run.step for run in runs] if len(runs) > 1 else runs[0].step,
            "classes": list(runs[0].labels.names),
        }
        earlier = _read_journal(folder / "predict.json")
        if earlier is None and not overwrite and (found := io.list_files(folder)):
            raise UserError(
                "The output folder holds images that `medseg predict` did not write",
                file=folder,
                found=", ".join(p.name for p in found[:5]),
                remedy="choose an empty folder, or --overwrite",
            )
        finished = earlier["cases"] if earlier else {}
        before = earlier["made_by"] if earlier else made_by
        if finished and before != made_by and not overwrite:
            keys = [key for key in {**before, **made_by} if before.get(key) != made_by.get(key)]
            raise UserError(
                "The output folder holds predictions of another run or with other settings",
                file=folder / "predict.json",
                found="; ".join(f"{key}: {before.get(key)}, now {made_by.get(key)}" for key in keys),
                remedy="choose another folder, or --overwrite",
            )
        if overwrite:
            _remove(folder, [name for entry in finished.values() for name in entry["outputs"]])
        journal = cls(folder, {**about, "made_by": made_by, "cases": {} if overwrite else finished})
        journal.save()
        return journal

    def find(self, case: Case, extras: Sequence[str]) -> Path | None:
        """The label map of a case that is finished: same input files, all outputs there, those in `extras` included.

        Args:
            extras: folders such as "probabilities" that must hold something of the case, too.
        """
        entry = self.content["cases"].get(case.id)
        if entry is None or entry["inputs"] != _stamps(case):
            return None
        folders = {Path(name).parts[0] for name in entry["outputs"][1:]}
        outputs = [self.folder / name for name in entry["outputs"]]
        return outputs[0] if folders >= set(extras) and all(path.is_file() for path in outputs) else None

    def add(self, case: Case, outputs: Sequence[Path], shape: Sequence[int], seconds: float) -> None:
        """Notes that a case is finished; `outputs` are relative to the folder, the label map first."""
        stamps, names = _stamps(case), [path.as_posix() for path in outputs]
        earlier = self.content["cases"].get(case.id, {"inputs": stamps, "outputs": []})
        others = [name for name in earlier["outputs"] if name not in names and (self.folder / name).is_file()]
        if earlier["inputs"] == stamps:
            names += others
        else:  # maps of an image that is no more
            _remove(self.folder, others)
        self.content["cases"][case.id] = {
            "inputs": stamps,
            "outputs": names,
            "shape": list(shape),
            "seconds": round(seconds, 3),
        }
        self.save()

    def save(self) -> None:
        """Writes predict.json, whole or not at all."""
        write(self.folder / "predict.json", json.dumps(self.content, indent=1, ensure_ascii=False))


def _remove(folder: Path, names: Sequence[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _read_journal(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return content if isinstance(content["cases"], dict) and isinstance(content["made_by"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _stamps(case: Case) -> dict[str, list[int]]:
    """Size and time of last change of a case's files: enough to notice that they were replaced. Of a DICOM series the
    sums over its folder."""
    stamps = {}
    for path in case.images:
        folder = path if path.is_dir() else path.parent
        files = [path] if io.kind(path) != "dicom" else [p for p in folder.iterdir() if p.is_file()]
        stats = [file.stat() for file in files]
        stamps[path.name] = [sum(stat.st_size for stat in stats), sum(stat.st_mtime_ns for stat in stats)]
    return stamps


def weights_sha256(run: Run) -> str | None:
    """Hash of the checkpoint's manifest, which holds the hashes of all its files, or of an exported run's weights."""
    if run.members:
        return hashlib.sha256(repr([weights_sha256(member) for member in run.members]).encode()).hexdigest()
    if (run.path / WEIGHTS).is_file():
        return file_sha256(run.path / WEIGHTS)
    manifests = run.path.glob(f"checkpoints/*/{run.checkpoint}/{run.step}.sha256.json")
    newest = sorted(manifests, key=lambda path: int(path.parts[-3].partition("_")[0]))[-1:]
    return json.loads(newest[0].read_text())["self"] if newest else None

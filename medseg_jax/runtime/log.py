"""What a run says: log.jsonl, a progress bar on a terminal and plain lines when piped, progress.png, TensorBoard.

Only process 0 writes. log.jsonl holds one JSON object a line: {"kind": "train", "step", "stage", "loss", ...} and
{"kind": "val", "step", "stage", "dice", "dice/<class>", ...}. A resumed run first drops lines from after its
checkpoint, so that the file reads as if the run had never been interrupted; only the means of the interval in which it
was interrupted are taken over fewer steps.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from medseg_jax.paths import replacing, write
from medseg_jax.types import UserError


def say(text: str) -> None:
    """One line for the user, from process 0 only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


class Log:
    """Writes the log of one run.

    Args:
        folder: the run's folder.
        tensorboard: also write TensorBoard files (needs the extra `tensorboard`).
    """

    def __init__(self, folder: Path, tensorboard: bool = False):
        self.path = folder / "log.jsonl"
        self.main = jax.process_index() == 0
        self._bar: Progress | None = None
        self._board: Any = None
        self._printed = self._since = 0.0
        self._from: int | None = None
        if tensorboard and self.main:
            try:
                from tensorboardX import SummaryWriter
            except ModuleNotFoundError as error:
                raise UserError(
                    "TensorBoard files need a package that is not installed",
                    found=error,
                    remedy="pip install 'medseg-jax[tensorboard]'; log.jsonl is written without it",
                ) from error

            self._board = SummaryWriter(str(folder / "tensorboard"))

    def rewind(self, stage: str, step: int) -> None:
        """Drops lines of a stage that a resumed run will write again."""
        if not (self.main and self.path.exists()):
            return
        kept = [e for e in read(self.path) if e["stage"] != stage or e["step"] <= step]
        write(self.path, "".join(json.dumps(e) + "\n" for e in kept))

    def start(self, stage: str, step: int, steps: int) -> None:
        """Opens the progress display of a stage."""
        self.stage, self.steps, self._from = stage, steps, None
        if self.main and sys.stderr.isatty() and not os.environ.get("NO_COLOR"):
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(stage, total=steps, completed=step, note="")

    def stop(self) -> None:
        """Closes the progress display; what was written is on disk."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._board is not None:
            self._board.close()  # the next stage opens another file

    def write(self, kind: str, step: int, **values: Any) -> None:
        """One entry: a line of JSON, the progress display, TensorBoard."""
        if not self.main:
            return
        entry = {"kind": kind, "stage": self.stage, "step": step, **values}
        with self.path.open("a") as f:
            f.write(json.dumps(entry) + "\n")
        if self._board is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{self.stage}/{kind}/{name}", value, step)
        self._show(kind, step, values)

    def _show(self, kind: str, step: int, values: dict[str, Any]) -> None:
        shown = ("loss", "lr", "dice", "best")
        note = "  ".join(
            f"{k} {v:.4g}" for k, v in values.items() if k in shown or (kind == "val" and k.startswith("dice/"))
        )
        if self._bar is not None:
            if kind == "val":
                self._bar.console.print(f"{self.stage} {step}: validation  {note}", highlight=False)
            else:
                self._bar.update(self._task, completed=step, note=note)
            return
        now = time.perf_counter()
        if self._from is None:  # what came before was compiled, too: it says nothing of the steps to come
            self._since, self._from = now, step
        if kind == "val" or step >= self.steps or now - self._printed > 10:
            self._printed = now
            if self._from < step < self.steps:
                left = (now - self._since) / (step - self._from) * (self.steps - step)
                note += f"  ({left / 60:.1f} min left)" if left >= 60 else f"  ({left:.0f} s left)"
            say(f"{self.stage} {step}/{self.steps}  {kind}  {note}")


def read(path: Path) -> list[dict[str, Any]]:
    """Entries of a log.jsonl; lines that are not whole (cut off by a kill or a full disk) are left out."""
    entries = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and {"kind", "stage", "step"} <= entry.keys():
            entries.append(entry)
    return entries


def draw_progress(path: Path, entries: list[dict[str, Any]]) -> None:
    """progress.png: training loss and validation Dice over the steps of all stages.

    Args:
        path: the PNG to write, atomically.
        entries: what `read` gives.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from medseg_jax.data.preview import class_colors

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, dice_axes = figure.subplots(1, 2, sharex=True)
    offset, offsets = 0, {}
    for stage in dict.fromkeys(e["stage"] for e in entries):
        offsets[stage] = offset
        offset += max(e["step"] for e in entries if e["stage"] == stage)
    train = [e for e in entries if e["kind"] == "train" and e.get("loss") is not None]
    for stage, offset in offsets.items():  # not joined: another stage may have another loss
        own = [e for e in train if e["stage"] == stage]
        alone = "." if len(own) == 1 else ""  # a line of one point is not seen
        loss_axes.plot([offset + e["step"] for e in own], [e["loss"] for e in own], alone + "-", lw=0.8, color="C0")
    loss_axes.set(xlabel="step", ylabel="loss", title="Training loss")
    val = [e for e in entries if e["kind"] == "val"]
    names = [k for k in dict.fromkeys(k for e in val for k in e) if k == "dice" or k.startswith("dice/")]
    colors = iter(class_colors(len(names)) / 255)  # those of the outlines in previews and of the report
    for name in names:
        steps, scores = [offsets[e["stage"]] + e["step"] for e in val], [e.get(name) for e in val]
        mean = {"lw": 2.0, "color": "black", "label": "mean"}
        style = mean if name == "dice" else {"lw": 1.0, "color": next(colors), "label": name[5:]}
        dice_axes.plot(steps, scores, marker=".", **style)
    dice_axes.set(xlabel="step", ylabel="Dice", title="Validation Dice", ylim=(0, 1))
    if names:
        dice_axes.legend(fontsize="small")
    for axes in (loss_axes, dice_axes):
        axes.grid(alpha=0.3)
        axes.locator_params("x", integer=True)
        for x in list(offsets.values())[1:]:
            axes.axvline(x, color="gray", ls=":")
    with replacing(path) as draft:
        figure.savefig(draft, dpi=110)

"""Any folder of images and masks -> the canonical data set (see `data/dataset.py`).

    recognise   which layout; which files are images, masks, fields of view; which mask belongs to which image
    assign      domain, patient, split
    study       what values the masks hold
    decide      classes, thresholds, encoding
    write       case by case into DST.tmp, renamed to DST at the end

Nothing is guessed in silence: every decision is shown, and kept in dataset.json under "converted". Where two readings are
possible, `Ambiguous` lists the options to choose between. The source is never changed; the same source and options give
the same bytes.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from medseg_jax.data import io
from medseg_jax.data.convert.coding import decide
from medseg_jax.data.convert.found import Found, Layout
from medseg_jax.data.convert.layouts import recognise
from medseg_jax.data.convert.masks import study_masks
from medseg_jax.data.convert.options import Ambiguous, Options
from medseg_jax.data.convert.splits import assign
from medseg_jax.data.convert.write import Writer, check_target, choose_channels, choose_ending, target, write_dataset
from medseg_jax.data.dataset import Dataset
from medseg_jax.types import UserError

__all__ = ["Ambiguous", "Options", "convert"]


def convert(src: str | Path, dst: str | Path, **options: object) -> Dataset:
    """Makes a canonical data set of the images and masks in `src`.

    Args:
        src: folder with images and masks; left untouched.
        dst: folder to write; must not exist (but see `overwrite`).
        options: fields of `Options`.

    Returns:
        the data set in `dst`.

    Raises:
        Ambiguous: only the user can decide; the message lists the options for each answer.
        UserError: anything else the user can mend; `dst` is not there or as it was before.
    """
    src, dst = Path(src), Path(dst)
    said = Options.of(**options)
    check_target(src, dst, said)
    console = Console(quiet=said.quiet, highlight=False, soft_wrap=True)

    layout = recognise(src, said)
    cases, decisions = assign(src, list(layout.cases), said)
    study = study_masks(_progress(console, cases, "reading masks"), layout, said)
    coding = decide(study, cases, layout, said)
    channels = choose_channels(cases, layout, said)
    ending = choose_ending(cases, layout)
    decisions = [*_describe(layout, cases, channels, ending), *decisions, *coding.notes]
    show(console, src, decisions)

    with target(dst) as root:
        writer = Writer(root, ending, len(channels), layout, coding, said)
        written = [writer.write(case) for case in _progress(console, cases, "writing")]
        decisions += _afterwards(writer)
        write_dataset(root, said.name or src.resolve().name, channels, written, writer, decisions)
    console.print(f"wrote {len(written)} cases to {dst}")
    return Dataset.open(dst)


# ---------------------------------------------------------------------------------------------- what is told the user


def _describe(layout: Layout, cases: list[Found], channels: tuple[str, ...], ending: str) -> list[tuple[str, str]]:
    suffixes = Counter(io.suffix(path) for case in cases for path in case.images)
    images = ", ".join(f"{count} {suffix}" for suffix, count in sorted(suffixes.items()))
    unlabelled = sum(not case.labelled for case in cases)
    lossless = ", without loss" if ending == ".png" and {".jpg", ".jpeg"} & set(suffixes) else ""
    lines = [
        ("layout", layout.kind),
        ("images", f"{len(cases)} cases ({images}), written as {ending}{lossless}"),
        ("channels", ", ".join(channels)),
        *layout.notes,
    ]
    if unlabelled:
        lines.append(("unlabelled", f"{unlabelled} cases"))
    if domains := Counter(case.domain for case in cases if case.domain):
        lines.append(("domains", ", ".join(f"{name} {count}" for name, count in domains.items())))
    splits = Counter(case.split for case in cases)
    lines.append(("cases", ", ".join(f"{splits[role]} {role}" for role in ("train", "val", "test") if splits[role])))
    return lines


def _afterwards(writer: Writer) -> list[tuple[str, str]]:
    lines = []
    if writer.resized:
        lines.append(("resized", f"{writer.resized} masks, by nearest neighbour"))
    if writer.ignored:
        lines.append(("field of view", f"outside ignored in {writer.ignored} cases"))
    return lines


def show(console: Console, src: Path, decisions: list[tuple[str, str]]) -> None:
    """A table on a terminal, plain lines where the output is piped."""
    if not console.is_terminal:
        for what, text in decisions:
            console.print(f"{what}: {text}", markup=False)
        return
    table = Table("", "decided", title=str(src), show_header=False, title_justify="left")
    for what, text in decisions:
        table.add_row(what, text)
    console.print(table)


def _progress(console: Console, cases: list[Found], what: str) -> Iterator[Found]:
    """A bar on a terminal; ten lines at most where the output is piped."""
    if console.is_terminal and not console.quiet:
        yield from track(cases, what, console=console)
        return
    step = max(1, len(cases) // 5)
    for i, case in enumerate(cases, start=1):
        yield case
        if len(cases) >= 50 and i % step == 0:
            console.print(f"{what}: {i} of {len(cases)}")

"""The conversion from top to bottom, and what it tells the user on the way."""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from medseg_jax.data import io
from medseg_jax.data.convert.archives import as_folder
from medseg_jax.data.convert.coding import decide
from medseg_jax.data.convert.found import Found, Layout
from medseg_jax.data.convert.layouts import recognise
from medseg_jax.data.convert.masks import study_masks
from medseg_jax.data.convert.options import Options, as_flags, count
from medseg_jax.data.convert.splits import assign, limit
from medseg_jax.data.convert.write import Writer, check_target, choose_channels, choose_ending, target, write_dataset
from medseg_jax.data.dataset import Dataset
from medseg_jax.types import UserError


def run(src: Path, dst: Path, options: Options) -> Dataset:
    """See `medseg_jax.data.convert.convert`."""
    check_target(src, dst, options)
    with as_folder(src, dst) as folder:
        return _convert(folder, dst, options)


def _convert(src: Path, dst: Path, options: Options) -> Dataset:
    terminal = sys.stdout.isatty()  # not so in a notebook, which gets plain lines
    console = Console(
        quiet=options.quiet, highlight=False, soft_wrap=True, force_terminal=terminal, force_jupyter=False
    )

    layout = recognise(src, options)
    if options.reference and layout.reference is None:
        raise UserError("--reference is for a folder per case with a file per channel", file=src, found=layout.kind)
    everyone, decisions = assign(src, layout, options)
    cases = limit(everyone, options)
    read = [] if layout.labels else cases
    study = study_masks(_progress(console, read, "reading masks"), layout, options)
    coding = decide(study, everyone, layout, options)
    channels = choose_channels(cases, layout, options)
    ending = choose_ending(cases, layout)
    decisions = [*_describe(layout, options, cases, channels, ending), *decisions, *coding.notes]
    show(console, src, decisions)

    with target(dst) as root:
        writer = Writer(root, ending, len(channels), cases[0], layout, coding, options)
        written = [writer.write(case) for case in _progress(console, cases, "writing")]
        decisions += _afterwards(writer)
        write_dataset(root, options.name or src.resolve().name, channels, written, writer, decisions)
    console.print(f"wrote {count(len(written), 'case')} to {dst}", markup=False)
    return Dataset.open(dst)


# ---------------------------------------------------------------------------------------------- what is told the user


def _describe(
    layout: Layout, options: Options, cases: list[Found], channels: tuple[str, ...], ending: str
) -> list[tuple[str, str]]:
    suffixes = Counter(
        "DICOM" if io.kind(path) == "dicom" else io.suffix(path) for case in cases for path in case.images
    )
    images = ", ".join(f"{number} {suffix}" for suffix, number in sorted(suffixes.items()))
    unlabelled = sum(not case.labelled for case in cases)
    lossless = ", without loss" if ending == ".png" and {".jpg", ".jpeg"} & set(suffixes) else ""
    given = {f.name: value for f in fields(options) if (value := getattr(options, f.name)) != f.default}
    given = {name: value for name, value in given.items() if name not in ("quiet", "overwrite")}
    lines = [
        *([("options", as_flags(given))] if given else []),
        ("layout", layout.kind),
        ("images", f"{count(len(cases), 'case')} ({images}), written as {ending}{lossless}"),
        ("channels", ", ".join(channels)),
        *layout.notes,
    ]
    if unlabelled:
        lines.append(("unlabelled", count(unlabelled, "case")))
    if domains := Counter(case.domain for case in cases if case.domain):
        lines.append(("domains", ", ".join(f"{name} {number}" for name, number in domains.items())))
    splits = Counter(case.split for case in cases)
    lines.append(("cases", ", ".join(f"{splits[role]} {role}" for role in ("train", "val", "test") if splits[role])))
    return lines


def _afterwards(writer: Writer) -> list[tuple[str, str]]:
    lines = []
    if writer.resized:
        lines.append(("resized", f"{count(writer.resized, 'mask')}, by nearest neighbour"))
    if writer.ignored:
        lines.append(("field of view", f"outside ignored in {count(writer.ignored, 'case')}"))
    return lines


def show(console: Console, src: Path, decisions: list[tuple[str, str]]) -> None:
    """A table on a terminal, plain lines where the output is piped."""
    if not console.is_terminal:
        for what, text in decisions:
            console.print(f"{what}: {text}", markup=False)
        return
    table = Table("", "decided", title=str(src), show_header=False, title_justify="left")
    for what, text in decisions:
        table.add_row(what, Text(text))
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

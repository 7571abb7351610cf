"""medseg data convert|check|plan|preview|corrupt: from a folder of images to a data set that can be trained on"""

import difflib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

if TYPE_CHECKING:
    from medseg_jax.data.convert import Ambiguous

USAGE = """usage: medseg data VERB ...

  convert SRC DST   any folder of images and masks -> a data set (nnU-Net v2 folder with dataset.json)
  sources [NAME]    public data sets that convert --source knows: terms, how to get them, layout
  check DATASET     every problem of every case, all at once
  plan DATASET      plan.json: spacing, patch, normalisation, network, batch, and why; edit it by hand
  preview DATASET   a picture of some cases with the outlines of their labels
  corrupt SRC DST   a copy whose training labels are wrong on purpose, to see what a method makes of it

medseg data VERB --help says more. The usual order: convert, check, preview, plan, then medseg train DATASET --out RUN
exit codes: 0 done, 1 problem (explained), 2 wrong usage"""


def main(argv: list[str]) -> int:
    """Runs one of the verbs; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0 if argv else 2
    if argv[0] not in VERBS:
        near = difflib.get_close_matches(argv[0], VERBS, 1)
        hint = f"Did you mean {near[0]}?" if near else f"Verbs: {', '.join(VERBS)}"
        print(f"medseg data: no verb {argv[0]!r}. {hint}", file=sys.stderr)
        return 2
    return VERBS[argv[0]](argv[1:])


# ------------------------------------------------------------------------------------------------------------ convert


def convert(argv: list[str]) -> int:
    """medseg data convert SRC DST [options]"""
    import tyro

    from medseg_jax.data import convert as making
    from medseg_jax.data import sources as sets

    @dataclass(frozen=True)
    class Arguments:
        """Make a data set of any folder of images and masks. The source is left untouched.

        What was decided is shown; where several readings are possible, the options to choose between are listed (and
        asked for on a terminal). Recognised: nnU-Net v2 and Medical Segmentation Decathlon folders, folders of images
        and masks (of several sites, splits, classes, objects), h5 and npz arrays, a folder for each case, DICOM series
        with masks beside them.
        """

        src: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
        """folder with images and masks, or an archive of one (.zip, .tar, .tar.gz, .tgz)"""
        dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
        """folder to write"""
        conversion: tyro.conf.OmitArgPrefixes[making.Options]
        source: Annotated[str | None, tyro.conf.arg(metavar="NAME")] = None
        """SRC is this public data set (medseg data sources lists them); with tfds:NAME the data_dir of tfds"""

    arguments = tyro.conf.OmitSubcommandPrefixes[tyro.conf.FlagCreatePairsOff[Arguments]]
    args = tyro.cli(arguments, args=argv, prog="medseg data convert")
    options = args.conversion
    while True:
        try:
            if args.source:
                dataset = sets.convert(args.source, args.src, args.dst, **vars(options))
            else:
                dataset = making.convert(args.src, args.dst, **vars(options))
        except making.Ambiguous as question:
            if not (sys.stdin.isatty() and sys.stdout.isatty()):
                raise
            options = replace(options, **_ask(question))
        else:
            if not options.quiet:
                print(f"next: medseg data check {dataset.root}")
            return 0


def _ask(question: "Ambiguous") -> dict[str, object]:
    """Puts the question on the terminal; returns the options that the answer stands for."""
    from medseg_jax.data.convert.options import as_flags

    print(f"\n{question.problem}")
    for name in ("file", "found", "expected"):
        if (value := getattr(question, name)) is not None:
            print(f"  {name}: {value}")
    for number, (meaning, options) in enumerate(question.choices, start=1):
        print(f"  {number}  {meaning}: {as_flags(options)}")
    while True:
        answer = input(f"1 to {len(question.choices)} (Ctrl-C to stop): ").strip()
        if answer.isdigit() and 1 <= int(answer) <= len(question.choices):
            break
    chosen = dict(question.choices[int(answer) - 1][1])
    for name, value in chosen.items():
        if isinstance(value, str) and ("..." in value or "NAME" in value):
            chosen[name] = input(f"--{name.replace('_', '-')} ({value}): ").strip()
    return chosen


# ------------------------------------------------------------------------------------------------------------ sources


def sources(argv: list[str]) -> int:
    """medseg data sources [NAME] [--json]"""
    import tyro

    @dataclass(frozen=True)
    class Arguments:
        """List the public data sets that medseg data convert --source knows, or show one: terms, how to get it, layout.

        Nothing is downloaded.
        """

        name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="NAME")] = None
        """data set to show"""
        json: bool = False
        """print as JSON"""

    args = tyro.cli(tyro.conf.FlagCreatePairsOff[Arguments], args=argv, prog="medseg data sources")

    from medseg_jax.data import sources as sets

    fields = ("title", "licence", "citation", "origin", "access", "layout", "split")
    if args.json:
        chosen = [sets.find(args.name)] if args.name else list(sets.sources().values())
        shown = [{"name": source.name} | {field: getattr(source, field) for field in fields} for source in chosen]
        print(json.dumps(shown[0] if args.name else shown, indent=1, ensure_ascii=False))
    elif args.name:
        source = sets.find(args.name)
        for field in fields:
            print(f"{field}: {getattr(source, field).rstrip()}")
        print(f"then: medseg data convert --source {source.name} SRC DST")
    else:
        for name, source in sets.sources().items():
            print(f"{name:16s} {source.title}")
        print("medseg data sources NAME says how to get one")
    return 0


# -------------------------------------------------------------------------------------------------------------- check


def check(argv: list[str]) -> int:
    """medseg data check DATASET [--json]; 1 if there is an error"""
    import tyro

    @dataclass(frozen=True)
    class Arguments:
        """List every problem of every case at once. Exit code 1 if any of them is an error."""

        dataset: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATASET")]
        """folder with dataset.json"""
        json: bool = False
        """print the problems as JSON"""

    args = tyro.cli(tyro.conf.FlagCreatePairsOff[Arguments], args=argv, prog="medseg data check")

    from rich.console import Console

    from medseg_jax.data.dataset import Dataset
    from medseg_jax.data.verify import check_dataset, problems_json, problems_lines, problems_table, summary

    console = Console(highlight=False, soft_wrap=True)
    dataset = Dataset.open(args.dataset)
    problems = check_dataset(dataset)
    errors = sum(problem.severity == "error" for problem in problems)
    if args.json:
        counts = {"cases": len(dataset.cases), "errors": errors, "warnings": len(problems) - errors}
        print(json.dumps({**counts, "problems": problems_json(problems, dataset.root)}, indent=1))
    elif not problems:
        print(f"{len(dataset.cases)} cases: {summary(problems)}")
        print(f"next: medseg data preview {args.dataset}; medseg data plan {args.dataset}")
    elif console.is_terminal:
        Console().print(problems_table(problems, dataset.root))
    else:
        print("\n".join(problems_lines(problems, dataset.root)))
    return 1 if errors else 0


# --------------------------------------------------------------------------------------------------------------- plan


def plan(argv: list[str]) -> int:
    """medseg data plan DATASET [-o plan.json] [--json]"""
    import tyro

    @dataclass(frozen=True)
    class Arguments:
        """Decide how to preprocess the cases and which network to train; write plan.json, to be edited by hand."""

        dataset: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATASET")]
        """folder with dataset.json"""
        out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
        """file to write; DATASET/plan.json by default, where medseg train looks for it"""
        dim: Literal[2, 3] | None = None
        """2 trains slice by slice on volumes; the default is what the files are"""
        budget: Literal["cpu", "gpu", "tpu"] = "cpu"
        """machine to plan for"""
        overwrite: bool = False
        """replace a plan, and with it what was edited in it"""
        json: bool = False
        """print the plan as JSON"""

    args = tyro.cli(tyro.conf.FlagCreatePairsOff[Arguments], args=argv, prog="medseg data plan")

    from medseg_jax.data.dataset import Dataset
    from medseg_jax.data.planning import make_plan
    from medseg_jax.types import UserError

    dataset = Dataset.open(args.dataset)
    out = args.out or dataset.root / "plan.json"
    if out.exists() and not args.overwrite:
        raise UserError("The plan exists", file=out, remedy="--overwrite replaces it, or -o names another file")
    made = make_plan(dataset, dim=args.dim, budget=args.budget)
    made.save(out)
    if args.json:
        print(out.read_text(encoding="utf-8"))
        return 0
    for name, reason in made.reasons.items():
        print(f"{name}: {getattr(made, name, '')}   {reason}")
    print(f"wrote {out}; edit it, then medseg train {args.dataset} --out RUN")
    return 0


# ------------------------------------------------------------------------------------------------------------ preview


def preview(argv: list[str]) -> int:
    """medseg data preview DATASET [-o preview.png] [--json]"""
    import tyro

    @dataclass(frozen=True)
    class Arguments:
        """Draw some cases with the outlines of their labels: see that images, masks and classes belong together."""

        dataset: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DATASET")]
        """folder with dataset.json"""
        out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
        """picture to write; DATASET/preview.png by default"""
        cases: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ID ...")] = ()
        """cases to show; spread evenly over the data set by default"""
        n: int = 6
        """how many"""
        json: bool = False
        """print the written file as JSON"""

    args = tyro.cli(tyro.conf.FlagCreatePairsOff[Arguments], args=argv, prog="medseg data preview")

    from medseg_jax.data.dataset import Dataset
    from medseg_jax.data.preview import preview as draw

    dataset = Dataset.open(args.dataset)
    written = draw(dataset, args.out or dataset.root / "preview.png", args.cases or None, args.n)
    print(json.dumps({"written": str(written)}) if args.json else f"wrote {written}")
    return 0


# ------------------------------------------------------------------------------------------------------------ corrupt


def corrupt(argv: list[str]) -> int:
    """medseg data corrupt SRC DST [--style jsrt|whu|mrf] [options]"""
    import tyro

    from medseg_jax.data import label_noise

    @dataclass(frozen=True)
    class Arguments:
        """Copy a data set and corrupt its training labels; the clean ones are kept in DST/labelsClean for medseg audit.

        Validation and test cases stay as they are. The same seed makes the same labels.
        """

        src: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SRC")]
        """folder with dataset.json"""
        dst: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
        """folder to write"""
        noise: tyro.conf.OmitArgPrefixes[label_noise.LabelNoise]
        json: bool = False
        """print the changed share of each case as JSON"""

    args = tyro.cli(tyro.conf.FlagCreatePairsOff[Arguments], args=argv, prog="medseg data corrupt")
    changed = label_noise.corrupt(args.src, args.dst, args.noise).extra["label_noise"]["changed"]
    if args.json:
        print(json.dumps({"dataset": str(args.dst), "changed": changed}, indent=1))
        return 0
    wrong = [share for share in changed.values() if share]
    mean = sum(wrong) / max(len(wrong), 1)
    print(f"{len(wrong)} of {len(changed)} training labels are wrong now, by {mean:.0%} of their foreground on average")
    print(f"wrote {args.dst}; next: medseg data preview {args.dst}, medseg train {args.dst} --out RUN")
    return 0


VERBS: dict[str, Callable[[list[str]], int]] = {
    "convert": convert,
    "sources": sources,
    "check": check,
    "plan": plan,
    "preview": preview,
    "corrupt": corrupt,
}

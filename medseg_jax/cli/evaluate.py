"""medseg evaluate PRED REF -o DIR"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro


@dataclass
class Args:
    """Score predictions against references: Dice, IoU, precision, recall, HD, HD95, ASSD, NSD, volumes.

    On request also lesions (connected components), clDice, and, from probabilities, average precision and calibration.

    Writes DIR/summary.json (means, 95 % intervals, per class, per domain) and DIR/cases.csv (every case and class);
    from probabilities also DIR/plots/calibration.png.
    A class empty in both masks scores 1; empty in one of them, 0, with the image's diagonal as its distance.
    """

    pred: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="PRED")]
    """folder of predicted label maps, or one file"""
    ref: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="REF")]
    """data set folder, folder of label maps, or one file"""
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"], metavar="DIR")]
    """folder for summary.json and cases.csv"""
    nsd_tolerance: float = 1.0
    """distance within which surfaces agree, in mm (px for pictures)"""
    split: Literal["train", "val", "test"] | None = None
    """cases of a data set to score; by default the splits of the predicted cases"""
    missing: Literal["error", "worst", "skip"] = "error"
    """references without a prediction: list them and stop, score them as empty, or leave them out"""
    labels: tuple[str, ...] = field(default_factory=tuple)
    """names of the values 1, 2, ... where no dataset.json says them"""
    lesions: bool = False
    """also lesions, matched one to one: F1, sensitivity, precision, false positives a case, PQ; and accuracy"""
    lesion_iou: float = 0.2
    """least overlap (IoU) of a predicted and a true lesion that match"""
    cldice: bool = False
    """also clDice, for vessels and other tubes"""
    probabilities: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """folder of <case>.npz (medseg predict --probabilities) to score AUPR, ECE, Brier; by default PRED/probabilities"""
    seed: int = 0
    """of the bootstrap"""
    workers: int = 1
    """threads"""
    json: bool = False
    """print summary.json instead of a table"""


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    args = tyro.cli(Args, prog="medseg evaluate", args=argv, config=(tyro.conf.FlagCreatePairsOff,))

    from medseg_jax.evaluation.evaluate import evaluate
    from medseg_jax.types import Labels

    summary = evaluate(
        args.pred,
        args.ref,
        args.out,
        nsd_tolerance=args.nsd_tolerance,
        labels=Labels.simple(*args.labels) if args.labels else None,
        split=args.split,
        missing=args.missing,
        seed=args.seed,
        workers=args.workers,
        lesions=args.lesions,
        lesion_iou=args.lesion_iou,
        cldice=args.cldice,
        probabilities=args.probabilities,
    )
    if args.json:
        print(json.dumps(summary, indent=1, ensure_ascii=False))
        return 0
    _print(summary, args.out)
    return 0


def _print(summary: dict, out: Path) -> None:
    """Scores of all classes as a table; notes on the error stream, so that the output stays a table when piped."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from medseg_jax.evaluation.evaluate import remarks

    console, notes = Console(highlight=False, markup=False), Console(stderr=True, highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200
    unit, tolerance = summary["unit"], summary["settings"]["nsd_tolerance"]
    columns = {"dice": "Dice", "nsd": f"NSD {tolerance:g} {unit}", "hd95": f"HD95 {unit}"}
    extra = {"lesion_f1": "lesion F1", "lesion_fp": "lesion FP"}
    extra |= {"accuracy": "accuracy", "accuracy_of_nothing": "of nothing", "cldice": "clDice", "ap": "AP", "ece": "ECE"}
    columns |= {name: title for name, title in extra.items() if name in summary["mean"]}
    if console.width >= 110:
        columns |= {"assd": f"ASSD {unit}", "iou": "IoU", "precision": "precision", "recall": "recall"}
    table = Table(box=box.SIMPLE if console.is_terminal else None, header_style="bold")
    table.add_column("class")
    for name, title in columns.items():
        table.add_column(title, justify="right", no_wrap=True)
        if name in ("dice", "nsd", "hd95"):
            table.add_column("95 %", justify="right", style="dim", no_wrap=True)
    means = {"mean": summary["mean"] | {"ci95": summary["ci95"]}}
    for kind, groups in (("", summary["classes"]), ("domain ", summary.get("domains", {}))):
        means |= {f"{kind}{name}": values for name, values in groups.items()}
    for row, values in means.items():
        cells = []
        for name in columns:
            digits = 2 if name in ("hd95", "assd") else 3
            cells.append("–" if values[name] is None else f"{values[name]:.{digits}f}")
            if name in ("dice", "nsd", "hd95"):
                low, high = values["ci95"][name]
                cells.append("" if low is None else f"{low:.{digits}f}–{high:.{digits}f}")
        table.add_row(row, *cells, style="bold" if row == "mean" else "")
    console.print(table)
    for name, pooled in summary.get("probabilities", {}).get("classes", {}).items():
        if pooled["ap"] is not None:
            areas = f"{pooled['ap']:.3f} (average precision), {pooled['aupr33']:.3f} (33 thresholds, as IDRiD)"
            about = f"{name}, voxels of all cases pooled: AUPR {areas}; {pooled['prevalence']:.2%} are positive; "
            if (present := pooled["present"])["cases"] < summary["cases"]:
                about += (
                    f"{present['ap']:.3f} and {present['aupr33']:.3f} over the {present['cases']} cases that have it; "
                )
            about += f"soft Dice {pooled['soft_dice_pooled']:.3f}, which is no Dice of a mask"
            notes.print(about, soft_wrap=True)
    for note in remarks(summary):
        notes.print(note, soft_wrap=True)
    notes.print(
        f"{summary['cases']} cases; worst: {', '.join(summary['worst'])}\n{out / 'summary.json'}", soft_wrap=True
    )

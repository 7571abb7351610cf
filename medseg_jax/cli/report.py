"""medseg report RUN"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Args:
    """Write report.html: one self-contained page with scores, curves, worst and best cases, and how it was made."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """folder of a run, or of an evaluation (with summary.json)"""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="FILE")] = None
    """file to write; by default report.html in that folder"""
    json: bool = False
    """print the path as JSON"""


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    args = tyro.cli(Args, prog="medseg report", args=argv, config=(tyro.conf.FlagCreatePairsOff,))

    from medseg_jax.evaluation.report import report

    path = str(report(args.run, args.out))
    print(json.dumps({"report": path}) if args.json else path)
    return 0

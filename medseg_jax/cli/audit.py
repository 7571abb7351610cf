"""medseg audit DATASET RUN"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Args:
    """Which training labels are probably wrong, and where? Ranks the cases of a run of KMSNoise and draws their errors.

    Writes a page with pictures (sortable), a CSV, and the probability of an error as an image beside each label. The
    data set is not changed.
    """

    dataset: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DATASET")]
    """folder with dataset.json that the run was trained on"""
    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """folder of a run of KMSNoise"""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = None
    """folder to write; RUN/audit by default"""
    json: bool = False
    """print summary and paths as JSON"""


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    args = tyro.cli(Args, prog="medseg audit", args=argv, config=(tyro.conf.FlagCreatePairsOff,))

    from medseg_jax.evaluation.audit import audit

    page = audit(args.dataset, args.run, args.out)
    summary = json.loads((page.parent / "summary.json").read_text())
    if args.json:
        print(json.dumps({**summary, "page": str(page)}, indent=1))
        return 0
    for name, value in (summary["average_precision"] or {}).items():
        print(f"average precision for truly wrong voxels, {name}: {value:.3f}")
    if summary["not_doubted"]:
        names = ", ".join(summary["not_doubted"])
        print(f"not doubted in training, since the network does not know them well (train longer): {names}")
    print(f"{summary['cases']} cases ranked: {page}, {page.parent / 'cases.csv'}")
    return 0

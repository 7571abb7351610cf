"""medseg compare A B [-o DIR]"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass
class Args:
    """Is B better than A? Pairs the cases of two evaluations and tests their differences.

    Paired permutation test and bootstrap interval over patients, Holm correction over all metrics and classes. With -o
    also DIR/compare.html, compare.png and compare.json.
    """

    a: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="A")]
    """folder of an evaluation (summary.json, cases.csv), or of a run: the best weights' validation scores"""
    b: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="B")]
    """the other one"""
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"], metavar="DIR")] = None
    """folder for the page, the plot and the figures"""
    common: bool = False
    """compare the cases that both have, instead of refusing different sets"""
    seed: int = 0
    """of the random signs and of the bootstrap"""
    json: bool = False
    """print compare.json instead of a table"""


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    args = tyro.cli(Args, prog="medseg compare", args=argv, config=(tyro.conf.FlagCreatePairsOff,))

    from medseg_jax.evaluation.compare import compare
    from medseg_jax.evaluation.html import figure

    result = compare(args.a, args.b, args.out, common=args.common, seed=args.seed)
    if args.json:
        print(json.dumps(result, indent=1, ensure_ascii=False))
        return 0
    print(f"A {result['a']}\nB {result['b']}\n")
    print(f"{'':28s}{'A':>10s}{'B':>10s}{'B - A':>11s}   {'95 % interval':24s}{'p':>8s}{'p Holm':>9s}")
    groups = {"": result["overall"]} | (result["classes"] if len(result["classes"]) > 1 else {})
    for name, tests in groups.items():
        for metric, t in tests.items():
            if (name and metric not in ("dice", "nsd", "hd95")) or t["p"] is None:
                continue
            low, high = t["ci95"]
            interval = "" if low is None else f"{figure(low, '+')} to {figure(high, '+')}"
            figures = f"{figure(t['a']):>10s}{figure(t['b']):>10s}{figure(t['difference'], '+'):>11s}"
            row = f"{f'{name} {metric}'.strip():28s}{figures}   {interval:24s}"
            print(f"{row}{t['p']:8.4f}{t['p_holm']:9.4f}")
    for side in ("a", "b"):
        if result[f"only_{side}"]:
            print(f"left out, only in {side.upper()}: {len(result[f'only_{side}'])} cases")
    print(f"\n{result['verdict']}")
    if args.out:
        print(args.out / "compare.html")
    return 0

"""medseg demo [--out demo]: the whole walk on synthetic data, with nothing to download."""

import json
import time
from pathlib import Path

from medseg_jax.cli import Parser


def main(argv: list[str]) -> int:
    """Makes phantoms of three sites, trains on two, predicts and scores the third, writes the report."""
    parser = Parser("medseg demo", description=main.__doc__)
    parser.add_argument("--out", "-o", default="demo", help="where everything goes (default: demo)")
    parser.add_argument("--steps", type=int, default=300, help="training steps (default: 300)")
    parser.add_argument("--dim", type=int, choices=(2, 3), default=2, help="pictures or volumes (default: 2)")
    args = parser.parse_args(argv)

    import medseg_jax as ms

    since = time.perf_counter()
    out = Path(args.out)
    data, run = out / "phantoms", out / "run"
    predictions = run / "unseen_site"
    _say(1, f"phantoms of three sites -> {data}")
    if not (data / "dataset.json").exists():
        ms.make_phantoms(data, dim=args.dim, cases=36, sites=3, size=64 if args.dim == 2 else 32, seed=0)

    _say(2, f"training a U-Net on two sites -> {run}")
    config = ms.Config(data=str(data), stages=(ms.Stage(steps=args.steps),), cache=str(out / "cache"))
    ms.train(config, run)

    _say(3, f"predicting the unseen site -> {predictions}")
    ms.predict(run, data, predictions, split="test", postprocessing="none")  # as the scores it is compared with
    scores = {"seen sites (validation)": json.loads((run / "validation" / "best" / "summary.json").read_text())}
    scores["unseen site (test)"] = ms.evaluate(predictions, data, predictions)
    page = ms.report(run)

    print(f"\n{'':26s}{'Dice':>8s}{'HD95':>8s}{'NSD':>8s}   cases")
    for name, summary in scores.items():
        mean = summary["mean"]
        print(f"{name:26s}{mean['dice']:8.3f}{mean['hd95']:8.2f}{mean['nsd']:8.3f}   {summary['cases']}")
    print("The gap between the rows is what domain generalisation is about.")
    print(f"report: {page}   ({time.perf_counter() - since:.0f} s)")
    return 0


def _say(step: int, text: str) -> None:
    print(f"[{step}/3] {text}", flush=True)

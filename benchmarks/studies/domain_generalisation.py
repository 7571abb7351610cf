"""Which way of training serves a site that nobody has seen? Retinal vessels, four sites, each left out in turn.

    medseg data convert --source retinal_vessels FOLDER data/vessels
    python benchmarks/studies/domain_generalisation.py run --data data/vessels --work runs/dg [--limit 1]
    python benchmarks/studies/domain_generalisation.py table

`run` trains what is missing in benchmarks/results/domain_generalisation_vessels.json, the most important methods and
the first seeds first, and writes that file after every run; `--limit 1` stops after one. All methods have the same
plan, steps, batches (as many images of each site) and geometry; the two networks have about as many parameters and take
about as long. The target takes no part in anything; learning rates were chosen on source validation cases (`LR`).
"""

import argparse
import json
import os
import platform
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg_jax import DSU, Augment, Config, FourierMixing, MambaSea, Mix, MixStyle, Optim, Stage, Supervised, UNet
from medseg_jax.methods.objective import Objective
from medseg_jax.models.vmunet import VMUNet

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"

# ---------------------------------------------------------------------------------------------------------------- what

DOMAINS = ("DRIVE", "CHASEDB1", "STARE", "HRF")
SEEDS = (0, 1, 2)
LR = {"unet": 3e-3, "vmunet": 2e-3}

UNET = UNet.isotropic(2, 16, 32, 64, 128)
VM_UNET = VMUNet(features=(32, 64, 128), depths=(1, 1, 1), decoder_depths=(1, 1, 1), states=8, drop_path=0.1)
CONV_UNET = replace(VM_UNET, mixer="conv")


@dataclass(frozen=True)
class Method:
    """A row of the table: what trains it, and how the table calls it."""

    title: str
    objective: Objective
    augment: Augment = Augment()
    lr: float = LR["unet"]


METHODS = {
    "unet": Method("U-Net", Supervised(UNET)),
    "mamba_sea": Method("Mamba-Sea", MambaSea(VM_UNET), lr=LR["vmunet"]),
    "vmunet": Method("VM-UNet", Supervised(VM_UNET), lr=LR["vmunet"]),
    "bigaug": Method("U-Net, strong augmentation (BigAug)", Supervised(UNET), Augment.strong(p_color=0.5)),
    "mixstyle": Method("U-Net, MixStyle", MixStyle(UNET)),
    "dsu": Method("U-Net, DSU", DSU(UNET)),
    "fourier": Method("U-Net, Fourier mixing", FourierMixing(UNET)),
    "conv": Method("Mamba-Sea, convolutions for the scans", MambaSea(CONV_UNET), lr=LR["vmunet"]),
}
IMPORTANT = ("unet", "mamba_sea", "vmunet", "bigaug")


def config(method: Method, data: Path, seed: int) -> Config:
    """One run of a method."""
    mix = Mix(balance="domain")
    stage = Stage(method.objective, optim=Optim(lr=method.lr, warmup=20), mix=mix, augment=method.augment)
    plan = ROOT / "configs" / "plans" / "mamba_sea_vessels.json"
    return Config(str(data), (stage,), plan=str(plan), seed=seed, validate_every=100, checkpoint_every=200)


def jobs() -> list[tuple[int, str, str]]:
    """(seed, method, domain), the most important first: all seeds of four methods, then the others seed by seed."""
    rest = [name for name in METHODS if name not in IMPORTANT]
    order = [(seed, name) for names in (IMPORTANT, rest) for seed in SEEDS for name in names]
    return [(seed, name, domain) for seed, name in order for domain in DOMAINS]


# ----------------------------------------------------------------------------------------------------------------- run


def run(data: Path, work: Path, limit: int | None) -> int:
    """Trains what is missing; returns how many runs still are."""
    from medseg_jax.training.hold_out import hold_out_folder, train_hold_out

    path = RESULTS / "domain_generalisation_vessels.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    missing = [job for job in jobs() if f"{job[1]}/{job[2]}/{job[0]}" not in results]
    for seed, name, domain in missing[:limit]:
        out, since, used = work / f"{name}_seed{seed}", time.perf_counter(), time.process_time()
        train_hold_out(config(METHODS[name], data, seed), out, domain)
        folder = hold_out_folder(out, domain)
        row = json.loads((out / "hold_out.json").read_text())[domain]
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        record = json.loads((folder / "run.json").read_text())
        results[f"{name}/{domain}/{seed}"] = {
            **{which: row[which] for which in ("sources", "last", "best")},
            "cases_dice": _cases(folder / "target" / "last" / "cases.csv"),
            "steps": max(e["step"] for e in log),
            "seconds": round(time.perf_counter() - since, 1),
            "cpu_seconds": round(time.process_time() - used, 1),
            "commit": record["git"],
            "versions": record["versions"],
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        }
        RESULTS.mkdir(exist_ok=True)
        path.write_text(json.dumps(results, indent=1))
        shutil.rmtree(folder / "checkpoints")
    return len(missing) - len(missing[:limit])


def _cases(path: Path) -> dict[str, float]:
    lines = [line.split(",") for line in path.read_text().splitlines()]
    column = lines[0].index("dice")
    return {line[0]: round(float(line[column]), 4) for line in lines[1:]}


# --------------------------------------------------------------------------------------------------------------- table


def table(results: dict[str, Any]) -> str:
    """Markdown: mean target Dice of the last weights, per domain and over domains, ± deviation over seeds."""
    head = ["trained without", *DOMAINS, "mean of sites", "minus U-Net (95 % interval)", "HD95", "sources", "seeds"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, method in METHODS.items():
        seeds = [s for s in SEEDS if all(f"{name}/{d}/{s}" in results for d in DOMAINS)]
        if not seeds:
            continue
        runs = [[results[f"{name}/{d}/{s}"] for d in DOMAINS] for s in seeds]
        dice = np.array([[r["last"]["mean"]["dice"] for r in row] for row in runs])  # [seeds, domains]
        far = np.mean([[r["last"]["mean"]["hd95"] for r in row] for row in runs])
        sources = np.mean([[r["sources"]["mean"]["dice"] for r in row] for row in runs])
        cells = [method.title, *(_spread(column) for column in dice.T), _spread(dice.mean(1))]
        cells += [difference(results, name, seeds), f"{far:.1f} px", f"{sources:.3f}", str(len(seeds))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def difference(results: dict[str, Any], name: str, seeds: list[int], other: str = "unet") -> str:
    """Mean difference to another method over the sites, with a bootstrap interval over cases and seeds in each site."""
    seeds = [s for s in seeds if all(f"{other}/{d}/{s}" in results for d in DOMAINS)]
    if name == other or not seeds:
        return ""
    gaps = []  # [domain] -> [seeds, cases]
    for domain in DOMAINS:
        pairs = [[results[f"{m}/{domain}/{s}"]["cases_dice"] for m in (name, other)] for s in seeds]
        gaps.append(np.array([[mine[id] - theirs[id] for id in sorted(mine)] for mine, theirs in pairs]))
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(2000):
        chosen = rng.integers(len(seeds), size=len(seeds))
        parts = [gap[chosen][:, rng.integers(gap.shape[1], size=gap.shape[1])].mean() for gap in gaps]
        drawn.append(np.mean(parts))
    low, high = np.percentile(drawn, (2.5, 97.5))
    return f"{np.mean([gap.mean() for gap in gaps]):+.3f} ({low:+.3f} to {high:+.3f})"


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "table"))
    parser.add_argument("--data", type=Path, help="the converted data set")
    parser.add_argument("--work", type=Path, default=Path("runs/domain_generalisation"))
    parser.add_argument("--limit", type=int, help="runs to make before stopping; default all")
    args = parser.parse_args()
    path = RESULTS / "domain_generalisation_vessels.json"
    if args.what == "table":
        print(table(json.loads(path.read_text())))
        return 0
    left = run(args.data.resolve(), args.work.resolve(), args.limit)
    print(f"{left} runs left")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

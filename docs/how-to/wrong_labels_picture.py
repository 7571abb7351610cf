"""Draws wrong-labels.png: Dice of every method on JSRT with wrong labels, and the ablation of rho; from the results.

python docs/how-to/wrong_labels_picture.py
"""

import csv
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results" / "label_noise"
METHODS = {
    "ce": "cross entropy",
    "em": "EM",
    "kms_early": "KMS noise, all organs from step 100",
    "kms_late": "KMS noise, all organs from step 200",
    "kms": "KMS noise",
    "t_loss": "T-Loss",
}
ORGANS = ("lung", "heart", "clavicle")
LEVELS = (("mild", "o", "#0072b2", -0.22), ("middle", "s", "#d55e00", 0.0), ("strong", "D", "#009e73", 0.22))
"""Level, marker, colour, place."""
RHOS = (0.0, 0.25, 0.5, 0.75, 0.9)


def by_organ(job: str) -> dict[str, list[float]]:
    """Mean Dice of lungs, heart and clavicles with the last weights, one a seed."""
    found = defaultdict(list)
    with (RESULTS / f"{job}.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if row["scores"] == "last":
                found[row["seed"], next(o for o in ORGANS if o in row["class"])].append(float(row["dice"]))
    seeds = sorted({seed for seed, _ in found})
    return {organ: [float(np.mean(found[seed, organ])) for seed in seeds] for organ in ORGANS}


def draw() -> Figure:
    """One panel an organ, and one for rho."""
    figure = Figure(figsize=(11, 3.7), layout="constrained")
    panels = figure.subplots(1, 4, width_ratios=(1, 1, 1, 0.9))
    clean = by_organ("clean_ce")
    for axes, organ in zip(panels, ORGANS, strict=False):
        for level, marker, color, shift in LEVELS:
            for place, name in enumerate(METHODS):
                if not (RESULTS / f"{level}_{name}.csv").exists():
                    continue
                values = by_organ(f"{level}_{name}")[organ]
                label = f"{level} level" if place == 0 else None
                axes.plot(values, [place + shift] * len(values), marker, ms=4, mew=0, alpha=0.5, color=color)
                axes.plot(np.mean(values), place + shift, "|", ms=11, mew=2, color=color, label=label)
        axes.axvline(float(np.mean(clean[organ])), color="0.4", lw=1, ls=(0, (4, 3)), label="clean labels")
        axes.set(title={"lung": "Lungs", "heart": "Heart", "clavicle": "Clavicles"}[organ], xlabel="Dice")
        axes.set_yticks(range(len(METHODS)), METHODS.values() if axes is panels[0] else [""] * len(METHODS))
        axes.set_ylim(len(METHODS) - 0.5, -0.5)
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    jobs = ["middle_kms" if rho == 0.75 else f"middle_kms_rho{rho}" for rho in RHOS]
    dice = [json.loads((RESULTS / f"{job}.json").read_text())["seeds"]["0"]["last"]["mean"]["dice"] for job in jobs]
    panels[3].plot(RHOS, dice, "s-", color="#d55e00", ms=4)
    panels[3].set(title="Correlation, seed 0", xlabel="rho", ylabel="mean Dice, middle level", ylim=(0, 1))
    panels[3].grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    draw().savefig(HERE / "wrong-labels.png", dpi=110)

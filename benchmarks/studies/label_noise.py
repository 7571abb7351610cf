"""KMS noise against what else bears wrong labels, on JSRT with three levels of corrupted training labels.

Validation labels are clean. "closed" is the share of the gap between cross entropy on wrong and on clean labels that a
method closes. The rho ablation runs at the middle level with seed 0. Scores are those of the last weights: the best
ones were chosen on the cases that score.
"""

import numpy as np

from studies import Job, Records, case_values, interval

PAGE = "docs/how-to/wrong-labels.md"

LEVELS = {"mild": ("0.3", "0.5"), "middle": ("0.5", "0.7"), "strong": ("0.7", "0.7")}
METHODS = {
    "ce": ("robust_jsrt", ("--stages.0.objective.loss-name", "ce"), "cross entropy"),
    "kms": ("kms_noise_jsrt", (), "KMS noise"),
    "em": ("robust_jsrt", ("--stages.0.objective.loss-name", "em"), "EM, independent flips"),
    "t_loss": ("robust_jsrt", ("--stages.0.objective.loss-name", "t_loss"), "T-Loss"),
}
RHOS = ("0.0", "0.25", "0.5", "0.9")
SCORES = (("last", "validation/last"), ("best", "validation/best"))


def _noise(level: str) -> tuple[str, ...]:
    alpha, beta = LEVELS[level]
    return ("data", "corrupt", "SRC", "DST", "--style", "jsrt", "--alpha", alpha, "--beta", beta)


def _job(name: str, config: str, overrides: tuple[str, ...], corrupt: tuple[str, ...], seeds=(0, 1, 2)) -> Job:
    options = ("--source", "jsrt")
    return Job(name, config, "jsrt/derived_256", "JSRT", options, corrupt, overrides, seeds, SCORES)


JOBS = (
    _job("clean_ce", "robust_jsrt", METHODS["ce"][1], ()),
    *(
        _job(f"{level}_{method}", config, overrides, _noise(level))
        for level in ("middle", "mild", "strong")
        for method, (config, overrides, _) in METHODS.items()
    ),
    *(
        _job(f"middle_kms_rho{rho}", "kms_noise_jsrt", ("--stages.0.objective.rho", rho), _noise("middle"), (0,))
        for rho in RHOS
    ),
)


def table(records: Records) -> str:
    """One row a method and level, then the ablation."""
    rows = [
        "| labels | method | seeds | Dice (95 % interval) | lungs | heart | clavicles | HD95 | closed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    clean = _mean(records, "clean_ce")
    rows += _row(records, "clean_ce", "clean", "cross entropy (ceiling)", None)
    for level, (alpha, beta) in LEVELS.items():
        ce = _mean(records, f"{level}_ce")
        for method, (_, _, words) in METHODS.items():
            gap = None if clean is None or ce is None or method == "ce" else (clean, ce)
            rows += _row(records, f"{level}_{method}", f"{level}: {alpha} of the cases by {beta}", words, gap)
    ablation = ["", "| rho (middle level, seed 0) | Dice |", "|---|---|"]
    for rho in ("0.0", "0.25", "0.5", "0.75", "0.9"):
        found = records.get("middle_kms" if rho == "0.75" else f"middle_kms_rho{rho}", {})
        if 0 in found:
            ablation.append(f"| {float(rho)} | {found[0]['last']['mean']['dice']:.3f} |")
    return "\n".join([*rows, *(ablation if len(ablation) > 3 else [])])


def _mean(records: Records, job: str) -> float | None:
    found = [seed["last"]["mean"]["dice"] for seed in records.get(job, {}).values()]
    return float(np.mean(found)) if found else None


def _row(records: Records, job: str, labels: str, words: str, gap: tuple[float, float] | None) -> list[str]:
    if not records.get(job):
        return []
    values = case_values("label_noise", job, "last", "dice")
    mean, spread, low, high = interval(values)
    distance = np.mean([seed["last"]["mean"]["hd95"] for seed in records[job].values()])
    organs = []
    for part in ("lung", "heart", "clavicle"):
        found = [v for one in values.values() for (_, name), v in one.items() if part in name]
        organs.append(f"{np.mean(found):.3f}")
    sd = f" ± {spread:.3f}" if len(values) > 1 else ""
    closed = "" if gap is None else f"{(mean - gap[1]) / (gap[0] - gap[1]):.0%}"
    return [
        f"| {labels} | {words} | {len(values)} | {mean:.3f}{sd} ({low:.3f} – {high:.3f}) | {' | '.join(organs)} | "
        f"{distance:.1f} px | {closed} |"
    ]

"""KMS noise against what else bears wrong labels, on JSRT with three levels of corrupted training labels.

Validation labels are clean. "closed" is the share of the gap between cross entropy on wrong and on clean labels that a
method closes; it has no meaning for the clavicles, which cross entropy does not learn in these steps. The rho ablation
runs at the middle level with seed 0. Scores are those of the last weights: the best ones were chosen on the cases that
score.
"""

import numpy as np

from studies import Job, Records, case_values, interval

PAGE = "docs/how-to/wrong-labels.md"

LEVELS = {"mild": ("0.3", "0.5"), "middle": ("0.5", "0.7"), "strong": ("0.7", "0.7")}


def _from_step(step: int) -> tuple[str, ...]:
    """Doubt everything from one step on."""
    return ("--stages.0.objective.begin", "0", "--stages.0.objective.warmup", str(step))


METHODS = {
    "ce": ("robust_jsrt", ("--stages.0.objective.loss-name", "ce"), "cross entropy"),
    "kms": ("kms_noise_jsrt", (), "KMS noise"),
    "kms_late": ("kms_noise_jsrt", _from_step(200), "KMS noise, all organs from step 200"),
    "kms_early": ("kms_noise_jsrt", _from_step(100), "KMS noise, all organs from step 100"),
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
        "| labels | method | seeds | Dice (95 % interval) | lungs | heart | clavicles | HD95 | closed: lungs, heart |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    clean = _organs("clean_ce") if records.get("clean_ce") else None
    rows += _row(records, "clean_ce", "clean", "cross entropy (ceiling)", None)
    for level, (alpha, beta) in LEVELS.items():
        ce = _organs(f"{level}_ce") if records.get(f"{level}_ce") else None
        for method, (_, _, words) in METHODS.items():
            gap = None if clean is None or ce is None or method == "ce" else (clean, ce)
            rows += _row(records, f"{level}_{method}", f"{level}: {alpha} of the cases by {beta}", words, gap)
    ablation = ["", "| rho (middle level, seed 0) | Dice |", "|---|---|"]
    for rho in ("0.0", "0.25", "0.5", "0.75", "0.9"):
        found = records.get("middle_kms" if rho == "0.75" else f"middle_kms_rho{rho}", {})
        if 0 in found:
            ablation.append(f"| {float(rho)} | {found[0]['last']['mean']['dice']:.3f} |")
    return "\n".join([*rows, *(ablation if len(ablation) > 4 else [])])


def _organs(job: str) -> dict[str, float]:
    """Mean Dice of each kind of organ, over cases and seeds."""
    values = case_values("label_noise", job, "last", "dice")
    return {
        part: float(np.mean([v for one in values.values() for (*_, name), v in one.items() if part in name]))
        for part in ("lung", "heart", "clavicle")
    }


Gap = tuple[dict[str, float], dict[str, float]]
"""Dice of the organs with clean labels, and with wrong ones, both by cross entropy."""


def _row(records: Records, job: str, labels: str, words: str, gap: Gap | None) -> list[str]:
    if not records.get(job):
        return []
    values = case_values("label_noise", job, "last", "dice")
    mean, spread, low, high = interval(values)
    distance = np.mean([seed["last"]["mean"]["hd95"] for seed in records[job].values()])
    organs = _organs(job)
    sd = f" ± {spread:.3f}" if len(values) > 1 else ""
    each = " | ".join(f"{value:.3f}" for value in organs.values())
    closed = (
        ""
        if gap is None
        else ", ".join(
            f"{(organs[part] - gap[1][part]) / (gap[0][part] - gap[1][part]):.0%}" for part in ("lung", "heart")
        )
    )
    return [
        f"| {labels} | {words} | {len(values)} | {mean:.3f}{sd} ({low:.3f} – {high:.3f}) | {each} | "
        f"{distance:.1f} px | {closed} |"
    ]

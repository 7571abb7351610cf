"""Is model B better than model A? A paired comparison of two evaluations of the same cases.

    pair_scores    cases.csv of both, the same cases and classes in the same order
    permutation_p  could the mean difference be chance?      paired permutation test
    compare        all metrics, overall and by class, with intervals and corrected p -> compare.json, .png, .html

For every case d = (score of B) - (score of A). If the models were equally good, each d could as well have had the other
sign, so the p-value is the share of sign assignments whose mean is at least as far from 0 as the observed one: over all
2^n assignments for few patients (exact), else over 10,000 random ones, where the observed one is counted in with
(1 + hits) / (1 + draws) (Phipson and Smyth 2010). All d of a patient get their sign together, for they are no
independent evidence. It is a test of the mean, two-sided, and supposes nothing about normality.

The interval is a percentile bootstrap of the mean difference over patients. p-values of the whole table (all metrics,
overall and by class) are corrected by Holm (1979): with the smallest p times the number of tests, the second smallest
times one less, and so on, the chance of one or more false claims in the table is at most 5 %. The verdict is about Dice
overall, chosen before looking, and needs no correction.

Infinite distances (a class empty on one side) count as the image's diagonal, as everywhere. Where a score is not
defined in A or B, the case takes no part in that metric, and "cases" says so.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medseg_jax.evaluation.evaluate import ALL_METRICS, bootstrap_interval, read_rows
from medseg_jax.paths import read_record, write
from medseg_jax.types import UserError

LESS_IS_BETTER = ("hd", "hd95", "assd", "volume_error", "volume_error_relative", "lesion_fp", "ece", "brier")
EXACT = 13  # patients up to which all 2^n sign assignments are tried: 8,192
DRAWS = 10_000
ALPHA = 0.05


@dataclass(frozen=True)
class Paired:
    """Two evaluations side by side.

    Attributes:
        cases: ids, sorted.
        classes: names.
        metrics: those that both have.
        patients: patient of each case (the case itself where unknown).
        a, b: [cases, classes, metrics]; NaN where not defined.
        only_a, only_b: cases of one side, left out.
    """

    cases: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...]
    patients: np.ndarray
    a: np.ndarray
    b: np.ndarray
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]


def compare(
    a: str | Path, b: str | Path, out: str | Path | None = None, *, common: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Compare two evaluations of the same cases.

    Args:
        a, b: folders with summary.json and cases.csv (of `medseg evaluate`), or of runs: then validation/best; of folds
            cross_validation/best, of held-out domains unseen/last.
        out: folder for compare.json, compare.png and compare.html; made if needed. None: write nothing.
        common: compare the cases that both have, instead of refusing different sets.
        seed: of random signs and of the bootstrap.

    Returns:
        What compare.json holds: verdict (a sentence), overall and classes ({metric: a, b, difference (B - A), ci95, p,
        p_holm, better, cases, patients}), differences (one a case, of the overall Dice), cases left out, settings.

    Raises:
        UserError: no evaluations, different cases (without `common`), classes, units or tolerances.
    """
    folders = _evaluation(a), _evaluation(b)
    summaries = [read_record(folder / "summary.json", "settings") for folder in folders]
    _refuse_other_settings(folders, summaries)
    paired = pair_scores(*folders, common=common)
    groups = {None: (_mean_over_classes(paired.a), _mean_over_classes(paired.b))}
    groups |= {name: (paired.a[:, k], paired.b[:, k]) for k, name in enumerate(paired.classes)}
    tests: dict[str | None, dict[str, Any]] = {}
    for name, (scores_a, scores_b) in groups.items():
        tests[name] = {
            metric: compare_scores(scores_a[:, m], scores_b[:, m], paired.patients, seed)
            for m, metric in enumerate(paired.metrics)
        }
    # of one class the overall row is that class's row: one test, not two
    if len(paired.classes) == 1:
        tests = dict.fromkeys((None, paired.classes[0]), tests[None])
    counted = {id(t): (metric, t) for own in tests.values() for metric, t in own.items() if t["p"] is not None}
    known = list(counted.values())
    for (metric, t), corrected in zip(known, holm([t["p"] for _, t in known]), strict=True):
        t["p_holm"], t["better"] = corrected, better(metric, t["difference"], corrected)
    first = paired.metrics.index("dice")
    means_a, means_b = groups[None]
    result = {
        "verdict": verdict(tests[None]["dice"]),
        "a": _name(folders[0], folders[1]),
        "b": _name(folders[1], folders[0]),
        "unit": summaries[0]["unit"],
        "volume_unit": summaries[0]["volume_unit"],
        "overall": tests[None],
        "classes": {name: tests[name] for name in paired.classes},
        "differences": {
            id: [float(x), float(y)]
            for id, x, y in zip(paired.cases, means_a[:, first], means_b[:, first], strict=True)
        },
        "only_a": list(paired.only_a),
        "only_b": list(paired.only_b),
        "settings": {
            "a": str(folders[0].resolve()),
            "b": str(folders[1].resolve()),
            "nsd_tolerance": summaries[0]["settings"]["nsd_tolerance"],
            "test": f"paired permutation of signs by patient, two-sided; exact up to {EXACT} patients, "
            f"else {DRAWS:,} random ones with the +1 rule",
            "ci95": "percentile bootstrap of the mean difference over patients",
            "correction": f"Holm over {len(known)} tests: all metrics, overall and by class",
            "seed": seed,
        },
    }
    if out is not None:
        _write(Path(out), result)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Pairs
# ---------------------------------------------------------------------------------------------------------------------


def pair_scores(a: Path, b: Path, *, common: bool = False) -> Paired:
    """The scores of two evaluation folders, cases paired by id; arguments and errors as in `compare`."""
    sides = []
    for folder in (a, b):
        try:
            rows = read_rows(folder / "cases.csv")
        except (OSError, ValueError, KeyError) as error:
            raise UserError("cases.csv is missing or damaged", file=folder / "cases.csv", found=error) from error
        sides.append({(row["case"], row["class"]): row for row in rows})
    ids = [{case for case, _ in side} for side in sides]
    classes = [tuple(dict.fromkeys(name for _, name in side)) for side in sides]
    if set(classes[0]) != set(classes[1]):
        raise UserError(
            "The two evaluations have different classes",
            file=b / "cases.csv",
            found=", ".join(classes[1]),
            expected=", ".join(classes[0]),
        )
    only_a, only_b = (tuple(sorted(x - y)) for x, y in (ids, ids[::-1]))
    if (only_a or only_b) and not common:
        raise UserError(
            "The two evaluations have different cases",
            file=b / "cases.csv",
            found=f"only in A: {_some(only_a)}; only in B: {_some(only_b)}",
            expected="the same cases",
            remedy="evaluate both on the same cases, or --common to compare those that both have",
        )
    cases = tuple(sorted(ids[0] & ids[1]))
    if len(cases) < 2:
        raise UserError("Two cases or more are needed for a comparison", found=f"{len(cases)} in common")
    metrics = tuple(m for m in ALL_METRICS if all(m in next(iter(side.values())) for side in sides))
    scores = []
    for side in sides:
        rows = [side[case, name] for case in cases for name in classes[0]]
        values = np.array([[row[m] for m in metrics] for row in rows], float)
        values = np.where(np.isinf(values), np.array([row["diagonal"] for row in rows])[:, None], values)
        scores.append(values.reshape(len(cases), len(classes[0]), len(metrics)))
    patients = [sides[0][case, classes[0][0]]["patient"] or sides[1][case, classes[0][0]]["patient"] for case in cases]
    patients = np.array([patient or case for patient, case in zip(patients, cases, strict=True)])
    return Paired(cases, classes[0], metrics, patients, scores[0], scores[1], only_a, only_b)


def _evaluation(folder: str | Path) -> Path:
    folder = Path(folder)
    for place in (".", "validation/best", "cross_validation/best", "unseen/last"):
        if (folder / place / "summary.json").is_file():
            return folder / place
    raise UserError(
        "There is no evaluation here",
        file=folder,
        found="no summary.json" if folder.is_dir() else "no such folder",
        remedy="medseg evaluate PRED REF -o DIR makes one; of a run, the end of training does",
    )


def _refuse_other_settings(folders: Sequence[Path], summaries: Sequence[dict[str, Any]]) -> None:
    for key in ("unit", "volume_unit"):
        if summaries[0][key] != summaries[1][key]:
            raise UserError(
                "The two evaluations measure in different units",
                file=folders[1] / "summary.json",
                found=summaries[1][key],
                expected=summaries[0][key],
            )
    for key in ("nsd_tolerance", "lesions"):
        values = [summary["settings"].get(key) for summary in summaries]
        if values[0] != values[1] and None not in values:
            raise UserError(
                f"The two evaluations have different settings of {key}",
                file=folders[1] / "summary.json",
                found=values[1],
                expected=values[0],
                remedy="evaluate both with the same settings",
            )


def _name(folder: Path, other: Path) -> str:
    """The part of a folder's path that tells it from the other's, as far as needed."""
    own, rest = folder.resolve().parts, other.resolve().parts
    depth = next((i for i in range(1, len(own)) if own[-i:] != rest[-i:]), 1)
    return "/".join(own[-depth:][:2]) if own[-1] == rest[-1] else own[-1]


def _mean_over_classes(values: np.ndarray) -> np.ndarray:
    """[cases, classes, metrics] -> [cases, metrics] over what is known; NaN where nothing is."""
    known = ~np.isnan(values)
    return np.where(known.any(1), np.where(known, values, 0).sum(1) / np.maximum(known.sum(1), 1), np.nan)


# ---------------------------------------------------------------------------------------------------------------------
# Tests
# ---------------------------------------------------------------------------------------------------------------------


def compare_scores(a: np.ndarray, b: np.ndarray, patients: np.ndarray, seed: int = 0) -> dict[str, Any]:
    """Compare the scores [cases] of one metric; p_holm and better are filled in by `compare`."""
    known = ~(np.isnan(a) | np.isnan(b))
    a, b, patients = a[known], b[known], patients[known]
    empty = {"a": None, "b": None, "difference": None, "ci95": [None, None], "p": None, "p_holm": None, "better": None}
    if not len(a):
        return empty | {"cases": 0, "patients": 0}
    d = b - a
    low, high = (float(v[0]) for v in bootstrap_interval(d[:, None], patients, seed))
    return {
        "a": float(a.mean()),
        "b": float(b.mean()),
        "difference": float(d.mean()),
        "ci95": [None if np.isnan(v) else v for v in (low, high)],
        "p": permutation_p(d, patients, seed),
        "p_holm": None,
        "better": None,
        "cases": len(a),
        "patients": len(np.unique(patients)),
    }


def permutation_p(differences: np.ndarray, groups: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of a paired permutation test of the mean difference.

    Args:
        differences: [n] of each pair.
        groups: [n]; the differences of a group get their signs together.
        seed: of random signs.

    Returns:
        In (0, 1]; it does not change if all differences change their sign or their order.
    """
    names, index = np.unique(groups, return_inverse=True)
    sums = np.bincount(index, weights=differences)
    # sorted by size, signs dropped: so that neither the order of cases nor the order of A and B can matter
    sizes, observed = np.sort(np.abs(sums)), abs(float(np.sum(sums)))
    limit = observed - 1e-12 * max(float(sizes.sum()), 1e-300)  # equal up to rounding counts as equal
    if len(names) <= EXACT:
        signs = 1 - 2 * (np.arange(2 ** len(names))[:, None] >> np.arange(len(names)) & 1)
        return float(np.mean(np.abs(signs @ sizes) >= limit))
    hits, rng = 0, np.random.default_rng(seed)
    for _ in range(10):
        signs = rng.integers(0, 2, (DRAWS // 10, len(names)), np.int8) * 2 - 1
        hits += int(np.sum(np.abs(signs @ sizes) >= limit))
    return (1 + hits) / (1 + DRAWS)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the given order: never below p, never above 1, and rising with p."""
    corrected, running = [0.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = running
    return corrected


def better(metric: str, difference: float, p: float) -> str | None:
    """ "a" or "b" if p is below 5 %, else None."""
    if p >= ALPHA or not difference:
        return None
    return "b" if (difference > 0) != (metric in LESS_IS_BETTER) else "a"


def verdict(found: dict[str, Any]) -> str:
    """What the test of the overall Dice says, in a sentence."""
    n, winner = found["patients"], better("dice", found["difference"], found["p"])
    low, high = found["ci95"]
    about = f"{found['cases']} cases" + (f" of {n} patients" if n != found["cases"] else "")
    interval = "no interval from one patient" if low is None else f"95 % interval of B - A {low:+.4f} to {high:+.4f}"
    figures = f"({interval}; p = {_p(found['p'])}; {about})"
    if n <= EXACT and 2 / 2**n > ALPHA:
        return f"No difference can be claimed: {n} patients are too few, whatever they score {figures}."
    if winner is None:
        return f"No difference can be claimed: B - A is {found['difference']:+.4f} Dice {figures}."
    return f"{winner.upper()} is better by {abs(found['difference']):.4f} Dice {figures}."


def _p(p: float) -> str:
    return f"{p:.4f}" if p >= 0.001 else f"{p:.1g}"


def _some(names: Sequence[str]) -> str:
    return (", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")) or "none"


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def _write(out: Path, result: dict[str, Any]) -> None:
    from medseg_jax.evaluation.charts import comparison_figure, save_png
    from medseg_jax.evaluation.comparison_page import comparison_page

    out.mkdir(parents=True, exist_ok=True)
    save_png(comparison_figure(result), out / "compare.png")
    for name, text in {
        "compare.json": json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False),
        "compare.html": comparison_page(result),
    }.items():
        write(out / name, text)

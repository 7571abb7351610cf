"""Calibration metrics equal torchmetrics' and scikit-learn's on the golden files; all sizes come from them."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from medseg_jax.evaluation.metrics import calibration
from medseg_jax.evaluation.metrics.pr import ScoreHistogram

FILE = Path(os.environ.get("MEDSEG_GOLDEN", "golden")) / "metrics" / "calibration.npz"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="MEDSEG_GOLDEN does not name the folder of golden numbers")


def read():
    if not FILE.is_file():
        return {}, {"cases": {}, "tolerance": "1e-6"}
    with np.load(FILE, allow_pickle=False) as f:
        return dict(f), json.loads(str(f["meta"]))


GOLDEN, META = read()
TOLERANCE = float(re.search(r"\d[\d.]*e-\d+", META["tolerance"])[0])
NAMES = [key for key in GOLDEN if key.count("/") == 2]


def normalised(case):
    """Probabilities [n, k] in float64, of two classes for a binary case, and labels [n]."""
    p = GOLDEN[f"{case}/probs"].astype(np.float64)
    if p.ndim == 1:
        p = np.stack([1 - p, p], 1)
    return p / p.sum(1, keepdims=True), GOLDEN[f"{case}/labels"].astype(int)


def ours(case, metric):
    probs, labels = GOLDEN[f"{case}/probs"].astype(np.float64), GOLDEN[f"{case}/labels"].astype(int)
    if metric == "brier":
        return calibration.brier(probs, labels)
    if metric == "brier_sum_over_classes":
        return calibration.brier_multiclass(*normalised(case))
    if metric == "log_loss":
        return calibration.nll(*normalised(case))
    kind, norm, bins = re.fullmatch(r"(binary|multiclass)_(l1|l2|max)_(\d+)", metric).groups()
    if kind == "multiclass":
        stored = GOLDEN[f"{case}/probs"]  # 1 - p in float32, as the reference had it: it decides what is exactly 1
        both = stored if stored.ndim == 2 else np.stack([1 - stored, stored], 1)
        probs, labels = calibration.top_label(both, labels)
    curve = calibration.reliability(probs, labels, bins=int(bins))
    return {"l1": curve.ece, "l2": curve.rms, "max": curve.mce}[norm]


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    case, _, metric = name.split("/")
    assert len(GOLDEN[f"{case}/labels"]) == META["cases"][case]["n"]
    np.testing.assert_allclose(ours(case, metric), float(GOLDEN[name]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", [c for c, about in META["cases"].items() if about["classes"] == 2])
def test_the_histogram_gives_the_same_as_the_voxels(case):
    probs, labels = GOLDEN[f"{case}/probs"].astype(np.float16), GOLDEN[f"{case}/labels"]
    histogram = ScoreHistogram.of(probs, labels)
    for mass in (False, True):
        one, other = (calibration.reliability(*a, mass=mass) for a in ((probs, labels), (histogram,)))
        np.testing.assert_array_equal(one.count, other.count)
        np.testing.assert_allclose([one.ece, one.rms, one.mce], [other.ece, other.rms, other.mce], rtol=1e-12)
    assert calibration.histogram_brier(histogram) == pytest.approx(calibration.brier(probs, labels), rel=1e-12)


def test_the_golden_file_holds_what_is_expected():
    assert {name.split("/")[1] for name in NAMES} == {"torchmetrics", "sklearn", "numpy"}
    assert len(NAMES) >= 10 * len(META["cases"]) / 2

"""Areas under precision-recall equal scikit-learn's, the IDRiD challenge's and M2MRF's on the golden files."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from medseg_jax.evaluation.metrics import pr

FILE = Path(os.environ.get("MEDSEG_GOLDEN", "golden")) / "dr_lesions" / "aupr.npz"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="MEDSEG_GOLDEN does not name the folder of golden numbers")


def read():
    if not FILE.is_file():
        return {}, {"cases": {}, "tolerance": "1e-9 1e-6"}
    with np.load(FILE, allow_pickle=False) as f:
        return dict(f), json.loads(str(f["meta"]))


GOLDEN, META = read()
TOLERANCE = min(float(t) for t in re.findall(r"\d[\d.]*e-\d+", META["tolerance"]))
NAMES = [key for key in GOLDEN if "/" in key and not key.endswith(("/labels", "/scores", "/roc_auc"))]


def inputs(case):
    n = META["cases"][case]["n"]
    return GOLDEN[f"{case}/scores"], np.unpackbits(GOLDEN[f"{case}/labels"])[:n].astype(bool)


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    case, metric = name.split("/")
    scores, labels = inputs(case)
    assert labels.sum() == META["cases"][case]["positives"]
    if match := re.fullmatch(r"counts33_(ge|gt)", metric):
        counts = pr.counts_at(scores, labels, pr.IDRID, strict=match[1] == "gt")
        np.testing.assert_array_equal(counts, GOLDEN[name])
        return
    if match := re.fullmatch(r"aupr33_(ge|gt)_precision([01])_when_empty", metric):
        counts = pr.counts_at(scores, labels, pr.IDRID, strict=match[1] == "gt")
        value = pr.threshold_area(counts, empty_precision=float(match[2]))
    elif match := re.fullmatch(r"m2mrf_(\d+)_thresholds", metric):
        thresholds = np.linspace(0, 1, int(match[1]))
        value = pr.threshold_area(pr.counts_at(scores, labels, thresholds, strict=True))
    else:
        value = {
            "average_precision": lambda: pr.average_precision(scores, labels),
            "average_precision_8bit": lambda: pr.average_precision(np.rint(scores * 255), labels),
            "trapezoid_all_thresholds": lambda: pr.trapezoid_area(scores, labels),
        }[metric]()
    np.testing.assert_allclose(value, float(GOLDEN[name]), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("case", list(META["cases"]))
def test_the_histogram_is_exact_for_float16_and_within_its_bounds_for_float32(case):
    scores, labels = inputs(case)
    half = scores.astype(np.float16)
    parts = np.array_split(np.arange(len(scores)), 3)
    histogram = sum((pr.ScoreHistogram.of(half[p], labels[p]) for p in parts), pr.ScoreHistogram())
    np.testing.assert_allclose(histogram.average_precision(), pr.average_precision(half, labels), rtol=1e-12)
    np.testing.assert_allclose(histogram.idrid_aupr(), pr.idrid_aupr(half, labels), rtol=1e-12)
    low, high = pr.ScoreHistogram.of(scores, labels).bounds()
    if labels.any():
        assert low - 1e-12 <= pr.average_precision(scores, labels) <= high + 1e-12
    else:
        assert np.isnan([low, high, histogram.average_precision()]).all()


def test_the_golden_file_holds_what_is_expected():
    metrics = {name.split("/")[1] for name in NAMES}
    assert {"average_precision", "average_precision_8bit", "counts33_ge", "m2mrf_11_thresholds"} <= metrics

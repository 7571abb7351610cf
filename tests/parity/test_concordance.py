"""Concordance indices equal lifelines' and scikit-survival's on the golden files, pair counts included."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from medseg_jax.evaluation.metrics.survival import concordance_index, concordance_index_uno

FILE = Path(os.environ.get("MEDSEG_GOLDEN", "golden")) / "metrics" / "concordance.npz"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="MEDSEG_GOLDEN does not name the folder of golden numbers")
COUNTS = ("concordant", "discordant", "tied_risk", "tied_time")


def read():
    if not FILE.is_file():
        return {}, {"cases": {}, "tolerance": "1e-9"}
    with np.load(FILE, allow_pickle=False) as f:
        return dict(f), json.loads(str(f["meta"]))


GOLDEN, META = read()
TOLERANCE = float(re.search(r"\d[\d.]*e-\d+", META["tolerance"])[0])
NAMES = [key for key in GOLDEN if "/" in key and key.split("/")[1] not in ("time", "event", "score", "tau")]


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    case, metric = name.split("/")
    time, event, score = (GOLDEN[f"{case}/{key}"] for key in ("time", "event", "score"))
    assert (len(time), event.sum()) == (META["cases"][case]["n"], META["cases"][case]["events"])
    expected = float(GOLDEN[name])
    if metric in COUNTS:
        assert getattr(concordance_index(time, event, -score), metric) == expected
        return
    if metric in ("lifelines", "sksurv_harrell"):
        value = concordance_index(time, event, -score).value
    else:
        tau = {"sksurv_uno": None, "sksurv_uno_tau": float(GOLDEN[f"{case}/tau"])}[metric]
        value = concordance_index_uno(time, event, -score, tau=tau)
    np.testing.assert_allclose(value, expected, rtol=0, atol=TOLERANCE)


def test_the_golden_file_holds_what_is_expected():
    assert {*COUNTS, "lifelines", "sksurv_harrell", "sksurv_uno", "sksurv_uno_tau"} <= {n.split("/")[1] for n in NAMES}

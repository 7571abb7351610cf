"""Our metrics equal MONAI's, surface-distance's, MedPy's and SPE's on every pair of masks of the golden files.

Everything comes from the golden files (`MEDSEG_GOLDEN`/metrics): the pairs, their shapes and spacings, the tolerances
and the names of the metrics. Where a package gives no number (NaN, inf, an exception: only with empty masks), our own
stated rule is checked instead.
"""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from medseg_jax.evaluation.metrics.overlap import overlap, relative_volume_error, volume
from medseg_jax.evaluation.metrics.surface import SurfaceDistances, assd, hausdorff, nsd, surface_distances

FOLDER = Path(os.environ.get("MEDSEG_GOLDEN", "golden")) / "metrics"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="MEDSEG_GOLDEN does not name the folder of golden numbers")

# What we leave to the packages: a score of the background, SPE's overlaps (their eps shifts values),
# a correlation of masks, sums over classes.
ELSEWHERE = re.compile(
    r".*/specificity|spe/(dice|jaccard|precision|recall|pearson)|.*/generalized_dice\w*|.*/tp_fp_tn_fn"
)
NO_CONTOUR = 1e18  # SPE's answer where a mask has no contour
SCORES = r"dice|dc|iou|jc|precision|recall|nsd\d+"


def read(name):
    if not (FOLDER / name).is_file():
        return {}, {"pairs": [], "cases": [], "tolerance": ""}
    with np.load(FOLDER / name, allow_pickle=False) as f:
        return dict(f), json.loads(str(f["meta"]))


PAIRS, PAIRS_META = read("surface_overlap.npz")
CLASSES, CLASSES_META = read("multiclass.npz")
METRICS = sorted(key.removeprefix("value/") for key in PAIRS if key.startswith("value/"))
CLASS_METRICS = sorted(key for key in CLASSES if key.startswith(("monai/", "surface_distance/")))


def mean(values, size):
    return float(np.average(values, weights=size)) if len(values) else np.nan


def ours(package, metric, prediction, reference, spacing):
    """The metric of a golden file by our functions."""
    o = overlap(prediction, reference)
    table = {"dice": o.dice, "dc": o.dice, "iou": o.iou, "jc": o.iou, "precision": o.precision, "recall": o.recall}
    table |= {"pred_ml": volume(prediction, spacing) / 1000, "ref_ml": volume(reference, spacing) / 1000}
    table |= {"ravd": relative_volume_error(prediction, reference)}
    if metric.removesuffix("_keep_empty") in table:
        return table[metric.removesuffix("_keep_empty")]
    full = prediction.ndim
    if package == "spe":  # unit spacing, contour by all neighbours, the image's border is no contour
        options = {"surface": "voxel", "connectivity": full, "outside": True}
        return hausdorff(surface_distances(prediction, reference, (1,) * full, **options), 95, pooled=True)
    subvoxel = package == "surface_distance" or metric.endswith("_subvoxel")
    d = surface_distances(
        prediction,
        reference,
        spacing,
        surface="subvoxel" if subvoxel else "voxel",
        connectivity=full if metric.endswith("_connectivity_full") else 1,
    )
    if match := re.fullmatch(r"nsd(\d+)(_subvoxel)?", metric):
        return nsd(d, float(match[1]))
    if match := re.fullmatch(r"overlap(\d+)_(ref|pred)", metric):
        predicted = match[2] == "pred"
        near = (d.from_prediction if predicted else d.from_reference) <= float(match[1])
        return mean(near, d.prediction_size if predicted else d.reference_size)
    if match := re.fullmatch(r"hd(\d*)(_directed)?(_connectivity_full)?", metric):
        if match[2]:
            d = SurfaceDistances(d.from_prediction, np.zeros(0))
        return hausdorff(d, float(match[1] or 100), pooled=package == "medpy")
    return {
        "assd": lambda: assd(d),
        "asd": lambda: mean(d.from_prediction, d.prediction_size),
        "asd_directed": lambda: mean(d.from_prediction, d.prediction_size),
        "asd_pred_to_ref": lambda: mean(d.from_prediction, d.prediction_size),
        "asd_ref_to_pred": lambda: mean(d.from_reference, d.reference_size),
        "area_pred": lambda: float(np.sum(d.prediction_size)),
        "area_ref": lambda: float(np.sum(d.reference_size)),
    }[metric]()


def tolerance(meta, package, metric):
    """Tolerance of a metric from the file's own words, as keywords of assert_allclose."""
    text = meta["tolerance"]
    number = r"(\d[\d.]*e-?\d+)"
    if package == "monai" and not re.match(r"dice|iou|precision|recall", metric):
        match = re.search(rf"distances {number} rel|{number} rel distances", text)
        relative = float(match[1] or match[2])
        return {"rtol": relative, "atol": relative}
    match = re.search(rf"overlap:? {number}|{number} overlap", text)
    return {"rtol": 0.0, "atol": float(match[1] or match[2])} if package != "spe" else {"rtol": 1e-6, "atol": 1e-6}


def check(package, metric, prediction, reference, spacing, expected, meta, where):
    value = ours(package, metric, prediction, reference, spacing)
    if np.isfinite(expected) and expected < NO_CONTOUR:
        np.testing.assert_allclose(value, expected, **tolerance(meta, package, metric), err_msg=where)
        return
    assert package == "spe" or not (prediction.any() and reference.any()), f"{where}: no number for full masks"
    if package != "spe" and not re.search(r"directed|asd_|^asd|overlap|area", metric):
        agree = not prediction.any() and not reference.any()
        rule = float(agree) if re.match(SCORES, metric) else (0.0 if agree else np.inf)
        assert value == rule, where


@pytest.mark.parametrize("name", METRICS)
def test_pairs(name):
    if ELSEWHERE.fullmatch(name):
        pytest.skip("not a metric of ours")
    package, metric = name.split("/")
    for i, pair in enumerate(PAIRS_META["pairs"]):
        shape = tuple(pair["shape"])
        prediction, reference = (
            np.unpackbits(PAIRS[f"{side}/{pair['name']}"])[: np.prod(shape)].reshape(shape).astype(bool)
            for side in ("pred", "ref")
        )
        assert np.count_nonzero(prediction) == pair["pred_voxels"]
        assert np.count_nonzero(reference) == pair["ref_voxels"]
        expected = float(PAIRS[f"value/{name}"][i])
        if metric.endswith("_depth_1"):
            prediction, reference = prediction[None], reference[None]
            if len(shape) == 3:
                continue
        spacing = (1.0, *pair["spacing"])[-prediction.ndim :]
        check(package, metric, prediction, reference, spacing, expected, PAIRS_META, f"{name} of {pair['name']}")


@pytest.mark.parametrize("name", CLASS_METRICS)
def test_classes(name):
    if ELSEWHERE.fullmatch(name):
        pytest.skip("not a metric of ours")
    package, case_name, metric = name.split("/")
    case = next(c for c in CLASSES_META["cases"] if c["name"] == case_name)
    for k in range(case["classes"]):
        prediction, reference = (CLASSES[f"{side}/{case_name}"].reshape(case["shape"]) == k for side in ("pred", "ref"))
        expected = float(CLASSES[name][k])
        check(package, metric, prediction, reference, case["spacing"], expected, CLASSES_META, f"class {k} of {name}")


def test_the_golden_files_hold_what_the_issue_asks_for():
    metrics = " ".join(METRICS + CLASS_METRICS)
    for word in ("dice", "iou", "precision", "recall", "hd95", "hd100", "assd", "nsd1"):
        assert word in metrics

"""The paired comparison: laws of the test, Holm, pairing of cases, verdicts, the page and the command line."""

import json
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import medseg_jax
from medseg_jax.cli import main
from medseg_jax.evaluation.compare import DRAWS, compare, compare_scores, holm, permutation_p
from medseg_jax.evaluation.evaluate import METRICS, summarise
from medseg_jax.types import UserError

numbers = st.lists(st.floats(-1, 1, allow_subnormal=False), min_size=2, max_size=25).map(np.array)


def own(values):
    return np.array([f"{i:03d}" for i in range(len(values))])


@given(numbers, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_p_value_knows_neither_order_nor_side(d, random):
    order = list(range(len(d)))
    random.shuffle(order)
    p = permutation_p(d, own(d))
    assert 0 < p <= 1
    assert permutation_p(-d, own(d)) == p
    assert permutation_p(d[order], own(d)[order]) == p


@given(st.lists(st.sampled_from([-0.2, -0.1, 0.0, 0.1, 0.3]), min_size=2, max_size=8).map(np.array))
@settings(max_examples=40, deadline=None)
def test_few_cases_are_exact(d):
    sums = [abs(np.dot(signs, d)) for signs in product((1, -1), repeat=len(d))]
    assert permutation_p(d, own(d)) == pytest.approx(np.mean(np.array(sums) >= abs(d.sum()) - 1e-12))


def test_many_cases_are_drawn_and_agree_with_the_normal_law():
    d = np.random.default_rng(0).normal(0.02, 0.1, 200)
    z = abs(d.sum()) / np.sqrt(np.sum(d**2))
    assert permutation_p(d, own(d)) == pytest.approx(2 * stats.norm.sf(z), abs=0.005)
    assert permutation_p(np.ones(200), own(np.ones(200))) == 1 / (1 + DRAWS)  # the +1 rule: never 0


def test_p_values_are_uniform_where_nothing_differs():
    rng = np.random.default_rng(1)
    exact = [permutation_p(rng.normal(size=11), own(range(11))) for _ in range(400)]
    drawn = [permutation_p(rng.normal(size=30), own(range(30)), seed=i) for i in range(150)]
    for p in (exact, drawn):
        assert stats.kstest(p, "uniform").pvalue > 0.01
    assert np.mean(np.array(exact) < 0.05) == pytest.approx(0.05, abs=0.03)


def test_cases_of_a_patient_are_no_independent_evidence():
    d = np.repeat(np.random.default_rng(2).normal(0.3, 1, 12), 10)
    patients = np.repeat(own(range(12)), 10)
    assert permutation_p(d, own(d)) < 0.01 < permutation_p(d, patients)
    assert permutation_p(d, patients) == permutation_p(d[::10], patients[::10])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm(p):
    corrected = holm(p)
    assert all(a <= b <= 1 for a, b in zip(p, corrected, strict=True))
    order = np.argsort(p, kind="stable")
    assert (np.diff(np.array(corrected)[order]) >= 0).all()
    assert corrected[order[0]] == min(1, len(p) * p[order[0]])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_undefined_scores_leave_their_case_out():
    a, b = np.array([0.5, np.nan, 0.7]), np.array([0.6, 0.9, 0.9])
    found = compare_scores(a, b, own(a))
    assert (found["cases"], found["difference"]) == (2, pytest.approx(0.15))
    assert compare_scores(a * np.nan, b, own(a))["p"] is None


# ---------------------------------------------------------------------------------------------------- folders


def evaluation(folder, dice, patients=None, classes=("x", "y"), ids=None, **changes):
    """An evaluation as `medseg evaluate` leaves it, class y a little worse than x."""
    from medseg_jax.evaluation.evaluate import _write_rows

    folder.mkdir(parents=True)
    rows = [
        dict.fromkeys(METRICS, 1.0)
        | {"case": ids[i] if ids else f"c{i:03d}", "class": name, "domain": "", "dice": float(v) - 0.01 * k}
        | {"patient": patients[i] if patients else "", "volume_prediction": 1.0, "volume_reference": 1.0}
        | {"empty": "", "diagonal": 50.0}
        for i, v in enumerate(dice)
        for k, name in enumerate(classes)
    ]
    with (folder / "cases.csv").open("w") as file:
        _write_rows(file, rows)
    about = {"unit": "mm", "volume_unit": "ml", "settings": {"nsd_tolerance": 1.0, "seed": 0}, "unscored": []}
    (folder / "summary.json").write_text(json.dumps(summarise(rows) | about | changes))
    return folder


@pytest.fixture
def scores():
    rng = np.random.default_rng(3)
    a = rng.uniform(0.6, 0.9, 40)
    return a, a + rng.normal(0.03, 0.02, 40)


def test_a_better_model_is_found_and_sides_can_be_swapped(tmp_path, scores):
    a, b = evaluation(tmp_path / "a", scores[0]), evaluation(tmp_path / "b", scores[1])
    one, other = compare(a, b), compare(b, a)
    assert one["verdict"].startswith("B is better by 0.0")
    assert other["verdict"].startswith("A is better by 0.0")
    x, y = one["overall"]["dice"], other["overall"]["dice"]
    assert x["difference"] == pytest.approx(np.mean(scores[1] - scores[0]), abs=1e-6)
    assert x["difference"] == pytest.approx(-y["difference"])
    assert x["ci95"] == pytest.approx([-v for v in y["ci95"][::-1]])
    assert x["ci95"][0] < x["difference"] < x["ci95"][1]
    assert (x["p"], x["p_holm"]) == (y["p"], y["p_holm"])
    assert (x["better"], y["better"], one["overall"]["nsd"]["better"]) == ("b", "a", None)
    assert x["p_holm"] == pytest.approx(min(1, x["p"] * 30))
    assert "Holm over 30 tests" in one["settings"]["correction"]  # 10 metrics, overall and of two classes
    assert medseg_jax.compare(a, b) == one


def test_the_same_model_is_not_better_than_itself(tmp_path, scores):
    a, b = evaluation(tmp_path / "a", scores[0]), evaluation(tmp_path / "b", scores[0])
    result = compare(a, b)
    assert result["verdict"].startswith("No difference can be claimed")
    assert (result["overall"]["dice"]["p"], result["overall"]["dice"]["difference"]) == (1, 0)


def test_of_distances_less_is_better(tmp_path, scores):
    a, b = evaluation(tmp_path / "a", scores[0]), evaluation(tmp_path / "b", scores[0])
    text = (b / "cases.csv").read_text().splitlines()
    column = text[0].split(",").index("hd95")
    rows = [line.split(",") for line in text[1:]]
    for i, row in enumerate(rows):
        row[column] = "inf" if i < 2 else "0.5"
    (b / "cases.csv").write_text("\n".join([text[0], *(",".join(row) for row in rows)]) + "\n")
    found = compare(a, b)["overall"]["hd95"]
    assert found["b"] == pytest.approx((50 + 39 * 0.5) / 40)  # one case without a prediction: the diagonal
    assert found["better"] is None
    assert compare(a, b)["differences"]["c000"][0] == pytest.approx(scores[0][0] - 0.005, abs=1e-5)


def test_patients_are_the_unit(tmp_path, scores):
    patients = [f"p{i // 20}" for i in range(40)]
    a, b = (evaluation(tmp_path / n, s, patients, ("x",)) for n, s in zip("ab", scores, strict=True))
    result = compare(a, b)
    assert result["overall"]["dice"]["patients"] == 2
    assert "2 patients are too few" in result["verdict"]
    assert result["classes"]["x"] == result["overall"]


def test_different_cases_are_listed_unless_common_ones_are_asked_for(tmp_path, scores):
    a = evaluation(tmp_path / "a", scores[0])
    b = evaluation(tmp_path / "b", scores[1][:39], ids=[f"c{i + 1:03d}" for i in range(38)] + ["new"])
    with pytest.raises(UserError) as error:
        compare(a, b)
    assert "c000, c039" in str(error.value)
    assert "new" in str(error.value)
    result = compare(a, b, common=True)
    assert (result["only_a"], result["only_b"]) == (["c000", "c039"], ["new"])
    assert result["overall"]["dice"]["cases"] == 38


def test_what_cannot_be_compared_is_refused(tmp_path, scores):
    a = evaluation(tmp_path / "a", scores[0])
    with pytest.raises(UserError, match="no evaluation"):
        compare(a, tmp_path / "nowhere")
    with pytest.raises(UserError, match="different classes"):
        compare(a, evaluation(tmp_path / "other", scores[0], classes=("x", "z")))
    with pytest.raises(UserError, match="different units"):
        compare(a, evaluation(tmp_path / "px", scores[0], unit="px"))
    with pytest.raises(UserError, match="nsd_tolerance"):
        compare(a, evaluation(tmp_path / "loose", scores[0], settings={"nsd_tolerance": 2.0}))
    with pytest.raises(UserError, match="Two cases"):
        compare(a, evaluation(tmp_path / "none", scores[0], ids=[f"d{i}" for i in range(40)]), common=True)


def test_command_line_page_and_plot(tmp_path, scores, capsys):
    a = evaluation(tmp_path / "run <a>" / "validation" / "best", scores[0])
    b = evaluation(tmp_path / "run b" / "validation" / "best", scores[1])
    out = tmp_path / "out"
    assert main(["compare", str(a.parents[1]), str(b.parents[1]), "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "B is better" in printed
    page = (out / "compare.html").read_text()
    assert "run &lt;a&gt;" in page
    assert "<a>" not in page
    assert page.count("<svg") == 1
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert main(["compare", str(a), str(b), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((out / "compare.json").read_text())
    assert main(["compare", str(a), str(tmp_path)]) == 1
    assert "no summary.json" in capsys.readouterr().err

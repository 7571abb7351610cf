"""Laws of precision-recall, calibration and concordance, and their answers where there is nothing to say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_jax.evaluation.metrics import calibration, pr
from medseg_jax.evaluation.metrics.survival import concordance_index, concordance_index_uno

pairs = st.lists(st.tuples(st.sampled_from(np.linspace(0, 1, 9)), st.booleans()), min_size=1, max_size=40)


@given(pairs)
@settings(max_examples=60, deadline=None)
def test_average_precision_by_its_definition_and_by_histogram(items):
    scores, labels = (np.array(v) for v in zip(*items, strict=True))
    value = pr.average_precision(scores, labels)
    if not labels.any():
        assert np.isnan(value)
        return
    recall, area = 0.0, 0.0
    for t in sorted(set(scores), reverse=True):
        chosen = scores >= t
        area += (labels[chosen].sum() / labels.sum() - recall) * labels[chosen].mean()
        recall = labels[chosen].sum() / labels.sum()
    assert value == pytest.approx(area)
    histogram = pr.ScoreHistogram.of(scores, labels)
    low, high = histogram.bounds()
    assert low - 1e-12 <= histogram.average_precision() == pytest.approx(value)
    assert value <= high + 1e-12
    assert pr.average_precision(scores**3, labels) == pytest.approx(value)  # only the order counts


def test_average_precision_of_the_best_and_of_a_guess():
    labels = np.arange(1000) % 10 == 0
    assert pr.average_precision(1.0 * labels, labels) == pr.idrid_aupr(1.0 * labels, labels) == 1
    assert pr.average_precision(np.zeros(1000), labels) == pytest.approx(0.1)
    random = np.random.default_rng(0).random(100_000)
    assert pr.average_precision(random, random[::-1] < 0.1) == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("scores", [[-0.1], [1.5], [np.nan]])
def test_histograms_refuse_what_is_no_probability(scores):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        pr.ScoreHistogram.of(np.array(scores), np.array([True]))


@given(pairs, st.integers(1, 12), st.booleans())
@settings(max_examples=60, deadline=None)
def test_calibration_laws(items, bins, mass):
    p, y = (np.array(v) for v in zip(*items, strict=True))
    curve = calibration.reliability(p, y, bins=bins, mass=mass)
    assert curve.count.sum() == len(p)
    assert len(curve.count) <= bins + 1
    assert (np.diff(curve.confidence) > 0).all()
    assert 0 <= curve.ece <= curve.rms + 1e-12 <= curve.mce + 2e-12
    assert abs(p.mean() - y.mean()) <= curve.ece + 1e-12  # bins can only cancel less than the whole does
    assert calibration.reliability(y.astype(float), y, bins=bins, mass=mass).ece == 0


def test_bins_of_equal_mass_are_equal():
    p = np.random.default_rng(0).random(1500) ** 6
    assert set(calibration.reliability(p, p > 0.5, bins=15, mass=True).count) == {100}


def test_true_probabilities_are_calibrated():
    rng = np.random.default_rng(1)
    p = rng.beta(0.3, 0.3, 200_000)
    y = rng.random(len(p)) < p
    assert calibration.reliability(p, y).ece < 0.005
    assert calibration.reliability(p**3, y).ece > 0.1
    assert calibration.brier(p, y) < calibration.brier(p**3, y)


def test_nothing_has_no_calibration():
    none = np.zeros(0)
    values = [
        calibration.brier(none, none),
        calibration.reliability(none, none).ece,
        calibration.nll(none[:, None], none),
    ]
    assert np.isnan(values).all()
    assert np.isnan(calibration.histogram_brier(pr.ScoreHistogram()))
    assert np.isnan(calibration.reliability(pr.ScoreHistogram()).mce)


survival = st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(0, 4)), min_size=1, max_size=14)


@given(survival)
@settings(max_examples=80, deadline=None)
def test_concordance_by_trying_all_pairs(items):
    time, event, risk = (np.array(v) for v in zip(*items, strict=True))
    kinds = [
        np.sign(risk[i] - risk[j])
        for i in range(len(time))
        for j in range(len(time))
        if event[i] and (time[i] < time[j] or (time[i] == time[j] and not event[j]))
    ]
    found = concordance_index(time, event, risk)
    assert (found.concordant, found.discordant, found.tied_risk) == (kinds.count(1), kinds.count(-1), kinds.count(0))
    if not kinds:
        assert np.isnan(found.value)
        return
    assert found.value == pytest.approx(np.mean([(k + 1) / 2 for k in kinds]))
    assert concordance_index(time, event, -risk).value == pytest.approx(1 - found.value)
    if event.all():
        assert concordance_index_uno(time, event, risk) == pytest.approx(found.value)


def test_survival_refuses_what_makes_no_sense():
    with pytest.raises(ValueError, match="one length"):
        concordance_index(np.ones(3), np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match="finite"):
        concordance_index(np.array([1, np.nan]), np.ones(2), np.ones(2))
    trained = np.array([1.0, 2.0]), np.array([False, False])
    with pytest.raises(ValueError, match="smaller tau"):
        concordance_index_uno(np.array([1, 5]), np.array([True, True]), np.array([2, 1]), censoring=trained)

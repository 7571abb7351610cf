"""Maps of uncertainty: known values and bounds."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_jax.inference import uncertainty
from medseg_jax.inference.ensemble import mean


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(np.float32)


def test_known_values():
    sure, unsure = np.float32([1, 0, 0]), np.float32([1, 1, 1]) / 3
    np.testing.assert_allclose(uncertainty.entropy(np.stack([sure, unsure]), True), [0, 1], atol=1e-6)
    np.testing.assert_allclose(uncertainty.entropy(np.float32([[0, 1], [0.5, 0.5], [0.5, 1]]), False), [0, 1, 0.5])
    a, b = np.float32([[1, 0]]), np.float32([[0, 1]])
    maps = uncertainty.maps([a, b], (a + b) / 2, True)
    np.testing.assert_allclose([maps[k][0] for k in uncertainty.LARGEST], [1, 0.25, 1], atol=1e-6)
    overlapping = uncertainty.maps([np.float32([[1, 0]]), np.float32([[0, 0]])], np.float32([[0.5, 0]]), False)
    np.testing.assert_allclose([overlapping[k][0] for k in uncertainty.LARGEST], [0.5, 0.125, 0.5], atol=1e-6)
    assert set(uncertainty.maps([a], a, True)) == {"entropy"} == set(uncertainty.names(1))


@settings(deadline=None, max_examples=50)
@given(members=st.integers(2, 5), k=st.integers(2, 6), exclusive=st.booleans(), scale=st.floats(0, 30))
def test_bounds(members, k, exclusive, scale):
    z = np.random.default_rng(k).normal(0, scale, (members, 7, k))
    p = list(softmax(z) if exclusive else (1 / (1 + np.exp(-np.clip(z, -60, 60)))).astype(np.float32))
    maps = uncertainty.maps(p, mean(p), exclusive)
    for name, values in maps.items():
        assert values.dtype == np.float32
        assert (values >= 0).all()
        assert (values <= uncertainty.LARGEST[name]).all()
    assert (maps["mutual_information"] <= maps["entropy"] + 1e-6).all()
    same = uncertainty.maps([p[0]] * members, p[0], exclusive)
    np.testing.assert_allclose(same["variance"], 0, atol=1e-12)
    np.testing.assert_allclose(same["mutual_information"], 0, atol=1e-6)

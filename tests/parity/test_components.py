"""Connected components on the device against SciPy (golden/slic/components.npz): exact."""

import math

import jax
import numpy as np
import pytest

import golden_files
from medseg_jax.ops.components import label, largest_component


@pytest.mark.parametrize(("dim", "neighbours"), [(2, 4), (2, 8), (3, 6), (3, 18), (3, 26)])
def test_labels_and_largest_of_hard_patterns(golden, dim, neighbours):
    arrays, meta = golden_files.read(golden / "slic" / "components.npz")
    patterns = {name: facts for name, facts in meta["patterns"].items() if len(facts["shape"]) == dim}
    assert patterns
    largest_size = np.max([facts["shape"] for facts in patterns.values()], 0)

    def padded(x):
        """Background around a pattern changes nothing, and lets one program take them all."""
        return np.pad(x, [(0, n - m) for n, m in zip(largest_size, x.shape, strict=True)])

    masks = []
    for name, facts in patterns.items():
        bits = np.unpackbits(arrays[f"mask/{name}"])[: math.prod(facts["shape"])]
        masks.append(padded(bits.reshape(facts["shape"]).astype(bool)))
    labels, largest = jax.jit(lambda m: (label(m, neighbours), largest_component(m, neighbours)))(np.stack(masks))
    for (name, facts), found, one in zip(patterns.items(), labels, largest, strict=True):
        expected = padded(arrays[f"labels/{name}/{neighbours}"].astype(int))
        np.testing.assert_array_equal(found, expected, err_msg=name)
        assert found.max() == facts[f"components_{neighbours}"]
        assert one.sum() == facts.get(f"largest_{neighbours}", 0), name
        sizes = np.bincount(expected.ravel())[1:]
        best = 1 + sizes.argmax() if sizes.size else -1
        np.testing.assert_array_equal(one, expected == best, err_msg=name)

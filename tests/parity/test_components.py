"""Connected components on the device against SciPy (golden/slic/components.npz) and the clean-up of pseudo-labels
against WT-BCP's (golden/wt_bcp/largest_component.npz): exact."""

import json
import math
from collections import defaultdict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medseg_jax.ops.components import label, largest_component, largest_per_class


def read(file):
    with np.load(file, allow_pickle=False) as content:
        arrays = dict(content)
    return arrays, json.loads(str(arrays.pop("meta")))


@pytest.mark.parametrize(("dim", "neighbours"), [(2, 4), (2, 8), (3, 6), (3, 18), (3, 26)])
def test_labels_and_largest_of_hard_patterns(golden, dim, neighbours):
    arrays, meta = read(golden / "slic" / "components.npz")
    groups = defaultdict(list)  # patterns of one size go through one program, side by side
    for name, facts in meta["patterns"].items():
        if len(facts["shape"]) == dim:
            groups[tuple(facts["shape"])].append(name)
    assert groups
    for size, names in groups.items():
        bits = [np.unpackbits(arrays[f"mask/{name}"])[: math.prod(size)] for name in names]
        masks = jnp.asarray(np.stack(bits).reshape(-1, *size), bool)
        labels = jax.jit(label, static_argnums=1)(masks, neighbours)
        largest = jax.jit(largest_component, static_argnums=1)(masks, neighbours)
        for i, name in enumerate(names):
            expected = arrays[f"labels/{name}/{neighbours}"].astype(int)
            np.testing.assert_array_equal(labels[i], expected, err_msg=name)
            facts = meta["patterns"][name]
            assert labels[i].max() == facts[f"components_{neighbours}"]
            assert largest[i].sum() == facts.get(f"largest_{neighbours}", 0), name
            sizes = np.bincount(expected.ravel())[1:]
            first = expected == 1 + sizes.argmax() if sizes.size else np.zeros_like(expected)
            np.testing.assert_array_equal(largest[i], first, err_msg=name)


def test_pseudo_labels_of_slices(golden):
    arrays, _ = read(golden / "wt_bcp" / "largest_component.npz")
    clean = jax.jit(partial(largest_per_class, classes=4, neighbours=8))
    np.testing.assert_array_equal(clean(arrays["labels2d"]), arrays["largest2d"])


@pytest.mark.parametrize("neighbours", [6, 18, 26])
def test_pseudo_labels_of_volumes(golden, neighbours):
    arrays, _ = read(golden / "wt_bcp" / "largest_component.npz")
    field = jnp.asarray(arrays["field3d"])
    foreground = jax.nn.softmax(jnp.stack([jnp.zeros_like(field), field], -1))[..., 1] >= 0.5
    np.testing.assert_array_equal(foreground, arrays["foreground3d"])
    found = jax.jit(partial(largest_component, neighbours=neighbours))(foreground)
    np.testing.assert_array_equal(found, arrays[f"largest3d_{neighbours}"])

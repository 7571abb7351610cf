"""Rules say where state lies; tested on four virtual devices in a process of their own."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medseg_jax.config import Rule
from medseg_jax.runtime.sharding import make_mesh, path_name, put_batch, state_shardings
from medseg_jax.types import UserError

STATE = {
    "params": {"encoder": {"kernel": jnp.ones((3, 8))}, "head": {"kernel": jnp.ones((5, 7))}},
    "step": jnp.int32(0),
}

FOUR_DEVICES = """
import jax, jax.numpy as jnp
from medseg_jax.config import Rule
from medseg_jax.runtime.sharding import make_mesh, put_batch, state_shardings
import numpy as np

mesh = make_mesh(fsdp=2)
assert dict(mesh.shape) == {"data": 2, "fsdp": 2}
state = {"big": jnp.ones((3, 8)), "odd": jnp.ones((5, 7)), "kept": jnp.ones((8, 8))}
rules = (Rule("kept", "replicate"), Rule(".", "fsdp"))
found = {k: v.spec for k, v in state_shardings(state, rules, mesh).items()}
assert found["big"] == jax.P(None, "fsdp"), found
assert found["odd"] == jax.P() and found["kept"] == jax.P(), found
batch = put_batch({"image": np.zeros((8, 2, 2, 1))}, mesh)
assert {s.data.shape for s in batch["image"].addressable_shards} == {(2, 2, 2, 1)}
"""


def test_rules_on_four_devices():
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run([sys.executable, "-c", FOUR_DEVICES], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_paths_are_readable():
    names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(STATE)]
    assert names == ["params/encoder/kernel", "params/head/kernel", "step"]


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(UserError, match="matches nothing"):
        state_shardings(STATE, (Rule("decoder", "fsdp"),), make_mesh())


def test_devices_and_rows_must_divide():
    with pytest.raises(UserError, match="does not divide"):
        make_mesh(fsdp=3)
    batch = put_batch({"image": np.arange(3.0)}, make_mesh())
    np.testing.assert_array_equal(batch["image"], np.arange(3.0))

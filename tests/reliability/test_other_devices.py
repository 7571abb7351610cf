"""Promise 2 on other devices: saved on 1, restored on 2 and 4 and back; parameters split or whole; losses agree."""

import os
import subprocess
import sys

import numpy as np
import pytest

from medseg_jax.runtime.checkpoint import Checkpoints, restore_tree
from runs import STEPS, finish, last, losses, start, wait_for_step, write_config

# Saves on as many devices as there are, split over them or whole, or restores and compares.
ROUND = """
import sys
import jax, jax.numpy as jnp, numpy as np
from medseg_jax.config import Rule
from medseg_jax.runtime.checkpoint import Checkpoints
from medseg_jax.runtime.sharding import make_mesh, state_shardings
how, folder, split = sys.argv[1:]
mesh = make_mesh(fsdp=jax.device_count() if split == "fsdp" else 1)
rng = np.random.default_rng(0)
host = {"kernel": rng.normal(size=(3, 8, 4)).astype("f4"), "odd": rng.normal(size=(5,)).astype("f4"), "n": np.int32(7)}
places = state_shardings(host, (Rule(".", "fsdp"),), mesh)
store = Checkpoints(folder)
if how == "save":
    store.save(1, jax.tree.map(jax.device_put, host, places))
else:
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), host, places)
    step, state = store.restore(like)
    jax.tree.map(np.testing.assert_array_equal, state, host)
    assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding == s, state, places)))
    if split == "fsdp" and jax.device_count() > 1:
        assert len({s.index for s in state["kernel"].addressable_shards}) == jax.device_count()
store.close()
"""


def call(how, folder, devices, split):
    env = os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)}
    command = [sys.executable, "-c", ROUND, how, str(folder), split]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("saved", "restored"),
    [
        ((1, "whole"), (4, "fsdp")),
        ((4, "fsdp"), (2, "whole")),
        pytest.param((1, "whole"), (2, "whole"), marks=pytest.mark.slow),
        pytest.param((2, "fsdp"), (1, "whole"), marks=pytest.mark.slow),
        pytest.param((2, "fsdp"), (4, "fsdp"), marks=pytest.mark.slow),
        pytest.param((4, "whole"), (1, "whole"), marks=pytest.mark.slow),
    ],
)
def test_the_same_bits_lie_elsewhere(tmp_path, saved, restored):
    call("save", tmp_path / "c", *saved)
    call("restore", tmp_path / "c", *restored)
    here = restore_tree(tmp_path / "c" / "1")  # without a word of where things should lie, as prediction reads them
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(here["kernel"], rng.normal(size=(3, 8, 4)).astype("f4"))
    assert all(isinstance(leaf, np.ndarray) for leaf in here.values())


@pytest.mark.slow
@pytest.mark.parametrize("first", [1, 4])
def test_a_run_moves_between_one_and_four_devices(phantoms, tmp_path, first):
    """Until step 8 on `first` devices, then on 4 or 1: losses within 1e-4 of a run that never moved."""
    config = write_config(tmp_path / "config.py", phantoms.root)
    process = start(config, tmp_path / "run", devices=first)
    wait_for_step(process, tmp_path / "run", 8)
    process.terminate()
    finish(process, None)
    finish(start(config, tmp_path / "run", devices=5 - first))
    finish(start(config, tmp_path / "whole"))
    assert Checkpoints(last(tmp_path / "run"), read_only=True).steps()[-1] == STEPS
    np.testing.assert_allclose(losses(tmp_path / "run", 16, 20, 24), losses(tmp_path / "whole", 16, 20, 24), rtol=1e-4)


@pytest.mark.slow
def test_a_run_whose_samples_are_shared_goes_on_where_they_are_not(phantoms, tmp_path):
    """Until step 8 on four devices, two for each sample; then on one."""
    config = write_config(tmp_path / "config.py", phantoms.root)
    process = start(config, tmp_path / "run", "--spatial", "2", devices=4)
    wait_for_step(process, tmp_path / "run", 8)
    process.terminate()
    finish(process, None)
    finish(start(config, tmp_path / "run"))
    finish(start(config, tmp_path / "whole"))
    np.testing.assert_allclose(losses(tmp_path / "run", 4, 8), losses(tmp_path / "whole", 4, 8), rtol=1e-5)
    np.testing.assert_allclose(losses(tmp_path / "run", 16, 20, 24), losses(tmp_path / "whole", 16, 20, 24), rtol=1e-4)


@pytest.mark.slow
def test_split_parameters_give_the_same_losses(phantoms, tmp_path):
    more = 'fsdp=2, rules=(Rule("params|opt|ema", "fsdp"),), '
    finish(start(write_config(tmp_path / "split.py", phantoms.root, more=more), tmp_path / "split", devices=4))
    finish(start(write_config(tmp_path / "config.py", phantoms.root), tmp_path / "whole"))
    np.testing.assert_allclose(losses(tmp_path / "split"), losses(tmp_path / "whole"), rtol=1e-4)


SCANS = """
from medseg_jax import Augment, Config, Stage, Supervised, VMUNet

net = VMUNet(features=(4, 8), depths=(1, 1), decoder_depths=(1, 1), states=2)
stage = Stage(Supervised(net), steps=2, augment=Augment.none())
config = Config(data={data!r}, stages=(stage,), cache={cache!r}, validate_every=1)
"""


def test_scans_split_themselves_in_training_and_not_in_validation(phantoms, tmp_path):
    """A scan shares its rows among the devices of a training; validation has one device."""
    config = tmp_path / "config.py"
    config.write_text(SCANS.format(data=str(phantoms.root), cache=str(tmp_path / "cache")))
    finish(start(config, tmp_path / "run", devices=2))
    assert np.isfinite(losses(tmp_path / "run")).all()

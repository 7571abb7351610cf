"""Rules say where state lies; tested on four virtual devices in a process of their own."""

import os
import subprocess
import sys
from dataclasses import dataclass, replace

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
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "spatial": 1}
state = {"big": jnp.ones((3, 8)), "odd": jnp.ones((5, 7)), "kept": jnp.ones((8, 8))}
rules = (Rule("kept", "replicate"), Rule(".", "fsdp"))
found = {k: v.spec for k, v in state_shardings(state, rules, mesh).items()}
assert found["big"] == jax.P(None, "fsdp"), found
assert found["odd"] == jax.P() and found["kept"] == jax.P(), found
batch = put_batch({"image": np.zeros((8, 2, 2, 1))}, mesh)
assert {s.data.shape for s in batch["image"].addressable_shards} == {(2, 2, 2, 1)}
mesh = make_mesh(spatial=4)
assert dict(mesh.shape) == {"data": 1, "fsdp": 1, "spatial": 4}
batch = put_batch({"image": np.zeros((3, 2, 2, 1))}, mesh)
assert {s.data.shape for s in batch["image"].addressable_shards} == {(3, 2, 2, 1)}
from medseg_jax.data.augment import Augment, augment
from medseg_jax.runtime.sharding import within
from medseg_jax.types import UserError

try:
    put_batch({"image": np.zeros((8, 2, 2, 1)), "unlabelled": np.zeros((2, 2, 2, 1))}, make_mesh())
except UserError as error:
    assert error.found == "2 rows of unlabelled"
else:
    raise AssertionError("two rows for four devices")

mesh = make_mesh(spatial=2)
batch = put_batch({"image": np.zeros((2, 4, 8, 1), "f4"), "label": np.zeros((2, 4, 8), "i4")}, mesh)
out = jax.jit(within(mesh, lambda b: augment(jax.random.key(0), b, Augment.none(), (4, 8))))(batch)
for name, slab in (("image", (1, 4, 4, 1)), ("label", (1, 4, 4))):  # the longer side, cut in two
    assert {s.data.shape for s in out[name].addressable_shards} == {slab}, out[name].sharding
try:
    jax.jit(within(mesh, lambda b: augment(jax.random.key(0), b, Augment.none(), (4, 7))))(batch)
except UserError as error:
    assert "longest side" in str(error)
else:
    raise AssertionError("7 pixels for 2 devices")
"""

# Steps of a 3-D U-Net on one device and on two that share each sample; both with augmentation.
SHARED_SAMPLES = """
import jax, numpy as np
from medseg_jax import Config, Optim, Stage, Supervised, UNet
from medseg_jax.runtime.sharding import make_mesh, put_batch
from medseg_jax.methods.objective import Task
from medseg_jax.training.step import init_state
from medseg_jax.training.prepare import abstract_state, compile_step, stage_parts
from medseg_jax.data.plan import Plan
from medseg_jax.types import Labels
import sys
net = UNet(features=(4, 8), strides=((1, 1, 1), (2, 2, 2)), kernel_sizes=((3, 3, 3),) * 2)
labels, patch = Labels.simple("a", "b"), (8, 16, 8)
plan = Plan.load(sys.argv[1])
config = Config(stages=(Stage(Supervised(net), steps=9, optim=Optim(name="sgd", lr=1e-2, warmup=1, momentum=0.9)),))
rng = np.random.default_rng(0)
size = config.stages[0].augment.sample_size(patch, (1.0,) * 3)
image = rng.normal(size=(2, *size, 1)).astype("f4")
batch = {"image": image, "label": (image[..., 0] > 1).astype("i4"), "case": np.arange(2), "domain": np.zeros(2, "i4")}
parts, _ = stage_parts(config, 0, Task(plan, labels, 1, 2), batch)
losses, flops = [], []
for devices in (1, 2):
    mesh = make_mesh(spatial=devices, devices=jax.devices()[:devices])
    abstract = abstract_state(parts, (batch, 0), config, mesh)
    there = put_batch(batch, mesh)
    step = compile_step(parts, abstract, mesh).lower(abstract, {}, there).compile()
    places = jax.tree.map(lambda a: a.sharding, abstract)
    state = jax.jit(lambda b: init_state(parts, b, 0), out_shardings=places)(batch)
    found = []
    for _ in range(4):
        state, metrics = step(state, {}, there)
        found.append(float(metrics["loss"]))
    losses.append(found)
    flops.append(step.cost_analysis()["flops"])
print(losses, flops)
assert losses[0][-1] != losses[0][0]
np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=1e-5)
assert flops[1] < 0.62 * flops[0], flops  # of one device: half of it, and the halos
"""


def test_rules_on_four_devices():
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "4"}
    done = subprocess.run([sys.executable, "-c", FOUR_DEVICES], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_devices_that_share_a_sample_share_the_work_and_find_the_same_losses(tmp_path):
    from medseg_jax.data.planning import make_plan
    from medseg_jax.data.synthetic import make_phantoms

    plan = replace(make_plan(make_phantoms(tmp_path / "data", dim=3, cases=2, sites=1, size=16)), patch_size=(8, 16, 8))
    plan.save(tmp_path / "plan.json")
    command = [sys.executable, "-c", SHARED_SAMPLES, str(tmp_path / "plan.json")]
    env = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stderr


@dataclass(frozen=True)
class Chip:
    """What JAX says of a chip of a TPU slice."""

    id: int
    process_index: int
    coords: tuple[int, int, int]
    device_kind: str
    platform: str = "tpu"
    core_on_chip: int = 0
    slice_index: int = 0


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v6 lite"])
def test_on_a_slice_each_host_has_rows_that_follow_each_other(kind):
    """4 x 4 chips, 2 x 2 a host. The links run along rows of chips, across hosts."""
    corners = [(2 * (host % 2), 2 * (host // 2)) for host in range(4)]
    places = [(host, (x + dx, y + dy, 0)) for host, (x, y) in enumerate(corners) for dy in (0, 1) for dx in (0, 1)]
    chips = [Chip(i, host, coords, kind) for i, (host, coords) in enumerate(places)]
    for fsdp, spatial in ((1, 1), (2, 1), (2, 2), (1, 4)):
        mesh = make_mesh(fsdp, spatial, chips[::-1])
        assert [device.process_index for device in mesh.devices.flat] == [host for host, _ in places]
    with pytest.raises(UserError, match="several processes") as error:
        make_mesh(spatial=8, devices=chips)
    assert error.value.expected == "a divisor of the 4 devices of a process"


def test_paths_are_readable():
    names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(STATE)]
    assert names == ["params/encoder/kernel", "params/head/kernel", "step"]


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(UserError, match="matches nothing"):
        state_shardings(STATE, (Rule("decoder", "fsdp"),), make_mesh())


def test_devices_and_rows_must_divide():
    with pytest.raises(UserError, match="do not divide"):
        make_mesh(fsdp=3)
    with pytest.raises(UserError, match="do not divide"):
        make_mesh(spatial=2)
    batch = put_batch({"image": np.arange(3.0)}, make_mesh())
    np.testing.assert_array_equal(batch["image"], np.arange(3.0))

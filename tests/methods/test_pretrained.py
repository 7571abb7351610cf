"""A run that starts from a weight file: the weights arrive, the run says which file, and resumes without it."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from medseg_jax import Config, Optim, Stage, UserError, train
from medseg_jax.methods.supervised import Supervised
from medseg_jax.models.unet import UNet
from medseg_jax.runtime.checkpoint import file_sha256, restore_tree
from medseg_jax.runtime.sharding import path_name
from medseg_jax.training.check import dry_run
from medseg_jax.weights import KeyMap, Rule, mapping

SMALL = Supervised(UNet.isotropic(2, 4, 8))


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "cache"))
    found = KeyMap("a U-Net of two scales", rules=(Rule(r"(.*)", r"\1"),), may_stay=(r".*",))
    monkeypatch.setattr(mapping, "key_map", lambda net: found)
    stage = Stage(SMALL, steps=1, optim=Optim(lr=1e-30, weight_decay=0))
    return Config(data="phantoms2d", stages=(stage,), pretrained=str(tmp_path / "w.safetensors"), validate_every=1)


def kernels(run):
    """The convolution kernels that a run ended with, by path."""
    tree = restore_tree(run / "checkpoints" / "0_train" / "last" / "1")["params"]
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {name: x for p, x in leaves if (name := path_name(p)).endswith("kernel")}


def test_the_first_stage_starts_from_the_file(tmp_path, config):
    plain = train(replace(config, pretrained=None), tmp_path / "plain", report=False)
    before = kernels(plain)
    name = min(before)
    value = np.full(before[name].shape, 0.125, np.float32)
    save_file({name: value}, tmp_path / "w.safetensors")
    run = train(config, tmp_path / "run", report=False)
    after = kernels(run)
    np.testing.assert_allclose(after[name], value)
    for other in before.keys() - {name}:
        np.testing.assert_allclose(after[other], before[other], atol=1e-12)
    record = json.loads((run / "run.json").read_text())
    assert record["pretrained"]["sha256"] == file_sha256(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").unlink()
    train(config, run, report=False)
    assert json.loads((run / "run.json").read_text())["pretrained"] == record["pretrained"]


def test_weights_that_do_not_fit_are_refused_before_training(tmp_path, config):
    save_file({"somewhere/else": np.zeros(3, np.float32)}, tmp_path / "w.safetensors")
    for start in (dry_run, lambda c: train(c, tmp_path / "run", report=False)):
        with pytest.raises(UserError, match="the network has no somewhere/else"):
            start(config)

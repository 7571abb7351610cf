"""Promise 1: whatever is done to any file of a real checkpoint is detected, named, and the step before is used."""

import json
import random
import shutil

import jax
import pytest

from medseg_jax import config as configs
from medseg_jax.runtime.checkpoint import Checkpoints, verify_manifest
from medseg_jax.runtime.run import open_run
from medseg_jax.training.train import train
from medseg_jax.types import UserError
from runs import STEPS, last, sha256, write_config


@pytest.fixture(scope="module")
def config(phantoms, tmp_path_factory):
    return configs.load(write_config(tmp_path_factory.mktemp("manifest") / "config.py", phantoms.root))


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    return train(config, tmp_path_factory.mktemp("trained") / "run", report=False)


@pytest.fixture
def run(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def truncate(path, _):
    path.write_bytes(path.read_bytes()[:-1])


def delete(path, _):
    path.unlink()


def empty(path, _):
    path.write_bytes(b"")


def extra(path, _):
    path.with_name("intruder").write_text("x")


@pytest.mark.parametrize("damage", [flip, truncate, delete, empty, extra])
def test_every_file_of_a_checkpoint(run, caplog, damage):
    """One after the other, on the newest of two steps; the reader falls back to the one before and names the file."""
    store = Checkpoints(last(run), read_only=True)
    before, newest = store.steps()
    files = [p for p in (last(run) / str(newest)).rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) > 5
    for file in files:
        good = file.read_bytes()
        damage(file, random.Random(file.name).randrange(8 * len(good)))
        caplog.clear()
        assert store._newest_undamaged(None) == before
        assert ("intruder" if damage is extra else file.name) in caplog.text
        if damage is extra:
            file.with_name("intruder").unlink()
        file.write_bytes(good)
        assert not verify_manifest(last(run) / str(newest))


@pytest.mark.parametrize("damage", [flip, truncate, empty])
def test_the_manifest_itself(run, damage):
    store = Checkpoints(last(run), read_only=True)
    before, newest = store.steps()
    manifest = last(run) / f"{newest}.sha256.json"
    good = manifest.read_bytes()
    for bit in random.Random(0).sample(range(8 * len(good)), 20 if damage is flip else 1):
        damage(manifest, bit)
        if damage is flip and json.loads(good) == _parsed(manifest):
            continue  # white space says nothing
        assert store._newest_undamaged(None) == before
        manifest.write_bytes(good)


def _parsed(path):
    try:
        return json.loads(path.read_bytes())
    except ValueError:
        return None


def test_without_its_manifest_a_step_does_not_exist(run):
    store = Checkpoints(last(run), read_only=True)
    before, newest = store.steps()
    (last(run) / f"{newest}.sha256.json").unlink()
    assert store.steps() == [before]


@pytest.mark.slow
def test_twenty_bits_of_every_file(run):
    store = Checkpoints(last(run), read_only=True)
    before, newest = store.steps()
    flipped = 0
    for file in sorted(p for p in (last(run) / str(newest)).rglob("*") if p.is_file() and p.stat().st_size):
        size = 8 * file.stat().st_size
        for bit in random.Random(file.name).sample(range(size), min(20, size)):
            flip(file, bit)
            assert store._newest_undamaged(None) == before
            flip(file, bit)
            flipped += 1
    assert store._newest_undamaged(None) == newest
    assert flipped >= 100


def test_training_on_replaces_the_damaged_step(config, trained, run):
    """Also where the run saves at other steps than before: no save is declined because a damaged step is newer."""
    from dataclasses import replace

    victim = next(p for p in (last(run) / "24" / "default").rglob("*") if p.is_file() and p.stat().st_size > 100)
    flip(victim, 5)
    train(replace(config, checkpoint_every=1), run, report=False)
    assert Checkpoints(last(run), read_only=True).steps() == [23, 24]
    assert not verify_manifest(last(run) / "23")
    assert sha256(run) == sha256(trained)


def test_all_checkpoints_damaged_is_a_new_beginning_that_ends_the_same(config, trained, run, caplog):
    for step in Checkpoints(last(run), read_only=True).steps():
        victim = next(p for p in (last(run) / str(step) / "default").rglob("*") if p.is_file() and p.stat().st_size)
        flip(victim, 3)
    train(config, run, report=False)
    assert caplog.text.count("is damaged and skipped") >= 2
    assert sha256(run) == sha256(trained)


@pytest.mark.parametrize("which", ["best", "last"])
def test_damaged_weights_never_predict(run, which):
    folder = run / "checkpoints" / "0_train" / which
    victim = next(p for p in sorted(folder.rglob("d/*")) if p.is_file())
    flip(victim, 9)
    newest = Checkpoints(folder, read_only=True).steps()[-1]
    if str(newest) not in victim.parts:
        victim = next(p for p in sorted((folder / str(newest)).rglob("d/*")) if p.is_file())
        flip(victim, 9)
    with pytest.raises(UserError, match="damaged") as error:
        open_run(run, which)
    assert victim.name in str(error.value)


def test_a_run_that_was_never_validated_has_last_weights(run):
    shutil.rmtree(run / "checkpoints" / "0_train" / "best")
    with pytest.raises(UserError, match="no best weights") as error:
        open_run(run)
    assert "--checkpoint last" in error.value.remedy
    assert open_run(run, "last").step == STEPS


def test_a_state_of_another_shape_is_refused_in_words(run):
    store = Checkpoints(last(run), read_only=True)
    with pytest.raises(UserError, match="does not fit what is trained"):
        store.restore({"params": jax.ShapeDtypeStruct((3,), "float32")})

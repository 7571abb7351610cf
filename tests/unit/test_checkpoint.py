from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from medseg_jax.runtime.checkpoint import Checkpoints, restore_tree, verify_manifest


def state(value=0.0):
    return {
        "step": jnp.int32(3),
        "params": {"a": {"0": jnp.full((3, 4), value), "1": jnp.zeros(2)}},
        "opt": (jnp.ones(3),),
    }


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.fixture
def saved(tmp_path):
    store = Checkpoints(tmp_path / "c", keep=2)
    for step in (1, 2, 3):
        store.save(step, state(float(step)))
    store.wait()
    yield store
    store.close()


def test_keeps_the_newest_and_restores_equal(saved):
    assert saved.steps() == [2, 3]
    step, found = saved.restore(abstract(state()))
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, found, state(3.0))
    assert restore_tree(saved.folder / "2")["params"]["a"]["0"][0, 0] == 2.0


def test_a_relative_path_is_as_good(saved, monkeypatch):
    monkeypatch.chdir(saved.folder)
    assert restore_tree(Path("2"))["params"]["a"]["0"][0, 0] == 2.0


def test_nothing_there_is_none(tmp_path):
    store = Checkpoints(tmp_path / "empty")
    assert store.restore(abstract(state())) is None
    store.close()


def test_a_flipped_bit_in_any_file_is_named_and_the_step_before_is_used(saved, caplog):
    files = [p for p in (saved.folder / "3").rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) > 3
    reader = Checkpoints(saved.folder, read_only=True)
    for file in files:
        good = file.read_bytes()
        file.write_bytes(bytes([good[0] ^ 1]) + good[1:])
        caplog.clear()
        assert reader.restore(abstract(state()))[0] == 2
        assert file.name in caplog.text
        file.write_bytes(good)
    assert saved.restore(abstract(state()))[0] == 3


def test_missing_extra_and_truncated_files_are_named(saved):
    folder = saved.folder / "3"
    (folder / "intruder").write_text("x")
    assert verify_manifest(folder) == ["intruder: not in the manifest"]
    (folder / "intruder").unlink()
    victim = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    assert "wrong sha256" in verify_manifest(folder)[0]
    victim.unlink()
    assert "missing" in verify_manifest(folder)[0]


@pytest.mark.parametrize("damage", ["", "{}", "[]", '{"files": {}, "self": "0"}'])
def test_a_damaged_manifest_is_not_believed(saved, damage):
    (saved.folder / "3.sha256.json").write_text(damage)
    assert verify_manifest(saved.folder / "3")
    assert saved.restore(abstract(state()))[0] == 2


def test_rests_of_a_killed_run_are_swept(saved):
    (saved.folder / "9").mkdir()
    (saved.folder / "8.orbax-checkpoint-tmp").mkdir()
    again = Checkpoints(saved.folder)
    assert not (saved.folder / "9").exists()
    assert not (saved.folder / "8.orbax-checkpoint-tmp").exists()
    assert again.steps() == [2, 3]
    again.close()


def test_a_failed_save_is_reported_and_earlier_ones_stay(saved, monkeypatch):
    from medseg_jax.runtime import checkpoint
    from medseg_jax.types import UserError

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    saved.save(4, state(4.0))
    with pytest.raises(UserError, match="could not be written") as error:
        saved.wait()
    assert "No space left" in str(error.value)
    monkeypatch.undo()
    assert saved.restore(abstract(state()))[0] == 3

"""Preprocessing and its inverse, and a cache that survives damage, kills, full disks and company."""

import dataclasses
import errno
import itertools
import json
import logging
import multiprocessing
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_jax.data import cache as cache_module
from medseg_jax.data.cache import Record, build_cache, cache_folder, preprocess, restore
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.io import write_image, write_label
from medseg_jax.data.plan import Plan
from medseg_jax.types import Geometry, UserError

RAW = ({"scheme": "none"},)


def plan(**changes) -> Plan:
    values = {
        "dim": 3,
        "spacing": (1.0, 1.0, 1.0),
        "patch_size": (8, 8, 8),
        "batch_size": 2,
        "normalization": RAW,
        "strides": ((1, 1, 1), (2, 2, 2)),
        "kernel_sizes": ((3, 3, 3),) * 2,
        "features": (4, 8),
        "crop_nonzero": False,
        "steps": 10,
        "classes": ("a", "b"),
        "in_channels": 1,
    }
    return Plan(**(values | changes))


def picture_plan(**changes) -> Plan:
    flat = {"dim": 2, "spacing": None, "patch_size": (8, 8), "strides": ((1, 1), (2, 2)), "kernel_sizes": ((3, 3),) * 2}
    return plan(**(flat | changes))


# ------------------------------------------------------------------------------------------------- there and back again

ORIENTATIONS = [
    (order, signs) for order in itertools.permutations(range(3)) for signs in itertools.product((1, -1), repeat=3)
]


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(ORIENTATIONS),
    st.tuples(*[st.integers(1, 12)] * 3),
    st.tuples(*[st.sampled_from([0.4, 1.0, 1.3, 5.0])] * 3),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_shape_and_place_come_back_for_every_orientation(orientation, shape, spacing, crop, seed):
    order, signs = orientation
    affine = np.eye(4)
    affine[:3, :3] = np.diag(np.array(spacing) * signs)[:, order]
    geometry = Geometry(shape, affine)
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(*shape, 1)).astype(np.float32) * (rng.random((*shape, 1)) < 0.1)
    label = rng.integers(0, 3, shape).astype(np.uint8)
    done = preprocess(image, label, geometry, plan(crop_nonzero=crop))
    assert done.image.dtype == np.float32
    assert done.image.flags.c_contiguous
    assert done.image.shape[:3] == done.label.shape == done.record.resampled_shape
    probabilities = np.zeros((*done.record.resampled_shape, 3), np.float32)
    probabilities[..., 1] = 1
    back = restore(probabilities, done.record, geometry, plan())
    assert back.shape == (*shape, 3)
    np.testing.assert_allclose(back.sum(-1), 1, atol=1e-5)
    assert Record.from_dict(json.loads(json.dumps(dataclasses.asdict(done.record)))) == done.record


@pytest.mark.parametrize("orientation", ORIENTATIONS, ids=str)
def test_without_resampling_the_way_back_is_the_identity(orientation):
    order, signs = orientation
    affine = np.eye(4)
    affine[:3, :3] = np.diag(signs)[:, order]
    geometry = Geometry((5, 6, 7), affine)
    rng = np.random.default_rng(0)
    image = np.zeros((5, 6, 7, 1), np.float32)
    image[1:4, 2:6, 1:7] = rng.uniform(1, 2, (3, 4, 6, 1))
    label = (image[..., 0] > 1.5).astype(np.uint8)
    for crop in (False, True):
        done = preprocess(image, label, geometry, plan(crop_nonzero=crop))
        assert done.image.size == (3 * 4 * 6 if crop else 5 * 6 * 7)
        one_hot = np.eye(3, dtype=np.float32)[done.label]
        np.testing.assert_array_equal(restore(one_hot, done.record, geometry, plan())[..., 1], label)


def test_resampled_label_comes_back_nearly():
    geometry = Geometry((40, 30, 24), np.diag([0.7, 0.9, 1.2, 1]))
    grid = np.stack(np.mgrid[:40, :30, :24], -1) - np.array([20, 15, 12])
    label = (np.linalg.norm(grid * [0.7, 0.9, 1.2], axis=-1) < 8).astype(np.uint8)
    done = preprocess(label[..., None].astype(np.float32), label, geometry, plan())
    assert done.record.resampled_shape == (29, 27, 28)
    back = restore(np.eye(3)[done.label], done.record, geometry, plan()).argmax(-1)
    assert 2 * (back & label).sum() / (back.sum() + label.sum()) > 0.97


def test_outside_the_crop_is_background():
    geometry = Geometry((6, 6, 6))
    image = np.zeros((6, 6, 6, 1), np.float32)
    image[2:4, 2:4, 2:4] = 1
    record = preprocess(image, None, geometry, plan(crop_nonzero=True)).record
    softmax = restore(np.full((2, 2, 2, 3), 1 / 3, np.float32), record, geometry, plan())
    assert softmax[0, 0, 0].tolist() == [1, 0, 0]
    sigmoid = restore(np.full((2, 2, 2, 2), 0.5, np.float32), record, geometry, plan())
    assert sigmoid[0, 0, 0].tolist() == [0, 0]
    assert sigmoid[2, 2, 2].tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match="record"):
        restore(softmax, record, geometry, plan())


def test_pictures_of_any_size_fit_the_working_size():
    for shape in ((60, 80), (33, 21), (16, 16)):
        geometry = Geometry(shape, unit="px")
        label = np.zeros(shape, np.uint8)
        label[shape[0] // 4 : shape[0] // 2, shape[1] // 4 :] = 1
        image = np.repeat(label[..., None] * 255, 3, -1).astype(np.uint8)
        sized = picture_plan(working_size=(16, 24), in_channels=3, normalization=RAW * 3)
        done = preprocess(image, label, geometry, sized)
        assert done.image.shape == (1, 16, 24, 3)
        back = restore(np.eye(3)[done.label], done.record, geometry, sized).argmax(-1)
        assert back.shape == shape
        assert (back == label).mean() > 0.9


def test_shrinking_a_picture_averages():
    """A checkerboard of pixels shrunk fourfold is grey, not noise."""
    image = np.indices((64, 64)).sum(0) % 2 * 100.0
    done = preprocess(image[..., None], None, Geometry((64, 64), unit="px"), picture_plan(spacing=(1.0, 4.0, 4.0)))
    assert done.image.shape == (1, 16, 16, 1)
    np.testing.assert_allclose(done.image[0, 2:-2, 2:-2], 50, atol=2)


def test_slices_stay_where_they_are():
    geometry = Geometry((20, 20, 5), np.diag([2.0, 2.0, 9.0, 1.0]))
    done = preprocess(np.ones((20, 20, 5, 1)), None, geometry, picture_plan(spacing=(None, 1.0, 1.0)))
    assert done.image.shape == (5, 40, 40, 1)
    assert done.record.spacing == (9.0, 1.0, 1.0)


def test_normalisation_schemes():
    rng = np.random.default_rng(0)
    image = rng.normal(40, 300, (8, 8, 8, 1)).astype(np.float32)
    geometry = Geometry((8, 8, 8))

    def normalised(entry, image=image):
        return preprocess(image, None, geometry, plan(normalization=(entry,))).image.transpose(2, 1, 0, 3)

    ct = {"scheme": "ct", "low": -100.0, "high": 200.0, "mean": 50.0, "std": 25.0}
    np.testing.assert_allclose(normalised(ct), (np.clip(image, -100, 200) - 50) / 25, rtol=1e-5)
    fixed = {"scheme": "fixed", "mean": 50.0, "std": 25.0}
    np.testing.assert_allclose(normalised(fixed), (image - 50) / 25, rtol=1e-5, atol=1e-5)
    scaled = normalised({"scheme": "zscore", "nonzero": False})
    assert abs(scaled.mean()) < 1e-5
    assert scaled.std() == pytest.approx(1, abs=1e-4)
    hollow = image.copy()
    hollow[4:] = 0
    masked = normalised({"scheme": "zscore", "nonzero": True}, hollow)
    assert masked[4:].max() == masked[4:].min() == 0
    assert masked[:4].std() == pytest.approx(1, abs=1e-4)
    constant = normalised({"scheme": "zscore", "nonzero": False}, np.full((8, 8, 8, 1), 7.0, np.float32))
    assert (constant == 0).all()
    np.testing.assert_array_equal(normalised({"scheme": "none"}), image)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_are_refused_with_the_channel_and_its_file(tmp_path, value):
    image = np.ones((4, 4, 4, 2), np.float32)
    image[1, 2, 3, 1] = value
    files = (tmp_path / "x_0000.nii.gz", tmp_path / "x_0001.nii.gz")
    with pytest.raises(UserError, match="NaN or Inf") as error:
        preprocess(image, None, Geometry((4, 4, 4)), plan(in_channels=2, normalization=RAW * 2), files)
    assert error.value.file == files[1]
    assert "1 voxels of channel 1" in str(error.value)


def test_wrong_channels_and_shapes_are_refused():
    with pytest.raises(UserError, match="channels"):
        preprocess(np.ones((4, 4, 4, 2)), None, Geometry((4, 4, 4)), plan())
    with pytest.raises(UserError, match="shape"):
        preprocess(np.ones((4, 4, 4, 1)), np.ones((4, 4, 5), np.uint8), Geometry((4, 4, 4)), plan())


# -------------------------------------------------------------------------------------------------------------- on disk


@pytest.fixture
def dataset(tmp_path):
    return make_dataset(tmp_path / "set")


def make_dataset(root, cases=4, shape=(12, 10, 8)) -> Dataset:
    (root / "imagesTr").mkdir(parents=True)
    (root / "labelsTr").mkdir()
    for i in range(cases):
        rng = np.random.default_rng(i)
        geometry = Geometry(shape)
        image = rng.normal(size=(*shape, 1)).astype(np.float32)
        label = np.zeros(shape, np.uint8)
        label[2:10, 2:9] = 1
        label[3, 3, 3] = 2 if i else 0
        write_image(root / "imagesTr" / f"c{i}_0000.nii.gz", image, geometry)
        write_label(root / "labelsTr" / f"c{i}.nii.gz", label, geometry)
    description = {
        "name": "a set / with odd name",
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": cases,
        "file_ending": ".nii.gz",
        "medseg": {
            "version": 1,
            "cases": {f"c{i}": {"split": "test" if i == cases - 1 else "train"} for i in range(cases)},
        },
    }
    (root / "dataset.json").write_text(json.dumps(description))
    return Dataset.open(root)


def test_cache_holds_what_preprocess_gives(dataset, tmp_path):
    seen = []
    cache = build_cache(dataset, plan(), tmp_path / "cache", lambda *event: seen.append(event))
    assert sorted(cache.ids) == ["c0", "c1", "c2"]  # c3 is a test case
    assert [done for done, _, _ in seen] == [1, 2, 3]
    assert {(total, name) for _, total, name in seen} == {(3, "c0"), (3, "c1"), (3, "c2")}
    for case in dataset.cases[:3]:
        image, label, geometry = dataset.load(case)
        wanted = preprocess(image, label, geometry, plan())
        entry = cache.case(case.id)
        np.testing.assert_array_equal(entry.image, wanted.image)
        np.testing.assert_array_equal(entry.label, wanted.label)
        assert entry.record == wanted.record
        assert isinstance(entry.image, np.memmap)
        assert not entry.image.flags.writeable
        for value, name in enumerate(("a", "b"), 1):
            voxels = entry.foreground[name]
            assert len(voxels) == min(500, (wanted.label == value).sum())
            assert (wanted.label[tuple(voxels.T)] == value).all()
            assert len(np.unique(voxels, axis=0)) == len(voxels)
    with pytest.raises(UserError, match="c3"):
        cache.case("c3")


def test_test_cases_are_never_opened(dataset, tmp_path):
    dataset.cases[3].images[0].write_bytes(b"secret")
    build_cache(dataset, plan(), tmp_path / "cache")


def stamps(root):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in root.glob("*/*")}


def test_second_build_changes_nothing_and_another_plan_has_another_folder(dataset, tmp_path):
    cache = build_cache(dataset, plan(), tmp_path / "cache")
    before = stamps(cache.root)
    assert (
        build_cache(dataset, plan(batch_size=3, steps=99, patch_size=(4, 4, 4)), tmp_path / "cache").root == cache.root
    )
    assert build_cache(dataset, plan(), tmp_path / "cache", verify=True).repaired == {}
    assert stamps(cache.root) == before
    assert cache_folder(dataset, plan(crop_nonzero=True), tmp_path / "cache") != cache.root
    assert cache_folder(dataset, plan(spacing=(1.0, 1.0, 1.1)), tmp_path / "cache") != cache.root


def test_directory_comes_from_the_environment(dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDSEG_CACHE", str(tmp_path / "there"))
    assert cache_folder(dataset, plan()).parent == tmp_path / "there" / "preprocessed"
    monkeypatch.delenv("MEDSEG_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(dataset, plan()).parent == tmp_path / ".cache" / "medseg_jax" / "preprocessed"


def flip_bit(path, position=-1):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("name", ["image.npy", "label.npy", "case.json"])
@pytest.mark.parametrize("damage", [truncate, flip_bit, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
def test_damage_is_named_and_mended(dataset, tmp_path, caplog, name, damage):
    cache = build_cache(dataset, plan(), tmp_path / "cache")
    whole = np.array(cache.case("c1").image), np.array(cache.case("c1").label), cache.case("c1").foreground
    damage(cache.root / "c1" / name)
    with caplog.at_level(logging.WARNING):
        again = build_cache(dataset, plan(), tmp_path / "cache", verify=True)
    assert list(again.repaired) == ["c1"]
    assert name in again.repaired["c1"]
    assert "c1" in caplog.text
    np.testing.assert_array_equal(again.case("c1").image, whole[0])
    np.testing.assert_array_equal(again.case("c1").label, whole[1])
    assert {k: v.tolist() for k, v in again.case("c1").foreground.items()} == {
        k: v.tolist() for k, v in whole[2].items()
    }
    assert build_cache(dataset, plan(), tmp_path / "cache", verify=True).repaired == {}


def test_sizes_are_checked_without_being_asked(dataset, tmp_path):
    cache = build_cache(dataset, plan(), tmp_path / "cache")
    truncate(cache.root / "c0" / "image.npy")
    with pytest.raises(UserError, match="damaged") as error:
        dataclasses.replace(cache).case("c0")
    assert "image.npy" in str(error.value)
    assert list(build_cache(dataset, plan(), tmp_path / "cache").repaired) == ["c0"]


def test_a_kill_while_writing_leaves_no_entry(dataset, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "_put", killed)
        with pytest.raises(KeyboardInterrupt):
            build_cache(dataset, plan(), tmp_path / "cache")
    root = cache_folder(dataset, plan(), tmp_path / "cache")
    assert not list(root.iterdir())
    assert build_cache(dataset, plan(), tmp_path / "cache").repaired == {}


def test_old_left_overs_are_swept_and_young_ones_left(dataset, tmp_path):
    root = cache_folder(dataset, plan(), tmp_path / "cache")
    for name in (".draft-old", ".trash-old", ".draft-young"):
        (root / name).mkdir(parents=True)
        (root / name / "image.npy").write_bytes(b"1")
    for name in (".draft-old", ".trash-old"):
        os.utime(root / name, (0, 0))
    build_cache(dataset, plan(), tmp_path / "cache")
    assert sorted(path.name for path in root.iterdir()) == [".draft-young", "c0", "c1", "c2"]


def test_a_full_disk_ends_cleanly(dataset, tmp_path, monkeypatch):
    save, calls = np.save, []

    def full(file, array):
        calls.append(file)
        if len(calls) > 3:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(file, array)

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(UserError, match="disk is full") as error:
            build_cache(dataset, plan(), tmp_path / "cache")
    assert "MEDSEG_CACHE" in str(error.value)
    root = cache_folder(dataset, plan(), tmp_path / "cache")
    assert not list(root.glob(".draft-*"))
    assert build_cache(dataset, plan(), tmp_path / "cache", verify=True).repaired == {}


def test_a_folder_that_is_a_file_is_explained(dataset, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(UserError, match="cannot be used"):
        build_cache(dataset, plan(), tmp_path / "cache")


def test_a_bad_case_is_named(dataset, tmp_path):
    bad = np.ones((12, 10, 8, 1), np.float32)
    bad[0, 0, 0] = np.nan
    write_image(dataset.cases[1].images[0], bad, Geometry((12, 10, 8)))
    with pytest.raises(UserError) as error:
        build_cache(Dataset.open(dataset.root), plan(), tmp_path / "cache")
    assert error.value.file == dataset.cases[1].images[0]


def _build(root, directory, results):
    try:
        cache = build_cache(Dataset.open(root), plan(), directory)
        results.put(float(sum(cache.case(name).image.sum() for name in sorted(cache.ids))))
    except BaseException as error:
        results.put(repr(error))


@pytest.mark.parametrize("damaged", [False, True])
def test_two_processes_at_once(tmp_path, damaged):
    dataset = make_dataset(tmp_path / "set", cases=9)
    if damaged:
        cache = build_cache(dataset, plan(), tmp_path / "cache")
        for name in cache.ids:
            truncate(cache.root / name / "image.npy")
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    processes = [spawn.Process(target=_build, args=(dataset.root, tmp_path / "cache", results)) for _ in range(2)]
    for process in processes:
        process.start()
    sums = [results.get(timeout=120) for _ in processes]
    for process in processes:
        process.join(60)
    assert sums[0] == sums[1]
    assert isinstance(sums[0], float)
    final = build_cache(dataset, plan(), tmp_path / "cache", verify=True)
    assert final.repaired == {}
    assert not list(final.root.glob(".*"))


def test_entries_hold_no_code(dataset, tmp_path):
    cache = build_cache(dataset, plan(), tmp_path / "cache")
    path = cache.root / "c0" / "image.npy"
    evil = np.empty(1, object)
    evil[0] = len
    np.save(path, evil, allow_pickle=True)
    with pytest.raises(UserError, match="damaged"):
        dataclasses.replace(cache).case("c0")

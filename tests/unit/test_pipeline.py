"""Batches are a pure function of (seed, step): resuming, splitting over processes and reading ahead change no bit."""

import dataclasses
import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes import make_plan
from medseg_jax.data.cache import Cache, CachedCase, build_cache
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.io import write_image, write_label
from medseg_jax.data.pipeline import Mix, batch_at, cut, foreground_voxel, pick, place, stream
from medseg_jax.types import Geometry, UserError

PATCH = (8, 8, 8)


FACTS = {"spacing": (1.0, 1.0, 1.0), "batch_size": 4, "classes": ("a", "b")}
PLAN = make_plan(PATCH, **FACTS)
DOMAINS = {"site0": 5, "site1": 2, "site2": 3}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Cache, Dataset]:
    """10 labelled cases of 3 sites, 3 unlabelled ones, 1 to validate; every voxel of a case holds its number + 1."""
    root = tmp_path_factory.mktemp("set")
    for folder in ("imagesTr", "labelsTr", "imagesUn"):
        (root / folder).mkdir()
    notes = {}
    names = [(f"{site}_{i}", site, "train", "Tr") for site, n in DOMAINS.items() for i in range(n)]
    names += [("un_0", "site0", "train", "Un"), ("un_1", "site1", "train", "Un"), ("un_2", "site1", "train", "Un")]
    names += [("val_0", "site0", "val", "Tr")]
    for number, (name, site, split, folder) in enumerate(sorted(names)):
        shape = (6 + number % 5, 14, 20)
        geometry = Geometry(shape)
        image = np.full((*shape, 1), number + 1, np.float32)
        write_image(root / f"images{folder}" / f"{name}_0000.nii.gz", image, geometry)
        label = np.zeros(shape, np.uint8)
        label[3, 12, 18] = 1
        if folder == "Tr":
            write_label(root / "labelsTr" / f"{name}.nii.gz", label, geometry)
        notes[name] = {"domain": site, "patient": name, "split": split}
    description = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": 11,
        "file_ending": ".nii.gz",
        "medseg": {"version": 1, "cases": notes},
    }
    (root / "dataset.json").write_text(json.dumps(description))
    dataset = Dataset.open(root)
    return build_cache(dataset, PLAN, tmp_path_factory.mktemp("cache")), dataset


def batch(data, step, mix=None, **options):
    cache, dataset = data
    options = {"sample_size": PATCH, "seed": 3} | options
    return batch_at(cache, dataset, PLAN, mix or Mix(), step=step, **options)


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ------------------------------------------------------------------------------------------------------- whole batches


def test_fields_shapes_and_meaning(data):
    _, dataset = data
    got = batch(data, 0, Mix(unlabelled=2), sample_size=(10, 12, 9))
    assert {k: (v.shape, v.dtype.name) for k, v in got.items()} == {
        "image": ((4, 10, 12, 9, 1), "float32"),
        "label": ((4, 10, 12, 9), "int32"),
        "case": ((4,), "int32"),
        "domain": ((4,), "int32"),
        "start": ((4, 3), "int32"),
        "unlabelled": ((2, 10, 12, 9, 1), "float32"),
        "unlabelled_case": ((2,), "int32"),
        "unlabelled_domain": ((2,), "int32"),
    }
    for image, case, domain in (("image", "case", "domain"), ("unlabelled", "unlabelled_case", "unlabelled_domain")):
        for row in range(len(got[case])):
            index = int(got[case][row])
            assert got[image][row].max() == index + 1  # the voxels say which case they are
            assert dataset.domains[got[domain][row]] == dataset.cases[index].domain
            assert (dataset.cases[index].label is None) == (image == "unlabelled")


@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 10**6), seed=st.integers(0, 2**40), unlabelled=st.sampled_from([0, 4]))
def test_processes_together_see_the_whole_batch(data, step, seed, unlabelled):
    mix = Mix(unlabelled=unlabelled, balance="domain" if step % 2 else "case")
    whole = batch(data, step, mix, seed=seed)
    assert_equal(whole, batch(data, step, mix, seed=seed))
    for count in (2, 4):
        parts = [batch(data, step, mix, seed=seed, process=(i, count)) for i in range(count)]
        assert_equal(whole, {name: np.concatenate([part[name] for part in parts]) for name in whole})


def test_seed_and_step_matter(data):
    first = batch(data, 0)
    assert any((first["case"] != batch(data, step)["case"]).any() for step in (1, 2, 3))
    assert any((first["case"] != batch(data, 0, seed=s)["case"]).any() for s in (4, 5, 6))


@pytest.mark.parametrize(("workers", "start"), [(0, 0), (0, 12345), (2, 12345)])
def test_stream_equals_batch_at_from_any_step(data, workers, start):
    cache, dataset = data
    mix = Mix(unlabelled=2)
    options = {"sample_size": (10, 10, 10), "seed": 7}
    batches = stream(cache, dataset, PLAN, mix, workers=workers, start=start, **options)
    for step in range(start, start + 5):
        assert_equal(next(batches), batch_at(cache, dataset, PLAN, mix, step=step, **options))
    batches.close()


def test_validation_has_its_own_cases(data):
    _, dataset = data
    got = batch(data, 0, split="val")
    assert {dataset.cases[i].id for i in got["case"]} == {"val_0"}


@pytest.mark.parametrize(
    ("mix", "options", "words"),
    [
        (Mix(labelled=3), {"process": (0, 2)}, "cannot be shared equally"),
        (Mix(unlabelled=3), {"process": (0, 2)}, "3 unlabelled"),
        (Mix(unlabelled=1), {"split": "val"}, "no unlabelled val"),
        (Mix(), {"split": "test"}, "no labelled test"),
        (Mix(foreground=1.5), {}, "share"),
        (Mix(balance="site"), {}, "balance"),  # pyright: ignore[reportArgumentType]
        (Mix(), {"seed": -1}, "seed"),
    ],
)
def test_refusals_come_before_the_first_batch(data, mix, options, words):
    cache, dataset = data
    with pytest.raises(UserError, match=words):
        stream(cache, dataset, PLAN, mix, **({"sample_size": PATCH, "seed": 0} | options))


def test_a_sample_smaller_than_the_patch_is_a_mistake_of_ours(data):
    for size in ((8, 8, 7), (8, 8)):
        with pytest.raises(ValueError, match="sample_size"):
            batch(data, 0, sample_size=size)


# ------------------------------------------------------------------------------------------------------- order of cases

POOLS = st.lists(st.integers(1, 7), min_size=1, max_size=5).map(
    lambda sizes: tuple(tuple(100 * i + k for k in range(n)) for i, n in enumerate(sizes))
)


@settings(max_examples=80, deadline=None)
@given(POOLS, st.integers(1, 9), st.integers(0, 2**40), st.integers(0, 5))
def test_every_case_comes_once_an_epoch_and_every_domain_equally_often(pools, rows, seed, epoch):
    longest = max(len(pool) for pool in pools)
    steps = range(-(-(epoch + 1) * longest * len(pools) // rows) + 1)
    drawn = [[pick(seed, 0, pools, rows, step, row) for row in range(rows)] for step in steps]
    for cases in drawn:
        share = Counter(case // 100 for case in cases)
        counts = [share[i] for i in range(len(pools))]
        assert max(counts) - min(counts) <= 1
    # Rows of a batch are permuted: only whole batches tell where an epoch ends.
    for i, pool in enumerate(pools):
        seen = Counter()
        for cases in drawn:
            seen.update(case for case in cases if case // 100 == i)
            counts = [seen[case] for case in pool]
            assert max(counts) - min(counts) <= 2
            if sum(counts) % len(pool) == 0:
                assert max(counts) == min(counts)


def test_epochs_and_domains_are_shuffled():
    pools = (tuple(range(20)),)
    epochs = [[pick(1, 0, pools, 20, step, row) for row in range(20)] for step in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    last = [pick(1, 0, ((0,), (100,)), 2, step, 1) for step in range(50)]
    assert 10 < last.count(0) < 40  # the forced-foreground row is no domain's own


def test_few_rows_rotate_through_the_domains(data):
    got = [int(d) for step in range(3) for d in batch(data, step, Mix(labelled=1, balance="domain"))["domain"]]
    assert sorted(got) == [0, 1, 2]
    shares = Counter(int(d) for step in range(30) for d in batch(data, step, Mix(balance="domain"))["domain"])
    assert set(shares.values()) == {40}


# ------------------------------------------------------------------------------------------------------ where rows fall


@settings(max_examples=40, deadline=None)
@given(step=st.integers(0, 10**6), foreground=st.sampled_from([0.33, 0.5, 1.0]), margin=st.integers(0, 5))
def test_forced_rows_hold_foreground_in_the_patch(data, step, foreground, margin):
    sample = tuple(p + 2 * margin for p in PATCH)
    got = batch(data, step, Mix(foreground=foreground), sample_size=sample)
    middle = tuple(slice(margin, margin + p) for p in PATCH)
    for row in range(round(4 * (1 - foreground)), 4):
        assert (got["label"][row][middle] == 1).any()


def test_no_row_is_forced_without_a_share(data):
    hits = [(batch(data, step, Mix(foreground=0))["label"] > 0).any((1, 2, 3)).mean() for step in range(60)]
    assert np.mean(hits) < 0.3  # the only foreground voxel lies in a corner


def test_slices_for_a_flat_network(data):
    cache, dataset = data
    flat = make_plan(PATCH[:2], **FACTS)
    got = batch_at(cache, dataset, flat, Mix(foreground=1.0), sample_size=(12, 10), seed=0, step=4)
    assert got["image"].shape == (4, 12, 10, 1)
    assert got["label"].shape == (4, 12, 10)
    assert (got["label"][:, 2:10, 1:9] == 1).any((1, 2)).all()
    free = [
        batch_at(cache, dataset, flat, Mix(foreground=0.0), sample_size=(8, 8), seed=0, step=k)["image"].mean()
        for k in range(5)
    ]
    assert len(set(free)) > 1


@settings(max_examples=200, deadline=None)
@given(
    shape=st.tuples(*[st.integers(1, 30)] * 3),
    patch=st.tuples(*[st.integers(1, 24)] * 3),
    margin=st.tuples(*[st.integers(0, 9)] * 3),
    forced=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_place_keeps_the_patch_inside_or_centred(shape, patch, margin, forced, seed):
    rng = np.random.default_rng(seed)
    voxel = rng.integers(0, shape) if forced else None
    sample = tuple(p + m for p, m in zip(patch, margin, strict=True))
    start, size = place(rng, shape, patch, sample, voxel)
    assert size == sample
    for axis in range(3):
        low = start[axis] + margin[axis] // 2  # where the patch in the sample's middle begins
        free = shape[axis] - patch[axis]
        if free >= 0:
            assert 0 <= low <= free
        else:
            assert abs((-low) - (low + patch[axis] - shape[axis])) <= 1
        if voxel is not None:
            assert low <= voxel[axis] < low + patch[axis]


def test_place_reaches_every_corner_and_every_voxel_evenly():
    rng = np.random.default_rng(0)
    starts = Counter(place(rng, (1, 10, 10), (4, 4), (8, 8), None)[0][1] for _ in range(4000))
    assert sorted(starts) == list(range(-2, 5))
    assert max(starts.values()) < 1.3 * min(starts.values())
    slices = Counter(place(rng, (5, 10, 10), (4, 4), (4, 4), None)[0][0] for _ in range(2000))
    assert sorted(slices) == list(range(5))


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(*[st.integers(1, 8)] * 3),
    st.tuples(*[st.integers(-12, 12)] * 3),
    st.tuples(*[st.integers(1, 12)] * 3),
)
def test_cut_is_slicing_of_a_padded_array(shape, start, size):
    array = np.arange(1, np.prod(shape) * 2 + 1, dtype=np.float32).reshape(*shape, 2)
    padded = np.pad(array, ((12, 24),) * 3 + ((0, 0),))
    wanted = padded[tuple(slice(s + 12, s + 12 + n) for s, n in zip(start, size, strict=True))]
    np.testing.assert_array_equal(cut(array, start, size), wanted)


def test_small_cases_are_padded_on_both_sides(data):
    cache, dataset = data
    wide = dataclasses.replace(PLAN, patch_size=(32, 16, 16))
    got = batch_at(cache, dataset, wide, Mix(foreground=0.0), sample_size=(32, 16, 16), seed=0, step=0)
    for image, case in zip(got["image"], got["case"], strict=True):
        inside = image[..., 0] == case + 1
        d, h, w = (np.flatnonzero(inside.any(axes)) for axes in ((1, 2), (0, 2), (0, 1)))
        shape = cache.case(dataset.cases[case].id).image.shape[:3]
        assert (len(d), len(h), len(w)) == tuple(min(n, m) for n, m in zip(shape, (32, 16, 16), strict=True))
        assert d[0] == (32 - shape[0]) // 2
        assert image[~inside].max(initial=0) == 0


def test_only_the_patch_is_read():
    class Spy:
        shape, dtype, reads = (1024, 1024, 1024, 1), np.dtype(np.float32), []

        def __getitem__(self, key):
            self.reads.append(key)
            return np.ones([k.stop - k.start for k in key] + [1], np.float32)

    spy = Spy()
    assert cut(spy, (1000, 1020, -2), (40, 8, 8)).sum() == 24 * 4 * 6  # pyright: ignore[reportArgumentType]
    assert spy.reads == [(slice(1000, 1024), slice(1020, 1024), slice(0, 6))]


def test_each_present_class_is_drawn_equally_often():
    foreground = {"a": np.zeros((400, 3), np.int32), "b": np.ones((1, 3), np.int32), "c": np.zeros((0, 3), np.int32)}
    case = CachedCase(np.zeros((2, 2, 2, 1)), None, None, foreground)  # pyright: ignore[reportArgumentType]
    rng = np.random.default_rng(0)
    rare = sum(int(foreground_voxel(rng, case, ("a", "b", "c"))[0]) for _ in range(1000))
    assert 430 < rare < 570
    assert foreground_voxel(rng, case, ("c",)) is None

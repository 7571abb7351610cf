"""Phantoms: the same bytes for the same seed, splits by patient and site, anatomy, geometry, difficulty."""

from itertools import pairwise
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg_jax.data import geometry as space
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.synthetic import draw_machine, make_phantoms
from medseg_jax.data.verify import check_dataset
from medseg_jax.types import UserError


def files(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Dataset:
    return make_phantoms(tmp_path_factory.mktemp("phantoms") / "2d", cases=30, unlabelled=6, size=32)


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> Dataset:
    return make_phantoms(tmp_path_factory.mktemp("phantoms") / "3d", dim=3, cases=12, sites=2, unlabelled=2, size=24)


@pytest.mark.parametrize("dim", [2, 3])
def test_the_same_seed_writes_the_same_bytes(tmp_path, dim):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_phantoms(tmp_path / name, dim=dim, cases=4, sites=2, unlabelled=1, size=20, seed=seed)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    one, other = files(tmp_path / "a"), files(tmp_path / "c")
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one if name.startswith("images"))


def test_splits_follow_sites_and_patients(pictures):
    assert pictures.domains == ("site0", "site1", "site2")
    assert {case.domain for case in pictures.subset("test")} == {"site2"}
    assert {case.domain for case in pictures.subset("train", None) + pictures.subset("val")} == {"site0", "site1"}
    assert len(pictures.subset("test")) == 10
    assert len(pictures.subset("val")) == 4
    assert {case.domain for case in pictures.subset("val")} == {"site0", "site1"}
    assert len(pictures.subset("train", labelled=False)) == 6
    patients = {split: {case.patient for case in pictures.subset(split, None)} for split in ("train", "val", "test")}
    assert not patients["train"] & patients["val"]
    assert not (patients["train"] | patients["val"]) & patients["test"]
    assert len(patients["test"]) == 5


def test_anatomy(pictures, volumes):
    for dataset in (pictures, volumes):
        for case in dataset.cases:
            image, label, geometry = dataset.load(case)
            assert image.shape[:-1] == geometry.shape
            if label is None:
                continue
            counts = np.bincount(label.ravel(), minlength=4)
            assert len(counts) == 4
            assert counts[1] > counts[2] > 4, case.id
            assert counts[3] > 4, case.id


def test_pictures_are_colour_of_several_sizes(pictures):
    shapes = {pictures.load(case)[0].shape for case in pictures.cases}
    assert len(shapes) > 8
    assert all(shape[2] == 3 and 26 < shape[0] < 38 for shape in shapes)


def test_volumes_are_anisotropic_and_turned(volumes):
    orientations = set()
    for case in volumes.cases:
        _, label, geometry = volumes.load(case)
        orientations.add(nib.aff2axcodes(geometry.affine))
        d, h, w = space.spacing_canonical(geometry)
        assert d > 1.5 * h
        assert h == pytest.approx(w)
        if label is not None:
            # Whatever the orientation of the file, the vessel runs along A in canonical space.
            where = np.argwhere(space.to_canonical(label, geometry, channels=False) == 3) * (d, h, w)
            assert np.ptp(where, axis=0).argmax() == 1
    assert len(orientations) > 6


def test_two_cases_of_a_patient_are_alike(pictures):
    organs: dict[str, list[np.ndarray]] = {}
    for case in pictures.cases:
        if case.label is not None:
            label = pictures.load(case)[1]
            assert label is not None
            organ = Image.fromarray((label == 1).astype(np.uint8)).resize((24, 24), Image.Resampling.NEAREST)
            organs.setdefault(case.patient, []).append(np.asarray(organ) > 0)
    pairs = [pair for pair in organs.values() if len(pair) == 2]
    assert len(pairs) == 15
    same = [iou(a, b) for a, b in pairs]
    others = [iou(a, c) for (a, _), (c, _) in pairwise(pairs)]
    assert np.mean(same) > np.mean(others) + 0.2


def iou(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def test_the_last_site_is_another_world():
    machines = [draw_machine(np.random.default_rng([0, 3, site]), site, 4, 2) for site in range(4)]
    seen, unseen = machines[:3], machines[3]
    assert unseen.noise > max(machine.noise for machine in seen)
    assert unseen.contrast < min(machine.contrast for machine in seen)
    assert all(np.abs(unseen.cast - machine.cast).max() > 0.1 for machine in seen)


def test_they_are_a_clean_data_set(pictures, volumes):
    assert check_dataset(pictures) == []
    assert check_dataset(volumes) == []


def test_one_site_has_no_test_set(tmp_path):
    dataset = make_phantoms(tmp_path, cases=6, sites=1, size=16)
    assert [len(dataset.subset(split)) for split in ("train", "val", "test")] == [4, 2, 0]


@pytest.mark.parametrize("wrong", [{"dim": 4}, {"sites": 0}, {"cases": 2}, {"unlabelled": -1}, {"size": 4}])
def test_impossible_phantoms(tmp_path, wrong):
    with pytest.raises(UserError, match="No phantoms"):
        make_phantoms(tmp_path, **wrong)


def test_nothing_is_overwritten(tmp_path):
    make_phantoms(tmp_path, cases=3, size=16)
    before = files(tmp_path)
    with pytest.raises(UserError, match="already"):
        make_phantoms(tmp_path, cases=3, size=16, seed=1)
    assert files(tmp_path) == before

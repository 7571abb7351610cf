"""The list of sources, what it says, and what it refuses; sets that are not at hand, in small."""

import json
import shutil
from collections import Counter
from pathlib import Path

import h5py
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from medseg_jax import Dataset, cli
from medseg_jax.data import sources
from medseg_jax.data.views import labelled_view
from medseg_jax.types import UserError


def picture(path: Path, values, size=(16, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(len(path.name)).choice(np.array(values, np.uint8), size)).save(path)


def volume(path: Path, most: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.Nifti1Image(np.random.default_rng(0).integers(0, most + 1, (6, 7, 8)).astype(np.uint8), np.eye(4)).to_filename(
        path
    )


def test_every_source_is_complete():
    known = sources.sources()
    assert len(known) >= 20
    for name, source in known.items():
        assert source.name == name
        assert all((source.title, source.licence, source.citation, source.origin, source.access, source.split))
        assert source.layout.strip()
        assert source.needs


def test_the_list_and_one_of_it(capsys):
    assert cli.main(["data", "sources", "--json"]) == 0
    assert {entry["name"] for entry in json.loads(capsys.readouterr().out)} == set(sources.sources())
    assert cli.main(["data", "sources", "hecktor"]) == 0
    assert "sign the agreement" in capsys.readouterr().out


def test_unknown_names_and_other_layouts(tmp_path, capsys):
    (tmp_path / "src").mkdir()
    assert cli.main(["data", "convert", "--source", "kvasir", str(tmp_path / "src"), str(tmp_path / "dst")]) == 1
    assert "kvasir_seg" in capsys.readouterr().err
    with pytest.raises(UserError, match="not the layout of kvasir_seg") as error:
        sources.convert("kvasir_seg", tmp_path / "src", tmp_path / "dst", quiet=True)
    assert "masks/cju0qkwl35piu0993l0dewei2.jpg" in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["src"]


def test_fundus(tmp_path):
    for domain in ("Domain1", "Domain2"):
        for split in ("train", "test"):
            for name in "abcdef":
                picture(tmp_path / "src" / domain / split / "image" / f"{split}{name}.png", range(256))
                picture(tmp_path / "src" / domain / split / "mask" / f"{split}{name}.png", (0, 128, 255))
    dataset = sources.convert("fundus", tmp_path / "src", tmp_path / "dst", quiet=True)
    assert dataset.labels.names == ("rim", "cup")
    assert dataset.domains == ("Domain1", "Domain2")
    assert Counter(case.split for case in dataset.cases) == {"train": 8, "val": 4, "test": 12}
    assert dict(Dataset.open(tmp_path / "dst").labels.scores) == {"disc": (1, 2), "cup": (2,)}


def test_prostate_acdc_and_hecktor(tmp_path):
    for site in ("BMC", "HK"):
        for i in range(6):
            volume(tmp_path / "p" / site / f"Case{i:02d}.nii.gz", 200)
            volume(tmp_path / "p" / site / f"Case{i:02d}_segmentation.nii.gz", 2)
    dataset = sources.convert("prostate", tmp_path / "p", tmp_path / "dst", quiet=True)
    assert (dataset.labels.names, dataset.domains) == (("prostate",), ("BMC", "HK"))
    for i in range(1, 7):
        for frame in (1, 12):
            name = f"patient{i:03d}_frame{frame:02d}"
            volume(tmp_path / "a" / "training" / f"patient{i:03d}" / f"{name}.nii.gz", 200)
            volume(tmp_path / "a" / "training" / f"patient{i:03d}" / f"{name}_gt.nii.gz", 3)
    dataset = sources.convert("acdc", tmp_path / "a", tmp_path / "dst2", quiet=True)
    assert Counter(case.split for case in dataset.cases) == {"train": 8, "val": 4}
    assert len({case.patient for case in dataset.cases}) == 6
    for centre in ("CHUM", "MDA"):
        for i in range(2):
            for modality in ("CT", "PT"):
                volume(tmp_path / "h" / "imagesTr" / f"{centre}-{i:03d}__{modality}.nii.gz", 200)
            volume(tmp_path / "h" / "labelsTr" / f"{centre}-{i:03d}.nii.gz", 2)
    dataset = sources.convert("hecktor", tmp_path / "h", tmp_path / "dst3", quiet=True)
    assert (dataset.labels.names, dataset.channels) == (("GTVp", "GTVn"), ("CT", "PET"))
    assert dataset.domains == ("CHUM", "MDA")


def test_isic_as_released(tmp_path):
    for split in ("Training", "Validation"):
        for i in range(3):
            name = f"ISIC_{i + 10 * len(split):07d}"
            picture(tmp_path / "i" / f"ISIC2018_Task1-2_{split}_Input" / f"{name}.jpg", range(256))
            picture(tmp_path / "i" / f"ISIC2018_Task1_{split}_GroundTruth" / f"{name}_segmentation.png", (0, 255))
    dataset = sources.convert("isic2018", tmp_path / "i", tmp_path / "dst", quiet=True)
    assert Counter(case.split for case in dataset.cases) == {"train": 3, "val": 3}


def test_glas_as_released(tmp_path):
    for name in ("train_1", "train_2", "testA_1"):
        picture(tmp_path / "g" / f"{name}.bmp", range(256))
        picture(tmp_path / "g" / f"{name}_anno.bmp", (0, 1, 2))
    dataset = sources.convert("glas", tmp_path / "g", tmp_path / "dst2", quiet=True)
    assert Counter(case.split for case in dataset.cases) == {"train": 1, "val": 1, "test": 1}


def test_idrid_as_released(tmp_path):
    for i, part in [*((i, "a. Training Set") for i in range(1, 8)), (55, "b. Testing Set")]:
        picture(tmp_path / "d" / "1. Original Images" / part / f"IDRiD_{i:02d}.jpg", range(256))
        for k, name in enumerate(("MA", "HE", "EX", "SE", "OD")):
            picture(
                tmp_path / "d" / "2. All Groundtruths" / part / f"{k}. {name}" / f"IDRiD_{i:02d}_{name}.tif", (0, 76)
            )
    dataset = sources.convert("idrid", tmp_path / "d", tmp_path / "dst3", quiet=True)
    assert Counter(case.split for case in dataset.cases) == {"train": 2, "val": 5, "test": 1}


@pytest.fixture
def pancreas(tmp_path) -> Path:
    """Twelve labelled scans, two unlabelled ones, two to test; the even ones are longer in z than in x and y."""
    folder = tmp_path / "src"
    folder.mkdir()
    for number in range(1, 17):
        rng, shape = np.random.default_rng(number), (9, 8, 12 - 5 * (number % 2))
        with h5py.File(folder / f"{number:04d}.h5", "w") as file:
            file["image"] = rng.normal(size=shape).astype(np.float32)
            file["label"] = rng.integers(0, 2, shape).astype(np.uint8)
    for name, numbers in (("train_lab", range(1, 13)), ("train_unlab", (13, 14)), ("test", (15, 16))):
        (folder / f"{name}.txt").write_text("".join(f"{number:04d}.h5\n" for number in numbers))
    return folder


def test_pancreas_joins_the_lists_and_reads_every_scan_as_x_y_z(pancreas, tmp_path):
    dataset = sources.convert("pancreas_nih", pancreas, tmp_path / "dst", quiet=True)
    assert [case.id for case in dataset.subset("test")] == ["0015", "0016"]
    assert [case.id for case in dataset.subset("val")] == ["0001", "0006", "0011"]
    assert len(dataset.subset("train")) == 11
    for name in ("0001", "0002"):
        image, label, _ = dataset.load(next(case for case in dataset.cases if case.id == name))
        with h5py.File(pancreas / f"{name}.h5") as stored:
            np.testing.assert_array_equal(image[..., 0], stored["image"][()].T)
            np.testing.assert_array_equal(label, stored["label"][()].T)


def test_the_papers_protocol_validates_on_the_test_scans_and_frees_their_labelled_ones(pancreas, tmp_path):
    split = "train=train.list,val=test.list"
    dataset = sources.convert("pancreas_nih", pancreas, tmp_path / "dst", quiet=True, split=split)
    assert [case.id for case in Dataset.open(tmp_path / "dst").subset("val")] == ["0015", "0016"]
    twelve = tuple(f"{number:04d}" for number in range(1, 13))
    assert [case.id for case in labelled_view(dataset, twelve).subset("train")] == list(twelve)

    atria, names = tmp_path / "la", "ABCDE"
    for name in names:
        (atria / name).mkdir(parents=True)
        shutil.copy(pancreas / "0001.h5", atria / name / "mri_norm2.h5")
    (atria / "train.list").write_text("\n".join(names[:4]))
    (atria / "test.list").write_text(names[4])
    dataset = sources.convert("la2018", atria, tmp_path / "dst2", quiet=True, split=split)
    assert [case.id for case in dataset.subset("val")] == ["E"]
    assert [case.id for case in labelled_view(dataset, 4).subset("train")] == list("ABCD")

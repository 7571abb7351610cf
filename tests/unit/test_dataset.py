"""The canonical folder: what opens, what is refused and with which words, splits, labels, loading, fingerprint."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset, read_description, unknown_values, value_counts
from medseg_jax.types import Case, Geometry, Labels, UserError

PLAIN = {
    "channel_names": {"0": "MR"},
    "labels": {"background": 0, "organ": 1, "lesion": 2},
    "numTraining": 6,
    "file_ending": ".nii.gz",
}


def volume(path: Path, values: int = 3, shape: tuple[int, ...] = (4, 5, 6), seed: int = 0, affine=None) -> None:
    array = np.random.default_rng(seed).integers(0, values, shape).astype(np.uint8)
    io.write_image(path, array[..., None], Geometry(shape, np.diag([1.0, 1, 2, 1]) if affine is None else affine))


def folder(root: Path, content: dict | None = None, ids: tuple[str, ...] = tuple("abcdef"), **changes) -> Path:
    """A plain nnU-Net folder of 3-D cases."""
    for number, id in enumerate(ids):
        volume(root / "imagesTr" / f"{id}_0000.nii.gz", 200, seed=number)
        volume(root / "labelsTr" / f"{id}.nii.gz", seed=number)
    (root / "dataset.json").write_text(json.dumps((content or PLAIN) | changes))
    return root


def refused(root: Path, **changes) -> str:
    """The error that a changed dataset.json meets; a value of None takes the key out."""
    content = {key: value for key, value in (PLAIN | changes).items() if value is not None}
    root.mkdir(exist_ok=True)
    (root / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        Dataset.open(root)
    assert error.value.file is not None
    return str(error.value)


# ----------------------------------------------------------------------------------------------------------- what opens


def test_plain_nnunet_folder_opens(tmp_path):
    dataset = Dataset.open(folder(tmp_path / "Dataset001_Things"))
    assert dataset.name == "Dataset001_Things"
    assert dataset.channels == ("MR",)
    assert dataset.labels == Labels.simple("organ", "lesion")
    assert [case.id for case in dataset.cases] == list("abcdef")
    assert dataset.unit == "mm"
    assert dataset.domains == ("",)


def test_every_fifth_patient_validates(tmp_path):
    dataset = Dataset.open(folder(tmp_path))
    assert [case.id for case in dataset.subset("val")] == ["a", "f"]
    notes = {id: {"patient": patient} for id, patient in zip("abcdef", ["x", "x", "y", "y", "z", "w"], strict=True)}
    dataset = Dataset.open(folder(tmp_path, medseg={"cases": notes}))
    assert [case.id for case in dataset.subset("val")] == ["f"]
    assert [case.id for case in dataset.subset("train")] == list("abcde")


def test_one_patient_trains(tmp_path):
    assert [case.split for case in Dataset.open(folder(tmp_path, ids=("a",))).cases] == ["train"]


def test_given_splits_domains_and_patients(tmp_path):
    notes = {id: {"split": "val" if id == "c" else "train", "domain": f"site{id < 'c'}"} for id in "abcdef"}
    notes["a"]["patient"] = "p7"
    dataset = Dataset.open(folder(tmp_path, medseg={"version": 1, "cases": notes}))
    assert [case.id for case in dataset.subset("val")] == ["c"]
    assert dataset.domains == ("siteFalse", "siteTrue")
    assert dataset.case("a").patient == "p7"


def test_test_and_unlabelled_cases(tmp_path):
    root = folder(tmp_path)
    volume(root / "imagesTs" / "t_0000.nii.gz")
    volume(root / "imagesTs" / "u_0000.nii.gz")
    volume(root / "labelsTs" / "t.nii.gz")
    volume(root / "imagesUn" / "v_0000.nii.gz")
    dataset = Dataset.open(root)
    assert [case.id for case in dataset.subset("test")] == ["t"]
    assert [case.id for case in dataset.subset("test", labelled=None)] == ["t", "u"]
    assert [case.id for case in dataset.subset("train", labelled=False)] == ["v"]
    assert dataset.load(dataset.case("v"))[1] is None
    with pytest.raises(UserError, match="split"):
        dataset.subset("valid")


def test_unlabelled_case_follows_its_patient(tmp_path):
    root = folder(tmp_path)
    volume(root / "imagesUn" / "v_0000.nii.gz")
    notes = {"a": {"patient": "A"}, "v": {"patient": "A"}}
    (root / "dataset.json").write_text(json.dumps(PLAIN | {"medseg": {"cases": notes}}))
    dataset = Dataset.open(root)
    assert dataset.case("a").split == dataset.case("v").split == "val"


def test_several_channels_and_names_with_numbers(tmp_path):
    content = PLAIN | {"channel_names": {"1": "PET", "0": "CT"}}
    root = folder(tmp_path, content, ids=("scan_0001", "scan_0002"))
    for id in ("scan_0001", "scan_0002"):
        volume(root / "imagesTr" / f"{id}_0001.nii.gz", seed=5)
    dataset = Dataset.open(root)
    assert dataset.channels == ("CT", "PET")
    assert [case.id for case in dataset.cases] == ["scan_0001", "scan_0002"]
    assert [path.name for path in dataset.cases[0].images] == ["scan_0001_0000.nii.gz", "scan_0001_0001.nii.gz"]
    image, label, _ = dataset.load(dataset.cases[0])
    assert image.shape == (4, 5, 6, 2)
    assert label is not None
    assert label.shape == (4, 5, 6)


@pytest.mark.parametrize("name", ["{}_0000.png", "{}.png"])
def test_rgb_pictures(tmp_path, name):
    content = PLAIN | {"channel_names": {"0": "R", "1": "G", "2": "B"}, "file_ending": ".png"}
    geometry = Geometry((7, 9), unit="px")
    for id in ("im_0001", "im_0002"):
        io.write_image(tmp_path / "imagesTr" / name.format(id), np.full((7, 9, 3), 9, np.uint8), geometry)
        io.write_label(tmp_path / "labelsTr" / f"{id}.png", np.ones((7, 9), np.uint8), geometry)
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    dataset = Dataset.open(tmp_path)
    assert [case.id for case in dataset.cases] == ["im_0001", "im_0002"]
    assert dataset.unit == "px"
    assert dataset.load(dataset.cases[1])[0].shape == (7, 9, 3)


def test_hidden_files_are_no_cases(tmp_path):
    root = folder(tmp_path)
    (root / "imagesTr" / "._a_0000.nii.gz").write_bytes(b"resource fork")
    assert len(Dataset.open(root).cases) == 6


def test_nnunets_dataset_key(tmp_path):
    root = folder(tmp_path)
    shutil.move(root / "imagesTr", root / "pictures")
    listed = {"q": {"images": ["pictures/a_0000.nii.gz"], "label": "labelsTr/a.nii.gz"}}
    (root / "dataset.json").write_text(json.dumps(PLAIN | {"dataset": listed}))
    dataset = Dataset.open(root)
    assert [case.id for case in dataset.cases] == ["q"]
    assert dataset.load(dataset.cases[0])[0].shape == (4, 5, 6, 1)
    dataset.save()
    assert json.loads((root / "dataset.json").read_text())["dataset"] == listed
    assert Dataset.open(root) == Dataset.open(root)


# ------------------------------------------------------------------------------------------------------ what is refused


def test_no_such_folder_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        Dataset.open("data/mine")
    assert str(tmp_path / "data" / "mine") in str(caught.value)
    assert "medseg data convert SRC data/mine" in str(caught.value)
    assert "--data FOLDER" in str(caught.value)


def test_no_dataset_json(tmp_path):
    with pytest.raises(UserError) as error:
        Dataset.open(tmp_path)
    assert f"medseg data convert {tmp_path}" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [
        {"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "organ"}, "training": []},
        {"labels": {"0": "background", "1": "organ"}, "file_ending": ".nii.gz", "channel_names": {"0": "MR"}},
    ],
)
def test_msd_form_tells_to_convert(tmp_path, content):
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        Dataset.open(tmp_path)
    assert error.value.remedy is not None
    assert error.value.remedy.startswith("medseg data convert")


@pytest.mark.parametrize(
    "text", ['{"labels": ', "[1, 2]", '{"labels": {"background": 0, "a": 1, "a": 2}}', "[" * 10**5]
)
def test_malformed_json(tmp_path, text):
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(UserError) as error:
        Dataset.open(tmp_path)
    assert error.value.file == tmp_path / "dataset.json"


def test_missing_and_misspelt_keys(tmp_path):
    for key in ("channel_names", "labels", "file_ending"):
        assert f"lacks the key {key!r}" in refused(tmp_path, **{key: None})
    assert "rename 'file_endings' to 'file_ending'" in refused(tmp_path, file_ending=None, file_endings=".png")
    assert "must be an object" in refused(tmp_path, labels=["organ"])


def test_file_ending(tmp_path):
    assert "did you mean '.nii.gz'?" in refused(tmp_path, file_ending=".nii.gzip")
    assert "JPEG cannot hold labels" in refused(tmp_path, file_ending=".jpg")
    volume(tmp_path / "imagesTr" / "a_0000.nii.gz")
    assert "files ending in .nii.gz" in refused(tmp_path, file_ending=".png")


@pytest.mark.parametrize("names", [{}, {"1": "CT"}, {"0": "CT", "2": "PET"}, {"0": 7}, {"CT": "0"}])
def test_channel_names(tmp_path, names):
    assert "number the channels from 0" in refused(tmp_path, channel_names=names)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"organ": 1}, "background must have the value 0"),
        ({"background": 1, "organ": 0}, "background must have the value 0"),
        ({"backgound": 0, "organ": 1}, "did you mean 'backgound'?"),
        ({"background": 0}, "no class"),
        ({"background": 0, "organ": 0}, "Only the background"),
        ({"background": 0, "organ": 1, "lesion": 1}, "share one value"),
        ({"background": 0, "organ": 1, "lesion": 3}, "not consecutive"),
        ({"background": 0, "organ": 255}, "numbers the classes anew"),
        ({"background": 0, "organ": -1}, "no usable value"),
        ({"background": 0, "organ": 1.0}, "no usable value"),
        ({"background": 0, "organ": True}, "no usable value"),
        ({"background": 0, "organ": "1"}, "no usable value"),
        ({"background": 0, "organ": []}, "no usable value"),
        ({"background": 0, "organ": [1, 1]}, "no usable value"),
        ({"background": 0, " ": 1}, "no usable value"),
        ({"background": 0, "organ": 1, "ignore": 1}, "ignore label must be the highest"),
        ({"background": 0, "organ": 1, "ignore": 255}, "ignore label must be the highest"),
        ({"background": 0, "whole": [1, 2], "core": 2}, "lacks the key 'regions_class_order'"),
    ],
)
def test_labels(tmp_path, labels, words):
    assert words in refused(tmp_path, labels=labels)


@pytest.mark.parametrize("order", [[1], [2, 3], ["1", "2"], 3])
def test_regions_class_order(tmp_path, order):
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    assert "regions_class_order" in refused(tmp_path, labels=labels, regions_class_order=order)


@pytest.mark.parametrize(
    ("medseg", "words"),
    [
        ([], "must be an object"),
        ({"units": "mm"}, "did you mean 'unit'?"),
        ({"unit": "cm"}, "'mm', 'px'"),
        ({"version": 2}, "another version"),
        ({"overlapping": 1}, '"overlapping"'),
        ({"cases": []}, '"cases"'),
        ({"cases": {"a": {"split": "vall"}}}, "did you mean 'val'?"),
        ({"cases": {"a": {"pateint": "p"}}}, "did you mean 'patient'?"),
        ({"cases": {"a": {"patient": 3}}}, "not understood"),
        ({"cases": {"a": {"split": "train"}}}, "to some cases only"),
        ({"overlapping": True}, "bit i set"),
    ],
)
def test_our_own_key(tmp_path, medseg, words):
    folder(tmp_path)
    assert words in refused(tmp_path, medseg=medseg)


@pytest.mark.parametrize("id", ["../a", "..", "/etc/passwd", "a/b", "C:\\a", "", ".a", "a\nb"])
def test_ids_are_file_names(tmp_path, id):
    assert "plain file name" in refused(tmp_path, medseg={"cases": {id: {"split": "train"}}})
    assert "plain file name" in refused(tmp_path, dataset={id: {"images": ["a.nii.gz"]}})


@pytest.mark.parametrize(
    "path", ["../secret.nii.gz", "x/../../y.nii.gz", "/etc/passwd", "C:\\x.nii.gz", "..\\x.nii.gz"]
)
def test_paths_stay_inside(tmp_path, path):
    assert "points outside its folder" in refused(tmp_path, dataset={"a": {"images": [path], "label": "l.nii.gz"}})
    assert "points outside its folder" in refused(tmp_path, dataset={"a": {"images": ["i.nii.gz"], "label": path}})


@pytest.mark.parametrize("entry", [[], {"label": "l"}, {"images": "a"}, {"images": [3]}, {"images": [""]}])
def test_malformed_dataset_key(tmp_path, entry):
    refused(tmp_path, dataset={"a": entry})


def test_a_case_cannot_be_in_two_folders(tmp_path):
    root = folder(tmp_path)
    volume(root / "imagesTs" / "b_0000.nii.gz")
    with pytest.raises(UserError, match="two folders"):
        Dataset.open(root)


def test_test_cases_cannot_train(tmp_path):
    root = folder(tmp_path)
    volume(root / "imagesTs" / "t_0000.nii.gz")
    (root / "dataset.json").write_text(json.dumps(PLAIN | {"medseg": {"cases": {"t": {"split": "train"}}}}))
    with pytest.raises(UserError, match="imagesTs"):
        Dataset.open(root)


# --------------------------------------------------------------------------------------------------------------- labels


def test_regions_and_ignore_label(tmp_path):
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": 3, "ignore": 4}
    dataset = Dataset.open(folder(tmp_path, labels=labels, regions_class_order=[1, 2, 3]))
    assert dataset.labels == Labels(
        ("whole", "core", "enhancing"), ((1, 2, 3), (2, 3), (3,)), ignore=4, exclusive=False, order=(1, 2, 3)
    )


def test_more_regions_than_a_label_map_has_bits_are_refused(tmp_path):
    regions = {"whole": list(range(1, 17)), **{f"r{i}": i for i in range(1, 17)}}
    order = [1, *range(1, 17)]
    root = folder(tmp_path, labels={"background": 0, **regions}, regions_class_order=order)
    with pytest.raises(UserError, match=r"(?s)Too many overlapping.*dataset\.json.*17.*at most 16"):
        Dataset.open(root)
    many = Labels(tuple(regions), tuple((i + 1,) for i in range(17)), exclusive=False)
    with pytest.raises(UserError, match="at most 16"):
        many.decode(np.zeros((2, 2, 17)))
    assert replace(many, exclusive=True).decode(np.eye(18)[[17]]) == 17


def test_single_valued_lists_are_plain_classes(tmp_path):
    dataset = Dataset.open(folder(tmp_path, labels={"background": [0], "organ": [1], "lesion": [2]}))
    assert dataset.labels == Labels.simple("organ", "lesion")


@pytest.mark.parametrize(
    "labels",
    [
        Labels.simple("organ", "lesion", ignore=3),
        Labels.overlapping("lung", "heart", "clavicle"),
        Labels.overlapping("lung"),
        Labels(("whole", "core"), ((1, 2), (2,)), exclusive=False, order=(1, 2)),
        Labels(("b", "a"), ((2,), (1,))),
    ],
)
def test_save_and_open_again(tmp_path, labels):
    source = Dataset.open(folder(tmp_path))
    cases = tuple(
        Case(c.id, c.images, c.label, f"site{c.id < 'c'}", f"p{c.id}", "val" if c.id == "b" else "train")
        for c in source.cases
    )
    written = Dataset(tmp_path, "Things", ("MR",), labels, cases, ".nii.gz", "mm", {"licence": "CC0"})
    written.save()
    assert Dataset.open(tmp_path) == written
    assert read_description(tmp_path / "dataset.json") == (("MR",), labels)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dataset.json", "imagesTr", "labelsTr"]


def test_bit_masks_are_regions_to_nnunet(tmp_path):
    dataset = Dataset.open(folder(tmp_path))
    Dataset(tmp_path, "X", ("MR",), Labels.overlapping("a", "b"), dataset.cases, ".nii.gz").save()
    content = json.loads((tmp_path / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "a": [1, 3], "b": [2, 3]}
    assert content["regions_class_order"] == [1, 2]
    assert content["numTraining"] == 6


def test_labels_that_json_cannot_express_are_not_written(tmp_path):
    dataset = Dataset.open(folder(tmp_path))
    before = (tmp_path / "dataset.json").read_bytes()
    with pytest.raises(UserError):
        Dataset(tmp_path, "X", ("MR",), Labels(("a",), ((7,),)), dataset.cases, ".nii.gz").save()
    with pytest.raises(UserError, match="cannot express"):
        Dataset(
            tmp_path, "X", ("MR",), Labels(("a", "b"), ((1,), (2,)), exclusive=False), dataset.cases, ".nii.gz"
        ).save()
    assert (tmp_path / "dataset.json").read_bytes() == before


def test_files_outside_the_folder_are_not_written(tmp_path):
    root = folder(tmp_path / "inside")
    dataset = Dataset.open(root)
    for case in (replace(dataset.cases[0], id="../a"), replace(dataset.cases[0], label=tmp_path / "a.nii.gz")):
        with pytest.raises(UserError):
            replace(dataset, cases=(case,)).save()
    assert Dataset.open(root) == dataset


def test_value_counts_in_slabs():
    label = np.arange(5_000_000, dtype=np.uint32).reshape(50, -1) % 7
    label = label.astype(np.uint8)
    assert value_counts(label) == {int(v): int(n) for v, n in zip(*np.unique(label, return_counts=True), strict=True)}
    assert value_counts(np.zeros((0, 3), np.uint8)) == {}


def test_unknown_values():
    labels = Labels.simple("organ", ignore=2)
    assert unknown_values(np.array([[0, 1], [2, 1]], np.uint8), labels) == {}
    assert unknown_values(np.array([0, 3, 3, 900], np.uint16), labels) == {3: 2, 900: 1}


# -------------------------------------------------------------------------------------------------------------- loading


def test_load_refuses_what_does_not_belong_together(tmp_path):
    root = folder(tmp_path)
    volume(root / "labelsTr" / "b.nii.gz", shape=(4, 5, 7))
    volume(root / "labelsTr" / "c.nii.gz", affine=np.array([[1.0, 0, 0, 9], [0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]))
    volume(root / "labelsTr" / "d.nii.gz", values=5, seed=1)
    (root / "labelsTr" / "e.nii.gz").unlink()
    volume(root / "imagesTr" / "f_0001.nii.gz")
    dataset = Dataset.open(root)
    for id, words in {"b": "4 x 5 x 7", "c": "mm", "d": "does not name", "e": "", "f": "number of channels"}.items():
        with pytest.raises(UserError) as error:
            dataset.load(dataset.case(id))
        assert words in str(error.value), id
        assert f"{id}" in str(error.value.file)


def test_a_case_without_files_is_not_lost(tmp_path):
    dataset = Dataset.open(folder(tmp_path, medseg={"cases": {"gone": {"domain": "x"}}}))
    assert dataset.case("gone").images == ()
    with pytest.raises(UserError, match="gone has no image"):
        dataset.load(dataset.case("gone"))
    with pytest.raises(UserError, match="No such case"):
        dataset.case("nobody")


def test_fingerprint_sees_every_change(tmp_path):
    root = folder(tmp_path / "one")
    fingerprint = Dataset.open(root).fingerprint()
    assert len(fingerprint) == 64
    shutil.copytree(root, tmp_path / "copy")
    (tmp_path / "copy" / "dataset.json").write_text(json.dumps(PLAIN | {"name": "one"}, indent=7))
    assert Dataset.open(tmp_path / "copy").fingerprint() == fingerprint
    seen = {fingerprint}
    path = root / "labelsTr" / "c.nii.gz"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    seen.add(Dataset.open(root).fingerprint())
    path.unlink()
    seen.add(Dataset.open(root).fingerprint())
    (root / "dataset.json").write_text(json.dumps(PLAIN | {"labels": {"background": 0, "organ": 1, "tumour": 2}}))
    seen.add(Dataset.open(root).fingerprint())
    (root / "imagesTr" / "f_0000.nii.gz").rename(root / "imagesTr" / "g_0000.nii.gz")
    seen.add(Dataset.open(root).fingerprint())
    assert len(seen) == 5

"""Promise 6: test data take no part in training and selection, and no patient or image sits in two splits unnoticed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from medseg_jax import config as configs
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.synthetic import make_phantoms
from medseg_jax.data.verify import check_dataset
from medseg_jax.training.train import train
from medseg_jax.types import UserError
from runs import sha256, write_config

SPY = """
import os, sys
seen = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def spy(event, args):
    if event == "open" and isinstance(args[0], (str, bytes)):
        os.write(seen, f"{args[0]}\\n".encode(errors="backslashreplace"))  # whole lines, from whichever thread
sys.addaudithook(spy)
from medseg_jax.cli import main
code = main(sys.argv[2:])
sys.exit(code)
"""


@pytest.fixture
def data(tmp_path):
    """Phantoms of three sites, the third of which is for tests."""
    made = make_phantoms(tmp_path / "data", dim=2, cases=12, sites=3, size=32, seed=0)
    assert made.subset("test")
    return made


def test_training_and_selection_open_no_file_of_a_test_case(data, tmp_path):
    """A spy on every open() of `medseg train`, with checks, cache, training, validation, final scores and report."""
    config = write_config(tmp_path / "config.py", data.root, steps=8)
    command = [sys.executable, "-c", SPY, str(tmp_path / "seen"), "train", str(config), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    seen = {os.path.abspath(line) for line in (tmp_path / "seen").read_text().splitlines()}
    files = {split: {str(p) for c in data.subset(split) for p in (*c.images, c.label)} for split in ("train", "test")}
    assert files["train"] <= seen  # the spy sees what is read
    assert not files["test"] & seen


def test_the_bits_of_a_run_do_not_depend_on_test_files(data, tmp_path):
    """Also what no spy sees (C code, other processes): rubbish of the same size in every test file changes nothing."""
    config = configs.load(write_config(tmp_path / "config.py", data.root, steps=8))
    train(config, tmp_path / "one", report=False)
    for case in data.subset("test"):
        for path in (*case.images, case.label):
            path.write_bytes(b"rubbish"[:1] * path.stat().st_size)
    train(config, tmp_path / "two", report=False)
    assert sha256(tmp_path / "one", 8) == sha256(tmp_path / "two", 8)


def change(root: Path, edit) -> None:
    content = json.loads((root / "dataset.json").read_text())
    edit(content)
    (root / "dataset.json").write_text(json.dumps(content))


def test_a_patient_in_training_and_test_is_refused_before_training(data, tmp_path):
    """Known from dataset.json alone, so that training refuses it although it opens no test file."""
    first, other = data.subset("train")[0], data.subset("test")[0]
    change(data.root, lambda c: c["medseg"]["cases"][other.id].update(patient=first.patient or "p1"))
    change(data.root, lambda c: c["medseg"]["cases"][first.id].update(patient=first.patient or "p1"))
    with pytest.raises(UserError, match="is in several splits") as error:
        train(configs.load(write_config(tmp_path / "config.py", data.root)), tmp_path / "run", report=False)
    assert other.id in str(error.value)
    assert first.id in str(error.value)


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_same_image_under_two_names_in_two_splits_is_an_error(data, split):
    one, copy = data.subset("train")[0], data.subset(split)[0]
    shutil.copy(one.images[0], copy.images[0])
    found = [p for p in check_dataset(Dataset.open(data.root)) if "holds the same image as" in p.text]
    assert [p.severity for p in found] == ["error"]
    assert one.id in found[0].text
    assert copy.id in found[0].text


def test_a_copy_in_validation_stops_training(data, tmp_path):
    shutil.copy(data.subset("train")[0].images[0], data.subset("val")[0].images[0])
    with pytest.raises(UserError, match="holds the same image"):
        train(configs.load(write_config(tmp_path / "config.py", data.root)), tmp_path / "run", report=False)


def test_selection_is_by_validation(data, tmp_path):
    """The best weights are those of the step whose validation Dice is the highest in the log."""
    from medseg_jax.runtime.run import open_run

    config = configs.load(write_config(tmp_path / "config.py", data.root))
    run = train(config, tmp_path / "run", report=False)
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    scores = {e["step"]: e["dice"] for e in entries if e["kind"] == "val"}
    assert open_run(run, "best").step == max(scores, key=lambda step: (scores[step], -step))
    assert set(scores) == {8, 16, 24}


# ------------------------------------------------------------------------------------------------ labels and odd cases


def test_labels_that_cannot_be_meant_stop_training_all_named_at_once(data, tmp_path):
    from medseg_jax.data import io

    cases = data.subset("train")[:2]
    for case, value in zip(cases, (99, 77), strict=True):
        label, geometry = io.read_label(case.label)
        io.write_label(case.label, np.where(label == 0, np.uint16(value), label).astype(np.uint16), geometry)
    with pytest.raises(UserError, match="2 errors") as error:
        train(configs.load(write_config(tmp_path / "config.py", data.root)), tmp_path / "run", report=False)
    for case, value in zip(cases, (99, 77), strict=True):
        assert case.id in str(error.value)
        assert str(value) in str(error.value)


def test_cases_without_any_class_train(data, tmp_path):
    """Half of the labels empty: a warning, no NaN, no crash."""
    from medseg_jax.data import io

    for case in data.subset("train")[::2]:
        label, geometry = io.read_label(case.label)
        io.write_label(case.label, np.zeros_like(label), geometry)
    train(configs.load(write_config(tmp_path / "config.py", data.root, steps=8)), tmp_path / "run", report=False)
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(e["loss"]) and e["skipped"] == 0 for e in entries if e["kind"] == "train")


def test_a_case_of_ignored_voxels_only_stops_training(data, tmp_path):
    from medseg_jax.data import io

    ignore = len(data.labels.names) + 1
    change(data.root, lambda c: c["labels"].update(ignore=ignore))
    case = data.subset("train")[0]
    label, geometry = io.read_label(case.label)
    io.write_label(case.label, np.full_like(label, ignore), geometry)
    with pytest.raises(UserError, match="every voxel is ignored") as error:
        train(configs.load(write_config(tmp_path / "config.py", data.root)), tmp_path / "run", report=False)
    assert case.id in str(error.value)

"""What is scored may differ from what is predicted: disc (rim and cup) and cup, where rim and cup are the classes."""

import json

import numpy as np
import pytest

from medseg_jax import Dataset, Labels, UserError, evaluate
from medseg_jax.data import io
from medseg_jax.types import Geometry


@pytest.fixture
def eyes(phantoms, tmp_path):
    """One picture: background 0, rim 1, cup 2; a prediction that calls the whole disc cup."""
    root, geometry = tmp_path / "eyes", Geometry((8, 8), np.eye(4), "px")
    label = np.zeros((8, 8), np.uint8)
    label[1:7, 1:7] = 1
    label[3:5, 3:5] = 2
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
    io.write_image(root / "imagesTr" / "a_0000.png", np.zeros((8, 8, 3), np.uint8), geometry)
    io.write_label(root / "labelsTr" / "a.png", label, geometry)
    (tmp_path / "pred").mkdir()
    io.write_label(tmp_path / "pred" / "a.png", np.where(label, 2, 0).astype(np.uint8), geometry)
    content = {
        "channel_names": {"0": "R", "1": "G", "2": "B"},
        "labels": {"background": 0, "rim": 1, "cup": 2},
        "numTraining": 1,
        "file_ending": ".png",
        "medseg": {"version": 1, "scores": {"disc": [1, 2], "cup": 2}},
    }
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_disc_and_cup_are_scored_and_rim_on_request(eyes, tmp_path):
    summary = evaluate(tmp_path / "pred", eyes, tmp_path / "out")
    found = {name: entry["dice"] for name, entry in summary["classes"].items()}
    assert found == {"disc": 1.0, "cup": pytest.approx(2 * 4 / (36 + 4))}
    assert summary["settings"]["labels"] == {"disc": [1, 2], "cup": [2]}
    rim = evaluate(tmp_path / "pred", eyes, tmp_path / "out", labels=Labels.simple("rim", "cup"))
    assert rim["classes"]["rim"]["dice"] == 0


def test_it_is_kept_when_the_data_set_is_saved(eyes):
    dataset = Dataset.open(eyes)
    assert (dataset.labels.names, dataset.labels.exclusive, dataset.labels.channels) == (("rim", "cup"), True, 3)
    assert (dataset.labels.judged.names, dataset.labels.judged.channels) == (("disc", "cup"), 2)
    dataset.save()
    assert Dataset.open(eyes).labels == dataset.labels


@pytest.mark.parametrize("scores", [["disc"], {"disc": [1, 3]}, {"disc": 0}, {"disc": "1"}])
def test_what_cannot_be_scored_is_refused(eyes, scores):
    file = eyes / "dataset.json"
    content = json.loads(file.read_text())
    content["medseg"]["scores"] = scores
    file.write_text(json.dumps(content))
    with pytest.raises(UserError):
        Dataset.open(eyes)

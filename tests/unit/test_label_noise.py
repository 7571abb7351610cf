"""medseg data corrupt: what changes, what does not, and that it can be repeated."""

import json

import numpy as np
import pytest

from medseg_jax import Dataset, LabelNoise, Labels, UserError, cli, corrupt
from medseg_jax.data import io, label_noise


def labels_of(dataset, split):
    return {case.id: io.read_label(case.label)[0] for case in dataset.subset(split)}


@pytest.mark.parametrize("style", ["jsrt", "whu", "mrf"])
def test_training_labels_change_and_nothing_else(phantoms, tmp_path, style):
    before = labels_of(phantoms, "train")
    noise = LabelNoise(style, alpha=0.6, drop=0.5, border=0.5, add=0.2)
    made = corrupt(phantoms.root, tmp_path / "a", noise)
    after = labels_of(made, "train")
    wrong = [id for id in before if (before[id] != after[id]).any()]
    assert wrong
    assert len(wrong) <= (int(0.6 * len(before)) if style == "jsrt" else len(before))
    for id, label in after.items():
        assert set(np.unique(label)) <= made.labels.known
        clean = label_noise.clean_label(made, made.case(id))
        np.testing.assert_array_equal(io.read_label(clean)[0], before[id])
    for split in ("val", "test"):
        for id, label in labels_of(phantoms, split).items():
            np.testing.assert_array_equal(labels_of(made, split)[id], label)
    for case in made.cases:
        np.testing.assert_array_equal(made.load(case)[0], phantoms.load(phantoms.case(case.id))[0])
    np.testing.assert_equal(labels_of(phantoms, "train"), before)
    again = corrupt(phantoms.root, tmp_path / "b", noise)
    np.testing.assert_equal(labels_of(again, "train"), after)
    assert again.extra["label_noise"] == made.extra["label_noise"]
    (tmp_path / "b" / "dataset.json").unlink()  # as if it had been interrupted
    third = corrupt(phantoms.root, tmp_path / "b", noise)
    np.testing.assert_equal(labels_of(third, "train"), after)
    other = corrupt(phantoms.root, tmp_path / "c", LabelNoise(style, alpha=0.6, drop=0.5, border=0.5, seed=1))
    assert any((labels_of(other, "train")[id] != after[id]).any() for id in after)


def test_the_verb(phantoms, tmp_path, capsys):
    out = tmp_path / "wrong"
    assert cli.main(["data", "corrupt", str(phantoms.root), str(out), "--style", "mrf", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said["changed"]) == {case.id for case in Dataset.open(out).subset("train")}
    assert cli.main(["data", "corrupt", str(phantoms.root), str(out)]) == 1
    assert "already" in capsys.readouterr().err


@pytest.mark.parametrize("beta", [0.3, 0.7])
@pytest.mark.parametrize("shape", [(48, 48), (10, 40, 40)])
def test_the_share_of_wrong_voxels_is_about_beta(beta, shape):
    mask = np.zeros(shape, bool)
    mask[(*([slice(2, 8)] * (len(shape) - 2)), slice(12, 28), slice(12, 28))] = True
    for made in (label_noise.dilate(mask, beta), label_noise.erode(mask, beta)):
        assert (made != mask).sum() / mask.sum() == pytest.approx(beta, abs=0.3)  # a step of a small volume is large
    for direction in label_noise.DIRECTIONS:
        made = label_noise.affine(mask, beta, 3.0, direction)
        assert (made != mask).sum() / mask.sum() == pytest.approx(beta, abs=0.1)
        centre = np.argwhere(made).mean(0)[-2:] - np.argwhere(mask).mean(0)[-2:]
        assert np.sign(centre.round()).tolist() == list(direction)


def test_ignored_voxels_stay_and_classes_may_overlap():
    rng = np.random.default_rng(0)
    label = np.zeros((32, 32), np.uint8)
    label[4:20, 4:20], label[:, 30:] = 1, 3
    ignoring = Labels.simple("a", "b", ignore=3)
    for style in ("jsrt", "whu", "mrf"):
        made = label_noise.corrupt_label(label, ignoring, LabelNoise(style, drop=0, add=0, border=1), rng)
        assert ((made == 3) == (label == 3)).all()
    both = np.zeros((32, 32), np.uint8)
    both[4:20, 4:20] |= 1
    both[10:28, 10:28] |= 2
    made = label_noise.corrupt_label(both, Labels.overlapping("a", "b"), LabelNoise("mrf", mu=-2), rng)
    assert set(np.unique(made)) == {0, 1, 2, 3}


def test_the_field_has_the_promised_moments():
    field = label_noise.sample_field((400, 400), LabelNoise("mrf", mu=-2, s=1.5, rho=0.7), np.random.default_rng(0))
    assert field.mean() == pytest.approx(-2, abs=0.1)
    assert field.std() == pytest.approx(1.5, rel=0.05)
    standard = (field + 2) / 1.5
    assert (standard[1:, 1:] * standard[:-1, :-1]).mean() == pytest.approx(0.49, abs=0.05)


NAN = float("nan")


@pytest.mark.parametrize(
    "options",
    [{"style": "x"}, {"alpha": 1.2}, {"beta": 0}, {"rho": 1}, {"angle": -5}, {"seed": -1}, {"beta": NAN}, {"s": NAN}],
)
def test_noise_that_makes_no_sense_is_refused(options):
    with pytest.raises(UserError):
        LabelNoise(**options)

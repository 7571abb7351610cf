"""The target and its fate, and the command line: the source is untouched and nothing that is not ours is removed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from making import SIZE, convert, hashes, pairs, photo, save
from medseg_jax import cli
from medseg_jax.cli import data as verbs
from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset
from medseg_jax.types import UserError

# ---------------------------------------------------------------------------------------------- the target and its fate


def test_the_source_is_untouched_and_the_result_is_repeatable(src, dst, tmp_path):
    pairs(src)
    before = hashes(src)
    convert(src, dst)
    convert(src, tmp_path / "again")
    assert hashes(src) == before
    assert hashes(dst) == hashes(tmp_path / "again")
    assert not [path for path in dst.rglob("*") if path.is_symlink()]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "dst", "src"]


def test_an_existing_target_is_kept_unless_told(src, dst):
    convert(pairs(src), dst)
    before = hashes(dst)
    with pytest.raises(UserError, match="exists"):
        convert(src, dst)
    (src / "images" / "b.png").write_bytes(b"broken")
    with pytest.raises(UserError):
        convert(src, dst, overwrite=True)
    assert hashes(dst) == before
    pairs(src)
    convert(src, dst, overwrite=True, classes="new")
    assert Dataset.open(dst).labels.names == ("new",)
    assert not dst.with_name("dst.old").exists()


def test_nothing_that_is_not_ours_is_removed(src, dst):
    pairs(src)
    dst.mkdir()
    (dst / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="no data set"):
        convert(src, dst, overwrite=True)
    (dst / "thesis.txt").unlink()
    leftover = dst.with_name("dst.tmp")
    leftover.mkdir()
    (leftover / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="in the way"):
        convert(src, dst)
    assert (leftover / "thesis.txt").read_text() == "precious"
    (leftover / ".medseg-convert").touch()  # what a killed conversion leaves behind
    convert(src, dst)
    assert not leftover.exists()


def test_the_target_may_not_lie_in_the_source(src):
    pairs(src)
    for place in (src, src / "out", src.parent):
        with pytest.raises(UserError, match="lies in the"):
            convert(src, place)
    assert sorted(os.listdir(src)) == ["images", "masks"]


def test_options_that_contradict_or_do_not_apply(src, dst):
    pairs(src)
    for options in (
        {"spacing": "1,1,1"},
        {"reference": "CT"},
        {"domains": "x"},
        {"multilabel": True, "exclusive": True},
        {"empty": True, "unlabelled": True},
        {"limit": 0},
    ):
        with pytest.raises(UserError):
            convert(src, dst, **options)


# ------------------------------------------------------------------------------------------------------- command line


def test_command_line(src, dst, capsys):
    pairs(src)
    assert verbs.main(["convert", str(src), str(dst), "--classes", "wound", "--split", "last-1"]) == 0
    out = capsys.readouterr().out
    for line in ("images: 3 cases (3 .png)", "classes: 1 wound", "cases: 2 train, 1 val", "next: medseg data check"):
        assert line in out
    assert verbs.main(["check", str(dst)]) == 0
    assert "no problem found" in capsys.readouterr().out
    assert verbs.main(["check", str(dst), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"cases": 3, "errors": 0, "warnings": 0, "problems": []}
    io.write_label(dst / "labelsTr" / "a.png", np.full(SIZE, 9, np.uint8), io.read_image(src / "images" / "a.png")[1])
    assert verbs.main(["check", str(dst), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["errors"] == 1
    assert found["problems"][0]["file"] == "labelsTr/a.png"


def test_command_line_plan_and_preview(src, dst, capsys):
    convert(pairs(src), dst)
    assert verbs.main(["plan", str(dst), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dim"] == 2
    assert (dst / "plan.json").is_file()
    assert cli.main(["data", "plan", str(dst)]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert verbs.main(["plan", str(dst), "--overwrite"]) == 0
    assert "patch_size: " in capsys.readouterr().out
    assert verbs.main(["preview", str(dst), "--n", "2", "--json"]) == 0
    picture = Path(json.loads(capsys.readouterr().out)["written"])
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 100


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        ([], 2, "usage"),
        (["--help"], 0, "convert SRC DST"),
        (["chekc"], 2, "Did you mean check?"),
        (["convert", "only-one"], 2, "DST"),
        (["convert", "nowhere", "out"], 1, "must be a folder"),
        (["check", "nowhere"], 1, "dataset.json"),
    ],
)
def test_exit_codes(argv, code, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", *argv]) == code
    captured = capsys.readouterr()
    assert words in captured.out + captured.err


def test_a_question_is_asked_on_a_terminal(src, dst, monkeypatch, capsys):
    pairs(src)
    save(src / "images" / "z.png", photo(9))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    answers = iter(["x", "7", "1"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(answers))
    assert verbs.main(["convert", str(src), str(dst)]) == 0
    assert Dataset.open(dst).case("z").label is None
    assert "images/z.png" in capsys.readouterr().out

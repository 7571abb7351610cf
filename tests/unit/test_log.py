"""What a run says: log.jsonl, TensorBoard, progress.png."""

import builtins
import json

import pytest
from PIL import Image

from medseg_jax.data.preview import class_colors
from medseg_jax.runtime import log as logs
from medseg_jax.runtime.log import Log
from medseg_jax.types import UserError


def filled(folder, **options):
    log = Log(folder, **options)
    log.start("train", 0, 30)
    for step in (10, 20, 30):
        log.write("train", step, loss=1 / step, lr=1e-3)
        log.write("val", step, dice=step / 100, **{"dice/organ": step / 100})
    log.stop()
    return log


def test_lines_can_be_read_and_one_cut_off_by_a_kill_is_left_out(tmp_path):
    log = filled(tmp_path)
    entries = logs.read(log.path)
    assert [e["step"] for e in entries if e["kind"] == "train"] == [10, 20, 30]
    log.path.write_bytes(log.path.read_bytes()[:-9])
    assert logs.read(log.path) == entries[:-1]


def test_rewind_drops_what_a_resumed_run_will_write_again(tmp_path):
    log = filled(tmp_path)
    with log.path.open("a") as file:
        file.write(json.dumps({"kind": "train", "stage": "second", "step": 5}) + "\n")
    log.rewind("train", 20)
    assert [(e["stage"], e["kind"], e["step"]) for e in logs.read(log.path)] == [
        ("train", "train", 10), ("train", "val", 10), ("train", "train", 20), ("train", "val", 20),
        ("second", "train", 5),
    ]  # fmt: skip


def test_piped_output_is_plain_lines(tmp_path, capsys):
    filled(tmp_path)
    err = capsys.readouterr().err
    assert "train 30/30  val  dice 0.3" in err
    assert "\x1b" not in err


def test_the_time_left_is_told_from_the_second_line_to_the_last_but_one(tmp_path, capsys):
    """What passes before the first one is compiling, and after the last one nothing is left."""
    filled(tmp_path)
    lines = {n: x for x in capsys.readouterr().err.splitlines() for n in (10, 20, 30) if f" {n}/30  val" in x}
    assert {n: line.endswith("(0 s left)") for n, line in lines.items()} == {10: False, 20: True, 30: False}


def test_progress_picture_is_drawn(tmp_path):
    logs.draw_progress(tmp_path / "progress.png", logs.read(filled(tmp_path).path))
    with Image.open(tmp_path / "progress.png") as picture:
        assert picture.size[0] > 500
    assert [p.name for p in tmp_path.glob(".*.png")] == []


def test_a_class_has_the_colour_of_its_outlines(tmp_path):
    entries = [{"kind": "val", "stage": "train", "step": s, "dice": 0.9, "dice/organ": 0.5} for s in (1, 2)]
    logs.draw_progress(tmp_path / "progress.png", entries)
    with Image.open(tmp_path / "progress.png") as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 24)}
    assert tuple(class_colors(1)[0]) in colors


def test_tensorboard_gets_every_number(tmp_path):
    pytest.importorskip("tensorboardX")
    filled(tmp_path, tensorboard=True)
    content = b"".join(p.read_bytes() for p in (tmp_path / "tensorboard").iterdir())
    for tag in (b"train/train/loss", b"train/train/lr", b"train/val/dice/organ"):
        assert content.count(tag) == 3


def test_tensorboard_that_is_missing_is_explained(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("tensorboardX"):
            raise ModuleNotFoundError("No module named 'tensorboardX'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="not installed") as caught:
        Log(tmp_path, tensorboard=True)
    assert "medseg-jax[tensorboard]" in str(caught.value)

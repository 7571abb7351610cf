"""The command line: help, exit codes, suggestions."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import medseg_jax
from medseg_jax.cli import VERBS, main
from medseg_jax.types import UserError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("verb", [v for v in VERBS if v != "data"])
def test_every_verb_has_help(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert "usage" in capsys.readouterr().out.lower()


@pytest.mark.parametrize("verb", ["convert", "check", "plan", "preview"])
def test_every_data_verb_has_help(verb, capsys):
    assert main(["data", verb, "--help"]) == 0
    assert "usage" in capsys.readouterr().out.lower()


def test_help_lists_the_verbs_and_no_argument_is_wrong_usage(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert main([]) == 2


@pytest.mark.parametrize(("wrong", "right"), [("trian", "train"), ("evalute", "evaluate"), ("dat", "data")])
def test_a_wrong_verb_is_wrong_usage_with_a_suggestion(wrong, right, capsys):
    assert main([wrong]) == 2
    assert f"Did you mean {right}?" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "predict", "evaluate", "info"])
def test_a_wrong_flag_is_wrong_usage(verb, capsys):
    assert main([verb, "--no-such-flag"]) == 2


def test_a_user_error_is_explained_without_a_traceback(capsys, tmp_path):
    assert main(["train", str(tmp_path / "nothing.py")]) == 1
    err = capsys.readouterr().err
    assert "No such config" in err
    assert "nothing.py" in err
    assert "Traceback" not in err


def test_a_user_error_is_explained_without_a_traceback_in_notebooks():
    error = UserError("Something is wrong", file="a.png", remedy="mend it")
    assert error._render_traceback_() == ["UserError: Something is wrong\n  file: a.png\n  try: mend it"]


def test_info_json(capsys):
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert "supervised" in info["methods"]
    assert {"unet", "resenc"} <= set(info["models"])
    assert not {"teacher", "objective"} & set(info["methods"])  # helpers are no methods
    assert not {"resnet", "blocks"} & set(info["models"])
    assert "configs/unet_hippocampus.py" in info["configs"]


def test_the_demo_compares_sites_without_post_processing_on_either_side(tmp_path, monkeypatch, capsys):
    """It is chosen on the cases of the seen sites: applied to the unseen one alone, it would hide a part of the gap."""
    summary = {"mean": {"dice": 0.5, "hd95": 1.0, "nsd": 0.5}, "cases": 2}
    said = {}

    def train(config, run):
        place = run / "validation" / "best"
        place.mkdir(parents=True)
        (place / "summary.json").write_text(json.dumps(summary))

    monkeypatch.setattr(medseg_jax, "make_phantoms", lambda *args, **options: None, raising=False)
    monkeypatch.setattr(medseg_jax, "train", train, raising=False)
    monkeypatch.setattr(medseg_jax, "predict", lambda *args, **options: said.update(options), raising=False)
    monkeypatch.setattr(medseg_jax, "evaluate", lambda *args: summary, raising=False)
    monkeypatch.setattr(medseg_jax, "report", lambda run: run / "report.html", raising=False)
    assert main(["demo", "--out", str(tmp_path)]) == 0
    assert said["postprocessing"] == "none"
    assert "unseen site (test)" in capsys.readouterr().out


def test_help_imports_nothing_heavy():
    code = "import sys; from medseg_jax.cli import main; main(['--help']); main(['info']); "
    code += "print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "flax", "tyro", "matplotlib"} & set(done.stderr.split())


def test_every_command_of_the_readme_exists():
    commands = re.findall(r"^(?:\.venv/bin/)?medseg +(\w+)(?: +(\w+))?", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) >= 9
    for verb, second in commands:
        assert verb in VERBS
        assert verb != "data" or second in ("convert", "check", "plan", "preview")

"""The command line in a real shell's place: suggestions, exit codes, pipes, odd paths, inputs that stay untouched."""

import builtins
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest

from medseg_jax.cli import VERBS, Parser, main
from runs import write_config

ESCAPE = "\x1b"


def medseg(*args, **options):
    command = [sys.executable, "-m", "medseg_jax.cli", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, **options)


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["info", "--jsn"], "--json"),
        (["info", "--device"], None),  # a unique beginning is understood
        (["demo", "--setps", "3"], "--steps"),
        (["train", "phantoms2d", "--no-reprt"], "--no-report"),
        (["train", "phantoms2d", "--sed", "3"], "--seed"),
        (["check", "phantoms2d", "--jsn"], "--json"),
        (["predict", "run", "-i", "a", "-o", "b", "--checkpiont", "last"], "--checkpoint"),
        (["evaluate", "a", "b", "-o", "c", "--nsd-tolerence", "2"], "--nsd-tolerance"),
        (["report", "run", "--jsno"], "--json"),
        (["data", "check", "folder", "--jsno"], "--json"),
        (["data", "plan", "folder", "--budgt", "gpu"], "--budget"),
        (["data", "preview", "folder", "--case", "a"], None),
        (["data", "convert", "a", "b", "--qiet"], "--quiet"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_a_misspelt_flag_is_wrong_usage_and_the_right_one_is_named(args, meant, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = main(args)
    said = capsys.readouterr()
    if meant is None:
        return
    assert code == 2
    assert meant in said.err
    assert not list(tmp_path.iterdir())


def test_who_reads_only_the_beginning_gets_no_error():
    """medseg info | head -1"""
    for args in (["info", "--json"], ["--help"]):
        process = subprocess.Popen(
            [sys.executable, "-m", "medseg_jax.cli", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        process.stdout.close()
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0
        assert errors == b""


def test_what_the_system_refuses_is_explained(tmp_path, capsys, monkeypatch):
    from medseg_jax.cli import info

    def refuse(argv):
        raise PermissionError(13, "Permission denied", str(tmp_path / "there"))

    monkeypatch.setattr(info, "main", refuse)
    assert main(["info"]) == 1
    said = capsys.readouterr().err
    assert "there" in said
    assert "Permission denied" in said


def test_ctrl_c_while_modules_are_imported_is_no_traceback(monkeypatch, capsys):
    real = builtins.__import__

    def interrupted(name, *args):
        if name == "medseg_jax.types":
            raise KeyboardInterrupt
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", interrupted)
    assert main(["train", "phantoms2d"]) == 130
    assert capsys.readouterr().err == "medseg train: interrupted\n"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_prediction_says_that_it_goes_on(number, code, tmp_path, monkeypatch, capsys):
    from medseg_jax.inference import predict

    monkeypatch.setattr(predict, "predict", lambda *args, **options: signal.raise_signal(number))
    assert main(["predict", "run", "-i", "in", "-o", str(tmp_path / "out")]) == code
    assert capsys.readouterr().err == "medseg predict: stopped; the same command goes on from here\n"


def test_an_error_names_the_verb_behind_data(tmp_path, capsys):
    assert main(["data", "check", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("medseg data check: ")


def test_the_folder_to_write_is_dash_o_for_every_verb(capsys):
    for verb in ("demo", "train", "predict", "evaluate", "compare", "audit", "export", "report"):
        assert main([verb, "--help"]) == 0
        said = capsys.readouterr().out
        assert re.search(r"(?<!\w)-o\b", said), verb
        assert "--out " in said, verb


def test_a_bug_is_not_hidden(monkeypatch):
    from medseg_jax.cli import info

    def bug(argv):
        raise RuntimeError("ours")

    monkeypatch.setattr(info, "main", bug)
    with pytest.raises(RuntimeError, match="ours"):
        main(["info"])


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted([folder, *folder.rglob("*")])}


def test_the_whole_walk_with_odd_names_piped_and_the_input_untouched(phantoms, tmp_path):
    """Spaces, quotes and letters of other scripts in every path; no escape code in what is piped; exit codes.

    The data set is only read: not a file, not a time stamp in it changes.
    """
    odd = tmp_path / "mes données « µ » 'x' 影像"
    shutil.copytree(phantoms.root, odd / "data set")
    data, run = odd / "data set", odd / "run #1"
    config = write_config(odd / "my config.py", data, steps=8)
    before = snapshot(data)
    env = os.environ | {"TERM": "xterm-256color"}
    walk = [
        ("data", "check", data, "--json"),
        ("check", config, "--json"),
        ("train", config, "--out", run),
        ("predict", run, "-i", data, "-o", odd / "out put", "--split", "val", "--json"),
        ("evaluate", odd / "out put", data, "-o", odd / "scores", "--json"),
        ("report", run, "--json"),
    ]
    for args in walk:
        done = medseg(*args, cwd=odd, env=env)
        assert done.returncode == 0, (args, done.stderr)
        assert ESCAPE not in done.stdout + done.stderr, args
        if "--json" in args:
            json.loads(done.stdout)
    assert snapshot(data) == before
    assert (run / "report.html").stat().st_size > 1000
    assert medseg("data", "check", odd / "nothing here").returncode == 1


@pytest.mark.parametrize("verb", VERBS)
def test_help_is_piped_without_escape_codes(verb):
    done = medseg(verb, "--help", env=os.environ | {"TERM": "xterm-256color"})
    assert done.returncode == 0
    assert ESCAPE not in done.stdout
    assert "usage" in done.stdout.lower()


def test_a_field_of_a_config_is_no_misspelt_flag(capsys):
    parser = Parser("medseg train")
    parser.add_argument("--class")
    parser.mind(["--classes", "organ", "--classes=organ"])
    with pytest.raises(SystemExit):
        parser.mind(["--clas", "organ"])
    assert "did you mean --class?" in capsys.readouterr().err

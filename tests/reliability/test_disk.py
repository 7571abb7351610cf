"""Promise 1: a full disk, a folder that cannot be written, and files that grow too large cost nothing already done."""

import errno
import json
import os
import resource
import subprocess
import sys

import pytest

from medseg_jax import config as configs
from medseg_jax.runtime.checkpoint import Checkpoints
from medseg_jax.training import train as training
from medseg_jax.types import UserError
from runs import STEPS, finish, last, sha256, start, write_config


@pytest.fixture(scope="module")
def config(phantoms, tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("disk") / "config.py", phantoms.root)


def test_no_room_for_a_checkpoint_and_then_room_again(config, tmp_path, monkeypatch):
    """In-process: the third manifest meets a full disk. The same call later ends as if nothing had happened."""
    from medseg_jax.runtime import checkpoint

    loaded, written = configs.load(config), []
    write = checkpoint.write_manifest

    def full(folder):
        if folder.parent.name == "last" and len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        written.append(folder) if folder.parent.name == "last" else None
        write(folder)

    monkeypatch.setattr(checkpoint, "write_manifest", full)
    with pytest.raises(UserError, match="could not be written") as error:
        training.train(loaded, tmp_path / "run", report=False)
    assert "No space left" in str(error.value)
    assert str(last(tmp_path / "run")) in str(error.value)
    assert "free disk space" in str(error.value)
    assert Checkpoints(last(tmp_path / "run"), read_only=True).steps() == [4, 8]
    monkeypatch.undo()
    training.train(loaded, tmp_path / "run", report=False)
    training.train(loaded, tmp_path / "whole", report=False)
    assert sha256(tmp_path / "run") == sha256(tmp_path / "whole")


@pytest.mark.parametrize("what", ["log.jsonl", "progress.png"])
def test_no_room_for_the_log_or_the_picture(config, tmp_path, monkeypatch, what):
    from medseg_jax.runtime import log

    def full(*args, **values):
        raise OSError(errno.ENOSPC, "No space left on device", str(tmp_path / what))

    if what == "log.jsonl":
        monkeypatch.setattr(log.Log, "write", full)
    else:
        monkeypatch.setattr(log, "draw_progress", full)
    with pytest.raises(UserError, match="The disk is full") as error:
        training.train(configs.load(config), tmp_path / "run", report=False)
    assert what in str(error.value)
    assert "goes on from the last checkpoint" in str(error.value)


def test_a_file_size_limit_is_explained_and_the_run_goes_on_without_it(config, tmp_path):
    """A real limit of the system (RLIMIT_FSIZE), met by whichever file grows too large first."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from medseg_jax.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    command = [sys.executable, "-c", code, "train", str(config), "--out", str(tmp_path / "run"), "--no-report"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1, done.stderr
    assert "The disk is full" in done.stderr or "could not be written" in done.stderr
    assert "try: " in done.stderr
    assert not done.stderr.rstrip().startswith("Traceback")
    finish(start(config, tmp_path / "run"))
    assert Checkpoints(last(tmp_path / "run"), read_only=True).steps()[-1] == STEPS


def test_a_file_where_the_folder_should_be(config, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match="cannot be used") as error:
            training.train(configs.load(config), out, report=False)
        assert str(tmp_path / "file") in str(error.value)
    assert (tmp_path / "file").read_text() == "mine"


NOBODY = """
import os, sys
from medseg_jax import Config
from medseg_jax.training.train import train
from medseg_jax.types import UserError
if os.getuid() == 0:  # root may write everywhere
    os.setgid(65534)
    os.setuid(65534)
try:
    train(Config(), sys.argv[1])
except UserError as error:
    print(error)
"""


def test_a_read_only_folder_is_explained(tmp_path):
    folder = tmp_path / "read_only"
    folder.mkdir(mode=0o555)
    for parent in folder.parents:  # pytest's own folders are closed to others
        if parent.name.startswith("pytest-"):
            parent.chmod(0o755)
    env = os.environ | {"MEDSEG_CACHE": "/nonexistent/cache"}
    command = [sys.executable, "-c", NOBODY, str(folder / "run")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert "A file or folder cannot be used" in done.stdout, done.stderr
    assert "Permission denied" in done.stdout
    assert str(folder / "run") in done.stdout
    assert not list(folder.iterdir())


def test_half_written_lines_of_the_log_are_forgotten(config, tmp_path):
    from medseg_jax.runtime.log import read

    loaded = configs.load(config)
    training.train(loaded, tmp_path / "run", report=False)
    file = tmp_path / "run" / "log.jsonl"
    whole = read(file)
    file.write_bytes(file.read_bytes() + b'7\n{"kind": "train", "step": 3}\n\xff\xfe\n{"kind": "tra')
    assert read(file) == whole
    training.train(loaded, tmp_path / "run", report=False)
    assert [json.loads(line) for line in file.read_text().splitlines()] == whole

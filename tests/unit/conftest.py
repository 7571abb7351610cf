"""Where raw data lie and where they are converted to."""

from pathlib import Path

import pytest


@pytest.fixture
def src(tmp_path) -> Path:
    """Folder of raw data, not made yet."""
    return tmp_path / "src"


@pytest.fixture
def dst(tmp_path) -> Path:
    """Folder of the data set, not made yet."""
    return tmp_path / "dst"

"""Shared fixtures. Compiled programs are kept between runs, so that the suite is quick the second time."""

import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
import pytest

from medseg_jax.runtime.environment import use_compilation_cache

use_compilation_cache()


def _folder(variable: str) -> Path:
    folder = os.environ.get(variable)
    if not folder or not Path(folder).is_dir():
        pytest.skip(f"{variable} names no folder")
    return Path(folder)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images, $MEDSEG_DATA."""
    return _folder("MEDSEG_DATA")


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden numbers, $MEDSEG_GOLDEN."""
    return _folder("MEDSEG_GOLDEN")


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """A small 2-D synthetic data set of three sites; read only."""
    from medseg_jax.data.synthetic import make_phantoms

    return make_phantoms(tmp_path_factory.mktemp("data") / "phantoms", dim=2, cases=12, sites=3, size=32, seed=0)


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order(request):
    """A module's RNG starts anew for each test, so that a test draws the same whatever ran before it."""
    if hasattr(request.module, "RNG"):
        request.module.RNG.bit_generator.state = np.random.default_rng(0).bit_generator.state


@pytest.fixture
def x64():
    """Double precision inside one test."""
    with jax.enable_x64(True):
        yield

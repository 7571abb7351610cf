"""2.5-D: a 2-D network sees the slices beside its own as further channels, alike in training and prediction."""

import dataclasses
import json

import numpy as np
import pytest

from medseg_jax import (
    Augment,
    Config,
    Mix,
    Optim,
    Stage,
    Supervised,
    UNet,
    UserError,
    evaluate,
    make_plan,
    predict,
    train,
)
from medseg_jax.data.cache import build_cache
from medseg_jax.data.pipeline import batch_at, with_neighbours
from medseg_jax.data.plan import Plan
from medseg_jax.data.synthetic import make_phantoms


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    return make_phantoms(tmp_path_factory.mktemp("volumes") / "data", dim=3, cases=6, sites=2, size=20)


def plan_of(volumes) -> Plan:
    plan = make_plan(volumes, dim=2)
    changes = {"neighbours": 1, "normalization": ({"scheme": "minmax"},), "patch_size": (16, 16), "batch_size": 4}
    stages = {"strides": ((1, 1), (2, 2)), "kernel_sizes": ((3, 3),) * 2, "features": (4, 8)}
    return dataclasses.replace(plan, **changes, **stages)


def test_each_row_holds_the_slices_around_its_own(volumes, tmp_path):
    plan = plan_of(volumes)
    cache = build_cache(volumes, plan, tmp_path)
    batch = batch_at(cache, volumes, plan, Mix(foreground=0.0), sample_size=(16, 16), seed=0, step=0)
    assert batch["image"].shape == (4, 16, 16, 3)
    for image, label, index in zip(batch["image"], batch["label"], batch["case"], strict=True):
        case = cache.case(volumes.cases[index].id)
        stack = with_neighbours(np.asarray(case.image), 1)  # [d, h, w, 3]
        assert 0 <= stack.min() < stack.max() <= 1, "minmax"
        windows = np.lib.stride_tricks.sliding_window_view(
            np.pad(stack, ((0, 0), (16, 16), (16, 16), (0, 0))), (16, 16), (1, 2)
        )
        same = (np.moveaxis(windows, 3, -1) == image).all((-3, -2, -1))  # [d, y, x]
        assert same.any(), "every row is a window of one slice and its neighbours"
        assert label.shape == (16, 16)


def test_border_slices_are_repeated():
    image = np.arange(3.0).reshape(3, 1, 1, 1)
    np.testing.assert_array_equal(with_neighbours(image, 1)[:, 0, 0], [[0, 0, 1], [0, 1, 2], [1, 2, 2]])
    assert with_neighbours(image, 0) is image


def test_training_and_prediction_agree(volumes, tmp_path):
    """The network's Dice in the space of training is that of its predictions in the space of files, near enough."""
    plan_of(volumes).save(tmp_path / "plan.json")
    stage = Stage(
        Supervised(UNet(deep_supervision=False)), steps=8, optim=Optim(lr=1e-2, warmup=2), augment=Augment.none()
    )
    config = Config(str(volumes.root), (stage,), plan=str(tmp_path / "plan.json"), cache=str(tmp_path / "cache"))
    run = train(config, tmp_path / "run", report=False)
    predict(run, volumes, tmp_path / "out", checkpoint="last", split="val", postprocessing="none", progress=False)
    summary = evaluate(tmp_path / "out", volumes, tmp_path / "out")
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert summary["present"]["dice"] == pytest.approx([e for e in log if e["kind"] == "val"][-1]["dice"], abs=0.1)


def test_neighbours_want_a_flat_network(volumes):
    with pytest.raises(UserError, match="neighbours"):
        dataclasses.replace(make_plan(volumes, dim=3), neighbours=1)

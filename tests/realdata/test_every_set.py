"""The whole walk on every real data set: convert, check, preview, plan, one training step, predict one case.

The three sets that stretch the house most (overlapping classes, array files, two modalities on two grids) run in CI,
the others are slow.
"""

from dataclasses import replace

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
    check_dataset,
    convert,
    make_plan,
    predict,
    train,
)
from medseg_jax.data import io
from medseg_jax.data.preview import preview

SETS = {
    "hippocampus_msd04": {"limit": 2},
    "acdc/derived_128": {"classes": "RV,MYO,LV", "limit": 2},
    "la2018": {"split": "last-2", "classes": "atrium"},
    "jsrt/derived_256": {"limit": 2},
    "vessels": {"classes": "vessel", "roi": "fov", "limit": 1, "test_domain": "HRF"},
    "optic_disc": {"classes": "disc=od", "limit": 2},
    "polyp": {"classes": "polyp", "limit": 1},
    "isic2018_256": {"classes": "lesion", "limit": 2},
    "glas": {"instances": True, "classes": "gland"},
    "idrid": {"split": "last-5", "limit": 1},
    "wound_fuseg": {"classes": "wound", "limit": 2},
    "dsb2018": {"classes": "nucleus", "limit": 2},
    "em_isbi2012": {"classes": "membrane", "invert": True, "limit": 4},
    "sts_ctpet": {"reference": "PET", "classes": "tumour", "split": "last-1"},
}
IN_CI = ("jsrt/derived_256", "acdc/derived_128", "sts_ctpet")


@pytest.mark.parametrize("name", [n if n in IN_CI else pytest.param(n, marks=pytest.mark.slow) for n in SETS])
def test_the_whole_walk(name, real_data, tmp_path):
    dataset = convert(real_data / name, tmp_path / "data", quiet=True, **SETS[name])
    assert not [p for p in check_dataset(dataset) if p.severity == "error"]
    preview(dataset, tmp_path / "preview.png", n=2)
    assert (tmp_path / "preview.png").stat().st_size > 5_000

    plan = make_plan(dataset)
    dim = plan.dim
    small = replace(
        plan,
        patch_size=(16, 32, 32)[-dim:],
        strides=((1,) * dim, (2,) * dim),
        kernel_sizes=((3,) * dim,) * 2,
        features=(4, 8),
    )
    small.save(tmp_path / "plan.json")
    stage = Stage(Supervised(UNet()), steps=1, optim=Optim(warmup=0), mix=Mix(labelled=2), augment=Augment.none())
    config = Config(
        data=str(dataset.root), plan=str(tmp_path / "plan.json"), stages=(stage,), cache=str(tmp_path / "cache")
    )
    train(config, tmp_path / "run", report=False)

    case = (*dataset.subset("val"), *dataset.subset("train"))[0]
    _, geometry = io.read_image(case.images[0])
    source = tmp_path / "one" / case.images[0].name
    source.parent.mkdir()
    for channel in case.images:
        (source.parent / channel.name).write_bytes(channel.read_bytes())
    written = predict(tmp_path / "run", source.parent, tmp_path / "predictions", checkpoint="last", progress=False)
    assert [io.stem(p) for p in written] == [case.id]
    label, found = io.read_label(written[0])
    assert label.shape == geometry.shape
    np.testing.assert_allclose(found.affine, geometry.affine, atol=1e-5)
    assert set(np.unique(label).tolist()) <= dataset.labels.known

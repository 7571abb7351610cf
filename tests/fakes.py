"""A run without training: a plan, a network that compares with thresholds, and images to predict."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel as nib
import numpy as np

from medseg_jax.data.plan import Plan
from medseg_jax.types import Labels

LABELS = Labels.simple("low", "high")


def threshold(image):
    """A pointwise network: class 1 above 10, class 2 above 20; [b, *s, c] -> [b, *s, 3]."""
    x = np.asarray(image)[..., :1]
    return np.concatenate([x <= 10, (x > 10) & (x <= 20), x > 20], -1).astype(np.float32)


def expected_label(image: np.ndarray) -> np.ndarray:
    return (image > 10).astype(np.uint8) + (image > 20)


def make_plan(patch: tuple[int, ...], **changes: Any) -> Plan:
    dim = len(patch)
    values: dict[str, Any] = {
        "dim": dim,
        "spacing": None,
        "patch_size": patch,
        "batch_size": 2,
        "normalization": ({"scheme": "none"},),
        "strides": ((1,) * dim, (2,) * dim),
        "kernel_sizes": ((3,) * dim,) * 2,
        "features": (4, 8),
        "crop_nonzero": False,
        "steps": 10,
        "classes": LABELS.names,
        "in_channels": 1,
    }
    return Plan(**values | changes)


def make_run(folder: Path, patch: tuple[int, ...] = (4, 6, 8), network=threshold, weights: str = "a", **changes: Any):
    """What `open_run` gives, with a network of our choice."""
    manifest = folder / "checkpoints" / "0_main" / "best" / "7.sha256.json"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"files": {}, "self": weights}))
    (folder / "dataset.json").write_text(json.dumps({"labels": {"background": 0, "low": 1, "high": 2}}))
    channels = changes.pop("channels", ("MR",))
    changes = {"normalization": ({"scheme": "none"},) * len(channels)} | changes
    plan = make_plan(patch, in_channels=len(channels), **changes)
    labels = Labels(plan.classes, tuple((i + 1,) for i in range(len(plan.classes))))
    return SimpleNamespace(
        path=folder,
        plan=plan,
        labels=labels,
        channels=channels,
        predict=network,
        checkpoint="best",
        step=7,
        members=(),
        thresholds=None,
    )


def write_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    image = nib.Nifti1Image(array, np.eye(4) if affine is None else affine)
    image.header["descrip"] = b"scanner 7"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)


def random_volume(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 31, shape).astype(np.int16)


def folder_of_cases(folder: Path, count: int = 3) -> Path:
    for i in range(count):
        write_nifti(folder / f"c{i}.nii.gz", random_volume(4, 5, 6, seed=i))
    return folder


class Counter:
    """A network that counts its calls and can fail at one of them."""

    def __init__(self, fail_at: int = 0, error: type[BaseException] = RuntimeError):
        self.calls, self.fail_at, self.error = 0, fail_at, error

    def __call__(self, image):
        self.calls += 1
        if self.calls == self.fail_at:
            raise self.error("out of something")
        return threshold(image)

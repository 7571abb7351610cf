"""TensorFlow Datasets: any prepared builder with pictures and masks, as a folder that the general converter reads.

    medseg data convert --source tfds:NAME DATA_DIR DST

DATA_DIR is where `tfds build` or `tfds.load` prepared the set, in the array_record format; it is read by random access,
without TensorFlow, and nothing is downloaded. The builder's splits become folders, which say who validates and who is
tested; options of the converter (classes, threshold, split ...) work as for any folder.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medseg_jax.types import UserError

IMAGES = ("image",)
MASKS = ("segmentation_mask", "mask", "label", "annotation")
"""Names of features, the likeliest first."""

SPLITS: dict[str, str] = {"validation": "val", "valid": "val", "dev": "val"}


def export(name: str, data_dir: Path, work: Path) -> Path:
    """Writes <split>/images/<number>.png and <split>/masks/<number>.png into an empty folder.

    Args:
        name: of the builder, with its config and version if it has several: "oxford_iiit_pet:4.0.0".
        data_dir: where it was prepared.
        work: folder to write to.

    Raises:
        UserError: the package is missing, the set is not prepared there, or it has no pictures with masks.
    """
    tfds = _package()
    try:
        builder = tfds.builder(name, data_dir=str(data_dir))
        sources = builder.as_data_source()
    except Exception as error:  # tfds and its readers have dozens of their own
        raise UserError(
            f"TensorFlow Datasets has no prepared {name} here",
            file=data_dir,
            found=str(error).splitlines()[0][:200] if str(error) else type(error).__name__,
            expected="a data_dir in which the set lies in the array_record format",
            remedy=f"tfds build {name} --data_dir {data_dir} --file_format array_record",
        ) from error
    features = dict(builder.info.features.items())
    image, mask = _feature(features, IMAGES, data_dir), _feature(features, MASKS, data_dir)
    for split, rows in dict[str, Any](sources).items():
        for number in range(len(rows)):
            row = rows[number]
            for folder, value in (("images", row[image]), ("masks", row[mask])):
                path = work / SPLITS.get(split, split) / folder / f"{split}_{number:06d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(_picture(np.asarray(value), data_dir)).save(path)
    return work


def _package() -> Any:
    try:
        return importlib.import_module("tensorflow_datasets")
    except ImportError as error:
        raise UserError(
            "TensorFlow Datasets is not installed", found=error, remedy="pip install 'medseg-jax[tfds]'"
        ) from error


def _feature(features: dict[str, Any], names: tuple[str, ...], data_dir: Path) -> str:
    """The picture among the features that has one of these names."""
    for name in names:
        if len(getattr(features.get(name), "shape", None) or ()) in (2, 3):
            return name
    found = ", ".join(f"{name} {getattr(feature, 'shape', '')}" for name, feature in features.items())
    raise UserError("The data set has no pictures with masks", file=data_dir, found=found, expected=" or ".join(names))


def _picture(array: np.ndarray, data_dir: Path) -> np.ndarray:
    """[h, w], [h, w, 1] or [h, w, 3] whole numbers -> what a PNG holds."""
    array = array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array
    fits = array.dtype == bool or (array.dtype.kind in "iu" and array.min() >= 0 and array.max() <= 65535)
    if not fits or array.ndim not in (2, 3) or (array.ndim == 3 and (array.shape[-1] != 3 or array.max() > 255)):
        found = f"{array.dtype} {array.shape}, {array.min()} to {array.max()}"
        raise UserError("A feature is no picture", file=data_dir, found=found, expected="8-bit RGB or 8 or 16-bit grey")
    return array.astype(np.uint16 if array.max() > 255 else np.uint8)

"""Raw data to convert: photos and masks in folders, and what to ask of the result."""

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from medseg_jax.data import convert as package
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.verify import check_dataset

SIZE = (24, 32)


def convert(src, dst, **options) -> Dataset:
    return package.convert(src, dst, **{"quiet": True, **options})


def photo(seed: int = 0, size=SIZE) -> np.ndarray:
    """RGB noise [h, w, 3]: no two alike."""
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)


def blob(seed: int = 0, size=SIZE) -> np.ndarray:
    """A rectangle [h, w] of 0 and 1 that lies elsewhere for each seed."""
    mask = np.zeros(size, np.uint8)
    top, left = 2 + seed % 5, 3 + seed % 7
    mask[top : top + 12, left : left + 14] = 1
    return mask


def save(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **options)
    return path


def save_palette(path: Path, index: np.ndarray, palette: list[int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.frombytes("P", index.shape[::-1], index.tobytes())
    image.putpalette(palette)
    image.save(path)


def pairs(root: Path, names=("a", "b", "c"), images="images", masks="masks", scale=255) -> Path:
    for seed, name in enumerate(names):
        save(root / images / f"{name}.png", photo(seed))
        save(root / masks / f"{name}.png", blob(seed) * np.uint8(scale))
    return root


def label_of(dataset: Dataset, id: str) -> np.ndarray:
    label = dataset.load(dataset.case(id))[1]
    assert label is not None
    return label


def hashes(root: Path) -> dict[str, str]:
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def no_errors(dataset: Dataset) -> bool:
    return not [p for p in check_dataset(dataset) if p.severity == "error"]

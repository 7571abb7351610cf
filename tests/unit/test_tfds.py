"""TensorFlow Datasets as a source: a builder that is made here, prepared without a download, read by random access."""

import sys

import numpy as np
import pytest
from PIL import Image

from medseg_jax.data import io, sources
from medseg_jax.types import UserError


def test_the_missing_package_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(UserError, match="not installed") as caught:
        sources.convert("tfds:anything", tmp_path / "in", tmp_path / "out")
    assert "medseg-jax[tfds]" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data_dir with the set `tiny_wounds`: 6 training and 2 validation pictures with masks 0, 1, 2."""
    tfds = pytest.importorskip("tensorflow_datasets", reason="pip install 'medseg-jax[tfds]'")

    class TinyWounds(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            picture, mask = tfds.features.Image(shape=(None, None, 3)), tfds.features.Image(shape=(None, None, 1))
            features = tfds.features.FeaturesDict(
                {"image": picture, "segmentation_mask": mask, "id": tfds.features.Text()}
            )
            return self.dataset_info_from_configs(features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(0, 6), "validation": self._generate_examples(6, 8)}

        def _generate_examples(self, low, high):
            for i in range(low, high):
                paths = [folder / f"{kind}{i}.png" for kind in ("image", "mask")]  # arrays would need TensorFlow
                for path, array in zip(paths, example(i), strict=True):
                    Image.fromarray(array).save(path)
                yield i, {"image": str(paths[0]), "segmentation_mask": str(paths[1]), "id": f"wound {i}"}

    folder = tmp_path_factory.mktemp("tfds")
    TinyWounds(data_dir=str(folder), file_format="array_record").download_and_prepare()
    return folder


def example(i):
    rng = np.random.default_rng(i)
    mask = np.zeros((20, 24), np.uint8)
    mask[4:9, 5 : 12 + i % 3], mask[12:16, 3:9] = 1, 2
    return rng.integers(0, 255, (20, 24, 3)).astype(np.uint8), mask


def test_a_builder_becomes_a_data_set(prepared, tmp_path):
    dataset = sources.convert("tfds:tiny_wounds", prepared, tmp_path / "data", classes="wound=1,scar=2", quiet=True)
    assert [len(dataset.subset(split)) for split in ("train", "val", "test")] == [6, 2, 0]
    assert dataset.labels.names == ("wound", "scar")
    masks = {image.tobytes(): mask for image, mask in map(example, range(8))}  # tfds shuffles what it prepares
    for case in dataset.cases:
        mask = masks.pop(io.read_image(case.images[0])[0].tobytes())
        np.testing.assert_array_equal(io.read_label(case.label)[0], mask)
    assert not masks


def test_a_set_that_is_not_prepared_is_explained(prepared, tmp_path):
    with pytest.raises(UserError, match="no prepared absent_set") as caught:
        sources.convert("tfds:absent_set", prepared, tmp_path / "out")
    assert "tfds build" in str(caught.value)

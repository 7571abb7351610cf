"""Draws few-labels.png: a batch of bidirectional copy-paste and its wavelet images, from synthetic pictures.

    python docs/how-to/few_labels_picture.py

No network is asked: the true label of the unlabelled image stands in for a pseudo-label.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from medseg_jax.data import synthetic
from medseg_jax.methods.bcp import mix, paste_mask
from medseg_jax.methods.wt_bcp import FUSION, low_high

plt.switch_backend("agg")


def case(dataset, index: int) -> tuple[np.ndarray, np.ndarray]:
    """A grey image [1, 64, 64, 1] in 0 ... 1 and its label [64, 64]."""
    image, label, _ = dataset.load(dataset.subset("train")[index])
    assert label is not None
    image = image[..., :3].mean(-1) / 255
    size = min(64, *image.shape)
    return image[None, :size, :size, None].astype(np.float32), label[:size, :size]


def main() -> None:
    """From left to right: what is pasted, what the student sees, what the branches see."""
    dataset = synthetic.open_data("phantoms2d")
    (labelled, label), (other, stand_in) = case(dataset, 0), case(dataset, 6)
    n = min(labelled.shape[1], other.shape[1])
    labelled, label, other, stand_in = labelled[:, :n, :n], label[:n, :n], other[:, :n, :n], stand_in[:n, :n]
    mask = paste_mask(jax.random.key(3), (n, n), 2 / 3)
    pasted, around = jnp.asarray(labelled), jnp.asarray(other)
    inward, outward = mix(around, pasted, mask), mix(pasted, around, mask)
    low, high = low_high(inward, *FUSION[2])
    panels = [
        ("labelled image", labelled, label),
        ("unlabelled image (the true label\nstands in for a pseudo-label)", other, stand_in),
        ("mask: 1 bright, 0 dark", 0.15 + 0.7 * mask[None, ..., None], None),
        ("in: labelled box in\nunlabelled surroundings", inward, np.where(mask, stand_in, label)),
        ("out: unlabelled box in\nlabelled surroundings", outward, np.where(mask, label, stand_in)),
        ("LF of “in”", low, None),
        ("HF of “in”", high, None),
    ]
    figure, axes = plt.subplots(1, len(panels), figsize=(13, 2.35), layout="constrained")
    for axis, (title, image, outline) in zip(axes, panels, strict=True):
        axis.imshow(np.asarray(image)[0, ..., 0], cmap="gray", vmin=0, vmax=1 if "F of" not in title else None)
        axis.contour(mask, [0.5], colors="white", linewidths=0.5)
        if outline is not None:
            for value, colour in enumerate(("tab:orange", "tab:red", "tab:cyan"), 1):
                style = "dashed" if "pseudo" in title else "solid"
                axis.contour(outline == value, [0.5], colors=colour, linewidths=0.9, linestyles=style)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    figure.savefig(Path(__file__).with_name("few-labels.png"), dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()

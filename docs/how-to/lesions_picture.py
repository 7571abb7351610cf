"""Draws lesions.png: what is done to a fundus photograph before the networks, and what is made of their answers.

python docs/how-to/lesions_picture.py

The eye is drawn, and so are the answers: no image of a data set is in it. Contrast, maps and colours are the product's.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from scipy.ndimage import gaussian_filter

from medseg_jax.data.preview import class_colors
from medseg_jax.inference.merge import one_map
from medseg_jax.ops.clahe import clahe_lab

plt.switch_backend("agg")
NAMES, THRESHOLDS = ("HE", "EX"), (0.3, 0.5)
H, W = 300, 400


def eye(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A photograph [h, w, 3] in uneven light, its field of view [h, w], and lesions [2, h, w], dark and bright."""
    y, x = np.mgrid[:H, :W].astype(float)
    field = (y - H / 2) ** 2 + (x - W / 2) ** 2 < 140**2
    light = 0.35 + 0.65 * np.exp(-((y - 110) ** 2 + (x - 130) ** 2) / 2e4)
    colour = np.array([190.0, 95.0, 45.0])
    picture = np.ones((H, W, 3)) * colour
    for turn in (-1, 1):
        for bend in (40, 75):
            vessel = np.abs(y - H / 2 - turn * bend * np.sin((x - 110) / 90)) < 2.0
            picture[vessel & (x > 110)] *= 0.7
    picture += 90 * np.exp(-((y - 150) ** 2 + (x - 105) ** 2) / 300)[..., None]
    dark, bright = np.zeros((2, H, W), bool)
    for mask, number, size, around in ((dark, 9, 6.0, (190, 240)), (bright, 12, 4.0, (130, 270))):
        for _ in range(number):
            cy, cx = rng.normal(around, (32, 38))
            ry, rx = rng.uniform(0.5, 1.3, 2) * size
            mask |= ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    dark, bright = dark & field, bright & field
    picture[dark] *= 0.55
    picture[bright] = picture[bright] * 0.6 + np.array([90.0, 85.0, 40.0])
    picture = picture * light[..., None] + rng.normal(0, 3, picture.shape)
    return np.clip(np.where(field[..., None], picture, 0), 0, 255).astype(np.uint8), field, np.stack([dark, bright])


def main() -> None:
    """Photograph, prepared, two probability maps, merged map."""
    rng = np.random.default_rng(4)
    picture, field, lesions = eye(rng)
    rows, columns = np.flatnonzero(field.any(1)), np.flatnonzero(field.any(0))
    box = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    prepared = clahe_lab(picture[box], 2.0, (8, 8))
    doubt = [gaussian_filter(rng.normal(size=(H, W)), 5) for _ in NAMES]
    chances = [np.clip(gaussian_filter(m * 1.0, 1.5) + 1.2 * d, 0, 1) for m, d in zip(lesions, doubt, strict=True)]
    probabilities = np.stack([np.where(field, c, 0) for c in chances], -1)
    merged = one_map(probabilities, THRESHOLDS)
    colours = np.array([(30, 30, 30), *class_colors(len(NAMES))], np.uint8)[merged]
    figure, axes = plt.subplots(1, 5, figsize=(13, 2.6), layout="constrained")
    panels = [
        ("photograph (drawn)", picture),
        ("field of view, contrast\n(what the networks see)", prepared),
        *(
            (f"{n}, its own network\nthreshold {t}", probabilities[..., k])
            for k, (n, t) in enumerate(zip(NAMES, THRESHOLDS, strict=True))
        ),
        ("merged/<case>.png", colours),
    ]
    for axis, (title, image) in zip(axes, panels, strict=True):
        axis.imshow(image, cmap="magma", vmin=0, vmax=1 if image.ndim == 2 else None)
        axis.set_title(title, fontsize=9)
        axis.axis("off")
    for name, colour in zip(NAMES, class_colors(len(NAMES)), strict=True):
        axes[-1].scatter([], [], color=np.array(colour) / 255, label=name, s=18)
    axes[-1].legend(fontsize=7, loc="upper right", facecolor="black", labelcolor="white")
    figure.savefig(Path(__file__).with_name("lesions.png"), dpi=80, metadata={"Software": None})


if __name__ == "__main__":
    main()

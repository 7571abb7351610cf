"""Classes that were predicted each on its own, and may overlap, in one map of which each pixel names one class.

    candidates of a pixel    classes l with p_l > tau_l
    winner                   the largest (p_l - tau_l) / (1 - tau_l); of equal ones the class that is named first

The thresholds tau maximise F1 over all pixels of the validation cases. Label maps and probabilities keep what is lost
here: that two lesions lie on one pixel. Spec: bayes_spe_med2d_dr D7.

    RUN/thresholds.json         {"last": {"MA": 0.4, ...}, "best": {...}}
    OUT/merged/<case>.png       one map, in indexed colours: the pixel is the class's number (0: nothing), and looks it
    OUT/merged/legend.json      number -> class and colour
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medseg_jax.data.preview import class_colors
from medseg_jax.paths import replacing

STRIP = 256


def one_map(probabilities: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """Probabilities [*s, k] -> number of the winner, 1 to k, or 0 where there is no candidate: [*s] uint8."""
    tau = np.asarray(thresholds, np.float32)
    out = np.zeros(probabilities.shape[:-1], np.uint8)
    for i in range(0, len(out), STRIP):
        margin = (probabilities[i : i + STRIP].astype(np.float32) - tau) / (1 - tau)  # [strip, .., k]
        out[i : i + STRIP] = np.where(margin.max(-1) > 0, margin.argmax(-1) + 1, 0)
    return out


def write(folder: Path, case: str, label: np.ndarray, names: Sequence[str]) -> list[Path]:
    """Writes a merged picture [h, w] and the legend."""
    folder.mkdir(parents=True, exist_ok=True)
    colors = [(0, 0, 0), *(tuple(int(v) for v in color) for color in class_colors(len(names)))]
    picture = Image.fromarray(label)
    picture.putpalette([v for color in colors for v in color])
    path = folder / f"{case}.png"
    with replacing(path) as draft:
        picture.save(draft, format="PNG")
    legend = {str(i): {"class": n, "color": list(c)} for i, (n, c) in enumerate(zip(["", *names], colors, strict=True))}
    with replacing(folder / "legend.json") as draft:
        draft.write_text(json.dumps(legend, indent=1), encoding="utf-8")
    return [path]

"""Draws unseen-scanner.png: what Mamba-Sea's two augmentations do, on synthetic pictures of three sites.

python docs/how-to/unseen_scanner_picture.py

Both really act inside the training: LSA on the outputs of the scans, GVA with weights that are learned. Here LSA acts
on the pictures themselves, whose colours are features that one can see, and GVA has random weights.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from medseg_jax.data.synthetic import make_phantoms
from medseg_jax.methods.mamba_sea import GVA, lsa
from medseg_jax.methods.objective import Fn

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def pictures(side: int = 56) -> np.ndarray:
    """[3, side, side, 3] in [0, 1]: one picture of each of three sites."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_phantoms(Path(folder) / "phantoms", cases=6, sites=3, size=72, seed=3)
        chosen = [next(c for c in dataset.cases if c.domain == domain) for domain in dataset.domains]
        found = []
        for case in chosen:
            image = dataset.load(case)[0] / 255
            top, left = ((n - side) // 2 for n in image.shape[:2])
            found.append(image[top : top + side, left : left + side])
    return np.stack(found).astype(np.float32)


def main() -> None:
    """Writes the picture beside this file."""
    x = jnp.asarray(pictures())
    rows = {"site's own style": x}
    rows["LSA, as run: all tokens"] = lsa(jax.random.key(11), x, "as_run", probability=1.0)
    rows["LSA, as described: a window"] = lsa(jax.random.key(11), x, "paper", probability=1.0, window=0.5)
    fn = Fn(lambda rngs: GVA(3, rngs))
    for number, words in ((1, "some"), (5, "other")):
        rows[f"GVA, {words} random weights"] = fn.apply(fn.init(jax.random.key(number))[0], {}, x)[0]
    figure, axes = plt.subplots(3, len(rows), figsize=(2.1 * len(rows), 6.6), layout="constrained")
    for column, (title, images) in enumerate(rows.items()):
        for row, image in enumerate(np.asarray(images)):
            axes[row, column].imshow(np.clip(image, 0, 1), interpolation="nearest")
            axes[row, column].set(xticks=[], yticks=[], ylabel=f"site {row}" if column == 0 else "")
        axes[0, column].set_title(title, fontsize=9)
    figure.savefig(Path(__file__).with_name("unseen-scanner.png"), dpi=80)


if __name__ == "__main__":
    main()

"""Draws audit.png: the first pictures of a label audit, on synthetic images with labels that were spoilt on purpose.

python docs/how-to/audit_picture.py
"""

import base64
import io
import re
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import medseg_jax as ms
from medseg_jax.data.synthetic import make_phantoms

SHOWN = 2


def audited(folder: Path) -> Path:
    """A short training on wrong labels, and the page of its audit."""
    make_phantoms(folder / "clean", dim=2, cases=24, sites=1, size=96)
    data = ms.corrupt(folder / "clean", folder / "wrong", ms.LabelNoise("jsrt", alpha=0.5, beta=0.7))
    net = ms.UNet.isotropic(2, 8, 16, 32, 64)
    stage = ms.Stage(ms.KMSNoise(net, e_steps=3), steps=300, optim=ms.Optim(lr=1e-2), augment=ms.Augment.light())
    config = ms.Config(data=str(data.root), stages=(stage,), cache=str(folder / "cache"))
    return ms.audit(data, ms.train(config, folder / "run", report=False))


def main() -> None:
    """The pictures stand in the page as they are."""
    with tempfile.TemporaryDirectory() as folder:
        page = audited(Path(folder)).read_text()
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)[:SHOWN]
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]
    Image.fromarray(np.concatenate(pictures, 1)).save(Path(__file__).with_name("audit.png"), optimize=True)


if __name__ == "__main__":
    main()

"""Draws audit.png: the first pictures of a label audit, on synthetic images with labels that were spoilt on purpose.

python docs/how-to/audit_picture.py
"""

import base64
import io
import re
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import medseg_jax as ms
from medseg_jax.data.synthetic import make_phantoms

SHOWN = 2
TITLES = ("label as given", "red: probably wrong")


def audited(folder: Path) -> Path:
    """A short training on wrong labels, and the page of its audit."""
    make_phantoms(folder / "clean", dim=2, cases=24, sites=1, size=96)
    data = ms.corrupt(folder / "clean", folder / "wrong", ms.LabelNoise("jsrt", alpha=0.5, beta=0.7))
    net = ms.UNet.isotropic(2, 8, 16, 32, 64)
    stage = ms.Stage(ms.KMSNoise(net, e_steps=3), steps=300, optim=ms.Optim(lr=1e-2), augment=ms.Augment.light())
    config = ms.Config(data=str(data.root), stages=(stage,), cache=str(folder / "cache"))
    return ms.audit(data, ms.train(config, folder / "run", report=False))


def main() -> None:
    """The pictures stand in the page as they are, each two panels wide; here with titles."""
    with tempfile.TemporaryDirectory() as folder:
        page = audited(Path(folder)).read_text()
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', page)[:SHOWN]
    pictures = [np.asarray(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found]
    titled(pictures).save(Path(__file__).with_name("audit.png"), optimize=True)


def titled(pictures: list[np.ndarray]) -> Image.Image:
    """Pictures [h, w, 3] side by side, with a title above each half of them and a gap in between."""
    top, gap = 26, 12
    size = sum(p.shape[1] for p in pictures) + gap * (len(pictures) - 1), top + pictures[0].shape[0]
    canvas, left = Image.new("RGB", size, "white"), 0
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(16)
    for picture in pictures:
        canvas.paste(Image.fromarray(picture), (left, top))
        for half, title in enumerate(TITLES):
            draw.text((left + (2 * half + 1) * picture.shape[1] / 4, top / 2), title, "black", font, "mm")
        left += picture.shape[1] + gap
    return canvas


if __name__ == "__main__":
    main()

"""JSRT chest X-rays with the SCR outlines: raw 12-bit images, masks of half their size, organs that overlap."""

from pathlib import Path

import numpy as np
from PIL import Image

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source, files, link
from medseg_jax.types import UserError

SIZE, BRIGHTEST = 2048, 4095


def arrange(folder: Path, work: Path) -> Path:
    """Raw images become PNG; the masks of both folds come together."""
    for path in files(folder, "**/*.IMG"):
        (work / "images").mkdir(exist_ok=True)
        Image.fromarray(read_raw(path)).save(work / "images" / f"{path.stem}.png")
    for path in files(folder, "**/images/*.png"):
        link(path, work / "images" / path.name)
    for path in files(folder, "**/masks/*/*.gif", "**/masks/*/*.png"):
        link(path, work / "masks" / path.parent.name.replace(" ", "_") / path.name)
    return work


def read_raw(path: Path) -> np.ndarray:
    """JSRT's .IMG -> [2048, 2048] uint16; 0 is white in the file, and black in what is returned."""
    if path.stat().st_size != SIZE * SIZE * 2:
        found, expected = f"{path.stat().st_size} bytes", f"{SIZE * SIZE * 2}: 2048 x 2048, two bytes each"
        raise UserError("Not a raw image of JSRT", file=path, found=found, expected=expected)
    stored = np.fromfile(path, ">u2").reshape(SIZE, SIZE)  # [h, w]
    return (BRIGHTEST - np.minimum(stored, BRIGHTEST)).astype(np.uint16)


SOURCE = Source(
    name="jsrt",
    title="JSRT/SCR: chest X-rays with lungs, heart and clavicles (KMS noise)",
    licence="research use",
    citation="Shiraishi et al., American Journal of Roentgenology 174, 2000; outlines: van Ginneken et al., Medical Image "
    "Analysis 10, 2006",
    origin="http://db.jsrt.or.jp/eng.php (images), https://www.isi.uu.nl/Research/Databases/SCR/ (outlines)",
    access="Both ask for a registration. Unpack images and outlines into one folder.",
    layout="""
jsrt/
  All247images/JPCLN001.IMG
  fold1/masks/heart/JPCLN001.gif  fold1/masks/left lung/JPCLN001.gif ...
  fold2/masks/...
or images/JPCLN001.png with masks/heart/JPCLN001.png ...
""",
    needs=("**/*.IMG|**/images/*.png", "**/masks/heart/*"),
    split="Every fifth image (sorted) validates: our rule. SCR itself is meant for two-fold cross-validation.",
    options=Options(multilabel=True, resize_labels=True),
    arrange=arrange,
)

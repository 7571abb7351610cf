"""CVC-ClinicDB: polyps, frames of a few videos."""

from pathlib import Path

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source, files, link


def arrange(folder: Path, work: Path) -> Path:
    """The last fifth of the frames validates: neighbours are frames of one video, and number order is video order."""
    images = sorted(files(folder, "Original/*", "PNG/Original/*", "images/*"), key=lambda path: int(path.stem))
    masks = {int(path.stem): path for path in files(folder, "Ground Truth/*", "PNG/Ground Truth/*", "masks/*")}
    for i, image in enumerate(images):
        split = "val" if i >= len(images) - max(1, round(len(images) / 5)) else "train"
        link(image, work / split / "images" / image.name)
        if int(image.stem) in masks:
            link(masks[int(image.stem)], work / split / "masks" / masks[int(image.stem)].name)
    return work


SOURCE = Source(
    name="cvc_clinicdb",
    title="CVC-ClinicDB: polyps, 612 frames of colonoscopy videos",
    licence="research use",
    citation="Bernal et al., WM-DOVA Maps for Accurate Polyp Highlighting in Colonoscopy, Computerized Medical Imaging and "
    "Graphics 43, 2015",
    origin="https://polyp.grand-challenge.org/CVCClinicDB/",
    access="Free download after a registration.",
    layout="""
CVC-ClinicDB/
  Original/1.tif          or PNG/Original/1.png,     or images/1.png
  Ground Truth/1.tif      or PNG/Ground Truth/1.png, or masks/1.png
""",
    needs=("Original/*|PNG/Original/*|images/*", "Ground Truth/*|PNG/Ground Truth/*|masks/*"),
    split="The last fifth of the frames validates (our rule), so that frames of a video stay together but for the one at "
    "the cut; a random split, as papers use it, leaks.",
    options=Options(classes="polyp"),
    arrange=arrange,
)

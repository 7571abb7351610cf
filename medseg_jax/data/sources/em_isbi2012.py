"""ISBI 2012: membranes of neurons in consecutive slices, drawn in black."""

from pathlib import Path

from PIL import Image, ImageSequence

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source, files, link


def arrange(folder: Path, work: Path) -> Path:
    """Slices of both stacks as pictures; the last fifth validates."""
    for role, stack in (("images", "train-volume.tif"), ("masks", "train-labels.tif")):
        if (folder / stack).is_file():
            (work / "stack" / role).mkdir(parents=True)
            with Image.open(folder / stack) as pages:
                for z, page in enumerate(ImageSequence.Iterator(pages)):
                    page.convert("L").save(work / "stack" / role / f"{z}.png")
            slices = files(work / "stack" / role, "*.png")
        else:
            slices = files(folder, f"{role}/*.png")
        for i, path in enumerate(slices):
            split = "val" if i >= len(slices) - max(1, round(len(slices) / 5)) else "train"
            link(path, work / "slices" / split / role / path.name)
    return work / "slices"


SOURCE = Source(
    name="em_isbi2012",
    title="ISBI 2012: neuron membranes in electron microscopy, 30 slices",
    licence="free with citation",
    citation="Arganda-Carreras et al., Crowdsourcing the Creation of Image Segmentation Algorithms for Connectomics, Frontiers "
    "in Neuroanatomy 9, 2015",
    origin="https://imagej.net/events/isbi-2012-segmentation-challenge",
    access="Free download of train-volume.tif and train-labels.tif.",
    layout="""
em_isbi2012/
  train-volume.tif  train-labels.tif      (30 slices each; membranes are 0)
or images/0.png, masks/0.png ...
""",
    needs=("train-volume.tif|images/*.png", "train-labels.tif|masks/*.png"),
    split="The last fifth of the slices validates (our rule): neighbouring slices are alike, so a random split would leak.",
    options=Options(classes="membrane", invert=True),
    arrange=arrange,
)

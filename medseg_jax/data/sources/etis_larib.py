"""ETIS-Larib: polyps of another centre, the usual test of what was learnt on Kvasir-SEG."""

from pathlib import Path

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source, files, link


def arrange(folder: Path, work: Path) -> Path:
    """Masks are called p1.tif in the release, and 1.png in copies of it."""
    for path in files(folder, "ETIS-LaribPolypDB/*", "images/*"):
        link(path, work / "images" / path.name)
    for path in files(folder, "Ground Truth/*", "masks/*"):
        link(path, work / "masks" / path.name.removeprefix("p"))
    return work


SOURCE = Source(
    name="etis_larib",
    title="ETIS-Larib: 196 polyp images of another centre",
    licence="research use",
    citation="Silva et al., Toward Embedded Detection of Polyps in WCE Images for Early Diagnosis of Colorectal Cancer, "
    "International Journal of Computer Assisted Radiology and Surgery 9, 2014",
    origin="https://polyp.grand-challenge.org/EtisLarib/",
    access="Free download after a registration.",
    layout="""
ETIS-Larib/
  ETIS-LaribPolypDB/1.tif    or images/1.png
  Ground Truth/p1.tif        or masks/1.png
""",
    needs=("ETIS-LaribPolypDB/*|images/*", "Ground Truth/*|masks/*"),
    split="Every fifth image validates (our rule). Papers only test on this set: medseg evaluate scores predictions of its images.",
    options=Options(classes="polyp"),
    arrange=arrange,
)

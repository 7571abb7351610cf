"""Retinal vessels of four data sets, each with file names of its own, as four domains."""

from pathlib import Path

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source, files, link

# Domain -> patterns of images, masks and fields of view; earlier patterns of masks go before later ones.
PATTERNS = {
    "DRIVE": (("**/images/*.tif",), ("**/*_manual1.gif",), ("**/*_mask.gif",)),
    "CHASEDB1": (("**/Image_*.jpg",), ("**/*_1stHO.png",), ("**/fov/Image_*",)),
    "STARE": (("**/im????.ppm",), ("**/*.ah.ppm", "**/*.vk.ppm"), ()),
    "HRF": (("**/images/*.jpg",), ("**/manual1/*.tif", "**/masks/*.tif"), ("**/mask/*_mask.tif",)),
}


def arrange(folder: Path, work: Path) -> Path:
    """Images without a mask (DRIVE's test images) are left out; those in a folder called test are the test set."""
    for domain, (images, masks, fields) in PATTERNS.items():
        root = folder / domain
        outlined = next((found for pattern in masks if (found := files(root, pattern))), [])
        seen = files(root, *fields) if fields else []
        for image in files(root, *images):
            key = image.stem.removesuffix("_training").removesuffix("_test")
            here = [path for path in outlined if path.name.startswith((f"{key}_", f"{key}."))]
            if not here:
                continue
            split = "test" if "test" in image.relative_to(root).parts else "train"
            for role, found in (("images", [image]), ("masks", here), ("fov", [p for p in seen if _is_of(p, key)])):
                for path in found[:1]:
                    link(path, work / split / domain / role / f"{image.stem}{path.suffix.lower()}")
    return work


def _is_of(path: Path, key: str) -> bool:
    return path.stem == key or path.stem.startswith(f"{key}_")


SOURCE = Source(
    name="retinal_vessels",
    title="Retinal vessels of DRIVE, CHASE_DB1, STARE and HRF as four domains (Mamba-Sea)",
    licence="DRIVE, STARE: research use; CHASE_DB1, HRF: CC BY 4.0",
    citation="DRIVE: Staal et al., IEEE TMI 23, 2004; CHASE_DB1: Fraz et al., IEEE TBME 59, 2012; STARE: Hoover et al., "
    "IEEE TMI 19, 2000; HRF: Budai et al., International Journal of Biomedical Imaging 2013",
    origin="https://drive.grand-challenge.org, https://blogs.kingston.ac.uk/retinal/chasedb1/, "
    "https://cecas.clemson.edu/~ahoover/stare/, https://www5.cs.fau.de/research/data/fundus-images/",
    access="DRIVE asks for a registration, the others are free downloads. Unpack each into a folder of its name.",
    layout="""
vessels/
  DRIVE/training/images/21_training.tif  .../1st_manual/21_manual1.gif  .../mask/21_training_mask.gif
  CHASEDB1/Image_01L.jpg  CHASEDB1/Image_01L_1stHO.png
  STARE/im0001.ppm  STARE/im0001.ah.ppm
  HRF/images/01_dr.JPG  HRF/manual1/01_dr.tif  HRF/mask/01_dr_mask.tif
(one of the four at least; folders below them do not matter)
""",
    needs=("DRIVE/**/*_manual1.gif|CHASEDB1/**/*_1stHO.png|STARE/**/*.ppm|HRF/**/*.tif",),
    split="Every fifth patient of each domain validates (our rule); both eyes of a person stay together; DRIVE's own test "
    "images are the test set where their masks are there. Leave a domain out: --test-domain HRF.",
    options=Options(classes="vessel", roi="fov"),
    arrange=arrange,
)

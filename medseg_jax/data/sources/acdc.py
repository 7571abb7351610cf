"""ACDC as the challenge gives it out: a folder for each patient, two labelled phases of each."""

from pathlib import Path

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source, files, link


def arrange(folder: Path, work: Path) -> Path:
    """The cine series (_4d) have no labels and are left out."""
    for label in files(folder, "**/patient*_gt.nii*"):
        image = label.with_name(label.name.replace("_gt.", "."))
        split = "test" if "testing" in label.relative_to(folder).parts else "train"
        link(image, work / split / "images" / image.name)
        link(label, work / split / "masks" / image.name)
    return work


SOURCE = Source(
    name="acdc",
    title="ACDC: cardiac cine MR, right ventricle, myocardium and left ventricle (challenge release, NIfTI)",
    licence="CC BY-NC-SA 4.0",
    citation="Bernard et al., Deep Learning Techniques for Automatic MRI Cardiac Multi-structures Segmentation and "
    "Diagnosis: Is the Problem Solved?, IEEE TMI 37, 2018",
    origin="https://www.creatis.insa-lyon.fr/Challenge/acdc/",
    access="Free download from the challenge's page; some mirrors ask for a registration.",
    layout="""
ACDC/
  training/patient001/patient001_frame01.nii.gz
  training/patient001/patient001_frame01_gt.nii.gz
  testing/patient101/...    (optional)
""",
    needs=("**/patient*_frame*_gt.nii*",),
    split="Official test patients (101 to 150) are the test set if they are there; every fifth of the others validates "
    "(our rule). For the split of the semi-supervised papers see acdc_ssl.",
    options=Options(layout="pairs", classes="RV=1,MYO=2,LV=3", patient_from=r"(patient\d+)"),
    arrange=arrange,
)

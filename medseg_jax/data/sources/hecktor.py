"""HECKTOR: tumours and lymph nodes of head and neck in CT and PET, of several centres."""

from pathlib import Path

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source, files, link


def arrange(folder: Path, work: Path) -> Path:
    """A folder per case below one per centre: CHUM-001 is of CHUM. Test cases have no labels and are left out."""
    for label in files(folder, "**/labelsTr/*.nii*"):
        case = label.name.partition(".")[0]
        for name, path in (
            ("CT_image", label.parents[1] / "imagesTr" / f"{case}__CT.nii.gz"),
            ("PET_image", label.parents[1] / "imagesTr" / f"{case}__PT.nii.gz"),
            ("mask", label),
        ):
            if path.is_file():
                link(path, work / case.rpartition("-")[0] / case / f"{name}.nii.gz")
    return work


SOURCE = Source(
    name="hecktor",
    title="HECKTOR 2022: head and neck, primary tumour and lymph nodes in CT and FDG-PET of seven centres",
    licence="end user agreement: research use, no passing on",
    citation="Andrearczyk et al., Overview of the HECKTOR Challenge at MICCAI 2022, LNCS 13626, 2023; Oreiller et al., Head and "
    "Neck Tumor Segmentation in PET/CT: The HECKTOR Challenge, Medical Image Analysis 77, 2022",
    origin="https://hecktor.grand-challenge.org",
    access="Register, and sign the agreement; the link to the files is then sent to you.",
    layout="""
hecktor2022_training/
  imagesTr/CHUM-001__CT.nii.gz  imagesTr/CHUM-001__PT.nii.gz
  labelsTr/CHUM-001.nii.gz      (1 GTVp primary tumour, 2 GTVn lymph nodes)
""",
    needs=("**/imagesTr/*__CT.nii.gz", "**/imagesTr/*__PT.nii.gz", "**/labelsTr/*.nii.gz"),
    split="Every fifth case of each centre validates (our rule; the test labels are withheld). Centres are domains: --domains "
    "CHUS,CHUV,CHUM,CHUP takes some of them.",
    options=Options(layout="cases", reference="CT", classes="GTVp=1,GTVn=2"),
    arrange=arrange,
)

"""Soft-tissue sarcoma: CT and FDG-PET on two grids, with a mask on each."""

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source

SOURCE = Source(
    name="sts",
    title="Soft-tissue sarcoma: CT and FDG-PET with the tumour",
    licence="CC BY 3.0",
    citation="Vallières et al., A Radiomics Model from Joint FDG-PET and MRI Texture Features for the Prediction of Lung "
    "Metastases in Soft-tissue Sarcomas, Physics in Medicine and Biology 60, 2015; doi 10.7937/K9/TCIA.2015.7GO2GSKS",
    origin="https://www.cancerimagingarchive.net/collection/soft-tissue-sarcoma/; NIfTI copies of the IBSI",
    access="Free download. TCIA has DICOM: convert it to NIfTI (CT in HU, PET in SUV), or take the IBSI's NIfTI copies.",
    layout="""
sts/
  STS_002/CT_image.nii.gz   STS_002/CT_mask.nii.gz
  STS_002/PET_image.nii.gz  STS_002/PET_mask.nii.gz
""",
    needs=("*/CT_image.nii*", "*/PET_image.nii*", "*/CT_mask.nii*"),
    split="Every fifth patient (sorted) validates: our rule, which leaves one of the first five out. Everything is brought onto the "
    "CT's grid; --reference PET chooses the other.",
    options=Options(layout="cases", reference="CT", classes="tumour"),
)

"""Medical Segmentation Decathlon: ten tasks in one layout, each with the dataset.json that says its classes."""

from medseg_jax.data.sources.source import Source

SOURCE = Source(
    name="msd",
    title="Medical Segmentation Decathlon, one task at a time (CT and MR of ten organs)",
    licence="CC BY-SA 4.0",
    citation="Antonelli et al., The Medical Segmentation Decathlon, Nature Communications 13, 2022",
    origin="http://medicaldecathlon.com",
    access="Free download of one tar file per task; SRC may be that tar file.",
    layout="""
Task04_Hippocampus/
  dataset.json
  imagesTr/hippocampus_001.nii.gz
  labelsTr/hippocampus_001.nii.gz
  imagesTs/hippocampus_002.nii.gz    (optional, without labels)
""",
    needs=("dataset.json", "imagesTr/*.nii.gz", "labelsTr/*.nii.gz"),
    split="Every fifth training case (sorted) validates: our rule, since the labels of the official test cases are withheld.",
)

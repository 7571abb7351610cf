"""Data Science Bowl 2018: nuclei, one mask file for each."""

from pathlib import Path

from medseg_jax.data.convert.options import Options
from medseg_jax.data.sources.source import Source

SOURCE = Source(
    name="dsb2018",
    title="Data Science Bowl 2018: nuclei in fluorescence and histology",
    licence="CC0 1.0",
    citation="Caicedo et al., Nucleus Segmentation Across Imaging Experiments: The 2018 Data Science Bowl, Nature Methods 16, "
    "2019",
    origin="https://bbbc.broadinstitute.org/BBBC038",
    access="Free download of stage1_train.zip; unpack it into a folder called stage1_train.",
    layout="""
dsb2018/
  stage1_train/<id>/images/<id>.png
  stage1_train/<id>/masks/<one file for each nucleus>.png
""",
    needs=("stage1_train/*/images/*.png", "stage1_train/*/masks/*.png"),
    split="Every fifth image (sorted) validates: our rule. Only stage1_train is used.",
    options=Options(classes="nucleus", split="every-5"),
    arrange=lambda folder, work: Path(folder) / "stage1_train",
)

"""Any folder (or zip, tar) of images and masks -> the canonical data set (see `data/dataset.py`).

    recognise   which layout; which files are images, masks, fields of view; which mask belongs to which image
    assign      domain, patient, split
    study       what values the masks hold
    decide      classes, thresholds, encoding
    write       case by case into DST.tmp, renamed to DST at the end

Nothing is guessed in silence: every decision is shown, and kept in dataset.json under "converted". Where two readings
are possible, `Ambiguous` lists the options to choose between. The source is never changed; the same source and options
give the same bytes.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from medseg_jax.data.convert.options import Ambiguous, Options

if TYPE_CHECKING:
    from medseg_jax.data.dataset import Dataset

__all__ = ["Ambiguous", "Options", "convert"]


def convert(src: str | Path, dst: str | Path, **options: object) -> "Dataset":
    """Makes a canonical data set of the images and masks in `src`.

    Args:
        src: folder with images and masks, or a zip or tar file of one; left untouched.
        dst: folder to write; must not exist (but see `overwrite`).
        options: fields of `Options`.

    Returns:
        the data set in `dst`.

    Raises:
        Ambiguous: only the user can decide; the message lists the options for each answer.
        UserError: anything else the user can mend; `dst` is not there or as it was before.
    """
    # Readers and their libraries load only here, so that `medseg data convert --help` answers at once.
    from medseg_jax.data.convert.steps import run

    return run(Path(src), Path(dst), Options.of(**options))

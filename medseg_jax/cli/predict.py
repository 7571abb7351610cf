"""medseg predict RUN [RUN ...] -i IN -o OUT"""

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg

# as strings, since tyro keeps the line breaks of a field's docstring
INPUT = (
    "an image, a folder of images (a file per channel: CASE_0000.nii.gz, CASE_0001.nii.gz; or pictures), a DICOM "
    "series or a folder of them, a data set"
)
TTA = (
    "test-time augmentation; alone it means flips. Times as slow: flips 4 (2-D) or 8 (3-D); rot90 4; both 8 or 16; "
    "scale about 3, on top of the others"
)


@dataclass(frozen=True)
class Arguments:
    """Segment images with one or several trained runs: label maps with the shape, place and header of the images.

    Several runs are averaged; a cross-validated one stands for all its folds. They may differ in plan, not in classes.
    Stopped and started again, it goes on with the cases that are missing. A broken case is listed at the end.
    """

    run: Annotated[Positional[tuple[Path, ...]], arg(metavar="RUN [RUN ...]")]
    """folders of runs, or of cross-validated runs"""
    input: Annotated[Path, arg(aliases=["-i"], metavar="IN", help=INPUT)]
    output: Annotated[Path, arg(aliases=["-o", "--out"], metavar="OUT")]
    """folder for the predictions"""
    checkpoint: Literal["best", "last"] = "best"
    """weights: best on validation, or last"""
    tta: Annotated[
        tuple[Literal["flips", "rot90", "scale"], ...] | None, arg(metavar="[flips] [rot90] [scale]", help=TTA)
    ] = None
    overlap: Annotated[float, arg(metavar="SHARE")] = 0.5
    """share of a window that its neighbours cover too, 0 to below 1"""
    batch_size: Annotated[int | None, arg(metavar="N")] = None
    """windows at once; None is the plan's batch size"""
    split: Literal["train", "val", "test"] | None = None
    """of a data set; default all its cases"""
    probabilities: bool = False
    """also write probabilities, to OUT/probabilities; runs of train --class always do"""
    uncertainty: bool = False
    """also write entropy, and variance and mutual information of runs and augmented views, to OUT/uncertainty"""
    dicom_seg: bool = False
    """also write OUT/CASE.dcm, a DICOM-SEG that refers to the DICOM series it was made of"""
    postprocessing: Literal["chosen", "none"] = "chosen"
    """as the run chose on its validation cases (RUN/postprocessing.json), or none"""
    overwrite: bool = False
    """predict everything anew, even if OUT holds predictions of another run or with other settings"""
    json: bool = False
    """print what was written as JSON"""


def main(argv: list[str]) -> int:
    """Predicts; returns 1 if some case could not be."""
    args = tyro.cli(FlagCreatePairsOff[Arguments], args=argv, prog="medseg predict")
    if not args.run:
        print("medseg predict: name at least one RUN", file=sys.stderr)
        return 2

    from medseg_jax.inference.predict import CasesFailed, predict
    from medseg_jax.runtime.environment import use_compilation_cache

    use_compilation_cache()
    before = {number: signal.signal(number, _stop) for number in (signal.SIGTERM, signal.SIGINT)}
    failed: dict[str, str] = {}
    try:
        written = predict(
            args.run,
            args.input,
            args.output,
            checkpoint=args.checkpoint,
            tta=False if args.tta is None else args.tta or ("flips",),
            overlap=args.overlap,
            batch_size=args.batch_size,
            split=args.split,
            save_probabilities=args.probabilities,
            save_uncertainty=args.uncertainty,
            save_dicom_seg=args.dicom_seg,
            postprocessing=args.postprocessing,
            overwrite=args.overwrite,
        )
    except CasesFailed as error:
        if not args.json:
            raise
        written, failed = error.written, error.failed
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if args.json:
        print(json.dumps({"written": [str(path) for path in written], "failed": failed}, indent=1, ensure_ascii=False))
    else:
        print(f"{len(written)} label map{'s' * (len(written) != 1)} in {args.output}", file=sys.stderr)
    return 1 if failed else 0


def _stop(number: int, _: object) -> None:
    """SIGTERM and Ctrl-C as an exception: what is half written is removed, finished cases are in the journal."""
    print("medseg predict: stopped; the same command goes on from here", file=sys.stderr)
    raise SystemExit(128 + number)

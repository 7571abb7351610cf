"""medseg predict RUN -i IN -o OUT"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, arg


@dataclass(frozen=True)
class Arguments:
    """Segment images with a trained run: label maps with the shape, place and header of the images.

    Started again, it goes on with the cases that are missing. A broken case is listed at the end; the others are done.
    """

    run: Annotated[Positional[Path], arg(metavar="RUN")]
    """folder of a run"""
    input: Annotated[Path, arg(aliases=["-i"], metavar="IN")]
    """an image, a folder of images (a file per channel: CASE_0000.nii.gz, CASE_0001.nii.gz; or pictures), a data set"""
    output: Annotated[Path, arg(aliases=["-o"], metavar="OUT")]
    """folder for the predictions"""
    checkpoint: Literal["best", "last"] = "best"
    """weights: best on validation, or last"""
    tta: bool = False
    """average over all mirror images: a little better, 4 (2-D) or 8 (3-D) times as slow"""
    overlap: Annotated[float, arg(metavar="SHARE")] = 0.5
    """share of a window that its neighbours cover too, 0 to below 1"""
    batch_size: Annotated[int | None, arg(metavar="N")] = None
    """windows at once; None is the plan's batch size"""
    split: Literal["train", "val", "test"] | None = None
    """of a data set; default all its cases"""
    probabilities: bool = False
    """also write probabilities, to OUT/probabilities"""
    overwrite: bool = False
    """predict everything anew, even if OUT holds predictions of another run or with other settings"""
    json: bool = False
    """print what was written as JSON"""


def main(argv: list[str]) -> int:
    """Predicts; returns 1 if some case could not be."""
    args = tyro.cli(FlagCreatePairsOff[Arguments], args=argv, prog="medseg predict")

    from medseg_jax.inference.predict import CasesFailed, predict
    from medseg_jax.runtime.environment import use_compilation_cache

    use_compilation_cache()
    failed: dict[str, str] = {}
    try:
        written = predict(
            args.run,
            args.input,
            args.output,
            checkpoint=args.checkpoint,
            tta=args.tta,
            overlap=args.overlap,
            batch_size=args.batch_size,
            split=args.split,
            save_probabilities=args.probabilities,
            overwrite=args.overwrite,
        )
    except CasesFailed as error:
        if not args.json:
            raise
        written, failed = error.written, error.failed
    if args.json:
        print(json.dumps({"written": [str(path) for path in written], "failed": failed}, indent=1, ensure_ascii=False))
    else:
        print(f"{len(written)} label maps in {args.output}", file=sys.stderr)
    return 1 if failed else 0

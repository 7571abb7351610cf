"""Cross-validation: every labelled case that is no test case is validated once, by a network that never saw it.

A fold is the same data set with another split, and a run like any other in RUN/fold_<k>; the loop knows nothing of it.

    split: the patients are sorted by (domain, patient); number i of them validates in fold  i mod K

so that a patient never stands on both sides, and within each domain, and on the whole, folds differ by one patient at
most. Test cases stay test cases; the data set's own validation cases take part like training cases; unlabelled cases of
a patient go where the patient goes.

    RUN/fold_<k>/                         an ordinary run
    RUN/cross_validation/{last,best}/     out-of-fold predictions of all cases, cases.csv, summary.json, report.html
    RUN/postprocessing.json               chosen on them, used when RUN predicts as an ensemble

The last checkpoint's scores are the honest ones: the best checkpoint of a fold was chosen on the cases it is scored on.
"""

import json
from dataclasses import replace
from pathlib import Path

from medseg_jax.config import Config
from medseg_jax.data import synthetic
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.views import fold_view
from medseg_jax.paths import write
from medseg_jax.runtime.log import say
from medseg_jax.runtime.run import fold_folder, seen_by
from medseg_jax.training.pool import CHECKPOINTS, pool
from medseg_jax.types import UserError


def train_folds(
    config: Config, out: str | Path, fold: int | None = None, *, fresh: bool = False, report: bool = True
) -> Path:
    """Trains one fold, or all that are not finished, and sums up as soon as all are. Resumable like `train`.

    Args:
        config: its `folds` says how many there are.
        out: folder of the cross-validation.
        fold: which one; None for all.
        fresh: throw away what these folds had and start them anew.
        report: write final scores and reports.

    Returns:
        `out`, or the folder of the one fold.

    Raises:
        UserError, Interrupted: as `train`; a fold lacks what the config asks for (before any is trained).
    """
    from medseg_jax.training.prepare import open_data, refuse_other_config
    from medseg_jax.training.train import train

    out = Path(out)
    if (out / "run.json").exists():
        raise UserError(
            "This folder holds a run without folds",
            file=out,
            remedy="choose another --out, or leave --fold out to go on with it",
        )
    wanted, dataset = range(config.folds) if fold is None else [fold], synthetic.open_data(config.data)
    for k in wanted:  # what a later fold cannot be trained with is said before the first
        try:
            seen_by(replace(config, fold=k), dataset)
        except UserError as error:
            error.problem = f"Fold {k}: {error.problem}"
            raise
    for k in wanted:
        folder, one = fold_folder(out, k), replace(config, fold=k)
        if finished(folder) and not fresh:
            refuse_other_config(one, folder, open_data(one)[0])
            say(f"fold {k}: finished already")
            continue
        say(f"fold {k} of {config.folds}: {folder}")
        train(one, folder, fresh=fresh, report=report)
    if report and all(finished(fold_folder(out, k)) for k in range(config.folds)):
        summarise(config, out)
    return out if fold is None else fold_folder(out, fold)


def finished(folder: Path) -> bool:
    """Whether a fold was trained to its end and scored."""
    return (folder / "report.html").is_file()


def summarise(config: Config, out: Path) -> None:
    """Pools the out-of-fold predictions of all folds, scores them as one, chooses post-processing; the reports."""
    import jax

    from medseg_jax.training.postprocess import choose_and_score
    from medseg_jax.training.prepare import open_data

    if jax.process_index() != 0:
        return
    _, dataset = open_data(replace(config, labelled=None))  # in the folds, only training cases lose their labels
    folders = {checkpoint: out / "cross_validation" / checkpoint for checkpoint in CHECKPOINTS}
    for checkpoint, target in folders.items():
        places = [fold_folder(out, k) / "validation" / checkpoint for k in range(config.folds)]
        summary = pool(places, target, pooled(dataset))
        mean, (low, high) = summary["mean"]["dice"], summary["ci95"]["dice"]
        say(f"cross-validation ({checkpoint}): Dice {mean:.4f} ({low:.4f} to {high:.4f}) over {summary['cases']} cases")
    choose_and_score(out, pooled(dataset), folders)
    write(out / "folds.json", json.dumps(_split(dataset, config.folds), indent=1, ensure_ascii=False))
    say(f"report: {folders['last'] / 'report.html'}")


def pooled(dataset: Dataset) -> Dataset:
    """All labelled cases that are no test cases, as validation cases."""
    cases = (
        replace(case, split="val") if case.label is not None and case.split != "test" else case
        for case in dataset.cases
    )
    return replace(dataset, cases=tuple(cases))


def _split(dataset: Dataset, folds: int) -> dict[str, list[str]]:
    """Fold -> ids of the cases that it validated on."""
    return {str(k): [case.id for case in fold_view(dataset, k, folds).subset("val")] for k in range(folds)}

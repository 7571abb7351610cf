"""A data set seen otherwise than its folder says; nothing is copied. For folds see training/folds.py."""

from dataclasses import replace

from medseg_jax.data.dataset import Dataset
from medseg_jax.types import UserError


def labelled_view(dataset: Dataset, labelled: int | tuple[str, ...]) -> Dataset:
    """The data set with labels for some training patients only: the other training cases become unlabelled ones.

    Validation and test cases stay as they are, and so do the indices of all cases.

    Args:
        labelled: names of patients or cases; or a number: the first so many labelled training patients in sorted order.

    Raises:
        UserError: a name that no labelled training case has, or fewer patients than asked for.
    """
    training = dataset.subset("train")
    patients = sorted({case.patient or case.id for case in training})
    if isinstance(labelled, int):
        if not 1 <= labelled <= len(patients):
            raise UserError(
                "The data set has not so many labelled training patients",
                file=dataset.root,
                found=f"labelled = {labelled}",
                expected=f"1 to {len(patients)}",
            )
        labelled = tuple(patients[:labelled])
    keep = set(labelled)
    if missing := keep - set(patients) - {case.id for case in training}:
        raise UserError(
            "No labelled training case of this name",
            file=dataset.root,
            found=", ".join(sorted(missing)),
            expected=f"patients or cases such as {', '.join(patients[:5])}",
            remedy="change the config's `labelled`",
        )
    hidden = {case.id for case in training if not keep & {case.id, case.patient}}
    cases = (replace(case, label=None) if case.id in hidden else case for case in dataset.cases)
    return replace(dataset, cases=tuple(cases))

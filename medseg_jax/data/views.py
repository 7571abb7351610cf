"""The same data set seen otherwise: a fold of a cross-validation, a domain held out, few labels, or some classes.

A view has the same cases in the same order, so that indices of cases and preprocessed files stay what they are.
"""

import difflib
from collections.abc import Sequence
from dataclasses import replace

from medseg_jax.data.dataset import Dataset
from medseg_jax.types import UserError


def fold_view(dataset: Dataset, fold: int, folds: int) -> Dataset:
    """The data set as fold `fold` of `folds` sees it; every labelled case that is no test case validates in one.

    The patients are sorted by (domain, patient), and number i of them validates in fold i mod K.

    Raises:
        UserError: there is no such fold, or there are fewer patients than folds.
    """
    owner = {case.id: case.patient or case.id for case in dataset.cases}
    domains: dict[str, str] = {}
    for case in dataset.cases:
        if case.label is not None and case.split != "test":
            domains[owner[case.id]] = min(case.domain, domains.get(owner[case.id], case.domain))
    if not 0 <= fold < folds:
        raise UserError("No such fold", found=f"fold {fold}", expected=f"0 to {folds - 1}, or all")
    if not 2 <= folds <= len(domains):
        raise UserError(
            "The patients cannot be shared out among so many folds",
            file=dataset.root,
            found=f"{folds} folds, {len(domains)} patients with labels that are not for tests",
            expected=f"2 to {len(domains)} folds",
            remedy="--folds N",
        )
    order = sorted(domains, key=lambda patient: (domains[patient], patient))
    validating = {patient for i, patient in enumerate(order) if i % folds == fold}
    cases = (
        case if case.split == "test" else replace(case, split="val" if owner[case.id] in validating else "train")
        for case in dataset.cases
    )
    return replace(dataset, cases=tuple(cases))


def hold_out_view(dataset: Dataset, domain: str, *, oracle: bool = False) -> Dataset:
    """The data set for a network that is to meet `domain` for the first time when it is tested.

    All cases of the domain are for tests, and so are the target's patients where they turn up in another domain. The
    other domains keep their split; where none of their cases validates, every fifth patient does, sorted by domain.

    Args:
        oracle: the labelled cases of the domain validate instead: what many articles do, and what nobody can who does
            not know the answers. Nothing else changes, so that a training takes the same steps.

    Raises:
        UserError: no such domain, or no labelled case in the others to train on.
    """
    if domain not in dataset.domains:
        near = difflib.get_close_matches(domain, dataset.domains, 1, 0.4)
        raise UserError(
            "No such domain to hold out",
            file=dataset.root / "dataset.json",
            found=domain,
            expected=", ".join(name or '""' for name in dataset.domains),
            remedy=f"did you mean {near[0]}?" if near else 'domains stand in dataset.json under "medseg", "cases"',
        )
    theirs = {case.patient for case in dataset.cases if case.domain == domain and case.patient}
    cases = (
        replace(case, split="test") if case.domain == domain or case.patient in theirs else case
        for case in dataset.cases
    )
    view = replace(dataset, cases=tuple(cases))
    if not view.subset("train"):
        raise UserError(
            f"Without {domain} there is nothing left to train on",
            file=dataset.root,
            found=f"domains {', '.join(name or chr(34) * 2 for name in dataset.domains)}",
            expected="two domains or more with labelled training cases",
        )
    patients = {case.patient or case.id for case in view.subset("train")}
    if not view.subset("val") and len(patients) > 1:
        view = fold_view(view, 0, min(5, len(patients)))
    if not oracle:
        return view
    # The sources' own validation cases stay out of the training.
    split = {"val": "test", "test": "test", "train": "train"}
    cases = (
        replace(case, split="val" if case.domain == domain and case.label is not None else split[case.split])
        for case in view.cases
    )
    return replace(view, cases=tuple(cases))


def class_view(dataset: Dataset, classes: Sequence[str] | None) -> Dataset:
    """The data set as one of these classes only (None: all); what else its label maps hold becomes background.

    Raises:
        UserError: no such class.
    """
    if classes is None:
        return dataset
    try:
        return replace(dataset, labels=dataset.labels.only(classes))
    except UserError as error:
        error.file, error.remedy = dataset.root / "dataset.json", "change the config's `classes`"
        raise


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

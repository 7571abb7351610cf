"""Few labelled patients: what unlabelled ones add to a U-Net, and what each part of WT-BCP adds.

On ACDC all jobs take 128 x 128 (30 patients train, 8 validate), slices of 64 x 64 after resampling, 2,000 steps of four
labelled slices (and four unlabelled ones), the same optimiser and augmentation, about 0.45 M parameters. The first
stage of BCP and WT-BCP takes eight labelled slices a step and mixes them into four: they see 10,000 labelled slices in
2,000 steps where the others see 8,000, and 24,000 in 4,000 steps where the U-Net alone sees 16,000. The patients that
are labelled are the papers' (5 %: three, 10 %: seven). The `_long` jobs take twice the steps, and half of them for the
first stage: with 500 + 1,500 BCP ended below the U-Net alone. The `_wide` jobs do so with networks of four times the
parameters: WT-BCP with XNet-Plus of width 4 ended without two of the classes.

Two sets are in 3-D, with the configs of the hippocampus: there two of 96 volumes are labelled, 600 steps. Of left atria
there are four scans: each is left out in turn, two of the other three are labelled, 400 steps at 2 mm.
"""

import numpy as np

from studies import Job, Records, case_values, difference, interval

PAGE = "docs/how-to/few-labels.md"

SEVEN = ("--labelled", *(f"patient{n:03d}" for n in (21, 38, 49, 50, 58, 99, 100)))
NO_WAVELETS = ("--stages.0.objective.wavelet", "None", "--stages.1.objective.wavelet", "None")
NO_CONSISTENCY = ("--stages.1.objective.consistency", "0")

LONG = {
    "supervised": ("--stages.0.steps", "4000"),
    "bcp": ("--stages.0.steps", "2000", "--stages.1.steps", "2000"),
    "wt_bcp": ("--stages.0.steps", "2000", "--stages.1.steps", "2000", "--stages.1.objective.ramp", "2000"),
}
"""Overrides of the configs that are also run for 4,000 steps, with three patients."""

WIDE = {"supervised": "16", "bcp": "16", "wt_bcp": "8"}
"""Their widths with four times the parameters."""

WORDS = {
    "supervised": "U-Net, labelled alone",
    "mean_teacher": "mean teacher",
    "bcp": "BCP, U-Net",
    "wt_bcp": "WT-BCP",
    "wt_bcp_no_wavelets": "WT-BCP minus wavelets",
    "wt_bcp_no_consistency": "WT-BCP minus consistency",
    "bcp_xnet": "WT-BCP minus both (BCP, XNet-Plus)",
}
VARIANTS = {
    "wt_bcp_no_wavelets": ("wt_bcp", NO_WAVELETS),
    "wt_bcp_no_consistency": ("wt_bcp", NO_CONSISTENCY),
    "bcp_xnet": ("wt_bcp", (*NO_WAVELETS, *NO_CONSISTENCY)),
}
SHOWN = (("dice", 3), ("hd95", 1))
"""Metrics of each class, and their digits."""


GROUPS = {
    "3": "3 of 30",
    "3_long": "3 of 30, 4,000 steps",
    "3_wide": "3 of 30, 4,000 steps, 1.8 M parameters",
    "7": "7 of 30",
}
"""Which patients are labelled, and how long and how large: end of a job's name -> words."""


def job(name: str, group: str) -> Job:
    """One method under the conditions of a group."""
    config, overrides = VARIANTS.get(name, (name, ()))
    if group == "7":
        overrides += SEVEN
    if group in ("3_long", "3_wide"):
        overrides += LONG[config]
    if group == "3_wide":
        for stage in range(1 if name == "supervised" else 2):
            overrides += (f"--stages.{stage}.objective.net.width", WIDE[config])
    source, options = "acdc/derived_128", ("--source", "acdc_ssl")
    return Job(f"{name}_{group}", f"few_labels/{config}", source, options=options, overrides=overrides)


VOLUMES = ("supervised", "mean_teacher", "bcp")
"""What is also run in 3-D."""


def atria(name: str) -> Job:
    """One method on four left atria, each segmented by the network of the other three."""
    plan = ("--plan", "configs/few_labels/la_2mm.plan.json", "--fold", "all", "--folds", "4", "--labelled", "2")
    steps = ("200", "200") if name == "bcp" else ("400",)
    overrides = (*plan, *(word for i, n in enumerate(steps) for word in (f"--stages.{i}.steps", n)))
    if name == "mean_teacher":
        overrides += ("--stages.0.objective.ramp", "200")
    config, scores = f"few_labels/hippocampus_{name}", (("last", "cross_validation/last"),)
    return Job(f"{name}_la", config, "la2018", options=("--source", "la2018"), overrides=overrides, scores=scores)


SOME = {"3_long": LONG, "3_wide": (*LONG, *VARIANTS)}
"""Groups of which not all methods are run."""

JOBS = (
    *(job(name, group) for group in GROUPS for name in SOME.get(group, WORDS)),
    *(Job(f"{name}_hippocampus", f"few_labels/hippocampus_{name}", "hippocampus_msd04") for name in VOLUMES),
    *map(atria, VOLUMES),
)


def table(records: Records) -> str:
    """A table a data set."""
    tables = [_table(records, GROUPS, ("RV", "MYO", "LV"))]
    tables.append(_table(records, {"hippocampus": "hippocampus: 2 of 96"}, ("Anterior", "Posterior")))
    tables.append(_table(records, {"la": "left atria: 2 of 3, four folds"}, ("atrium",)))
    return "\n\n".join(filter(None, tables))


def _table(records: Records, groups: dict[str, str], classes: tuple[str, ...]) -> str:
    """A row a method: mean over classes of Dice and HD95 of whole volumes, and Dice and HD95 of each class."""
    head = ["labelled", "method", "seeds", "Dice (95 % interval)", "less the U-Net alone", "HD95"]
    head += [f"{c}: Dice, HD95" for c in classes]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for group, labelled in groups.items():
        for name, words in WORDS.items():
            seeds = records.get(f"{name}_{group}", {})
            if not seeds:
                continue
            mean, spread, low, high = interval(case_values("few_labels", f"{name}_{group}", "last", "dice"))
            spread = f" ± {spread:.3f}" if len(seeds) > 1 else ""
            last = [record["last"] for record in seeds.values()]
            distance = np.mean([summary["mean"]["hd95"] for summary in last])
            by_class = [
                ", ".join(f"{np.mean([summary['classes'][c][m] for summary in last]):.{d}f}" for m, d in SHOWN)
                for c in classes
            ]
            cells = [labelled, words, str(len(seeds)), f"{mean:.3f}{spread} ({low:.3f} – {high:.3f})"]
            base = f"supervised_{group}"
            cells.append(difference("few_labels", f"{name}_{group}", base) if name != "supervised" else "")
            rows.append(f"| {' | '.join([*cells, f'{distance:.1f}', *by_class])} |")
    return "\n".join(rows) if len(rows) > 2 else ""

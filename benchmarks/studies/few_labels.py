"""ACDC with few labelled patients: what unlabelled patients add to a U-Net, and what each part of WT-BCP adds.

All jobs: ACDC at 128 x 128 (30 patients train, 8 validate), slices of 64 x 64 after resampling, 2,000 steps of four
labelled slices (and four unlabelled ones), the same optimiser and augmentation, about 0.45 M parameters. The patients
that are labelled are the papers' (5 %: three, 10 %: seven). The 3-D jobs: hippocampus, two labelled volumes.
"""

import numpy as np

from studies import Job, Records, case_values, interval

PAGE = "docs/how-to/few-labels.md"

SEVEN = ("--labelled", *(f"patient{n:03d}" for n in (21, 38, 49, 50, 58, 99, 100)))
NO_WAVELETS = ("--stages.0.objective.wavelet", "None", "--stages.1.objective.wavelet", "None")
NO_CONSISTENCY = ("--stages.1.objective.consistency", "0")

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
CLASSES = ("RV", "MYO", "LV")
SHOWN = (("dice", 3), ("hd95", 1))
"""Metrics of each class, and their digits."""


def job(name: str, labelled: int) -> Job:
    """One method with three or seven labelled patients."""
    config, overrides = VARIANTS.get(name, (name, ()))
    if labelled == 7:
        overrides = (*overrides, *SEVEN)
    source, options = "acdc/derived_128", ("--source", "acdc_ssl")
    return Job(f"{name}_{labelled}", f"few_labels/{config}", source, options=options, overrides=overrides)


JOBS = tuple(job(name, labelled) for labelled in (3, 7) for name in WORDS)


def table(records: Records) -> str:
    """A row a method: mean over classes of Dice and HD95 of whole volumes, and Dice and HD95 of each class."""
    head = ["labelled", "method", "seeds", "Dice (95 % interval)", "HD95", *(f"{c}: Dice, HD95" for c in CLASSES)]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for labelled in (3, 7):
        for name, words in WORDS.items():
            seeds = records.get(f"{name}_{labelled}", {})
            if not seeds:
                continue
            mean, spread, low, high = interval(case_values("few_labels", f"{name}_{labelled}", "last", "dice"))
            spread = f" ± {spread:.3f}" if len(seeds) > 1 else ""
            last = [record["last"] for record in seeds.values()]
            distance = np.mean([summary["mean"]["hd95"] for summary in last])
            by_class = [
                ", ".join(f"{np.mean([summary['classes'][c][m] for summary in last]):.{d}f}" for m, d in SHOWN)
                for c in CLASSES
            ]
            cells = [f"{labelled} of 30", words, str(len(seeds)), f"{mean:.3f}{spread} ({low:.3f} – {high:.3f})"]
            rows.append(f"| {' | '.join([*cells, f'{distance:.1f}', *by_class])} |")
    return "\n".join(rows)

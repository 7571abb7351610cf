"""Lesions of IDRiD: a network for each, or one for all? A DeepLabv3+, or a U-Net?

19 images train, 5 validate (the last of the official training images; the 27 test images have no part in anything).
Haemorrhages and hard exudates, the two that two CPU cores can learn in minutes: 150 steps a lesion or 300 for both
together; then all four lesions (`_all`), 600 steps for one network. Patches of 192 x 192 from images of 1429 x 949.
Everything but network and sharing is the same. Areas are over all pixels of the validation images in the files'
resolution, with the last weights; they need no threshold.
"""

import numpy as np

from studies import Job, Records

PAGE = "docs/how-to/lesions.md"
LESIONS = {"": ("HE", "EX"), "_all": ("MA", "HE", "SE", "EX")}
"""End of a job's name -> what it learns."""
METHODS = {
    "each": "DeepLabv3+ for each lesion",
    "shared": "one DeepLabv3+ for both",
    "unet_each": "U-Net for each lesion",
    "unet_shared": "one U-Net for both",
    "shared_all": "one DeepLabv3+ for all four",
    "unet_shared_all": "one U-Net for all four",
}


def job(name: str) -> Job:
    """One method. Runs of a network for each class start with two runs of one class and end with common scores."""
    overrides = ("--class", "all") if name.endswith("each") else ()
    if name.endswith("_all"):
        overrides += ("--classes", *LESIONS["_all"], "--stages.0.steps", "600", "--validate_every", "600")
    return Job(
        name, f"lesions/{name.removesuffix('_all')}", "idrid", options=("--source", "idrid"), overrides=overrides
    )


JOBS = tuple(job(name) for name in METHODS)


def table(records: Records) -> str:
    """A table of two lesions, and one of four."""
    return "\n\n".join(filter(None, (_table(records, group) for group in LESIONS)))


def _table(records: Records, group: str) -> str:
    """A row a method: IDRiD's AUPR and average precision of each lesion, mean over seeds ± deviation."""
    lesions, rows = LESIONS[group], []
    for name, words in METHODS.items():
        seeds = list(records.get(name, {}).values())
        if not seeds or name.endswith("_all") != (group == "_all"):
            continue
        cells = [words, str(len(seeds))]
        for lesion in lesions:
            pooled = [s["last"]["probabilities"]["classes"][lesion] for s in seeds]
            cells += [_spread([one[area] for one in pooled]) for area in ("aupr33", "ap")]
            dice = [s["last"]["classes"][lesion] for s in seeds]
            low, high = np.mean([one["ci95"]["dice"] for one in dice], 0)
            cells.append(f"{_spread([one['dice'] for one in dice])} ({low:.2f} – {high:.2f})")
        rows.append(f"| {' | '.join(cells)} |")
    head = ["", "seeds", *(f"{lesion}: {a}" for lesion in lesions for a in ("AUPR (33 thresholds)", "AP", "Dice"))]
    return "\n".join([f"| {' | '.join(head)} |", "|" + "---|" * len(head), *rows]) if rows else ""


def _spread(values: list[float]) -> str:
    return f"{np.mean(values):.3f}" + (f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else "")

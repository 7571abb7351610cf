"""Which way of training serves a site that nobody has seen? Retinal vessels of four sites, each left out in turn.

All methods have the same plan, steps, batches (as many images of each site) and geometry of augmentation; the two
networks have about as many parameters and take about as long for a step, Mamba-Sea twice that. The target takes no part
in anything; learning rates come from a few short runs on source sites. A record's scores are those of all
sites pooled, each predicted by the weights that never saw it; "domains" has them one by one.
"""

import numpy as np

from studies import Job, Records, case_values, interval

PAGE = "docs/benchmarks/domain-generalisation.md"
SCORES = (("last", "unseen/last"), ("best", "unseen/best"))
DOMAINS = ("DRIVE", "CHASEDB1", "STARE", "HRF")
OPTIONS = ("--source", "retinal_vessels")


def job(name: str, words: str, config: str | None = None) -> Job:
    """One method, all sites."""
    config = config or f"unseen_vessels/{name}"
    return Job(name, config, "vessels", words, OPTIONS, overrides=("--hold-out", "all"), scores=SCORES)


JOBS = (
    job("unet", "U-Net"),
    job("mamba_sea", "Mamba-Sea", "mamba_sea_vessels"),
    job("vmunet", "VM-UNet"),
    job("bigaug", "U-Net, strong augmentation (BigAug)"),
    job("mixstyle", "U-Net, MixStyle"),
    job("dsu", "U-Net, DSU"),
    job("fourier", "U-Net, Fourier mixing"),
    job("mamba_sea_conv", "Mamba-Sea, convolutions for the scans"),
)
"""The most important ones first."""


def table(records: Records) -> str:
    """Mean Dice on the held-out sites with the last weights, ± deviation over seeds; differences to the U-Net."""
    head = ("trained without", *DOMAINS, "mean of sites", "minus U-Net, by case (95 % interval)", "HD95", "seeds")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for one in JOBS:
        if not (seeds := records.get(one.name)):
            continue
        last = [record["last"] for record in seeds.values()]
        dice = np.array(
            [[summary["domains"][name]["dice"] for name in DOMAINS] for summary in last]
        )  # [seeds, domains]
        hd95 = np.mean([[summary["domains"][name]["hd95"] for name in DOMAINS] for summary in last])
        cells = [one.data, *map(_spread, dice.T), _spread(dice.mean(1)), _gap(one.name), f"{hd95:.1f} px"]
        lines.append(f"| {' | '.join([*cells, str(len(seeds))])} |")
    return "\n".join(lines)


def _spread(values: np.ndarray) -> str:
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def _gap(name: str) -> str:
    """Mean difference to the U-Net over cases and the seeds that both have, with its interval over cases."""
    mine, theirs = (case_values("domain_generalisation", n, "last", "dice") for n in (name, "unet"))
    both = {s: {key: mine[s][key] - theirs[s][key] for key in mine[s]} for s in mine.keys() & theirs.keys()}
    if name == "unet" or not both:
        return ""
    mean, _, low, high = interval(both)
    return f"{mean:+.3f} ({low:+.3f} to {high:+.3f})"

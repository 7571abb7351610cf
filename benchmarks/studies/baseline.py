"""What the README's table claims: a plain U-Net from `data plan` alone."""

import numpy as np

from studies import Job, Records

PAGE = "README.md"

JOBS = (
    Job("unet_hippocampus", "unet_hippocampus", "hippocampus_msd04", "MSD hippocampus, 96 train / 24 val"),
    Job("unet_isic2018", "unet_isic2018", "isic2018_256", "ISIC 2018 at 256 x 256, 500 train / 100 val"),
)


def table(records: Records) -> str:
    """A row is the mean over seeds of the mean over validation cases, and the first seed's interval over cases."""
    rows = ["| config | data, split | time | mean Dice (95 % interval) | HD95 | NSD |", "|---|---|---|---|---|---|"]
    for job in JOBS:
        seeds = list(records.get(job.name, {}).values())
        if not seeds:
            continue
        for which in ("best", "last"):
            mean = {m: np.array([s[which]["mean"][m] for s in seeds]) for m in ("dice", "hd95", "nsd")}
            spread = f" ± {mean['dice'].std(ddof=1):.3f}" if len(seeds) > 1 else ""
            low, high = seeds[0][which]["ci95"]["dice"]
            minutes = np.mean([s["minutes_of_steps"] for s in seeds])
            rows.append(
                f"| [{job.config}](configs/{job.config}.py), {which} | {job.data} | "
                f"{minutes:.0f} min, {len(seeds)} seeds | "
                f"{mean['dice'].mean():.3f}{spread} ({low:.3f} – {high:.3f}) | "
                f"{mean['hd95'].mean():.2f} {seeds[0][which]['unit']} | {mean['nsd'].mean():.3f} |"
            )
    return "\n".join(rows)

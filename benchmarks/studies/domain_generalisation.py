"""Which way of training serves a site that nobody has seen? Each site is left out in turn.

Optic discs of two sites, retinal vessels and polyps of four. With the published skips VM-UNet finds no vessel in 500
steps; there the scan networks have those of a U-Net. They are slow to learn vessels all the same, hence one site more
with five times the steps. Within a data set all have the same plan, steps, batches and geometry of augmentation; the
two networks have about as many parameters. The target takes no part in anything; learning rates come from a few short
runs on source sites. A record's scores are those of all sites pooled, each predicted by the weights that never saw it;
"domains" has them one by one.
"""

import numpy as np

from studies import Job, Records, case_values, difference, interval

PAGE = "docs/benchmarks/domain-generalisation.md"
SCORES = (("last", "unseen/last"), ("best", "unseen/best"))
DOMAINS = {
    "discs": ("drishti_gs", "idrid"),
    "vessels": ("DRIVE", "CHASEDB1", "STARE", "HRF"),
    "long": ("DRIVE",),
    "polyps": ("kvasir_seg", "cvc_clinicdb", "bkai_igh_neopolyp", "etis_larib"),
}
TITLES = {"long": "vessels, 1,500 steps"}
METHODS = {
    "unet": "U-Net",
    "mamba_sea": "Mamba-Sea",
    "vmunet": "VM-UNet",
    "mamba_sea_unet": "Mamba-Sea's method on the U-Net",
    "dsu": "U-Net, DSU",
    "mixstyle": "U-Net, MixStyle",
    "bigaug": "U-Net, strong augmentation (BigAug)",
    "fourier": "U-Net, Fourier mixing",
    "mamba_sea_conv": "Mamba-Sea, convolutions for the scans",
}
"""The most important ones first."""
BASES = {"mamba_sea": "vmunet", "mamba_sea_conv": "vmunet"}
"""What a method is compared with, if not with the U-Net."""
SCANS = ("vmunet", "mamba_sea", "mamba_sea_conv")
"""On a VM-UNet."""


def discs(name: str) -> Job:
    """One method on optic discs, both sites."""
    config = "mamba_sea_optic_disc" if name == "mamba_sea" else f"unseen_sites/{name}"
    plan = ("--plan", "configs/plans/mamba_sea_optic_disc.json", "--stages.0.steps", "200")
    overrides = ("--hold-out", "all", *plan)
    source = "optic_disc/derived_roi256"
    return Job(f"discs_{name}", config, source, options=("--source", "optic_disc"), overrides=overrides, scores=SCORES)


def vessels(name: str, group: str = "vessels", site: str = "all", steps: int = 300) -> Job:
    """One method on vessels, all four sites or one."""
    overrides, options = ("--hold-out", site, "--stages.0.steps", str(steps)), ("--source", "retinal_vessels")
    config = "mamba_sea_vessels" if name == "mamba_sea" else f"unseen_sites/{name}"
    if name in SCANS:
        overrides += ("--stages.0.objective.net.skips", "unet")
    return Job(f"{group}_{name}", config, "vessels", options=options, overrides=overrides, scores=SCORES)


def polyps(name: str) -> Job:
    """One method on polyps, all four centres."""
    config = "mamba_sea_polyp" if name == "mamba_sea" else f"unseen_sites/{name}"
    plan = ("--plan", "configs/plans/mamba_sea_polyp.json", "--stages.0.steps", "300")
    overrides = ("--hold-out", "all", *plan)
    return Job(f"polyps_{name}", config, "polyp", options=("--source", "polyps"), overrides=overrides, scores=SCORES)


JOBS = (
    *(discs(name) for name in METHODS if name != "fourier"),  # which mixes sites: there is one source
    *(vessels(name) for name in METHODS),
    *(vessels(name, "long", "DRIVE", 1500) for name in ("unet", "vmunet", "mamba_sea")),
    *(polyps(name) for name in METHODS),
)


def table(records: Records) -> str:
    """A table a data set: mean Dice on the held-out sites with the last weights, differences to the plain network;
    below it every site by itself."""
    groups = (group for group in DOMAINS if any(name.startswith(group) for name, seeds in records.items() if seeds))
    return "\n\n".join(f"{_table(records, group)}\n\n{_sites(records, group)}" for group in groups)


def _table(records: Records, group: str) -> str:
    """± is the deviation over seeds, intervals are over patients; "sites seen" are the others' validation cases."""
    sites, title = DOMAINS[group], TITLES.get(group, group)
    head = (
        f"{title}; trained without",
        *sites,
        "mean of sites",
        "sites seen",
        "difference (95 % interval)",
        "HD95",
        "seeds",
    )
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, words in METHODS.items():
        if not (seeds := records.get(f"{group}_{name}")):
            continue
        last = [record["last"] for record in seeds.values()]
        dice = np.array([[summary["domains"][site]["dice"] for site in sites] for summary in last])  # [seeds, sites]
        hd95 = f"{np.mean([[summary['domains'][site]['hd95'] for site in sites] for summary in last]):.1f} px"
        rows = [record["hold_out"].values() for record in seeds.values() if "hold_out" in record]
        seen = np.array([np.mean([row["sources"]["mean"]["dice"] for row in one]) for one in rows])
        cells = [words, *map(_spread, dice.T), _spread(dice.mean(1)), _spread(seen), _gap(group, name), hd95]
        lines.append(f"| {' | '.join([*cells, str(len(seeds))])} |")
    return "\n".join(lines)


def _sites(records: Records, group: str) -> str:
    """A line a site and method, folded away: intervals over patients of the mean over seeds."""
    title = f'<details markdown="1"><summary>{TITLES.get(group, group)}, site by site</summary>'
    lines = ["| trained without | method | Dice (95 % interval) | HD95 | ASSD | seeds |", "|---" * 6 + "|"]
    for site in DOMAINS[group]:
        for name, words in METHODS.items():
            if not (seeds := records.get(job := f"{group}_{name}")):
                continue
            mean, _, low, high = interval(case_values("domain_generalisation", job, "last", "dice", site))
            means = [record["last"]["domains"][site] for record in seeds.values()]
            distances = " | ".join(f"{np.mean([m[name] for m in means]):.1f} px" for name in ("hd95", "assd"))
            lines.append(f"| {site} | {words} | {mean:.3f} ({low:.3f} to {high:.3f}) | {distances} | {len(seeds)} |")
    return "\n".join((title, "", *lines, "", "</details>"))


def _spread(values: np.ndarray) -> str:
    if not len(values):
        return ""
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def _gap(group: str, name: str) -> str:
    """The difference to what a method is compared with."""
    if name == "unet":
        return ""
    base = BASES.get(name, "unet")
    found = difference("domain_generalisation", f"{group}_{name}", f"{group}_{base}")
    return found and f"to {METHODS[base]}: {found}"

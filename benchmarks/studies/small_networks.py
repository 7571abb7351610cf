"""Is a Med-2D SegNet better than a U-Net of its size, or than one whose step takes as long on a CPU?

Polyps: trained on 64 pictures of Kvasir-SEG, selected on 16, and scored on three centres that had no part in it. Skin
lesions: ISIC 2018, 500 train, 100 validate. Glands: five pictures of GlaS, each scored by a network that was trained on
the other four. All jobs: pictures of 96 x 96, 200 steps of four (100 a fold of GlaS), from scratch, one loss, one
optimiser, one augmentation; scores in the space of the files.
"""

import json

import numpy as np

from studies import RESULTS, Job, Records, case_values, interval

PAGE = "docs/benchmarks/small-networks.md"
NETWORKS = {
    "med2d_segnet": ("Med-2D SegNet", "2.05 M"),
    "unet_params": ("U-Net, equal parameters", "2.07 M"),
    "unet_time": ("U-Net, equal time", "4.33 M"),
}
CENTRES = {"cvc_clinicdb": "CVC-ClinicDB", "bkai_igh": "BKAI-IGH", "etis_larib": "ETIS-Larib"}
FOLDERS = {"bkai_igh": "bkai_igh_neopolyp"}
DATA = {"isic2018": "ISIC 2018", "polyp": "Kvasir-SEG", "glas": "GlaS, 5 folds"}


def job(data: str, network: str) -> Job:
    """One network on one data set."""
    config = f"small_networks/{network}"
    if data == "polyp":
        elsewhere = tuple((c, f"polyp/{FOLDERS.get(c, c)}", ("--source", c, "--classes", "polyp")) for c in CENTRES)
        options = ("--source", "kvasir_seg")
        return Job(f"polyp_{network}", config, "polyp/kvasir_seg", options=options, elsewhere=elsewhere)
    if data == "glas":
        overrides = ("--plan", "configs/small_networks/glas_96.plan.json", "--fold", "all")
        scores = (("last", "cross_validation/last"),)
        return Job(f"glas_{network}", config, "glas", options=("--source", "glas"), overrides=overrides, scores=scores)
    plan = ("--plan", "configs/small_networks/isic2018_96.plan.json")
    return Job(f"isic2018_{network}", config, "isic2018_256", overrides=plan)


JOBS = tuple(job(data, network) for data in DATA for network in NETWORKS)


def table(records: Records) -> str:
    """A row a network and data set: per-image Dice, elsewhere too, and what it costs; last weights."""
    head = ["trained on", "network", "parameters", "step", "latency", "seeds", "Dice (95 % interval)", "HD95"]
    costs = {row["name"]: row for row in json.loads((RESULTS / "small_networks_step.json").read_text())["rows"]}
    head += [f"Dice on {name}" for name in CENTRES.values()]
    rows = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for data, words in DATA.items():
        for network, (name, parameters) in NETWORKS.items():
            seeds = records.get(f"{data}_{network}", {})
            if not seeds:
                continue
            values = {
                label: interval(case_values("small_networks", f"{data}_{network}", label, "dice"))
                for label in ("last", *(CENTRES if data == "polyp" else ()))
            }
            mean, spread, low, high = values["last"]
            hd95 = np.mean([record["last"]["mean"]["hd95"] for record in seeds.values()])
            deviation = f" ± {spread:.3f}" if len(seeds) > 1 else ""
            cost = costs[network]
            cells = [words, name, parameters, f"{cost['seconds']:.2f} s", f"{1e3 * cost['prediction_seconds']:.0f} ms"]
            cells += [str(len(seeds)), f"{mean:.3f}{deviation} ({low:.3f} – {high:.3f})"]
            cells.append(f"{hd95:.1f} px")
            for centre in CENTRES:
                here = values.get(centre)
                cells.append(f"{here[0]:.3f} ({here[2]:.3f} – {here[3]:.3f})" if here else "")
            rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)

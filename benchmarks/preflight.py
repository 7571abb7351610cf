"""Preflights the configs for chips that are not here: compiled, not timed. Slow, and resumable.

    python benchmarks/preflight.py run [--configs WORD ...] [--topologies NAME ...] [--patience S]
    python benchmarks/preflight.py scaling       weak scaling of MODELS over SLICES
    python benchmarks/preflight.py table         writes the tables of docs/how-to/preflight.md

Needs the extras `preflight-tpu` and `preflight-cuda`. One program is compiled at a time; each figure is written to
results/preflight.json as soon as it is known, and what is there is not compiled again. Data sets need not be here: what
a config needs to know of its own stands in `DATA`.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "preflight.json"
PAGE = ROOT / "docs" / "how-to" / "preflight.md"

TOPOLOGIES = ("v5e-1", "h100x1", "v5e-16", "v5e-256")
SLICES = ("v5e-1", "v5e-4", "v5e-16", "v5e-64", "v5e-256")
MODELS = ("configs/unet_hippocampus.py", "configs/mamba_sea_vessels.py")

HIPPOCAMPUS = {"patch_size": (40, 56, 40), "channels": 1, "classes": 2, "cases": 96}
IDRID = {"overlapping": True, "cases": 54}
DATA: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("unet_hippocampus", "hippocampus_supervised"), HIPPOCAMPUS),
    **dict.fromkeys(("hippocampus_mean_teacher", "hippocampus_bcp"), HIPPOCAMPUS),
    "unet_isic2018": {"patch_size": (256, 256), "channels": 3, "classes": 1, "cases": 500},
    "kms_noise_jsrt": {"patch_size": (128, 128), "channels": 1, "classes": 5, "overlapping": True, "cases": 124},
    "robust_jsrt": {"patch_size": (128, 128), "channels": 1, "classes": 5, "overlapping": True, "cases": 124},
    "wt_bcp_acdc": {"patch_size": (256, 256), "channels": 1, "classes": 3, "cases": 1312},
    "wt_bcp_la": {"patch_size": (80, 112, 112), "channels": 1, "classes": 1, "cases": 80},
    "mamba_sea_fundus": {"cases": 789},
    **dict.fromkeys(("dr_lesions_idrid", "dr_lesions_multilabel_idrid"), IDRID),
    **dict.fromkeys(("each", "shared", "unet_each", "unet_shared"), IDRID),
}
"""What configs need to know of data that are elsewhere; the others have a plan or synthetic data."""


def config_files() -> list[str]:
    """The paper's set-ups first."""
    found = [str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("configs/**/*.py"))]
    return sorted(found, key=lambda name: (name.count("/"), name))


def run(configs: list[str], topologies: tuple[str, ...], patience: float) -> None:
    """Compiles what is not known yet."""
    from medseg_jax.runtime.environment import versions
    from medseg_jax.training.preflight import LABEL, preflight
    from medseg_jax.types import UserError

    os.chdir(ROOT)
    for topology in topologies:
        for name in configs:
            known = results()
            if f"{name} {topology}" in known["compiled"]:
                continue
            options = DATA.get(Path(name).stem, {"cases": 100})
            try:
                found = preflight(name, topology, search=False, patience=patience, **options)
            except UserError as error:
                found = {"error": str(error), "fits": None}
            known = results()
            known |= {"label": LABEL, "versions": versions()}
            known["compiled"][f"{name} {topology}"] = {"load": os.getloadavg()[0], **found}
            draft = RESULTS.with_suffix(".tmp")
            draft.write_text(json.dumps(known, indent=1) + "\n")
            draft.rename(RESULTS)


def results() -> dict[str, Any]:
    """What is known so far."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {"compiled": {}}


# --------------------------------------------------------------------------------------------------------------- tables


def config_table(compiled: dict[str, Any]) -> str:
    """A line a config, topology and stage."""
    head = "config | on | stage | rows a chip | memory a chip | matrix TFLOP | GB moved | collectives "
    head += "| at least | bound by | compiled in"
    lines = [f"| {head} |", "|" + "---|" * head.count("|") + "---|"]
    for key, found in sorted(compiled.items()):
        name, topology = key.split()
        for stage in found.get("stages", ()):
            start = f"| {Path(name).stem} | {topology} | {stage['stage']} | {stage['rows_per_chip']:g} |"
            if stage["status"] != "compiled":
                needed = f" (needs {stage['needed'] / 2**30:.1f} GiB)" if stage.get("needed") else ""
                lines.append(f"{start} {stage['status']}{needed} | | | | | | |")
                continue
            counts, roof = stage["counts"], stage["roofline"]
            sent = sum(c["bytes"] for c in counts["collectives"].values()) / 1e6
            memory, full = stage["memory"]["total"], stage["memory"]["total"] / found["memory_per_chip"]
            lines.append(
                f"{start} {memory / 2**30:.2f} GiB ({full:.0%}) | {counts['matmul_flops'] / 1e12:.3g} "
                f"| {counts['bytes'] / 1e9:.3g} | {sent:.3g} MB | {1e3 * roof['step']:.3g} ms | {roof['binds']} "
                f"| {stage['seconds']:.0f} s |"
            )
    return "\n".join(lines)


def scaling_table(compiled: dict[str, Any]) -> str:
    """Weak scaling: a row a model and slice. Efficiency is pessimistic: nothing is hidden."""
    lines = [
        "| config | chips | rows a chip | collectives, MB a chip | how many | ms on links | ms of rest | efficiency |",
        "|" + "---|" * 8,
    ]
    for name in MODELS:
        for topology in SLICES:
            found = compiled.get(f"{name} {topology}", {})
            for stage in found.get("stages", ()):
                if stage["status"] != "compiled":
                    continue
                sums, roof = stage["counts"]["collectives"].values(), stage["roofline"]
                seconds, stem = roof["seconds"], Path(name).stem
                rest = max(v for k, v in seconds.items() if k != "interconnect")
                lines.append(
                    f"| {stem} | {found['chips']} | {stage['rows_per_chip']:g} "
                    f"| {sum(c['bytes'] for c in sums) / 1e6:.4g} | {sum(c['count'] for c in sums)} "
                    f"| {1e3 * seconds['interconnect']:.3g} | {1e3 * rest:.3g} | {roof['efficiency']:.1%} |"
                )
    return "\n".join(lines)


def write_tables(page: Path) -> None:
    """Puts both tables between their markers."""
    compiled, text = results()["compiled"], page.read_text()
    for marker, made in (("preflight", config_table(compiled)), ("scaling", scaling_table(compiled))):
        start, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
        before, rest = text.split(start)
        text = f"{before}{start}\n\n{made}\n\n{end}{rest.split(end)[1]}"
    page.write_text(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["run", "scaling", "table"])
    parser.add_argument("--configs", nargs="+", default=[""], help="words that the names hold")
    parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES)
    parser.add_argument("--patience", type=float, default=1800)
    args = parser.parse_args()
    if args.verb == "run":
        chosen = [n for n in config_files() if any(word in n for word in args.configs)]
        run(chosen, tuple(args.topologies), args.patience)
    elif args.verb == "scaling":
        run(list(MODELS), SLICES, args.patience)
    if PAGE.exists():
        write_tables(PAGE)


if __name__ == "__main__":
    main()

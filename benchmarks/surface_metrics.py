"""Surface metrics against MONAI, surface-distance and MedPy: seconds and numbers, on the same masks in one run.

    python3 -m venv PEERS && PEERS/bin/pip install torch==2.13.0 monai==1.6.1 surface-distance==0.1 medpy==0.5.2
    python benchmarks/surface_metrics.py --peers PEERS/bin/python [--repeat 7]

The peers live in an environment of their own (`--peers`), for they need PyTorch, and nothing here does. Both sides read
the same masks from a file and take turns, one mask after another: ours, then each peer in its process, again and again;
the result is the least and the median time of each. What is timed is what a user calls: for one pair of masks HD95,
ASSD and NSD at 1 mm. Peers that lack a metric are timed on those they have, and compared with ours on the same ones.
Written to benchmarks/results/surface_metrics.json, with the values, so that equal numbers are seen to be equal.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

RESULT = Path(__file__).parent / "results" / "surface_metrics.json"
TOLERANCE = 1.0


def masks() -> dict[str, tuple[np.ndarray, np.ndarray, tuple[float, ...]]]:
    """name -> prediction, reference [*s], spacing in mm: bumpy ellipsoids, the prediction shifted and rougher."""
    rng = np.random.default_rng(0)

    def organ(shape, radius, center, phases):
        axes = np.meshgrid(*(np.arange(n) - c for n, c in zip(shape, center, strict=True)), indexing="ij", sparse=True)
        distance = np.sqrt(sum((a / r) ** 2 for a, r in zip(axes, radius, strict=True)))
        waves = sum(np.sin(a / r * 7 + p) for a, r, p in zip(axes, radius, phases, strict=True))
        return distance + 0.03 * waves < 1

    def pair(shape, radius):
        center = np.array(shape) / 2
        reference = organ(shape, radius, center, rng.uniform(0, 6, len(shape)))
        prediction = organ(shape, np.multiply(radius, 1.03), center + 1.5, rng.uniform(0, 6, len(shape)))
        return prediction, reference

    return {
        "picture 256 x 256": (*pair((256, 256), (70, 50)), (1.0, 1.0)),
        "small organ 64 x 64 x 64": (*pair((64,) * 3, (10, 14, 12)), (1.0, 1.0, 1.0)),
        "organ 128 x 128 x 128": (*pair((128,) * 3, (40, 34, 44)), (1.0, 1.0, 1.0)),
        "thick slices 48 x 256 x 256": (*pair((48, 256, 256), (14, 70, 60)), (5.0, 0.8, 0.8)),
    }


def ours(prediction: np.ndarray, reference: np.ndarray, spacing: tuple[float, ...], surface: str) -> dict[str, float]:
    from medseg_jax.evaluation.metrics.surface import assd, hausdorff, nsd, surface_distances

    d = surface_distances(prediction, reference, spacing, surface=surface)
    return {"hd95": hausdorff(d, 95), "assd": assd(d), "nsd": nsd(d, TOLERANCE)}


def peer_functions() -> dict:
    """Runs in the peers' environment: name -> function of (prediction, reference, spacing)."""
    import monai.metrics as monai  # type: ignore
    import surface_distance  # type: ignore
    import torch  # type: ignore
    from medpy.metric import binary  # type: ignore

    def by_monai(prediction, reference, spacing):
        p, r = (torch.from_numpy(mask)[None, None] for mask in (prediction, reference))
        options = dict(include_background=True, spacing=spacing)
        hd95 = monai.compute_hausdorff_distance(p, r, percentile=95, **options)
        assd = monai.compute_average_surface_distance(p, r, symmetric=True, **options)
        nsd = monai.compute_surface_dice(p, r, [TOLERANCE], **options)
        return {"hd95": float(hd95), "assd": float(assd), "nsd": float(nsd)}

    def by_surface_distance(prediction, reference, spacing):
        d = surface_distance.compute_surface_distances(reference, prediction, spacing)
        hd95 = surface_distance.compute_robust_hausdorff(d, 95)
        return {"hd95": hd95, "nsd": surface_distance.compute_surface_dice_at_tolerance(d, TOLERANCE)}

    def by_medpy(prediction, reference, spacing):
        return {"assd": binary.assd(prediction, reference, spacing)}

    return {"monai": by_monai, "surface-distance": by_surface_distance, "medpy": by_medpy}


SURFACE = {"monai": "voxel", "medpy": "voxel", "surface-distance": "subvoxel"}
"""Which of our two surfaces a peer measures. For MedPy only ASSD: its HD95 pools both directions."""


def serve(folder: Path) -> None:
    """In the peers' environment: one line in (peer and mask), one line out (seconds and values)."""
    functions, stored = peer_functions(), {}
    packages = ("torch", "monai", "surface-distance", "medpy", "numpy", "scipy")
    print(json.dumps({name: importlib.metadata.version(name) for name in packages}), flush=True)
    for line in sys.stdin:
        peer, index = json.loads(line)
        if index not in stored:
            with np.load(folder / f"{index}.npz") as f:
                stored[index] = f["prediction"], f["reference"], tuple(float(s) for s in f["spacing"])
        start = time.perf_counter()
        values = functions[peer](*stored[index])
        print(json.dumps([time.perf_counter() - start, values]), flush=True)


def run(peers: str, repeat: int) -> dict:
    """Takes turns with the peers' process; the content of the result file."""
    cases = masks()
    with tempfile.TemporaryDirectory() as folder:
        for i, (prediction, reference, spacing) in enumerate(cases.values()):
            np.savez(Path(folder) / f"{i}.npz", prediction=prediction, reference=reference, spacing=spacing)
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        command = [peers, str(Path(__file__).resolve()), "--serve", folder]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        process: Any
        with subprocess.Popen(command, env=environment, **pipes) as process:  # type: ignore[call-overload]
            versions = json.loads(process.stdout.readline())
            rows = {}
            for i, (name, (prediction, reference, spacing)) in enumerate(cases.items()):
                times: dict[str, list[float]] = {}
                values: dict[str, dict] = {}
                for _ in range(repeat + 1):  # the first one warms up
                    for surface in ("subvoxel", "voxel"):
                        start = time.perf_counter()
                        values[f"ours, {surface}"] = ours(prediction, reference, spacing, surface)
                        times.setdefault(f"ours, {surface}", []).append(time.perf_counter() - start)
                    for peer in SURFACE:
                        process.stdin.write(json.dumps([peer, i]) + "\n")
                        process.stdin.flush()
                        seconds, values[peer] = json.loads(process.stdout.readline())
                        times.setdefault(peer, []).append(seconds)
                rows[name] = _row(spacing, times, values)
            process.stdin.close()
    own = {name: importlib.metadata.version(name) for name in ("numpy", "scipy")} | {
        "python": platform.python_version()
    }
    machine = {"cores": os.cpu_count(), "machine": platform.machine()}
    about = "seconds for HD95, ASSD and NSD of one pair of masks (peers: those they have); speed-up by the least times"
    return {"about": about, "repeat": repeat, "machine": machine, "versions": own, "peers": versions, "masks": rows}


def _row(spacing: tuple[float, ...], times: dict[str, list[float]], values: dict[str, dict]) -> dict:
    least = {who: min(t[1:]) for who, t in times.items()}
    difference = {
        peer: max(abs(v - values[f"ours, {surface}"][m]) for m, v in values[peer].items())
        for peer, surface in SURFACE.items()
    }
    return {
        "spacing": list(spacing),
        "seconds": {
            who: {"min": round(min(t[1:]), 5), "median": round(float(np.median(t[1:])), 5)} for who, t in times.items()
        },
        "speed_up": {peer: round(least[peer] / least[f"ours, {surface}"], 2) for peer, surface in SURFACE.items()},
        "largest_difference": difference,
        "values": values,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", help="Python of the peers' environment")
    parser.add_argument("--repeat", type=int, default=7, help="timed repetitions (default: 7)")
    parser.add_argument("--out", type=Path, default=RESULT, help="file to write")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args.serve)
        return
    if not args.peers:
        parser.error("--peers PYTHON is needed: see the head of this file")
    result = run(args.peers, args.repeat)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in result["masks"].items():
        print(f"{name:30s}" + "  ".join(f"{who} {t['min'] * 1000:.1f} ms" for who, t in row["seconds"].items()))
        print(f"{'':30s}speed-up {row['speed_up']}  largest difference {row['largest_difference']}")


if __name__ == "__main__":
    main()

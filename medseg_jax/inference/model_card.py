"""MODEL_CARD.md of an exported run: all of it is read from the run; what is not known is said to be unknown."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from medseg_jax.methods.objective import Objective, Tree
from medseg_jax.runtime.run import Run

SHOWN = {"dice": "Dice", "hd95": "HD95", "nsd": "NSD"}


def model_card(
    run: Run,
    model: tuple[Objective, Tree],
    record: Mapping[str, str],
    found: Mapping[Path, Mapping[int, float]],
    hashes: Mapping[Path, str],
) -> str:
    """The card as Markdown.

    Args:
        run: what was exported.
        model: its method, bound to the data set, and the parameters.
        record: run.json, dataset.json and plan.json as they are given out.
        found: for each exported file the largest difference from the run, by batch size.
        hashes: sha256 of each file.
    """
    about, dataset = json.loads(record["run.json"]), json.loads(record["dataset.json"])
    stage = run.config.stages[run.stage]
    name = about["dataset"]["name"]
    objective, params = model
    count = sum(x.size for x in jax.tree.leaves(params))
    network = getattr(objective, "net", None)
    sections = [
        f"# {name}: {', '.join(run.labels.names)}",
        f"{type(stage.objective).__name__}{f' with {type(network).__name__}' if network else ''}, "
        f"{count:,} parameters, the {'best on validation' if run.checkpoint == 'best' else 'last'} weights "
        f"(step {run.step}). Research software, not a medical device.",
        "## Intended use and limits",
        _intended(run, name),
        "## Data",
        _data(about, dataset),
        "## Scores",
        _scores(about, run, dataset.get("medseg", {}).get("unit", "mm")),
        "## How it was trained",
        _training(run, about, stage),
        "## Files",
        _files(found, hashes),
        "## Use",
        _use(run, found),
    ]
    return "\n\n".join(sections) + "\n"


def _intended(run: Run, name: str) -> str:
    spacing = f" at a spacing of {_by(run.plan.spacing)}" if run.plan.spacing else ""
    dim = "slices or pictures" if run.plan.dim == 2 else "volumes"
    lines = [
        f"Made to outline {', '.join(run.labels.names)} in {dim} of the kind of {name} "
        f"(channels {', '.join(run.channels)}), in patches of {_by(run.plan.patch_size)}{spacing}, for research.",
        "Not made for diagnosis or treatment, and never tested for them. Other scanners, sites, protocols, patients "
        "and diseases than those of the training data can make it fail without a sign: score it on your own labelled "
        "cases first (`medseg evaluate`), site by site. It knows no other class and says nothing about images in which "
        "something else is wrong.",
    ]
    return "\n\n".join(lines)


def _data(about: Mapping[str, Any], dataset: Mapping[str, Any]) -> str:
    cases = ", ".join(f"{number} {split}" for split, number in about["cases"].items())
    licence = dataset.get("licence") or dataset.get("license")
    reference = dataset.get("reference") or dataset.get("citation")
    stated = licence or "not stated in dataset.json: find out before you pass the model on"
    rows = [
        f"* **Data set:** {about['dataset']['name']} ({cases})",
        f"* **Hash** (sha256 of its description and of all training and validation files): "
        f"`{about['dataset']['fingerprint']}`",
        f"* **Licence of the data:** {stated}",
    ]
    return "\n".join([*rows, *([f"* **Reference:** {reference}"] if reference else [])])


def _scores(about: Mapping[str, Any], run: Run, unit: str) -> str:
    if not about.get("scores"):
        return "The run holds no final scores (no validation cases, or trained with `--no-report`)."
    lines = [
        f"| weights | {' | '.join(SHOWN.values())} |".replace("HD95", f"HD95 ({unit})"),
        f"|---|{'---|' * len(SHOWN)}",
    ]
    for name, scores in about["scores"].items():
        values = [_interval(scores["mean"].get(metric), scores["ci95"].get(metric)) for metric in SHOWN]
        lines.append(f"| {name}{' (exported)' if name == run.checkpoint else ''} | {' | '.join(values)} |")
    note = (
        "On the validation cases, means over cases with 95 % bootstrap intervals. The best weights were chosen on "
        "these cases, so the row of the last ones is the honest one; no test case had a part in it."
    )
    return "\n".join([*lines, "", note])


def _interval(mean: float | None, interval: Any) -> str:
    if mean is None:
        return "–"
    low, high = interval if interval else (None, None)
    return f"{mean:.3f}" + (f" ({low:.3f} – {high:.3f})" if low is not None and high is not None else "")


def _training(run: Run, about: Mapping[str, Any], stage: Any) -> str:
    optim, git, devices = stage.optim, about.get("git", {}), about.get("devices", {})
    labelled, others = stage.mix.rows(run.plan)
    unlabelled = f" and {others} unlabelled" if others else ""
    modified = " with changes of its own" if git.get("modified") else ""
    rows = {
        "Stages": ", ".join(f"{s.name} ({type(s.objective).__name__})" for s in run.config.stages),
        "Steps": f"{stage.steps or run.plan.steps}, batch {labelled}{unlabelled}, seed {run.config.seed}",
        "Optimiser": f"{optim.name}, peak learning rate {optim.lr:g}, weight decay {optim.weight_decay:g}, "
        f"{optim.schedule} schedule",
        "Moving average of the weights": f"decay {run.config.ema:g}" if run.config.ema else "none",
        "Started from": about["config"].get("pretrained") or "random weights",
        "Devices": f"{devices.get('count', '?')} x {devices.get('kind', '?')}",
        "Versions": ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items() if k in ("medseg-jax", "jax")),
        "Commit": f"{git['commit']}{modified}" if git else "not from a repository",
    }
    fields = dataclasses.fields(stage.objective)
    method = ", ".join(f"{f.name}={getattr(stage.objective, f.name)!r}" for f in fields)
    listed = "\n".join(f"* **{name}:** {value}" for name, value in rows.items())
    return f"{listed}\n\n```text\n{type(stage.objective).__name__}({method})\n```\n\nEverything else is in run.json."


def _files(found: Mapping[Path, Mapping[int, float]], hashes: Mapping[Path, str]) -> str:
    batches = list(next(iter(found.values())))
    lines = [
        f"| file | sha256 | {' | '.join(f'largest difference, batch {b}' for b in batches)} |",
        f"|---|---|{'---|' * len(batches)}",
    ]
    for path, values in found.items():
        differences = " | ".join(f"{v:.2g}" for v in values.values())
        lines.append(f"| {path.name} | `{hashes[path]}` | {differences} |")
    note = "Differences are between its probabilities and the run's, on random images, on the machine that exported it."
    return "\n".join(lines) + f"\n\n{note}"


def _use(run: Run, found: Mapping[Path, Any]) -> str:
    names = {path.suffix for path in found}
    shape = f"[b, {', '.join(map(str, run.plan.patch_size))}, {run.plan.channels_seen}]"
    parts = [
        f"Image: float32 {shape}, preprocessed as plan.json says (spacing, normalisation). Output: probabilities of "
        f"{', '.join([*(['background'] if run.labels.exclusive else []), *run.labels.names])} in the last axis."
    ]
    if ".safetensors" in names:
        parts.append("```bash\nmedseg predict FOLDER -i IMAGES -o PREDICTIONS   # FOLDER: where this card lies\n```")
    if ".stablehlo" in names:
        parts.append(
            '```python\nimport jax.export\n\nmodel = jax.export.deserialize(open("model.stablehlo", "rb").read())\n'
            "probabilities = model.call(image)  # on a CPU, an NVIDIA GPU or a TPU\n```"
        )
    if ".onnx" in names:
        parts.append(
            '```python\nimport onnxruntime\n\nsession = onnxruntime.InferenceSession("model.onnx")\n'
            'probabilities = session.run(None, {"image": image})[0]\n```'
        )
    return "\n\n".join(parts)


def _by(values: Any) -> str:
    return " x ".join("any" if v is None else f"{v:g}" for v in values)

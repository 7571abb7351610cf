"""Is this run what it says? Every claim of a run's folder, or of a folder of predictions, checked against its files.

    records       run.json, plan.json and dataset.json can be read, and the config fits them
    checkpoints   every file of every checkpoint has the sha256 of its manifest
    weights       the weights have the shapes of the config's network, and are finite
    data          the data set is there and unchanged
    splits        no case, and no patient, is in two splits
    log           log.jsonl runs forward, and reaches the last checkpoint
    best          the best weights are those with the highest validation Dice of the log
    scores        final scores are of the validation cases, of these weights, and their means follow from cases.csv
    versions      installed packages are those of the run
    predict       on request: predicting again gives the recorded label maps

A check is "ok", a "warning" (could not be checked, or may change numbers) or a "problem" (a claim is false).
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from medseg_jax.data import io
from medseg_jax.data.dataset import Dataset, read_description, unknown_values
from medseg_jax.data.views import fold_view, hold_out_view
from medseg_jax.evaluation.evaluate import read_rows, summarise
from medseg_jax.paths import file_sha256, read_record
from medseg_jax.types import Labels, UserError


@dataclass(frozen=True)
class Check:
    """One line of the result.

    Attributes:
        name: of the check.
        state: "ok", "warning" or "problem".
        text: what was found.
        file: where, or "".
        remedy: what to do, or "".
    """

    name: str
    state: str
    text: str
    file: str = ""
    remedy: str = ""

    def json(self) -> dict[str, str]:
        """As a dict of its filled fields."""
        return {key: value for key, value in asdict(self).items() if value}


def verify(path: str | Path, *, predict: int = 0) -> list[Check]:
    """Check a run, or a folder of predictions.

    Args:
        path: folder with run.json, or with predict.json.
        predict: number of validation cases to predict again (runs only).

    Returns:
        All checks; the run is what it says if none has the state "problem".

    Raises:
        UserError: the folder is neither.
    """
    path = Path(path)
    if (path / "run.json").is_file():
        steps: dict[str, Callable[..., Iterator[Check]]] = {
            "records": _records,
            "checkpoints": _checkpoints,
            "weights": _weights,
            "data": _data,
            "splits": _splits,
            "log": _log,
            "best": _best,
            "scores": _scores,
            "versions": _versions,
        }
        if predict:
            steps["predict"] = lambda run: _predict(run, predict)
    elif (path / "predict.json").is_file():
        if predict:
            raise UserError("Only the validation cases of a run can be predicted again", file=path)
        steps = {"predictions": _predictions, "origin": _origin}
    else:
        raise UserError(
            "There is nothing to verify",
            file=path,
            found="neither run.json nor predict.json" if path.is_dir() else "no such folder",
            expected="a folder of medseg train or of medseg predict",
            remedy=" and ".join(f"medseg verify {run.parent}" for run in sorted(path.glob("*/run.json"))) or None,
        )
    return [check for name, step in steps.items() for check in _guarded(name, step, path)]


def _guarded(name: str, step: Callable[[Path], Iterator[Check]], path: Path) -> list[Check]:
    """What a check says, and a problem where its files cannot be read: later checks still run."""
    found: list[Check] = []
    try:
        found += step(path)
    except UserError as error:
        found.append(Check(name, "problem", error.problem, str(error.file or path), error.remedy or ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        text = f"cannot be checked: {type(error).__name__}: {error}"
        found.append(Check(name, "problem", text, str(path), "mend or restore the file that is named"))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


def _open(run: Path) -> tuple[Any, Any, tuple[str, ...], Labels]:
    """config, plan, channels, labels."""
    from medseg_jax import config as configs
    from medseg_jax.data.plan import Plan
    from medseg_jax.runtime.run import described

    config = configs.from_json(read_record(run / "run.json")["config"])
    return config, Plan.load(run / "plan.json"), *described(run, config)


def _records(run: Path) -> Iterator[Check]:
    config, _, channels, labels = _open(run)
    named = read_record(run / "run.json")["dataset"]["name"]
    facts = f"{len(config.stages)} stage(s), {len(channels)} channel(s), classes {', '.join(labels.names)}"
    logged = {k[5:] for e in _entries(run) if e["kind"] == "val" for k in e if k.startswith("dice/")}
    if strange := logged - set(labels.judged.names):
        text = f"log.jsonl has scores of classes that dataset.json does not name: {', '.join(sorted(strange))}"
        yield Check("records", "problem", text, str(run / "dataset.json"), "restore the dataset.json of this run")
        return
    yield Check("records", "ok", f"data set {named}, {facts}")


def _steps(run: Path) -> list[Path]:
    return sorted(p for p in run.glob("checkpoints/*/*/*") if p.is_dir() and p.name.isdigit())


def _checkpoints(run: Path) -> Iterator[Check]:
    from medseg_jax.runtime.checkpoint import verify_manifest

    found = _steps(run)
    complete = [p for p in found if p.with_name(p.name + ".sha256.json").is_file()]
    if not complete:
        yield Check(
            "checkpoints", "problem", "there are none", str(run / "checkpoints"), "medseg train goes on with it"
        )
    for step in found:
        place = step.relative_to(run).as_posix()
        if step not in complete:
            remedy = "none needed: it is skipped, and removed when training goes on"
            yield Check("checkpoints", "warning", f"{place} is incomplete (no manifest)", str(step), remedy)
        elif problems := verify_manifest(step):
            remedy = "training goes on from the checkpoint before it; don't use this one"
            yield Check("checkpoints", "problem", f"{place} is damaged: {'; '.join(problems)}", str(step), remedy)
        else:
            yield Check("checkpoints", "ok", f"{place} has the sha256 of its manifest")


def _weights(run: Path) -> Iterator[Check]:
    import jax

    from medseg_jax.data.pipeline import batch_shapes
    from medseg_jax.methods.objective import Task
    from medseg_jax.runtime.checkpoint import restore_tree, verify_manifest
    from medseg_jax.runtime.run import stage_folder
    from medseg_jax.runtime.sharding import path_name

    config, plan, _, labels = _open(run)
    size = tuple(plan.patch_size)
    batch = {name: jax.ShapeDtypeStruct(*shape) for name, shape in batch_shapes(plan, size, (1, 1)).items()}
    side = (1, *size)[-3:]  # parameters do not depend on the cases, nor on how large these are
    task = Task(plan, labels, plan.channels_seen, cases=1, extent=(side, side), sample_size=size)
    for index, stage in enumerate(config.stages):
        objective = stage.objective.bind(task)
        expected, _ = jax.eval_shape(lambda b, o=objective: o.init(jax.random.key(0), b), batch)
        want = {path_name(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(expected)}
        for step in _steps(run):
            folder = stage_folder(run, index, stage.name)
            if step.parent.parent != folder or verify_manifest(step):
                continue
            params = restore_tree(step)["params"]
            leaves = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(params)}
            wrong = [name for name in want.keys() | leaves if np.shape(leaves.get(name, ())) != want.get(name)]
            endless = [name for name, leaf in leaves.items() if not np.isfinite(leaf).all()]
            place = step.relative_to(run).as_posix()
            if wrong:
                text = f"{place} does not fit the config: {', '.join(sorted(wrong)[:5])}"
                yield Check("weights", "problem", text, str(step), "restore the run.json and plan.json of this run")
            elif endless:
                text = f"{place} holds NaN or infinity: {', '.join(sorted(endless)[:5])}"
                yield Check("weights", "problem", text, str(step), "use an earlier checkpoint")
            else:
                count = sum(int(np.size(leaf)) for leaf in leaves.values())
                yield Check("weights", "ok", f"{place} fits the config: {count:,} finite parameters")


def _whole(run: Path) -> Dataset | None:
    """The data set without what the run holds out, or None if it is not where it was."""
    record = read_record(run / "run.json")
    root, config = Path(record["dataset"]["root"]), record["config"]
    if not (root / "dataset.json").is_file():
        return None
    dataset = Dataset.open(root)
    if config.get("hold_out") is not None:
        dataset = hold_out_view(dataset, config["hold_out"], oracle=config["oracle"])
    return dataset


def _dataset(run: Path) -> Dataset | None:
    """The data set as the run saw it, or None if it is not where it was."""
    dataset, config = _whole(run), read_record(run / "run.json")["config"]
    if dataset is None or config.get("fold") is None:
        return dataset
    return fold_view(dataset, config["fold"], config["folds"])


def _data(run: Path) -> Iterator[Check]:
    record, dataset = read_record(run / "run.json")["dataset"], _whole(run)
    if dataset is None:
        remedy = "bring it back to where it was, to check it"
        yield Check("data", "warning", "the data set is not there, so it cannot be checked", record["root"], remedy)
    elif dataset.fingerprint() != record["fingerprint"]:
        remedy = "restore the data set, or train a new run on this one"
        yield Check("data", "problem", "the data set has changed since training", record["root"], remedy)
    else:
        yield Check("data", "ok", f"data set unchanged, sha256 {record['fingerprint'][:12]}…")


def _splits(run: Path) -> Iterator[Check]:
    cases = read_record(run / "run.json")["cases"]
    sets = {split: set(ids) for split, ids in cases.items()}
    dataset = _dataset(run)
    patients = {c.id: c.patient for c in dataset.cases if c.patient} if dataset else {}
    people = {split: {patients[id] for id in ids if id in patients} for split, ids in sets.items()}
    clean = True
    for i, one in enumerate(sets):
        for other in list(sets)[i + 1 :]:
            for what, table in (("cases", sets), ("patients", people)):
                if shared := table[one] & table[other]:
                    clean = False
                    text = f"{what} in both {one} and {other}: {', '.join(sorted(shared)[:5])}"
                    remedy = "split by patient and train anew: scores on these cases are worth nothing"
                    yield Check("splits", "problem", text, str(run / "run.json"), remedy)
    if clean:
        sizes = ", ".join(f"{len(ids)} {split}" for split, ids in cases.items())
        yield Check("splits", "ok", f"no case{' and no patient' if patients else ''} in two splits: {sizes}")


def _entries(run: Path) -> list[dict[str, Any]]:
    from medseg_jax.runtime import log

    return log.read(run / "log.jsonl") if (run / "log.jsonl").is_file() else []


def _log(run: Path) -> Iterator[Check]:
    entries, path = _entries(run), str(run / "log.jsonl")
    if not entries:
        yield Check(
            "log", "problem", "there is no log", path, "restore it: without it no curve and no choice can be traced"
        )
        return
    for stage in dict.fromkeys(e["stage"] for e in entries):
        for kind in ("train", "val"):
            steps = [e["step"] for e in entries if (e["stage"], e["kind"]) == (stage, kind)]
            back = [b for a, b in pairwise(steps) if b <= a]
            if back:
                text = f"{stage}: {kind} lines go back to step {back[0]}"
                yield Check(
                    "log", "problem", text, path, "two runs wrote into one folder, or it was edited: train anew"
                )
                return
        last = max(e["step"] for e in entries if e["stage"] == stage)
        saved = [int(p.name) for p in _steps(run) if p.parent.parent.name.partition("_")[2] == stage]
        if saved and max(saved) > last:
            text = f"{stage}: the log ends at step {last}, a checkpoint is of step {max(saved)}"
            yield Check("log", "problem", text, path, "the log was cut or belongs to another run")
            return
    yield Check("log", "ok", f"{len(entries)} lines, steps rise in every stage")


def _best(run: Path) -> Iterator[Check]:
    for folder in sorted(run.glob("checkpoints/*/best")):
        stage = folder.parent.name.partition("_")[2]
        scores = [e for e in _entries(run) if e["kind"] == "val" and e["stage"] == stage and "dice" in e]
        saved = [int(p.name) for p in folder.iterdir() if p.name.isdigit()]
        if not saved and not scores:
            continue
        top = max(scores, key=lambda e: e["dice"], default=None)  # the first of equals, as training keeps it
        if top is None or saved != [top["step"]]:
            found = f"weights of step {', '.join(map(str, saved)) or 'none'}"
            claim = (
                f"the log's highest validation Dice is at step {top['step']}" if top else "the log has no validation"
            )
            remedy = "the choice of weights cannot be trusted: use --checkpoint last, or train anew"
            yield Check("best", "problem", f"{stage}: {found}, but {claim}", str(folder), remedy)
        else:
            yield Check("best", "ok", f"{stage}: step {top['step']} has the highest validation Dice, {top['dice']:.4f}")


def _scores(run: Path) -> Iterator[Check]:
    cases, dataset = read_record(run / "run.json")["cases"], _dataset(run)
    labelled = {c.id for c in dataset.subset("val", labelled=True)} if dataset else set(cases["val"])
    folders = [f for f in (run / "validation" / which for which in ("best", "last")) if (f / "summary.json").is_file()]
    if not folders:
        state = "warning" if cases["val"] else "ok"
        remedy = "they are made at the end of training" if cases["val"] else ""
        yield Check("scores", state, "there are no final scores", str(run / "validation"), remedy)
    for folder in folders:
        place, file = folder.relative_to(run).as_posix(), str(folder / "cases.csv")
        summary, rows = read_record(folder / "summary.json"), read_rows(folder / "cases.csv")
        scored = {row["case"] for row in rows} | set(summary["unscored"])
        leaked = {split: sorted(scored & set(cases[split])) for split in ("train", "test")}
        if any(leaked.values()):
            text = "; ".join(f"{split} cases among them: {', '.join(ids[:5])}" for split, ids in leaked.items() if ids)
            yield Check("scores", "problem", f"{place}: {text}", file, "these are no validation scores: evaluate anew")
            continue
        if scored - set(cases["val"]) or labelled - scored:
            text = f"{place}: {len(scored - set(cases['val']))} unknown cases, {len(labelled - scored)} cases missing"
            yield Check("scores", "problem", text, file, "predict and evaluate the validation cases anew")
            continue
        means = summarise(rows, seed=summary["settings"]["seed"])["mean"]
        wrong = [m for m, v in summary["mean"].items() if not _close(v, means.get(m))]
        if wrong:
            text = f"{place}: summary.json says other means than cases.csv: {', '.join(wrong)}"
            yield Check("scores", "problem", text, str(folder / "summary.json"), "evaluate anew")
            continue
        if problem := _other_weights(run, folder):
            yield Check("scores", "problem", f"{place}: {problem}", str(folder / "predict.json"), "predict anew")
            continue
        words = f"{place}: Dice {summary['mean']['dice']:.4f} over {len(scored)} validation cases, from these weights"
        yield Check("scores", "ok", words)


def _close(claimed: float | None, computed: float | None) -> bool:
    """cases.csv keeps six digits."""
    if claimed is None or computed is None:
        return claimed is computed
    return bool(np.isclose(claimed, computed, rtol=1e-4, atol=1e-6))


def _other_weights(run: Path, folder: Path) -> str:
    """Why the predictions of a folder are not by the weights that its name says; "" if they are."""
    journal = read_record(folder / "predict.json")
    manifests = run.glob(f"checkpoints/*/{folder.name}/{journal['step']}.sha256.json")
    known = [json.loads(path.read_text())["self"] for path in manifests]
    return (
        "" if journal["made_by"]["weights"] in known else "these predictions are by other weights than the checkpoint's"
    )


def _versions(run: Path) -> Iterator[Check]:
    from medseg_jax.runtime.environment import versions

    recorded, installed = read_record(run / "run.json")["versions"], versions()
    changed = [f"{k} {v}, now {installed.get(k)}" for k, v in recorded.items() if installed.get(k) != v]
    if changed:
        remedy = "install the run's versions to get the same bits"
        yield Check("versions", "warning", f"other versions: {'; '.join(changed)}", str(run / "run.json"), remedy)
    else:
        yield Check("versions", "ok", "installed packages are those of the run")


def _predict(run: Path, number: int) -> Iterator[Check]:
    from medseg_jax.inference.predict import predict
    from medseg_jax.runtime.run import open_run

    dataset, folder = _dataset(run), run / "validation" / "best"
    if dataset is None or not (folder / "predict.json").is_file():
        remedy = "bring back the data set, or let training finish"
        yield Check("predict", "problem", "there is no data set or no recorded prediction", str(run), remedy)
        return
    journal = read_record(folder / "predict.json")
    ids = sorted(journal["cases"])[:number]
    opened, settings = open_run(run, "best"), journal["made_by"]
    for id in ids:
        image = dataset.case(id).images[0]
        with tempfile.TemporaryDirectory() as scratch:
            options = dict(tta=settings["tta"], overlap=settings["overlap"], postprocessing="none")
            written = predict(opened, image, Path(scratch) / "out", progress=False, **options)
            new, _ = io.read_label(written[0])
        old, _ = io.read_label(folder / journal["cases"][id]["outputs"][0])
        if new.shape != old.shape or (new != old).any():
            share = f"{np.mean(new != old):.3%} of the voxels" if new.shape == old.shape else "the shape"
            remedy = "expected on another kind of device; else the label map or the code has changed"
            yield Check("predict", "problem", f"{id}: {share} differ from the recorded label map", str(folder), remedy)
        else:
            yield Check("predict", "ok", f"{id}: the same label map again, {new.size:,} voxels")


# ---------------------------------------------------------------------------------------------------------------------
# A folder of predictions
# ---------------------------------------------------------------------------------------------------------------------


def _predictions(folder: Path) -> Iterator[Check]:
    journal = read_record(folder / "predict.json")
    labels = read_description(folder / "dataset.json")[1] if (folder / "dataset.json").is_file() else None
    clean = True
    for id, entry in journal["cases"].items():
        missing = [name for name in entry["outputs"] if not (folder / name).is_file()]
        if missing:
            text = f"{id}: {', '.join(missing)} missing"
        else:
            label, _ = io.read_label(folder / entry["outputs"][0])
            unknown = unknown_values(label, labels) if labels else {}
            if list(label.shape) == entry["shape"] and not unknown:
                continue
            text = (
                f"{id}: values {sorted(unknown)} are no class"
                if unknown
                else f"{id}: shape {label.shape} is not its own"
            )
        clean = False
        remedy = "start the same medseg predict again: it makes what is missing; remove damaged files first"
        yield Check("predictions", "problem", text, str(folder), remedy)
    if clean:
        yield Check("predictions", "ok", f"{len(journal['cases'])} cases, all files there, all values are classes")


def _origin(folder: Path) -> Iterator[Check]:
    from medseg_jax.runtime.run import WEIGHTS

    journal = read_record(folder / "predict.json")
    runs, weights, steps = (
        v if isinstance(v, list) else [v] for v in (journal["run"], journal["made_by"]["weights"], journal["step"])
    )
    for run, made_by, step in zip(map(Path, runs), weights, steps, strict=True):
        manifests = run.glob(f"checkpoints/*/{journal['checkpoint']}/*.sha256.json")
        known = [read_record(path)["self"] for path in manifests]
        known += [file_sha256(path) for path in [run / WEIGHTS] if path.is_file()]
        if not known:
            text = f"the run is not there, so its weights {str(made_by)[:12]}… cannot be checked"
            yield Check("origin", "warning", text, str(run), "bring it back to where it was, to check it")
        elif made_by in known:
            yield Check("origin", "ok", f"made by the {journal['checkpoint']} weights of step {step} of {run.name}")
        else:
            text = f"the run's {journal['checkpoint']} weights are others by now than those that made these predictions"
            yield Check("origin", "problem", text, str(run), "predict anew with --overwrite")

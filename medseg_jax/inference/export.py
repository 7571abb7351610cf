"""A trained run for others: one program for CPU, GPU and TPU, an ONNX file, or named tensors; with a model card.

Whatever is written is read back and compared with the run on random images, one at a time and eight at a time. More
difference than `TOLERANCES` allows is an error.

    model.stablehlo       jax.export's form of StableHLO: weights inside, for cpu, cuda and tpu, any batch size.
                          jax.export.deserialize(open(file, "rb").read()).call(image) needs nothing of medseg_jax.
    model.onnx            the same for ONNX runtimes, any batch size
    weights.safetensors   params/... and aux/..., config, plan and classes in its metadata. With the JSON files
                          beside it the folder is a run that predicts: medseg predict FOLDER
    MODEL_CARD.md         data and its hash, scores, how it was trained, intended use and limits

All map image [b, *patch, c], preprocessed as plan.json says, to probabilities [b, *patch, k]. A program for several
platforms and any batch cannot hold the kernels of one (`ops.scan`): it takes their portable forms, the convolutions
keep one form a platform.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import numpy as np

from medseg_jax.data.dataset import is_dataset
from medseg_jax.data.dataset_json import KEYS
from medseg_jax.inference import postprocess
from medseg_jax.inference.model_card import model_card
from medseg_jax.methods.objective import Objective, Tree
from medseg_jax.ops.plain import plain_forms
from medseg_jax.paths import file_sha256, read_record, write
from medseg_jax.runtime.run import WEIGHTS, Run, folds_of, open_run
from medseg_jax.runtime.tensors import save_tree
from medseg_jax.types import UserError

type Form = Literal["stablehlo", "onnx", "safetensors"]

FORMS: tuple[str, ...] = get_args(Form.__value__)
PLATFORMS = ("cpu", "cuda", "tpu")
BATCHES = (1, 8)
FILES = {"stablehlo": "model.stablehlo", "onnx": "model.onnx", "safetensors": WEIGHTS}
DIFFERENCES = "differences.json"
"""Form -> its file; and where the differences of all of them stand, for the card of a later export."""

SAID = ("source", "licence", "license", "reference", "citation", "description", "release")
"""Keys of dataset.json, beside those of the format, that are given out. Others may name cases or folders."""

TOLERANCES = {"stablehlo": 1e-5, "safetensors": 1e-5, "onnx": 1e-4}
"""Largest difference between an exported model's probabilities and the run's. An ONNX runtime has convolutions of its
own, which round otherwise: 1.2e-5 for a small U-Net."""


def export(
    run: Run | str | Path,
    output: str | Path,
    to: Form | Sequence[Form] = "stablehlo",
    checkpoint: Literal["best", "last"] = "best",
    progress: Callable[[str], None] = lambda text: None,
) -> dict[Path, dict[int, float]]:
    """Writes a run in forms that others can use, and proves each against the run.

    Args:
        run: a run or its folder.
        output: folder; made if missing. What an earlier export of the same weights left there in other forms stays.
        to: one form or several.
        checkpoint: "best" on validation, or "last".
        progress: told one line a form.

    Returns:
        For each file the largest difference of its probabilities from the run's, by batch size.

    Raises:
        UserError: no such form, the folder holds something else, a package is missing, the network has an operation
            that a converter does not know, or what was written does not compute the same.
    """
    forms = [to] if isinstance(to, str) else list(to)
    if not forms or set(forms) - set(FORMS):
        raise UserError("There is no such form to export to", found=", ".join(forms), expected=", ".join(FORMS))
    if not isinstance(run, Run):
        if folds := folds_of(Path(run)):
            raise UserError(
                "This is a cross-validation of several models",
                file=run,
                expected="one of them",
                remedy=f"export them one by one, beginning with {folds[0]}",
            )
        run = open_run(run, checkpoint)
    output = Path(output)
    objective, variables = _parts(run)
    if output.resolve() == run.path:
        raise UserError("The export would lie in the run itself", file=output, remedy="choose another folder")
    if is_dataset(output):
        raise UserError(
            "The folder is that of a data set, whose dataset.json the export would replace",
            file=output,
            remedy="choose another folder",
        )
    record = public_record(run)
    found = _earlier(output, record)
    output.mkdir(parents=True, exist_ok=True)
    for name, text in record.items():
        write(output / name, text)
    for form in forms:
        path, predict = WRITERS[form](run, output, record)
        found[path] = differences(run, predict)
        worst = max(found[path].values())
        said = ", ".join(f"{value:.2g} at batch {batch}" for batch, value in found[path].items())
        progress(f"{path}: largest difference from the run {said}")
        if not worst <= TOLERANCES[form]:
            raise UserError(
                "The exported model does not compute what the run does",
                file=path,
                found=f"probabilities differ by {said}",
                expected=f"at most {TOLERANCES[form]:g}",
                remedy="a network that computes in bfloat16 rounds differently elsewhere; please report anything else",
            )
    card = model_card(run, (objective, variables[0]), record, found, {path: file_sha256(path) for path in found})
    write(output / "MODEL_CARD.md", card)
    write(output / DIFFERENCES, json.dumps({path.name: values for path, values in found.items()}, indent=1))
    return {path: found[path] for path in found if path.name in {FILES[form] for form in forms}}


def _earlier(output: Path, record: dict[str, str]) -> dict[Path, dict[int, float]]:
    """Differences of the forms that an earlier export of the same weights left in the folder."""
    there, new = output / "run.json", json.loads(record["run.json"])["exported"]
    if not there.is_file():
        return {}
    old = json.loads(there.read_text(encoding="utf-8")).get("exported")
    if old != new:
        raise UserError(
            "The folder holds something else, which would be mixed up with this export",
            file=output,
            found=f"{old['checkpoint']} weights of step {old['step']} ({old['weights'][:8]})" if old else "a run",
            expected=f"nothing, or these {new['checkpoint']} weights of step {new['step']} ({new['weights'][:8]})",
            remedy="choose another folder, or remove it",
        )
    if not (output / DIFFERENCES).is_file():
        return {}
    values = json.loads((output / DIFFERENCES).read_text(encoding="utf-8"))
    return {output / k: {int(b): x for b, x in v.items()} for k, v in values.items() if (output / k).is_file()}


def differences(run: Run, predict: Callable[[np.ndarray], Any]) -> dict[int, float]:
    """Largest difference of probabilities between a model and the run, by batch size, on images of unit noise."""
    rng = np.random.default_rng(0)
    result = {}
    for batch in BATCHES:
        image = rng.standard_normal((batch, *run.plan.patch_size, run.plan.channels_seen), np.float32)
        wanted, given = np.asarray(run.predict(image)), np.asarray(predict(image))
        result[batch] = float(np.abs(wanted - given).max()) if wanted.shape == given.shape else float("inf")
    return result


def public_record(run: Run) -> dict[str, str]:
    """run.json, plan.json, dataset.json and, if there is one, postprocessing.json, without names of patients, cases,
    folders and commands.
    """
    own = read_record(run.path / "run.json", "dataset", "cases")
    config = {**own["config"], "data": Path(own["config"]["data"]).name, "cache": None}
    config |= {name: Path(config[name]).name for name in ("plan", "pretrained") if config.get(name)}
    if isinstance(config.get("labelled"), list):
        config["labelled"] = len(config["labelled"])
    cases = {split: len(ids) if isinstance(ids, list) else ids for split, ids in own["cases"].items()}
    about = {
        "config": config,
        "dataset": {name: own["dataset"][name] for name in ("name", "fingerprint")},
        "cases": cases,
        **{name: own[name] for name in ("versions", "git", "devices", "started", "scores") if name in own},
    }
    about.setdefault("scores", _scores(run.path))
    about["exported"] = {"checkpoint": run.checkpoint, "stage": run.stage, "step": run.step, "weights": _hash(run)}
    dataset = json.loads((run.path / "dataset.json").read_text(encoding="utf-8-sig"))
    dataset = {name: value for name, value in dataset.items() if name in (*KEYS, *SAID) and name != "dataset"}
    if "medseg" in dataset:
        dataset["medseg"] = {name: value for name, value in dataset["medseg"].items() if name != "cases"}
    return {
        "run.json": json.dumps(about, indent=1),
        "plan.json": (run.path / "plan.json").read_text(encoding="utf-8"),
        "dataset.json": json.dumps(dataset, indent=1, ensure_ascii=False),
        **{path.name: path.read_text(encoding="utf-8") for path in [run.path / postprocess.FILE] if path.is_file()},
    }


def _hash(run: Run) -> str:
    """sha256 of all arrays of the export."""
    found = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(_parts(run)[1]):
        found.update(jax.tree_util.keystr(path).encode())
        found.update(np.asarray(leaf).tobytes())
    return found.hexdigest()


def _scores(run: Path) -> dict[str, dict[str, Any]]:
    """Final scores on the validation cases, "last" and "best": mean and interval of each metric."""
    files = {name: run / "validation" / name / "summary.json" for name in ("last", "best")}
    read = {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}
    return {name: {key: summary[key] for key in ("mean", "ci95")} for name, summary in read.items()}


# ---------------------------------------------------------------- the forms


def _stablehlo(run: Run, output: Path, record: dict[str, str]) -> tuple[Path, Callable]:
    del record
    try:
        import flatbuffers  # noqa: F401  # pyright: ignore[reportMissingImports, reportUnusedImport]
    except ModuleNotFoundError as error:
        raise UserError(
            "Writing StableHLO needs a package that is not installed",
            found=error,
            remedy="pip install 'medseg-jax[export]'",
        ) from error
    (batch,) = jax.export.symbolic_shape("b")
    image = jax.ShapeDtypeStruct((batch, *run.plan.patch_size, run.plan.channels_seen), np.float32)
    exported = jax.export.export(jax.jit(_predict(run)), platforms=PLATFORMS)(image)
    path = write(output / FILES["stablehlo"], bytes(exported.serialize()))
    return path, jax.export.deserialize(bytearray(path.read_bytes())).call


def _safetensors(run: Run, output: Path, record: dict[str, str]) -> tuple[Path, Callable]:
    _, (params, aux, _) = _parts(run)
    said = {"stage": str(run.stage), "step": str(run.step), "checkpoint": run.checkpoint, **record}
    save_tree(output / WEIGHTS, params, aux, said)
    return output / WEIGHTS, open_run(output).predict


def _onnx(run: Run, output: Path, record: dict[str, str]) -> tuple[Path, Callable]:
    try:
        import jax2onnx  # pyright: ignore[reportMissingImports]
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise UserError(
            "Writing ONNX needs packages that are not installed",
            found=error,
            remedy="in an environment of its own (they want an older orbax): pip install 'medseg-jax[onnx]'; "
            "then export there this run, or what --to safetensors made of it",
        ) from error
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of every shape whose type it has to guess
    shape = ("b", *run.plan.patch_size, run.plan.channels_seen)
    try:
        with plain_forms():
            model = jax2onnx.to_onnx(
                _predict(run), [shape], input_names=["image"], output_names=["probabilities"], model_name="medseg_jax"
            )
    except (NotImplementedError, TypeError, ValueError, jax.errors.JAXTypeError) as error:
        raise UserError(
            "The converter to ONNX does not know an operation of this network",
            found=f"{type(error).__name__}: {str(error).splitlines()[0][:300]}",
            remedy="--to stablehlo works with every network",
        ) from error
    for name, text in record.items():
        model.metadata_props.add(key=name, value=text)
    path = write(output / FILES["onnx"], model.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return path, lambda image: session.run(None, {"image": image})[0]


WRITERS: dict[str, Callable] = {"stablehlo": _stablehlo, "onnx": _onnx, "safetensors": _safetensors}


def _predict(run: Run) -> Callable[[jax.Array], jax.Array]:
    """image -> probabilities, the weights inside."""
    objective, variables = _parts(run)
    return lambda image: objective.predict(*variables, image)


def _parts(run: Run) -> tuple[Objective, tuple[Tree, Tree, Tree]]:
    if run.objective is None or run.variables is None:
        raise UserError(
            "This run is put together from one model a class",
            file=run.path,
            expected="one of them",
            remedy=f"export them one by one, beginning with {run.members[0].path}",
        )
    return run.objective, run.variables

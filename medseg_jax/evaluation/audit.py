"""medseg audit: which training labels are probably wrong, and where.

A run of `KMSNoise` keeps, for each training case, a field: how probable label errors are around each voxel. `audit`
brings it up to date with the final network, combines it with what the network sees at the voxel itself (Bayes' rule),
takes the probability that the label is wrong back to the space of the label files, ranks the cases, and writes

    audit/maps/<case>.<ending>   that probability (PNG: 0 to 255), the largest one over classes that overlap
    audit/cases.csv              one row a case, the worst first
    audit/index.html             the same with pictures, sortable
    audit/summary.json           settings, and where the clean labels are known (`medseg data corrupt`), how well the
                                 probability finds the wrong voxels, beside the field alone, the network's entropy and
                                 its loss, and whether it is calibrated

so that a person can look at the worst ones first and mend them. Nothing in the data set is changed.
"""

import base64
import csv
import io as streams
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from PIL import Image

from medseg_jax.data import geometry as space
from medseg_jax.data import io, preview
from medseg_jax.data.cache import Cache, build_cache, preprocess, restore
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.label_noise import clean_label
from medseg_jax.data.pipeline import with_neighbours
from medseg_jax.data.plan import Plan
from medseg_jax.evaluation import html
from medseg_jax.evaluation.metrics.calibration import reliability
from medseg_jax.evaluation.metrics.pr import average_precision
from medseg_jax.inference.predict import write_map
from medseg_jax.inference.sliding_window import predict_volume
from medseg_jax.inference.uncertainty import entropy
from medseg_jax.methods.kms_noise import KMSNoise, Posterior, Prior, cost_of_flip, error_probability, infer
from medseg_jax.methods.objective import Task
from medseg_jax.paths import read_record, write
from medseg_jax.runtime.checkpoint import Checkpoints, restore_tree
from medseg_jax.runtime.run import WEIGHTS, open_run, seen_by, stage_folder
from medseg_jax.types import Case, Geometry, Labels, UserError

E_STEPS = 10  # with the final network
TINY = 1e-6  # a probability is at least that
PICTURES = 40  # of the worst cases on the page
PICTURE_SIZE = 300
HOT = (255, 45, 85)
HEADS = ("Case", "Wrong, expected", "Voxels", "Probably wrong", "In the label", "Missing", "Foreground")
NOTES = (
    "A voxel counts as probably wrong from a probability of one half on. “In the label”: the label shows a class there "
    "that is probably not there; “missing”: the other way round. The model was trained on these labels: it may be "
    "wrong where the labels are right, above all where many cases share an error. Look before you mend."
)
COLUMNS: tuple[str, ...] = (
    "case",
    "expected_wrong",
    "share",
    "probably_wrong",
    "added",
    "missing",
    "foreground",
    "truly_wrong",
)


@dataclass(frozen=True)
class Found:
    """One case.

    Attributes:
        row: what cases.csv says of it.
        picture: PNG, or None where the page shows none.
    """

    row: dict[str, Any]
    picture: bytes | None


def audit(dataset: Dataset | str | Path, run: str | Path, out: str | Path | None = None) -> Path:
    """Ranks the training cases of a run by how wrong their labels probably are.

    Args:
        dataset: the data set that the run was trained on, as it was then.
        run: folder of a run whose last stage is `KMSNoise`; its last weights are used.
        out: folder to write; by default `audit` in the run's.

    Returns:
        The page.

    Raises:
        UserError: the run keeps no posterior, or was trained on other files.
    """
    run = Path(run)
    dataset = dataset if isinstance(dataset, Dataset) else Dataset.open(dataset)
    out = Path(out) if out else run / "audit"
    posteriors = _open_posteriors(run, dataset)
    (out / "maps").mkdir(parents=True, exist_ok=True)
    results, marks = [], []
    for case in posteriors.cases:
        found, mark = _audit_case(posteriors, case, out)
        results.append(found)
        marks.append(mark)
    results.sort(key=lambda found: -found.row["share"])
    results = [found if i < PICTURES else replace(found, picture=None) for i, found in enumerate(results)]
    known = [mark for mark in marks if mark is not None]
    dataset = posteriors.dataset
    summary = {
        "run": run.name,
        "dataset": dataset.name,
        "cases": len(results),
        "prior": {name: getattr(posteriors.method, name) for name in ("mu", "s")} | {"rho": posteriors.rho},
        "not_doubted": posteriors.unknown,
    } | (_against_truth(known) if known else {"average_precision": None, "calibration": None})
    _write_csv(out / "cases.csv", [found.row for found in results])
    write(out / "summary.json", json.dumps(summary, indent=1))
    return write(out / "index.html", _html(results, summary, dataset))


# ---------------------------------------------------------------------------------------------------------------------
# What there is
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Posteriors:
    """A trained KMSNoise and the posteriors of its cases.

    Attributes:
        method: bound.
        rho: of the prior, learned or not.
        m, raw: the store, [rows, f, *grid].
        known: [f] whether the network knows a class, so that its labels are doubted.
        cases: training cases.
        predict: image -> probabilities, with the last weights.
    """

    dataset: Dataset
    plan: Plan
    cache: Cache
    method: KMSNoise
    rho: float
    m: np.ndarray
    raw: np.ndarray
    known: np.ndarray
    cases: tuple[Case, ...]
    predict: Any

    @property
    def unknown(self) -> list[str]:
        """Classes that the network does not know well enough for their labels to be doubted."""
        names = self.dataset.labels.names
        known = np.broadcast_to(self.known, len(names))  # one field for all classes that exclude each other
        return [name for name, is_known in zip(names, known, strict=True) if not is_known]

    def flip(self, case: Case, p: np.ndarray, label: np.ndarray) -> np.ndarray:
        """The field's probability that the label is wrong, r, in the preprocessed case, [d, h, w, f].

        The posterior that training left is brought up to date with the final network, which sees the whole case as it
        is; training had cut and augmented it.

        Args:
            p: the network's probabilities, [d, h, w, k].
            label: of the preprocessed case, [d, h, w].
        """
        index = next(i for i, c in enumerate(self.dataset.cases) if c.id == case.id)
        labels, store, dim, shape = self.dataset.labels, self.method.store, self.plan.dim, label.shape
        rows = slice(index * store.slices, index * store.slices + (shape[0] if dim == 2 else 1))
        inside = tuple(slice(m, m + n) for m, n in zip(store.margin, shape[-dim:], strict=True))
        left = Posterior(*(jnp.asarray(array[(rows, slice(None), *inside)]) for array in (self.m, self.raw)))

        p = np.clip(p, TINY, 1 - TINY)
        logits = np.log(p) if labels.exclusive else np.log(p) - np.log1p(-p)
        cost = cost_of_flip(jnp.asarray(logits), jnp.asarray(labels.table[label]), labels)  # [d, h, w, f]
        counted = jnp.ones(shape) if labels.ignore is None else jnp.asarray(labels.weights[label] > 0, jnp.float32)
        if dim == 2:
            new = self.update(left, jnp.moveaxis(cost, -1, 1), counted)
        else:
            new = self.update(left, jnp.moveaxis(cost, -1, 0)[None], counted[None])
        known = jnp.asarray(self.known).reshape(-1, *(1,) * dim)
        flip = np.asarray(jnp.where(known, self.method.flip(new), self.method.flip(left)))
        return np.moveaxis(flip, 1, -1) if dim == 2 else np.moveaxis(flip[0], 0, -1)  # from [d, f, h, w], [1, f, *s]

    def wrong(self, flip: np.ndarray, p_label: np.ndarray) -> np.ndarray:
        """Probability that the label is wrong, from the field and the network, both [d, h, w, f].

        Of a class that was never doubted the field says no more than that few labels are wrong.
        """
        others = self.dataset.labels.channels - 1 if self.dataset.labels.exclusive else 1
        seen = jnp.clip(jnp.asarray(p_label), TINY, 1 - TINY)
        return np.asarray(error_probability(jnp.asarray(flip), seen, others))

    @cached_property
    def update(self) -> Callable[[Posterior, Array, Array], Posterior]:
        """E-steps with a fixed network, compiled once a shape: (posterior, cost of a flip, counted) -> posterior."""
        method, prior = self.method, Prior(self.method.mu, self.method.s, self.rho, self.rho)

        @jax.jit
        def update(left: Posterior, cost: Array, counted: Array) -> Posterior:
            adam = optax.adam(method.e_lr)
            return infer(left, cost, counted, prior, lambda now, _: method.flip(now), adam, E_STEPS, method.whiten)

        return update


def _open_posteriors(run: Path, dataset: Dataset) -> Posteriors:
    opened = open_run(run, "last")
    config, index = opened.config, len(opened.config.stages) - 1
    stage = config.stages[index]
    if not isinstance(stage.objective, KMSNoise):
        raise UserError(
            "This run does not know which labels are wrong",
            file=run / "run.json",
            found=f"trained with {type(stage.objective).__name__}",
            expected="a last stage with KMSNoise",
            remedy="train one: medseg train configs/kms_noise_jsrt.py --data DATASET --out RUN",
        )
    folder = stage_folder(run, index, stage.name) / "last"
    steps = Checkpoints(folder, read_only=True).steps()
    if opened.stage != index or not steps:
        raise UserError(
            "This run keeps no posterior of the label errors",
            file=run,
            found="an exported run" if (run / WEIGHTS).is_file() else f"no weights of its last stage, {stage.name}",
            expected="the folder of medseg train, its last stage begun",
        )
    record = read_record(run / "run.json", "dataset")
    whole, dataset = seen_by(config, dataset)
    if record["dataset"]["fingerprint"] != whole.fingerprint():
        raise UserError(
            "The run was trained on other files",
            file=dataset.root,
            found="another fingerprint than in run.json",
            expected=record["dataset"]["root"],
            remedy="audit the data set as it was, or train again on the mended one",
        )
    plan = opened.plan
    cache = build_cache(whole, plan, config.cache)
    cases = dataset.subset("train")
    task = Task(
        plan,
        dataset.labels,
        plan.channels_seen,
        len(dataset.cases),
        extent=cache.extent([case.id for case in cases]),
        sample_size=stage.augment.sample_size(plan.patch_size, plan.patch_spacing),
    )
    method = replace(stage.objective, nodes=stage.objective.nodes or 9).bind(task)  # an expectation, not a sample
    state = restore_tree(folder / str(steps[-1]))
    aux, rho = state["aux"], float(method.prior(state["params"]).rho)
    known = np.asarray(method.known(aux["agreement"]))
    store = aux["cases"]
    return Posteriors(dataset, plan, cache, method, rho, store["m"], store["raw"], known, cases, opened.predict)


# ---------------------------------------------------------------------------------------------------------------------
# One case
# ---------------------------------------------------------------------------------------------------------------------


def _audit_case(posteriors: Posteriors, case: Case, out: Path) -> tuple[Found, dict[str, np.ndarray] | None]:
    """The case's row, map and picture, and where its clean label is known, what finds the wrong voxels."""
    labels, dataset = posteriors.dataset.labels, posteriors.dataset
    cached = posteriors.cache.case(case.id)
    given, plan = np.asarray(cached.label), posteriors.plan
    seen = with_neighbours(np.asarray(cached.image), plan.neighbours)
    p = predict_volume(posteriors.predict, seen, plan.patch_size, labels.channels, batch_size=plan.batch_size)
    p_label = _of_label(p, labels.table[given], labels)  # [d, h, w, f]
    flip = posteriors.flip(case, p, given)
    doubt = posteriors.wrong(flip, p_label)
    image, label, geometry = dataset.load(case)
    assert label is not None
    wrong = restore(doubt, cached.record, geometry, plan)  # [*s, f]
    counted = np.ones(label.shape, bool) if labels.ignore is None else label != labels.ignore
    wrong = np.where(counted[..., None], wrong, 0)
    whole = wrong.max(-1)  # [*s]
    write_map(out / "maps" / (case.label or Path(case.id)).name, whole, geometry)

    masks = labels.masks(label)  # [classes, *s]
    present = np.moveaxis(masks, 0, -1) if wrong.shape[-1] > 1 else masks.any(0)[..., None]  # [*s, f]
    probably, foreground = wrong > 0.5, int((present & counted[..., None]).sum())
    row = {
        "case": case.id,
        "expected_wrong": round(float(wrong.sum()), 1),
        "share": round(float(wrong.sum()) / max(foreground, 1), 5),
        "probably_wrong": int(probably.sum()),
        "added": int((probably & present).sum()),
        "missing": int((probably & ~present).sum()),
        "foreground": foreground,
    }
    mark = None
    if (clean := clean_label(dataset, case)) is not None:
        truth, _ = io.read_label(clean)
        row["truly_wrong"] = int(((labels.masks(truth) != masks) & counted).sum())
        right = preprocess(image, truth, geometry, plan).label
        assert right is not None
        scores = {"error probability": doubt, "field": flip, "entropy": _entropy(p, labels), "loss": -np.log(p_label)}
        mark = _marks(given, right, scores, labels)
    picture = _picture(image, label, whole, geometry, labels)
    return Found(row, picture), mark


def _of_label(p: np.ndarray, target: np.ndarray, labels: Labels) -> np.ndarray:
    """The network's probability of the label, [d, h, w, f], of probabilities and targets [d, h, w, k]."""
    given = (p * target).sum(-1, keepdims=True) if labels.exclusive else np.where(target > 0, p, 1 - p)
    return np.maximum(given, 1e-12)


def _entropy(p: np.ndarray, labels: Labels) -> np.ndarray:
    """Of the network's probabilities [d, h, w, k], in each field, [d, h, w, f]."""
    if labels.exclusive:
        return entropy(p, exclusive=True)[..., None]
    return np.stack([entropy(p[..., i : i + 1], exclusive=False) for i in range(p.shape[-1])], -1)


def _marks(
    given: np.ndarray, clean: np.ndarray, scores: dict[str, np.ndarray], labels: Labels
) -> dict[str, np.ndarray]:
    """Of every counted voxel and field of the preprocessed case: is its label truly wrong, and what each score says."""
    differ = labels.table[given] != labels.table[clean]  # [d, h, w, k]
    wrong = differ.any(-1, keepdims=True) if labels.exclusive else differ
    counted = np.broadcast_to((labels.weights[given] > 0)[..., None], wrong.shape)
    return {"wrong": wrong[counted]} | {name: score[counted] for name, score in scores.items()}


def _against_truth(marks: list[dict[str, np.ndarray]]) -> dict[str, dict[str, float]]:
    """Average precision of each score over the voxels of all cases, and whether the error probability is calibrated."""
    whole = {name: np.concatenate([mark[name] for mark in marks]) for name in marks[0]}
    wrong = whole.pop("wrong")
    precision = {name: round(average_precision(score, wrong), 4) for name, score in whole.items()}
    truly = float(wrong.mean())
    calibration = {"truly wrong": truly}
    for name in ("error probability", "field"):
        curve = reliability(whole[name], wrong)
        calibration |= {f"{name}, mean": float(whole[name].mean()), f"{name}, calibration error": curve.ece}
    return {"average_precision": precision | {"by chance": round(truly, 4)}, "calibration": calibration}


# ---------------------------------------------------------------------------------------------------------------------
# What is written
# ---------------------------------------------------------------------------------------------------------------------


def _picture(image: np.ndarray, label: np.ndarray, wrong: np.ndarray, geometry: Geometry, labels: Labels) -> bytes:
    """The slice with most expected errors: beside each other, the labels' outlines without and with the probability."""
    volume = len(geometry.shape) == 3
    image = space.to_canonical(image, geometry, channels=True)  # [d, h, w, c]
    label, wrong = (space.to_canonical(x, geometry, channels=False) for x in (label, wrong))
    index = int(wrong.sum((1, 2)).argmax())
    flat, masks, _ = preview.view(image, label, labels, volume, index)
    heat = wrong[index, ::-1, ::-1] if volume else wrong[index]
    spacing = space.spacing_canonical(geometry)[1:]
    small, masks = preview.scale(flat, masks, spacing, PICTURE_SIZE)
    size = (small.shape[1], small.shape[0])
    share = np.asarray(Image.fromarray((heat * 255).astype(np.uint8)).resize(size, Image.Resampling.BILINEAR)) / 255
    colors = [*preview.class_colors(len(labels.names)), *([preview.IGNORE_COLOR] if labels.ignore is not None else [])]
    plain = preview.overlay(small, masks, colors)
    grey = np.repeat(small[..., None], 3, -1) if small.ndim == 2 else small
    hot = grey * (1 - 0.75 * share[..., None]) + 0.75 * share[..., None] * np.array(HOT)
    both = np.concatenate([plain, preview.overlay(hot.round().astype(np.uint8), masks, colors)], 1)
    buffer = streams.BytesIO()
    Image.fromarray(both).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def _html(results: list[Found], summary: dict[str, Any], dataset: Dataset) -> str:
    clean = any("truly_wrong" in found.row for found in results)
    rows = []
    largest = max((found.row["share"] for found in results), default=1) or 1
    for found in results:
        row = found.row
        name = escape(row["case"])
        cells = [f'<td><a href="#{name}">{name}</a></td>' if found.picture else f"<td>{name}</td>"]
        cells.append(html.cell(f"{row['share']:.1%}", row["share"], part=row["share"] / largest))
        cells += [html.cell(f"{row[c]:,.0f}", row[c]) for c in COLUMNS[1:2] + COLUMNS[3:7]]
        cells += [html.cell(f"{row['truly_wrong']:,}", row["truly_wrong"])] if clean else []
        rows.append(html.row(*cells))
    table = html.table([*HEADS, *(["Truly wrong"] if clean else [])], rows, sortable=True)
    figures = "".join(_figure(found) for found in results if found.picture)
    colors = zip(dataset.labels.names, preview.class_colors(len(dataset.labels.names)), strict=True)
    legend = "".join(f'<li><i style="background:rgb{tuple(map(int, c))}"></i>{escape(n)}</li>' for n, c in colors)
    legend += f'<li><i style="background:rgb{HOT}"></i>label probably wrong</li>'
    found = summary["average_precision"]
    known = ""
    if found:
        calibration = summary["calibration"]
        known = f"""<section><h2>Where the truth is known</h2>{html.pairs({k: f"{v:.3f}" for k, v in found.items()})}
<p class="note">Average precision for truly wrong voxels, by the error probability, by the field alone, and by entropy
and loss of the same network. The error probability is {calibration["error probability, mean"]:.2%} in the mean;
{calibration["truly wrong"]:.2%} of the voxels are wrong; its calibration error is
{calibration["error probability, calibration error"]:.4f}.</p></section>"""
    body = f"""<header><p class="eyebrow">medseg_jax · Label audit</p><h1>{escape(summary["dataset"])}</h1>
<p>{summary["cases"]} training cases, run {escape(summary["run"])}. First the cases whose labels are probably most
wrong, as a share of their foreground.{_not_doubted(summary)}</p></header>
<section><h2>Cases</h2>{table}<p class="note">{NOTES}</p></section>{known}
<section><h2>Where</h2><ul class="legend">{legend}</ul><div class="charts">{figures}</div></section>"""
    return html.page(f"Label audit of {summary['dataset']}", body)


def _not_doubted(summary: dict[str, Any]) -> str:
    if not (names := summary["not_doubted"]):
        return ""
    words = f"Not doubted in training, since the network does not know them well: {escape(', '.join(names))}."
    return f" <b>{words} Believe little of what is said of them here.</b>"


def _figure(found: Found) -> str:
    name, row = escape(found.row["case"]), found.row
    data = base64.b64encode(found.picture or b"").decode()
    return (
        f'<figure id="{name}"><img style="width:100%" alt="{name}" src="data:image/png;base64,{data}">'
        f"<figcaption><b>{name}</b>: {row['share']:.1%} of the foreground, {row['added']:,} voxels probably too many, "
        f"{row['missing']:,} missing</figcaption></figure>"
    )


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    buffer = streams.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write(path, buffer.getvalue())

"""report.html: one self-contained page about a run, or about an evaluation alone.

    _gather    what there is: run.json, plan.json, log.jsonl, every summary.json + cases.csv, the images if still there
    sections   headline, curves, cases to look at, classes, domains, all cases, manifest, notes; each returns HTML
    report     puts them into one file: no other file, no network, no library; scripts only sort tables

Every word that comes from a file (names, commands, paths, classes) is escaped before it enters the page.
"""

import base64
import io as streams
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from medseg_jax.data import geometry as space
from medseg_jax.data import io, preview
from medseg_jax.data.dataset import Dataset
from medseg_jax.evaluation import html
from medseg_jax.evaluation.charts import calibration_figure, line_chart, strip_chart, svg
from medseg_jax.evaluation.evaluate import ACCURACY, DISTANCES, LESIONS, read_rows, remarks
from medseg_jax.evaluation.pairs import dataset_root
from medseg_jax.paths import read_record, write
from medseg_jax.types import UserError

HEADLINE = ("dice", "nsd", "hd95", "assd", "iou", "precision", "recall", "hd", "volume_error")
EXTRA = ("volume_error_relative", *LESIONS, *ACCURACY, "cldice", "ap", "ece", "brier")  # shown where they were measured
TABLE = tuple(metric for metric in HEADLINE if metric != "hd")  # one stray voxel decides HD: once on the page is enough
PICTURE_SIZE = 360

TITLES = {
    "validation/best": "best on validation",
    "validation/last": "last",
    "validation/best_postprocessed": "best, post-processed",
    "validation/last_postprocessed": "last, post-processed",
}
"""What the page calls the evaluations in the folder of a run, in its order."""


@dataclass(frozen=True)
class Scores:
    """One evaluation: its title, summary.json, the rows of cases.csv, and the folder of its predictions."""

    title: str
    summary: dict[str, Any]
    rows: list[dict[str, Any]]
    predictions: Path


@dataclass(frozen=True)
class Content:
    """What is known about a run or an evaluation.

    Attributes:
        name: of the folder.
        run: run.json, or None for an evaluation alone.
        plan: plan.json, if there is one.
        log: entries of log.jsonl.
        scores: the evaluations, the most important one first.
        dataset: folder where the images were.
        comparisons: page of each comparison in the folder, relative to it, with its verdict.
    """

    name: str
    run: dict[str, Any] | None
    plan: dict[str, Any] | None
    log: list[dict[str, Any]]
    scores: list[Scores]
    dataset: Path | None
    comparisons: tuple[tuple[str, str], ...] = ()


def report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run or of an evaluation.

    Args:
        run_dir: folder of a run (run.json), finished or not, or of an evaluation (summary.json).
        out: file to write; by default report.html in that folder.

    Returns:
        The file.

    Raises:
        UserError: the folder is neither, or one of its JSON files is damaged.
    """
    folder = Path(run_dir)
    content = replace(_gather(folder), comparisons=tuple(_find_comparisons(folder)))
    sections = {
        "scores": ("Scores", _headline(content)),
        "curves": ("Training", _curves(content)),
        "cases": ("Cases to look at", _examples(content)),
        "classes": ("Classes", _classes(content)),
        "probabilities": ("Probabilities", _probabilities(content)),
        "domains": ("Domains", _domains(content)),
        "comparisons": ("Comparisons", _comparisons(content)),
        "all": ("All cases", _all_cases(content)),
        "manifest": ("How this was made", _manifest(content)),
        "notes": ("How to read this", _notes(content)),
    }
    shown = {key: section for key, section in sections.items() if section[1]}
    links = "".join(f'<a href="#{key}">{title}</a>' for key, (title, _) in shown.items())
    body = "".join(f'<section id="{key}"><h2>{title}</h2>{text}</section>' for key, (title, text) in shown.items())
    page = html.page(content.name, f"{_header(content, links)}{body}")
    return write(Path(out) if out else folder / "report.html", page)


# ---------------------------------------------------------------------------------------------------------------------
# What there is
# ---------------------------------------------------------------------------------------------------------------------


def _gather(folder: Path) -> Content:
    name = folder.resolve().name
    if (folder / "run.json").is_file():
        run, plan = read_record(folder / "run.json"), folder / "plan.json"
        log = _read_log(folder / "log.jsonl")
        found = [_read_scores(path.parent, _title(path.parent, folder)) for path in sorted(_summaries(folder))]
        first = list(TITLES.values())
        scores = sorted(found, key=lambda s: first.index(s.title) if s.title in first else len(first))
        root = Path(str(run.get("dataset", {}).get("root", folder)))
        return Content(name, run, read_record(plan) if plan.is_file() else None, log, scores, root)
    if not (folder / "summary.json").is_file():
        inside = [*sorted(folder.glob("*/last/summary.json")), *sorted(folder.glob("*/run.json"))]
        raise UserError(
            "There is nothing to report on",
            file=folder,
            found="neither run.json nor summary.json" if folder.is_dir() else "no such folder",
            remedy=f"medseg report {inside[0].parent}"
            if inside
            else "medseg train CONFIG --out RUN, or medseg evaluate PRED REF -o DIR, makes such a folder",
        )
    scores = _read_scores(folder, "mean")
    settings = scores.summary["settings"]
    scores = Scores(scores.title, scores.summary, scores.rows, Path(settings["predictions"]))
    return Content(name, None, None, [], [scores], dataset_root(Path(settings["references"])))


def _find_comparisons(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted([*folder.glob("compare.json"), *folder.glob("*/compare.json")]):
        found = read_record(path)
        verdict = f"A {found['a']}, B {found['b']}: {found['verdict']}"
        yield path.with_suffix(".html").relative_to(folder).as_posix(), verdict


def _summaries(folder: Path) -> list[Path]:
    """Every evaluation of a run: in its own folders and in those of validation/."""
    return [*folder.glob("*/summary.json"), *folder.glob("validation/*/summary.json")]


def _title(folder: Path, run: Path) -> str:
    place = folder.relative_to(run).as_posix()
    return TITLES.get(place, place.replace("_", " "))


def _read_scores(folder: Path, title: str) -> Scores:
    summary = read_record(folder / "summary.json")
    try:
        return Scores(title, summary, read_rows(folder / "cases.csv"), folder)
    except (OSError, ValueError, KeyError) as error:
        raise UserError("cases.csv is missing or damaged", file=folder / "cases.csv", found=error) from error


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Entries of log.jsonl, steps counted through all stages."""
    from medseg_jax.runtime import log

    entries = log.read(path) if path.is_file() else []
    offset = 0
    for stage in dict.fromkeys(entry["stage"] for entry in entries):
        own = [entry for entry in entries if entry["stage"] == stage]
        last = max(entry["step"] for entry in own)
        for entry in own:
            entry["step"] += offset
        offset += last
    return entries


# ---------------------------------------------------------------------------------------------------------------------
# Sections
# ---------------------------------------------------------------------------------------------------------------------


def _header(content: Content, links: str) -> str:
    words = []
    if content.run:
        data = content.run.get("dataset", {})
        stages = content.run.get("config", {}).get("stages", [])
        words = [f"data set {data.get('name', 'unknown')}", f"{len(stages)} stage" + "s" * (len(stages) != 1)]
        words += [f"started {content.run['started']}"] if "started" in content.run else []
    elif content.scores:
        words = [f"predictions {content.scores[0].summary['settings']['predictions']}"]
    kind = "Training run" if content.run else "Evaluation"
    return (
        f'<header><p class="eyebrow">medseg_jax · {kind}</p><h1>{escape(content.name)}</h1>'
        f"<p>{escape(' · '.join(words))}</p><nav>{links}</nav></header>"
    )


def _headline(content: Content) -> str:
    if not content.scores:
        return "<p>There are no final scores yet: they are computed when training ends.</p>"
    main, *others = content.scores
    tiles = "".join(_tile(metric, content.scores) for metric in ("dice", "nsd", "hd95"))
    heads = ["Mean over cases", *(s.title.capitalize() for s in content.scores), "Median", "sd"]
    rows = []
    for metric in (*HEADLINE, *(m for m in EXTRA if any(m in s.summary["mean"] for s in content.scores))):
        cells = [
            html.cell(
                html.number(metric, s.summary["mean"].get(metric)),
                small=html.interval(metric, s.summary["ci95"].get(metric, (None, None))),
            )
            for s in content.scores
        ]
        spread = [html.cell(html.number(metric, main.summary[kind].get(metric))) for kind in ("median", "sd")]
        rows.append(html.row(html.cell(html.metric_name(metric, main.summary), kind="text"), *cells, *spread))
    rows.append(
        html.row(
            html.cell("Cases", kind="text"), *(html.cell(_count(s.summary)) for s in content.scores), "<td></td>" * 2
        )
    )
    text = "Small numbers: 95 % bootstrap interval of the mean."
    if others:
        text += f" Median and sd, over cases, belong to “{main.title}”."
    return f'<div class="tiles">{tiles}</div>{html.table(heads, rows)}<p class="note">{escape(text)}</p>'


def _count(summary: dict[str, Any]) -> str:
    if "patients" not in summary:
        return str(summary["cases"])
    patients = summary["patients"]["patients"]
    return f"{summary['cases']} (of {patients} patient{'s' * (patients != 1)})"


def _tile(metric: str, scores: Sequence[Scores]) -> str:
    main = scores[0].summary
    unit = f' <span class="unit">{escape(main["unit"])}</span>' if metric in DISTANCES else ""
    lines = [f"95 %: {html.interval(metric, main['ci95'][metric])}"] if main["ci95"][metric][0] is not None else []
    lines += [f"{s.title}: {html.number(metric, s.summary['mean'][metric])}" for s in scores[1:]]
    name = html.metric_name(metric, main) if metric == "nsd" else html.NAMES[metric]
    suffix = f", {scores[0].title}" if len(scores) > 1 else ""
    return (
        f'<div class="tile"><div class="name">{escape(name + suffix)}</div>'
        f'<div class="value">{html.number(metric, main["mean"][metric])}{unit}</div>'
        + "".join(f'<div class="interval">{escape(line)}</div>' for line in lines)
        + "</div>"
    )


OF_EVERY_METHOD = ("kind", "stage", "step", "loss", "grad_norm", "skipped", "lr", "seconds")
"""What each line about training holds; the rest are the method's own figures."""


def _curves(content: Content) -> str:
    train = [e for e in content.log if e["kind"] == "train" and e.get("loss") is not None]
    val = [e for e in content.log if e["kind"] == "val"]
    names = [k for k in dict.fromkeys(k for e in val for k in e) if k == "dice" or k.startswith("dice/")]
    charts = []
    if train:
        series = {}  # a curve a stage: another stage may have another loss
        for e in train:
            steps, losses = series.setdefault(e["stage"], ([], []))
            steps.append(e["step"])
            losses.append(e["loss"])
        charts.append(line_chart("Training loss", "loss", series))
    if names:
        series = {
            name.removeprefix("dice/") if name != "dice" else "mean": (
                [e["step"] for e in val if name in e],
                [e[name] for e in val if name in e],
            )
            for name in names
        }
        charts.append(line_chart("Dice on the validation cases while training", "Dice", series))
    for name in dict.fromkeys(k for e in train for k in e if k not in OF_EVERY_METHOD):
        known = [e for e in train if isinstance(e.get(name), int | float)]
        charts.append(
            line_chart(f"While training: {name}", name, {name: ([e["step"] for e in known], [e[name] for e in known])})
        )
    if not charts:
        return ""
    note = (
        "Validation while training works on preprocessed images and leaves out classes absent from a case; "
        "final scores are computed on the original images and count every class."
    )
    return f'<div class="charts">{"".join(charts)}</div><p class="note">{note}</p>'


def _examples(content: Content) -> str:
    """Worst, median and best case: outlines of reference and prediction side by side."""
    if not content.scores:
        return ""
    main = content.scores[0]
    if content.dataset is None:
        return "<p>The references are no data set, so the images are not known and cannot be shown.</p>"
    try:
        dataset = Dataset.open(content.dataset)
    except UserError:
        where = escape(str(content.dataset))
        return f"<p>The images cannot be shown: there is no data set at <code>{where}</code> any more.</p>"
    ranked = sorted(_by_case(main.rows).items(), key=lambda item: np.mean([row["dice"] for row in item[1]]))
    chosen = {"Worst": ranked[0], "Median": ranked[len(ranked) // 2], "Best": ranked[-1]}
    if len(ranked) < 3:
        chosen = {"Worst": ranked[0], "Best": ranked[-1]} if len(ranked) == 2 else {"The only": ranked[0]}
    figures = [_example(kind, id, rows, main, dataset) for kind, (id, rows) in chosen.items()]
    names = [*dataset.labels.names, *(["ignored"] if dataset.labels.ignore is not None else [])]
    legend = "".join(
        f'<li><i style="background:rgb({r},{g},{b})"></i>{escape(name)}</li>'
        for name, (r, g, b) in zip(names, _colors(dataset), strict=False)
    )
    title = f" of “{main.title}”" if len(content.scores) > 1 else ""
    return (
        f"<p>By mean Dice over the classes{escape(title)}. Of volumes, the axial slice with most foreground.</p>"
        f'<ul class="legend">{legend}</ul><div class="cases">{"".join(figures)}</div>'
    )


def _example(kind: str, id: str, rows: Sequence[dict[str, Any]], scores: Scores, dataset: Dataset) -> str:
    dice, hd95 = np.mean([row["dice"] for row in rows]), np.mean([row["hd95"] for row in rows])
    where = ", ".join(filter(None, (rows[0]["domain"], rows[0]["patient"])))
    words = f"{where and where + ' · '}Dice {dice:.3f} · HD95 {html.number('hd95', hd95)} {scores.summary['unit']}"
    title = f"<b>{kind}: {escape(id)}</b> · {escape(words)}"
    try:
        pictures, place = _pictures(id, scores, dataset)
    except (UserError, OSError) as error:
        problem = str(error).splitlines()[0]
        return f"<figure><figcaption>{title}<br>No picture: {escape(problem)}.</figcaption></figure>"
    images = "".join(
        f'<div><img alt="{escape(id)}, {side}" src="{_data_uri(picture)}"><span>{side}</span></div>'
        for side, picture in zip(("image", "reference", "prediction"), pictures, strict=True)
    )
    return f'<figure><div class="views">{images}</div><figcaption>{title}{place}</figcaption></figure>'


def _pictures(id: str, scores: Scores, dataset: Dataset) -> tuple[list[np.ndarray], str]:
    """Three pictures [h, w, 3] uint8 of a case (bare, reference, prediction), and which slice they show."""
    image, reference, geometry = dataset.load(dataset.case(id))
    if reference is None:
        raise UserError("the data set has no reference for it any more")
    file = next((path for path in io.list_files(scores.predictions) if io.stem(path) == id), None)
    prediction = io.read_label(file)[0] if file else np.zeros_like(reference)
    volume = len(geometry.shape) == 3
    image = space.to_canonical(image, geometry, channels=True)  # [d, h, w, c]
    both = [space.to_canonical(label, geometry, channels=False) for label in (reference, prediction)]  # [d, h, w]
    index = preview.busiest_slice(np.where(both[0] > 0, *both), dataset.labels)
    pictures = []
    for label in (None, *both):
        flat, masks, _ = preview.view(image, label, dataset.labels, volume, index)
        small, masks = preview.scale(flat, masks, space.spacing_canonical(geometry)[1:], PICTURE_SIZE)
        pictures.append(preview.overlay(small, masks, _colors(dataset)[: len(masks)], width=2))
    return pictures, f" · slice {index + 1} of {image.shape[0]}" if volume else ""


def _colors(dataset: Dataset) -> list[list[int]]:
    """Colours of the classes, then that of ignored voxels."""
    return [*preview.class_colors(len(dataset.labels.names)).tolist(), list(preview.IGNORE_COLOR)]


def _data_uri(picture: np.ndarray) -> str:
    buffer = streams.BytesIO()
    Image.fromarray(picture).save(buffer, "png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _classes(content: Content) -> str:
    if not content.scores:
        return ""
    main = content.scores[0]
    summary = main.summary
    rows = [_figures_row(name, values) for name, values in summary["classes"].items()]
    if len(rows) > 1:
        rows.append(_figures_row("mean", summary["mean"] | {"ci95": summary["ci95"]}, kind="total"))
    dice = {name: [row["dice"] for row in main.rows if row["class"] == name] for name in summary["classes"]}
    return html.table(["Class", *(html.metric_name(m, summary) for m in TABLE)], rows) + strip_chart(dice)


def _figures_row(name: str, values: dict[str, Any], kind: str = "") -> str:
    cells = [
        html.cell(
            html.number(m, values[m]),
            small=html.interval(m, values["ci95"][m]) if m in ("dice", "nsd", "hd95") else "",
            part=values[m] if m in ("dice", "nsd") else None,
        )
        for m in TABLE
    ]
    return html.row(html.cell(name, kind="text"), *cells, kind=kind)


def _probabilities(content: Content) -> str:
    """Calibration and average precision of every evaluation that had probabilities."""
    parts = []
    note = (
        "Average precision of a guess is the prevalence. ECE has bins of equal mass; the curve, of equal width. Most "
        "voxels are easy background, so small ECE and Brier scores are no praise: they serve to compare models."
    )
    for scores in content.scores:
        if not (found := scores.summary.get("probabilities")):
            continue
        title = f"<h3>{escape(scores.title.capitalize())}</h3>" if len(content.scores) > 1 else ""
        rows = []
        for name, own in (found["classes"] | {"likeliest class": found.get("top_label")}).items():
            if own is None:
                continue
            cells = [
                html.cell(html.number(key, own.get(key)))
                for key in ("ap", "aupr33", "soft_dice_pooled", "prevalence", "ece", "mce", "brier")
            ]
            rows.append(html.row(html.cell(name, kind="text"), *cells))
        heads = ["All voxels pooled", "Average precision", "AUPR, 33 thresholds", "Soft Dice", "Prevalence"]
        heads += ["ECE", "MCE", "Brier"]
        chart = svg(calibration_figure(found), "Reliability curves")
        parts.append(f'{title}{html.table(heads, rows)}<div class="charts">{chart}<p class="note">{note}</p></div>')
    return "".join(parts)


def _domains(content: Content) -> str:
    tables = []
    for scores in content.scores:
        if domains := scores.summary.get("domains"):
            title = f"<h3>{escape(scores.title.capitalize())}</h3>" if len(content.scores) > 1 else ""
            rows = [_figures_row(f"{name or 'unnamed'} ({v['cases']} cases)", v) for name, v in domains.items()]
            tables.append(title + html.table(["Domain", *(html.metric_name(m, scores.summary) for m in TABLE)], rows))
    return "".join(tables)


def _comparisons(content: Content) -> str:
    items = [f'<li><a href="{quote(page)}">{escape(text)}</a></li>' for page, text in content.comparisons]
    return f'<ul class="notes">{"".join(items)}</ul>' if items else ""


def _all_cases(content: Content) -> str:
    tables = []
    for scores in content.scores:
        table = _case_table(scores)
        if len(content.scores) > 1:
            state = " open" if scores is content.scores[0] else ""
            table = f"<details{state}><summary>{escape(scores.title.capitalize())}</summary>{table}</details>"
        tables.append(table)
    if not tables:
        return ""
    note = "Means over the classes, the worst first; a click on a heading sorts. ∞: a class is empty on one side only."
    return f'<p class="note">{note}</p>{"".join(tables)}'


def _case_table(scores: Scores) -> str:
    classes = list(scores.summary["classes"])
    apart = classes if 1 < len(classes) <= 8 else []
    columns = [key for key in ("domain", "patient") if any(row[key] for row in scores.rows)]
    metrics = ("dice", "nsd", "hd95", *(() if apart else ("assd", "precision", "recall")))
    cases = sorted(_by_case(scores.rows).items(), key=lambda item: np.mean([row["dice"] for row in item[1]]))
    rows = []
    for id, own in cases:
        means = {m: float(np.mean([row[m] for row in own])) for m in metrics}
        cells = [html.cell(id, kind="text"), *(html.cell(own[0][key], kind="text") for key in columns)]
        cells += [html.cell(html.number(m, v), v, part=v if m in ("dice", "nsd") else None) for m, v in means.items()]
        cells += [html.cell(html.number("dice", row["dice"]), row["dice"]) for row in own if apart]
        rows.append(html.row(*cells))
    heads = ["Case", *(key.capitalize() for key in columns), *(html.metric_name(m, scores.summary) for m in metrics)]
    return html.table([*heads, *(f"Dice {name}" for name in apart)], rows, sortable=True, texts=1 + len(columns))


def _manifest(content: Content) -> str:
    run = content.run
    if run is None:
        settings = content.scores[0].summary["settings"]
        return html.pairs(
            {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in settings.items()}
        )
    data, git = run.get("dataset", {}), run.get("git", {})
    facts = {
        "command": " ".join(run.get("command", [])),
        "started": run.get("started", ""),
        "seed": str(run.get("config", {}).get("seed", "")),
        "parameters": f"{run['parameters']:,}" if isinstance(run.get("parameters"), int) else "",
        "devices": ", ".join(f"{k} {v}" for k, v in run.get("devices", {}).items()),
        "data set": f"{data.get('name', '')} at {data.get('root', '')}",
        "data fingerprint": f"sha256 {data.get('fingerprint', '')}",
        "cases": ", ".join(f"{len(ids)} {split}" for split, ids in run.get("cases", {}).items()),
        "source": f"commit {git['commit']}{', modified' if git.get('modified') else ''}"
        if git
        else "not a git checkout",
        "versions": ", ".join(f"{name} {version}" for name, version in run.get("versions", {}).items()),
    }
    text = html.pairs({key: value for key, value in facts.items() if value})
    if content.plan:
        reasons = content.plan.get("reasons", {})
        rows = [
            html.row(
                html.cell(key, kind="text"),
                html.cell(json.dumps(value), kind="text wrap"),
                html.cell(reasons.get(key, ""), kind="text wrap soft"),
            )
            for key, value in content.plan.items()
            if key != "reasons"
        ]
        text += f"<h3>Plan</h3>{html.table(['Choice', 'Value', 'Reason'], rows, texts=3)}"
    config = escape(json.dumps(run.get("config", {}), indent=1, ensure_ascii=False))
    return f"{text}<details><summary>Config</summary><pre>{config}</pre></details>"


def _notes(content: Content) -> str:
    lines = []
    if content.run:
        lines.append(
            "“Best on validation” are the weights with the highest validation Dice, so their scores on those same "
            "cases are a little too good; “last” are the weights at the end of training, chosen by nobody. Test cases "
            "took no part in any choice."
        )
    if any(scores.title.endswith("post-processed") for scores in content.scores):
        lines.append(
            "Post-processing was chosen on these cases, so scores with it are too good as well; the choice of each "
            "class is in postprocessing.json."
        )
    if content.scores:
        summary = content.scores[0].summary
        settings = summary["settings"]
        lines += [
            "The mean of a case is the mean over its classes; the figures above are means over cases, each case "
            "counting the same.",
            "A class empty in reference and prediction scores 1, with distances 0. Empty on one side only, it scores 0 "
            "and its distances are infinite; in means the diagonal of that image stands for them. No case is left out.",
            f"NSD is the share of both surfaces that lies within {settings['nsd_tolerance']:g} {summary['unit']} of "
            f"the other. Surface: {settings['surface']}. HD95: {settings['hd95']}. ASSD: {settings['assd']}.",
            f"Intervals: {settings['ci95']}; they say how far the mean would move with other cases of the same kind, "
            "not how it would with another training run.",
        ]
        said: dict[str, list[str]] = {}  # a remark -> of which scores
        for scores in content.scores:
            for line in remarks(scores.summary):
                said.setdefault(line, []).append(scores.title)
        for line, titles in said.items():
            of_all = len(titles) == len(content.scores)
            lines.append(line if of_all else f"{'; '.join(titles).capitalize()}: {line}")
    return f'<ul class="notes">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def _by_case(rows: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    cases: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        cases.setdefault(row["case"], []).append(row)
    return cases

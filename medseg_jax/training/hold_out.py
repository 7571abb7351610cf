"""Leave one domain out: train on the other sites, score the one that was never seen; for one site, or each in turn.

A domain is held out by a view of the data set (data/views.py), and what is trained is a run like any other; the loop
knows nothing of it. The domain takes no part in plan, training and selection: the validation cases are patients of the
other domains.

    RUN/hold_out_<domain>/                       an ordinary run
    RUN/hold_out_<domain>/target/{last,best}/    the domain predicted and scored; "best" was chosen on the other domains
    RUN/oracle_<domain>/                         only if asked for: "best" chosen on the domain itself
    RUN/unseen/{last,best}/                      all domains pooled: cases.csv, summary.json ("domains"), report.html
    RUN/hold_out.json, hold_out.md               a row for each domain
"""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from medseg_jax.config import Config
from medseg_jax.data import synthetic
from medseg_jax.data.dataset import Dataset
from medseg_jax.data.views import class_view, hold_out_view
from medseg_jax.paths import safe_name, write
from medseg_jax.runtime.log import say
from medseg_jax.runtime.run import seen_by
from medseg_jax.training.pool import CHECKPOINTS, pool
from medseg_jax.types import UserError

UNTOUCHED: dict[str, Any] = {"postprocessing": "none", "overwrite": True}


def hold_out_folder(out: Path, domain: str, kind: str = "hold_out") -> Path:
    """Where the run without a domain lies."""
    return out / f"{kind}_{safe_name(domain)}"


def train_hold_out(
    config: Config,
    out: str | Path,
    domain: str | None = None,
    *,
    oracle: bool = False,
    fresh: bool = False,
    report: bool = True,
) -> Path:
    """Trains without one domain, or without each of them in turn, and scores what was held out. Resumable like `train`.

    Args:
        config: what to train.
        out: folder of all these runs.
        domain: which one; None for all.
        oracle: also train with the best weights chosen on the domain itself, to compare with articles that did so; a
            config that says so asks for it, too.
        fresh: throw away what these runs had and start them anew.
        report: write scores and reports.

    Returns:
        `out`.

    Raises:
        UserError, Interrupted: as `train`; no such domain, none of its cases has a label, or no other one to train on;
            a domain that was held out here before had another config.
    """
    import jax

    from medseg_jax.training.train import train

    out, dataset = Path(out), synthetic.open_data(config.data)
    oracle, config = oracle or config.oracle, replace(config, oracle=False)
    if (out / "run.json").exists():
        raise UserError(
            "This folder holds a run that holds nothing out",
            file=out,
            remedy="choose another --out, or leave --hold-out out to go on with it",
        )
    domains = _domains(dataset) if domain is None else [domain]
    views = {name: hold_out_view(dataset, name) for name in domains}
    _refuse(config, out, dataset, domains, oracle, fresh)
    for name, view in views.items():
        folder, one = hold_out_folder(out, name), replace(config, hold_out=name)
        if _is_scored(folder) and not fresh:
            say(f"{name}: finished already")
        else:
            say(f"held out: {name} ({len(_target(view, name))} labelled cases): {folder}")
            if fresh and jax.process_index() == 0:
                shutil.rmtree(folder / "target", ignore_errors=True)
            train(one, folder, fresh=fresh, report=report)
            if report and jax.process_index() == 0:
                score_target(folder, class_view(view, config.classes), name)
        if oracle:
            train(replace(one, oracle=True), hold_out_folder(out, name, "oracle"), fresh=fresh, report=report)
    if report and jax.process_index() == 0:
        summarise(config, out)
    return out


def _domains(dataset: Dataset) -> list[str]:
    """Every domain with labelled cases."""
    found = sorted({case.domain for case in dataset.cases if case.label is not None})
    if len(found) < 2:
        raise UserError(
            "There is no domain to hold out: the data set has one only",
            file=dataset.root / "dataset.json",
            found=", ".join(found) or "no domain",
            expected='two domains or more, each case with its own under "medseg", "cases"',
            remedy="medseg data convert --domain-from PATTERN takes them from folders or file names",
        )
    return found


def _refuse(config: Config, out: Path, dataset: Dataset, domains: list[str], oracle: bool, fresh: bool) -> None:
    """Raises before anything is trained: what a later domain could not be trained with, what cannot be scored or told
    apart, and what may not be pooled."""
    from medseg_jax.training.prepare import refuse_no_best, refuse_other_config

    folders: dict[Path, str] = {}
    for name in domains:
        seen_by(replace(config, hold_out=name, oracle=oracle), dataset)
        refuse_no_best(config, seen_by(replace(config, hold_out=name), dataset)[1])
        if not _target(dataset, name):
            raise UserError(
                "No case of the domain to hold out has a label, so that nothing could be scored",
                file=dataset.root / "dataset.json",
                found=f"{sum(case.domain == name for case in dataset.cases)} cases of {name}, none labelled",
                remedy="hold another domain out; to train without this one, give its cases the split test",
            )
    for name in dataset.domains:
        folder = hold_out_folder(out, name)
        if (other := folders.setdefault(folder, name)) != name:
            raise UserError(
                "The runs of two domains would share a folder",
                file=folder,
                found=f"{other}, {name}",
                remedy='rename one of them in dataset.json, under "medseg", "cases"',
            )
        if _is_scored(folder) and not (fresh and name in domains):
            refuse_other_config(replace(config, hold_out=name), folder, hold_out_view(dataset, name))


def _target(dataset: Dataset, domain: str) -> tuple[str, ...]:
    return tuple(case.id for case in dataset.cases if case.domain == domain and case.label is not None)


def _is_scored(folder: Path) -> bool:
    return all((folder / "target" / checkpoint / "summary.json").is_file() for checkpoint in CHECKPOINTS)


def score_target(folder: Path, view: Dataset, domain: str) -> None:
    """Predicts the labelled cases of the domain with the last and the best weights, without post-processing; scores."""
    from medseg_jax.evaluation.evaluate import evaluate
    from medseg_jax.inference.predict import predict

    wanted = set(_target(view, domain))
    target = replace(view, cases=tuple(case for case in view.cases if case.id in wanted))
    for checkpoint in CHECKPOINTS:
        place = folder / "target" / checkpoint
        # Without source patients to validate on there are no best weights but the last.
        there = (folder / "validation" / checkpoint).is_dir()
        predict(folder, target, place, checkpoint=checkpoint if there else "last", **UNTOUCHED)
        evaluate(place, target, place)


def summarise(config: Config, out: Path) -> dict[str, Any]:
    """Pools the domains that are scored: RUN/unseen, and a table with a row for each of them."""
    dataset = class_view(synthetic.open_data(config.data), config.classes)
    done = [name for name in dataset.domains if _is_scored(hold_out_folder(out, name))]
    wanted = {id for name in done for id in _target(dataset, name)}
    cases = tuple(replace(case, split="test") for case in dataset.cases if case.id in wanted)
    rows: dict[str, Any] = {name: _row(out, name) for name in done}
    for checkpoint in CHECKPOINTS:
        places = [hold_out_folder(out, name) / "target" / checkpoint for name in done]
        pool(places, out / "unseen" / checkpoint, replace(dataset, cases=cases))
    write(out / "hold_out.json", json.dumps(rows, indent=1, ensure_ascii=False))
    write(out / "hold_out.md", table(rows))
    say(table(rows))
    say(f"report: {out / 'unseen' / 'last' / 'report.html'}")
    return rows


def _row(out: Path, domain: str) -> dict[str, Any]:
    """Scores of one held-out domain, by protocol."""
    folder, oracle = hold_out_folder(out, domain), hold_out_folder(out, domain, "oracle")
    places = {
        "sources": folder / "validation" / "last",
        **{checkpoint: folder / "target" / checkpoint for checkpoint in CHECKPOINTS},
        "oracle": oracle / "validation" / "best",
    }
    row = {}
    for name, place in places.items():
        if (place / "summary.json").is_file():
            summary = json.loads((place / "summary.json").read_text(encoding="utf-8"))
            row[name] = {key: summary[key] for key in ("cases", "mean", "ci95", "unit")}
    return row


def table(rows: dict[str, Any]) -> str:
    """Markdown: a row for each held-out domain and their mean."""
    columns = ["sources", "last", "best", "oracle"]
    columns = [name for name in columns if any(name in row for row in rows.values())]
    titles = {
        "sources": "validation cases of the others",
        "last": "last weights",
        "best": "best on the others' validation",
        "oracle": "best on itself (oracle: not honest)",
    }
    lines = [
        f"| held out | cases | {' | '.join(f'Dice, {titles[name]}' for name in columns)} | HD95 (last) | ASSD (last) |",
        "|---" * (len(columns) + 4) + "|",
    ]
    for domain, row in rows.items():
        scores = [_number(row[name]["mean"]["dice"], 3) if name in row else "" for name in columns]
        low, high = row["last"]["ci95"]["dice"]
        if low is not None:  # there is no interval with one patient
            scores[columns.index("last")] += f" ({low:.3f} – {high:.3f})"
        far = [f"{_number(row['last']['mean'][metric], 2)} {row['last']['unit']}" for metric in ("hd95", "assd")]
        lines.append(f"| {domain} | {row['last']['cases']} | {' | '.join([*scores, *far])} |")
    means = []
    for name in columns:
        there = [d for row in rows.values() if name in row and (d := row[name]["mean"]["dice"]) is not None]
        means.append(_number(sum(there) / len(there) if there else None, 3))
    lines.append(f"| mean of domains | | {' | '.join(means)} | | |")
    return "\n".join(lines) + "\n"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"

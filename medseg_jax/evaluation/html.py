"""What the pages (report, comparison, audit) are made of: the file around them, tables, and the words for metrics.

Every word that comes from a file is escaped before it enters a page.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from medseg_jax.evaluation.evaluate import DISTANCES

NAMES = {
    "dice": "Dice",
    "iou": "IoU",
    "precision": "Precision",
    "recall": "Recall",
    "hd": "HD",
    "hd95": "HD95",
    "assd": "ASSD",
    "nsd": "NSD",
    "volume_error": "Volume error",
    "volume_error_relative": "Relative volume error",
    "lesion_f1": "Lesion F1",
    "lesion_sensitivity": "Lesion sensitivity",
    "lesion_precision": "Lesion precision",
    "lesion_fp": "False positive lesions a case",
    "lesion_pq": "Panoptic quality",
    "accuracy": "Accuracy",
    "accuracy_of_nothing": "Accuracy of predicting nothing",
    "cldice": "clDice",
    "ap": "Average precision",
    "ece": "ECE",
    "brier": "Brier score",
}


def page(title: str, content: str) -> str:
    """One HTML file around its content."""
    assets = Path(__file__).parent
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} · medseg_jax</title><style>{(assets / 'report.css').read_text('utf-8')}</style>"
        f"</head><body><main>{content}"
        "<footer>Made by medseg_jax. This file needs no other file and no network.</footer></main>"
        f"<script>{(assets / 'report.js').read_text('utf-8')}</script></body></html>\n"
    )


def number(metric: str, value: float | None) -> str:
    if value is None:
        return "–"
    if not np.isfinite(value):
        return "∞"
    if metric == "volume_error":
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:.2f}" if metric in (*DISTANCES, "lesion_fp") else f"{value:.3f}"


def figure(value: float, sign: str = "") -> str:
    """Of a comparison: four decimals, one of large ones."""
    return f"{value:{sign}.{4 if abs(value) < 100 else 1}f}"


def interval(metric: str, bounds: Sequence[float | None]) -> str:
    return "" if bounds[0] is None else f"{number(metric, bounds[0])} – {number(metric, bounds[1])}"


def metric_name(metric: str, summary: dict[str, Any]) -> str:
    if metric == "nsd":
        return f"NSD at {summary['settings']['nsd_tolerance']:g} {summary['unit']}"
    unit = summary["unit"] if metric in DISTANCES else summary["volume_unit"] if metric == "volume_error" else ""
    return f"{NAMES[metric]} ({unit})" if unit else NAMES[metric]


def cell(text: str, value: float | None = None, kind: str = "", small: str = "", part: float | None = None) -> str:
    """One cell: text, the number it sorts by, a grey addition, and a bar behind it for a share in [0, 1]."""
    number = f"{value:.6g}" if value is not None and np.isfinite(value) else "Infinity"  # as scripts spell it
    attributes = f' data-v="{number}"' if value is not None else ""
    if part is not None:
        kind, attributes = "bar", f'{attributes} style="--part:{100 * part:.1f}%"'
    attributes += f' class="{kind}"' if kind else ""
    return f"<td{attributes}>{escape(text)}{f'<small>{escape(small)}</small>' if small else ''}</td>"


def table(heads: Sequence[str], rows: Sequence[str], *, sortable: bool = False, texts: int = 1) -> str:
    """A table of rows made of `cell`s; the first `texts` columns hold words."""
    cells = "".join(
        f'<th scope="col"{" class=text" if i < texts else ""}>'
        + (f'<button type="button">{escape(head)}</button>' if sortable else escape(head))
        + "</th>"
        for i, head in enumerate(heads)
    )
    tall, kind = (" tall", ' class="sortable"') if sortable else ("", "")
    body = f"<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll{tall}"><table{kind}>{body}</table></div>'


def row(*cells: str, kind: str = "") -> str:
    return f"<tr{f' class={kind}' if kind else ''}>{''.join(cells)}</tr>"


def pairs(items: dict[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in items.items()) + "</dl>"

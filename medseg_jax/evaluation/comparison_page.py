"""compare.html: which of two models is better, with the plot and every test."""

from html import escape
from typing import Any

from medseg_jax.evaluation import html
from medseg_jax.evaluation.charts import comparison_figure, svg


def comparison_page(result: dict[str, Any]) -> str:
    """compare.html of what `compare` found: the verdict, the plot, every test, and how to read them."""
    a, b = escape(result["a"]), escape(result["b"])
    head = (
        '<header><p class="eyebrow">medseg_jax · Comparison</p>'
        f"<h1>{escape(result['verdict'].partition('(')[0].strip())}</h1><p>{escape(result['verdict'])}</p>"
        f"<p>A is <b>{a}</b>, B is <b>{b}</b>.</p></header>"
    )
    heads = ["", "A", "B", "B − A", "95 % interval", "p", "p (Holm)", "Better", "Cases"]
    about = {"unit": result["unit"], "volume_unit": result["volume_unit"], "settings": result["settings"]}
    tables = [html.table(heads, _test_rows(result["overall"], about))]
    if len(result["classes"]) > 1:
        for name, tests in result["classes"].items():
            tables.append(f"<h3>{escape(name)}</h3>{html.table(heads, _test_rows(tests, about))}")
    plot = svg(comparison_figure(result), "Difference of Dice of each case", "chart wide")
    settings = result["settings"]
    notes = [
        f"Test: {settings['test']}. Interval: {settings['ci95']}.",
        f"{settings['correction']}. “Better” is said where the corrected p is below .05, so that the chance of any "
        "false claim in the table is at most 5 %. The verdict above is about Dice overall alone, chosen beforehand, "
        "and uses its uncorrected p.",
        "A difference that cannot be claimed is not shown to be nothing: the interval says how large it may be.",
        "Both models were scored once. The test says what other cases would do to the difference, not what another "
        "training run (seed) would.",
    ]
    notes += [
        f"Left out, only in {side.upper()}: {', '.join(result[f'only_{side}'])}."
        for side in ("a", "b")
        if result[f"only_{side}"]
    ]
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    facts = {key: str(value) for key, value in settings.items()}
    body = (
        f"{head}<section><h2>Cases</h2>{plot}</section><section><h2>Mean over cases</h2>{''.join(tables)}</section>"
        f'<section><h2>How to read this</h2><ul class="notes">{items}</ul></section>'
        f"<section><h2>How this was made</h2>{html.pairs(facts)}</section>"
    )
    return html.page(f"{result['a']} and {result['b']}", body)


def _test_rows(tests: dict[str, Any], about: dict[str, Any]) -> list[str]:
    rows = []
    for metric, t in tests.items():
        name = html.cell(html.metric_name(metric, about), kind="text")
        if t["p"] is None:
            rows.append(html.row(name, html.cell("not defined in any case", kind="text soft"), *["<td></td>"] * 7))
            continue
        low, high = t["ci95"]
        interval = "–" if low is None else f"{html.figure(low, '+')} to {html.figure(high, '+')}"
        better = html.cell(t["better"].upper() if t["better"] else "no claim", kind="" if t["better"] else "soft")
        cells = [html.cell(html.figure(t[side])) for side in ("a", "b")]
        cells += [html.cell(html.figure(t["difference"], "+")), html.cell(interval), html.cell(f"{t['p']:.4f}")]
        kind = "total" if t["p_holm"] < 0.05 else ""
        rows.append(
            html.row(name, *cells, html.cell(f"{t['p_holm']:.4f}"), better, html.cell(str(t["cases"])), kind=kind)
        )
    return rows

"""Charts of the report: inline SVG in the text colour and font of the page, so that they follow light and dark."""

import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from medseg_jax.data.preview import class_colors
from medseg_jax.paths import replacing

INK = "#010203"  # becomes the colour of the page's text
ACCENT = "#0b84b8"
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "medseg_jax",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


def line_chart(title: str, quantity: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> str:
    """Curves over steps.

    Args:
        title: of the chart.
        quantity: what the vertical axis shows; "Dice" runs from 0 to 1.
        series: name -> (steps, values). The one called "mean" is drawn in the text colour, a single one in blue.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.add_subplot(facecolor="none")
        colors = iter(class_colors(len(series)) / 255)
        for name, (steps, values) in series.items():
            alone, mean = len(series) == 1, name == "mean"
            color = INK if mean else ACCENT if alone else next(colors)
            marker = "." if len(steps) < 30 else ""
            axes.plot(steps, values, label=name, color=color, lw=1.6 if mean or alone else 1, marker=marker)
        axes.set_title(title, loc="left", fontweight="bold")
        axes.set(xlabel="step", ylabel=quantity)
        axes.locator_params("x", integer=True)
        if quantity == "Dice":
            axes.set_ylim(0, 1)
        if len(series) > 1:
            axes.legend(loc="best", ncols=1 + len(series) // 6)
        axes.grid()
        return _svg(figure, title)


def strip_chart(dice: Mapping[str, Sequence[float]]) -> str:
    """Dice of every case as a dot, one row for each class, and the medians: the spread that a mean hides."""
    colors = class_colors(len(dice)) / 255
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 0.9 + 0.42 * len(dice)), layout="constrained")
        axes = figure.add_subplot(facecolor="none")
        for k, values in enumerate(dice.values()):
            # the golden ratio spreads neighbours in the list evenly, without chance
            jitter = (np.arange(len(values)) * 0.618 % 1 - 0.5) * 0.45
            axes.plot(values, k + jitter, "o", ms=4, mew=0, alpha=0.65, color=colors[k], clip_on=False)
            axes.plot([np.median(values)] * 2, [k - 0.33, k + 0.33], color=INK, lw=1.5)
        axes.set(xlim=(0, 1), ylim=(len(dice) - 0.5, -0.5), xlabel="Dice of each case; bar: median")
        axes.set_yticks(range(len(dice)), list(dice))
        axes.grid(axis="x")
        return _svg(figure, "Dice of each case by class", kind="chart wide")


def calibration_figure(probabilities: Mapping[str, Any]) -> Figure:
    """Reliability curves of all classes and, below, where the confidences lie; of summary.json's "probabilities"."""
    curves = {name: figures["curve"] for name, figures in probabilities["classes"].items()}
    eces = {name: figures["ece"] for name, figures in probabilities["classes"].items()}
    if "top_label" in probabilities:
        curves["likeliest class"] = probabilities["top_label"]["curve"]
        eces["likeliest class"] = probabilities["top_label"]["ece"]
    colors = class_colors(len(curves)) / 255
    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 5.2), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        upper.plot([0, 1], [0, 1], color=INK, lw=0.8, ls=(0, (4, 3)), label="perfect")
        for k, (name, curve) in enumerate(curves.items()):
            top = name == "likeliest class"
            color, style = (INK, "s-") if top else (colors[k], "o-")
            label = f"{name}, ECE {eces[name]:.3g}"
            upper.plot(curve["confidence"], curve["accuracy"], style, color=color, ms=4, lw=1.3, label=label)
            lower.plot(curve["confidence"], curve["voxels"], style, color=color, ms=3, lw=1)
        upper.set_title("Calibration: above the line too timid, below it too sure", loc="left", fontweight="bold")
        upper.set(ylabel="share that is right", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        upper.legend(loc="upper left")
        lower.set(xlabel="mean probability in the bin", ylabel="voxels", yscale="log")
        for axes in (upper, lower):
            axes.set_facecolor("none")
            axes.grid()
        return figure


def comparison_figure(result: Mapping[str, Any]) -> Figure:
    """Difference of Dice of every case, sorted, with its mean and interval; and B against A. Of compare.json."""
    pairs = np.array(list(result["differences"].values()), float)  # [cases, 2]
    a, b = pairs.T
    d, found = np.sort(b - a), result["overall"]["dice"]
    better, worse = "#0072b2", "#d55e00"  # blue and vermilion: told apart by all eyes, and by their side of 0
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        if found["ci95"][0] is not None:
            left.axhspan(*found["ci95"], color=INK, alpha=0.12, lw=0, label="95 % interval of the mean")
        left.axhline(found["difference"], color=INK, lw=1.2, label=f"mean {found['difference']:+.4f}")
        left.axhline(0, color=INK, lw=0.6)
        for sign, color, marker, words in ((1, better, "^", "B better"), (-1, worse, "v", "A better")):
            chosen = np.flatnonzero(np.sign(d) == sign)
            style = dict(ls="", ms=5, mew=0, color=color, label=f"{words}: {len(chosen)} cases")
            left.plot(chosen + 1, d[chosen], marker, **style)
            right.plot(a[np.sign(b - a) == sign], b[np.sign(b - a) == sign], marker, **style | {"alpha": 0.8})
        equal = np.flatnonzero(d == 0)
        left.plot(equal + 1, d[equal], "o", ms=4, mew=0, color=INK, alpha=0.5)
        right.plot(a[a == b], b[a == b], "o", ms=4, mew=0, color=INK, alpha=0.5)
        left.set_title("Dice of each case, B − A", loc="left", fontweight="bold")
        left.set(xlabel="cases, sorted by difference", ylabel="B − A")
        left.legend(loc="best")
        low = max(0.0, float(pairs.min()) - 0.05)
        high = min(1.0, float(pairs.max()) + 0.05)
        right.plot([low, high], [low, high], color=INK, lw=0.8, ls=(0, (4, 3)))
        right.set(xlabel="Dice of A", ylabel="Dice of B", xlim=(low, high), ylim=(low, high), aspect="equal")
        right.set_title("The same cases, B against A", loc="left", fontweight="bold")
        for axes in (left, right):
            axes.set_facecolor("none")
            axes.grid()
        return figure


PARTS = {
    "params": "parameters",
    "opt": "optimiser",
    "ema": "moving average",
    "aux": "state of the method",
    "frozen": "frozen",
    "batch": "batch",
    "padding": "padding",
    "temporaries": "temporaries",
    "outputs": "outputs",
    "program": "program",
}
"""What fills a chip's memory, in the order in which it is drawn."""


def memory_figure(result: Mapping[str, Any]) -> Figure:
    """What fills a chip's memory in each training stage and in prediction; of `training.preflight.preflight`."""
    grey = [(v,) * 3 for v in (0.6, 0.4, 0.8)]
    colors = dict(zip(PARTS, (*(class_colors(6) / 255), grey[0], (0.35, 0.6, 0.75), *grey[1:]), strict=True))
    rows = [(stage["stage"], stage) for stage in result["stages"]] + [("prediction", result["prediction"])]
    capacity = result["memory_per_chip"] / 2**30
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 1.7 + 0.55 * len(rows)), layout="constrained")
        axes, drawn, longest = figure.add_subplot(facecolor="none"), set(), 0.0
        for y, (_, part) in enumerate(rows):
            if part["status"] != "compiled":
                needed = part.get("needed")
                text = part["status"] + (f", needs {needed / 2**30:.1f} GiB" if needed else "")
                axes.annotate(text, (0, y), (4, 0), textcoords="offset points", va="center")
                continue
            memory, left = part["memory"], 0.0
            sizes = {**memory["held"], "padding": memory["arguments"] - sum(memory["held"].values())}
            sizes |= {name: memory[name] for name in ("temporaries", "outputs", "program")}
            for name in (n for n in PARTS if sizes.get(n, 0) > 0):
                width = sizes[name] / 2**30
                label = None if name in drawn else PARTS[name]
                axes.barh(y, width, left=left, height=0.6, color=colors[name], label=label, lw=0)
                drawn.add(name)
                left += width
            words = f"{left:.3g} GiB, {left / capacity:.0%}"
            axes.annotate(words, (left, y), (4, 0), textcoords="offset points", va="center")
            longest = max(longest, left)
        shown = longest > 0.05 * capacity or not longest
        if shown:  # else the bars would be too thin to be seen beside it
            axes.axvline(capacity, color=INK, lw=1.2)
        end = 1.18 * max(longest, capacity * shown)
        axes.set(xlim=(0, end), ylim=(len(rows) - 0.5, -0.6), xlabel=f"GiB; a chip has {capacity:.4g}")
        axes.set_axisbelow(True)
        axes.set_yticks(range(len(rows)), [name for name, _ in rows])
        axes.set_title(f"Memory of {result['title']} ({result['label']})", loc="left", fontweight="bold")
        if drawn:
            figure.legend(loc="outside lower center", ncols=min(len(drawn), 5))
        axes.grid(axis="x")
        return figure


def save_png(figure: Figure, path: Path) -> None:
    """The figure on white, whole or not at all."""
    figure.patch.set_facecolor("white")
    figure.set_dpi(150)
    with replacing(path) as draft:
        FigureCanvasAgg(figure).print_png(draft, metadata={"Software": None})


def svg(figure: Figure, label: str, kind: str = "chart") -> str:
    """The figure as HTML that follows the page's colours."""
    with rc_context(STYLE):
        return _svg(figure, label, kind)


def _svg(figure: Figure, label: str, kind: str = "chart") -> str:
    figure.patch.set_alpha(0)
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    return f'<figure class="{kind}" role="img" aria-label="{escape(label)}">{svg}</figure>'

"""Pictures of the report, as SVG that follows the page's colours and width. Matplotlib draws; nothing is computed here.

Ink is drawn in one colour that becomes `currentColor`, so that a picture is readable on light and on dark paper. The same data
give the same bytes: no dates, and ids from a fixed salt.
"""

import io
import re

import matplotlib
import pandas

matplotlib.use("svg")
matplotlib.rcParams |= {
    "svg.hashsalt": "phaseline",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "path.simplify": True,
}
from matplotlib import pyplot  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

INK = "#010203"
BETTER, WORSE, EQUIVALENT, NEUTRAL = "#1a7f37", "#cf222e", "#0969da", "#6e7781"
LINES = ["#0969da", "#bf8700", "#8250df", "#1a7f37", "#cf222e", "#bc4c00", "#1b7c83", "#bf3989", "#57606a", "#4d2d00"]
POINTS = 120  # of a curve: more can't be seen
for key in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"):
    matplotlib.rcParams[key] = INK


def svg(figure: Figure, title: str) -> str:
    """The figure as an SVG element without a size of its own. title: for who can't see it."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
    text = out.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = text.replace(INK, "currentColor")
    # Hundredths of a point are enough; what is written, between tags, stays.
    text = re.sub(r"(>[^<]*<)|(\d+\.\d\d)\d+", lambda found: found[1] or found[2], text)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace(
        "<svg", f'<svg role="img" aria-label="{label}" style="width:100%;max-width:{figure.get_figwidth():.1f}in"', 1
    )


def forest(rows: list[dict], level: str, title: str) -> str:
    """Differences with both intervals. rows: label, verdict and, in points, difference, low, high and *_simultaneous."""
    figure, axes = pyplot.subplots(figsize=(7.2, 0.6 + 0.34 * len(rows)))
    axes.axvline(0, color=INK, linewidth=0.8)
    for y, row in enumerate(reversed(rows)):
        colour = {"better": BETTER, "worse": WORSE, "equivalent": EQUIVALENT}.get(row["verdict"], NEUTRAL)
        axes.plot([row["low_simultaneous"], row["high_simultaneous"]], [y, y], color=colour, linewidth=1.2, solid_capstyle="butt")
        axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=4, solid_capstyle="butt")
        axes.plot([row["difference"]], [y], "o", color=colour, markersize=6)
    axes.set_yticks(range(len(rows)), [row["label"] for row in reversed(rows)])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel(f"difference in percentage points; thick: {level} % interval, thin: all of this family at once")
    axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
    return svg(figure, title)


def arms(rows: pandas.DataFrame, labels: dict[str, str]) -> str:
    """A file of its own: each experiment's mean, interval and seeds. rows: of `tools/study.py`; labels: of the tasks."""
    count = rows["experiment"].nunique()
    figure, grid = pyplot.subplots(1, len(labels), figsize=(0.6 + 6.4 * len(labels), 0.9 + 0.26 * count), squeeze=False)
    for axes, (task, label) in zip(grid.flat, labels.items(), strict=True):
        shown = rows[rows["task"] == task]
        for y, row in enumerate(reversed(list(shown.itertuples()))):
            axes.plot([100 * row.low, 100 * row.high], [y, y], color=LINES[0], linewidth=3, alpha=0.35, solid_capstyle="butt")
            axes.plot([100 * float(one) for one in row.each.split()], [y] * row.seeds, "o", color=LINES[0], markersize=3)
            axes.plot([100 * row.mean], [y], "|", color=LINES[0], markersize=11, markeredgewidth=2)
            if row.experiment == "base":
                axes.axvline(100 * row.mean, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(shown)), list(reversed(list(shown["experiment"]))))
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(f"{label}, %; points: seeds, bands: 95 % over prompts and seeds", fontsize=8)
        axes.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
    figure.tight_layout()
    text = svg(figure, "scores with intervals").replace("currentColor", NEUTRAL)  # as an image it has no page to follow
    return text + "\n"


def curves(panels: dict[str, dict[str, list]], title: str) -> str:
    """Small multiples. panels: what -> experiment -> list of (steps, values), one for each seed."""
    columns = 2
    rows = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(9.6, 2.3 * rows), squeeze=False)
    names = sorted({name for lines in panels.values() for name in lines})
    colour = {name: LINES[i % len(LINES)] for i, name in enumerate(names)}
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (what, lines) in zip(grid.flat, panels.items(), strict=False):
        for name, seeds in lines.items():
            for steps, values in seeds:
                every = max(1, -(-len(steps) // POINTS))
                axes.plot(steps[::every], values[::every], color=colour[name], linewidth=0.9, alpha=0.8)
        axes.set_title(what, fontsize=9, loc="left")
        axes.grid(color=INK, alpha=0.1, linewidth=0.6)
        axes.set_xlabel("step", fontsize=8)
    figure.tight_layout()
    handles = [matplotlib.lines.Line2D([], [], color=colour[name], label=name) for name in names]
    figure.legend(handles=handles, loc="upper center", ncols=6, frameon=False, bbox_to_anchor=(0.5, 0.0), fontsize=8)
    return svg(figure, title)


def scatter(points: list[dict], x: str, y: str, title: str) -> str:
    """points: x, y, name."""
    figure, axes = pyplot.subplots(figsize=(6.4, 3.4))
    names = sorted({point["name"] for point in points})
    for i, name in enumerate(names):
        chosen = [point for point in points if point["name"] == name]
        axes.plot([p["x"] for p in chosen], [p["y"] for p in chosen], "o", color=LINES[i % len(LINES)], label=name, alpha=0.85)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(color=INK, alpha=0.1, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg(figure, title)


def ranks(lines: dict[str, dict[int, list[float]]], y: str, title: str) -> str:
    """A line through the means over seeds, the seeds as points, by the rank of the adapters. lines: name -> rank -> values."""
    figure, axes = pyplot.subplots(figsize=(6.4, 3.4))
    for i, (name, values) in enumerate(lines.items()):
        colour, known = LINES[i % len(LINES)], sorted(values)
        axes.plot(known, [sum(values[r]) / len(values[r]) for r in known], color=colour, label=name, linewidth=1.4)
        points = [(r, value) for r in known for value in values[r]]
        axes.plot([r for r, _ in points], [value for _, value in points], "o", color=colour, markersize=4, alpha=0.6)
    axes.set_xscale("log", base=2)
    ticks = sorted({rank for values in lines.values() for rank in values})
    axes.set_xticks(ticks, [str(rank) for rank in ticks])
    axes.set_xlabel("rank of the adapters, r")
    axes.set_ylabel(y)
    axes.grid(color=INK, alpha=0.1, linewidth=0.6)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return svg(figure, title)


def sensitivity(panels: dict[str, dict], title: str) -> str:
    """Small multiples, one for each tuned experiment: its points in the order of the grid, with intervals; a ring around what was
    chosen, and in it how many seeds chose it. panels: name -> rows (text, mean, low, high, chosen, evaluation), objective, by."""
    columns = 2
    rows = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(9.6, 2.5 * rows), squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (name, panel) in zip(grid.flat, panels.items(), strict=False):
        known = [(x, row) for x, row in enumerate(panel["rows"]) if row["mean"] is not None]
        axes.plot([x for x, _ in known], [row["mean"] for _, row in known], color=LINES[0], linewidth=1.2)
        for x, row in known:
            if row["low"] is not None:
                axes.plot([x, x], [row["low"], row["high"]], color=LINES[0], linewidth=1.2)
            axes.plot([x], [row["mean"]], "o", color=LINES[0], markersize=4)
            if row["chosen"]:
                axes.plot(
                    [x], [row["mean"]], "o", markerfacecolor="none", markeredgecolor=WORSE, markersize=11, markeredgewidth=1.4
                )
                axes.annotate(str(row["chosen"]), (x, row["mean"]), (8, 6), textcoords="offset points", fontsize=7, color=WORSE)
        if any(row["evaluation"] is not None for _, row in known):
            judged = [(x, row["evaluation"]) for x, row in known if row["evaluation"] is not None]
            axes.plot(*zip(*judged, strict=True), "--", color=NEUTRAL, linewidth=1.0)
        keys = {row["text"].rpartition(" ")[0] for row in panel["rows"]}
        alone = len(keys) == 1 and ", " not in panel["rows"][0]["text"]  # one key: named once
        ticks = [row["text"].rpartition(" ")[2] if alone else row["text"].replace(", ", "\n") for row in panel["rows"]]
        axes.set_xticks(range(len(ticks)), ticks, fontsize=7)
        axes.set_xlabel(keys.pop() if alone else "", fontsize=8)
        axes.set_title(f"{name}, by {panel['by']}" if panel["by"] else name, fontsize=9, loc="left")
        axes.set_ylabel("change" if panel["objective"] else "%", fontsize=8)
        axes.grid(axis="y", color=INK, alpha=0.1, linewidth=0.6)
    figure.tight_layout()
    return svg(figure, title)


def shade(value: float, low: float, high: float) -> str:
    """A background for a cell of a heat map: the accent colour, as strong as the value lies between low and high."""
    share = 0.0 if high <= low else (value - low) / (high - low)
    return f"rgb(9 105 218 / {0.05 + 0.6 * min(max(share, 0.0), 1.0):.2f})"

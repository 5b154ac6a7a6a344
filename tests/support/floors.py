"""docs/architecture.svg: the floors, drawn from the code.

    python -m tests.support.floors            writes the picture anew

Floors are those of the contract in pyproject.toml, which `make lint` checks. What a room is for is its docstring, its modules are
the files in its folder, and below them stands which rooms they import. tests/docs/test_architecture.py holds it against the code.
"""

import ast
import io
import textwrap
import tomllib

import grimp
import matplotlib
import matplotlib.patches
from matplotlib.figure import Figure

from tests.conftest import ROOT

PICTURE = ROOT / "docs/architecture.svg"
PACKAGE = "workflow_scripts"
WIDTH, LINE, GAP = 100.0, 2.0, 1.2  # in one unit: of the picture, of a line of text, between boxes
COLOURS = ("#e8eef7", "#f3ecdf")
STYLE = {"svg.hashsalt": "floors", "svg.fonttype": "none", "font.family": "sans-serif"}


def floors() -> list[list[str]]:
    """The rooms of each floor, from the top down."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    (layers,) = [one["layers"] for one in contracts if one["type"] == "layers"]
    return [[room.strip() for room in layer.split("|")] for layer in layers]


def purpose(room: str) -> str:
    (docstring,) = ast.parse((ROOT / PACKAGE / room / "__init__.py").read_text()).body
    return docstring.value.value


def modules(room: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / PACKAGE / room).glob("*.py") if path.stem != "__init__")


def imported(graph: grimp.ImportGraph, room: str) -> list[str]:
    """The rooms that a room imports from."""
    inside = f"{PACKAGE}.{room}"
    found = {
        other.split(".")[1]
        for module in {inside, *graph.find_descendants(inside)}
        for other in graph.find_modules_directly_imported_by(module)
        if other.count(".") > 0
    }
    return sorted(found - {room})


def wrapped(text: str, width: float, letters: float) -> list[str]:
    """The text in lines that fit into a box of that width; letters: that go into one unit."""
    return textwrap.wrap(text, int(width * letters), break_long_words=False, break_on_hyphens=False)


def svg() -> str:
    graph = grimp.build_graph(PACKAGE, cache_dir=None)
    rows = []
    for rooms in floors():
        width = (WIDTH - GAP * (len(rooms) - 1)) / len(rooms)
        boxes = []
        for room in rooms:
            below = f"imports {', '.join(imported(graph, room)) or 'nothing of ours'}"
            text = [(line, 8.5, "#000000") for line in wrapped(purpose(room), width, 1.25)]
            text += [(line, 8, "#334466") for line in wrapped("   ".join(modules(room)), width, 1.4)]
            text += [(line, 7, "#777777") for line in wrapped(below, width, 1.6)]
            boxes.append((room, text))
        rows.append((width, boxes, (max(len(text) for _, text in boxes) + 2) * LINE))
    height = sum(tall + GAP for _, _, tall in rows)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the report's figures have settings of their own
        matplotlib.rcParams.update(STYLE)
        figure = Figure(figsize=(12, 12 * height / WIDTH))
        axes = figure.add_axes((0.04, 0, 0.95, 1))
        axes.set(xlim=(0, WIDTH), ylim=(0, height))
        axes.axis("off")
        top = height
        for number, (width, boxes, tall) in enumerate(rows):
            axes.text(-1, top - tall / 2, str(len(rows) - number), fontsize=13, color="#777777", ha="right", va="center")
            for place, (room, text) in enumerate(boxes):
                left = place * (width + GAP)
                box = matplotlib.patches.Rectangle((left, top - tall), width, tall, color=COLOURS[number % 2], linewidth=0)
                axes.add_patch(box)
                axes.text(left + 1, top - LINE, f"{room}/", fontsize=11, weight="bold", va="center")
                for line, (words, size, colour) in enumerate(text, start=2):
                    axes.text(left + 1, top - line * LINE, words, fontsize=size, color=colour, va="center")
            top -= tall + GAP
        drawn = io.StringIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    return "".join(f"{line.rstrip()}\n" for line in drawn.getvalue().splitlines())


if __name__ == "__main__":
    PICTURE.write_text(svg(), encoding="utf-8")

"""The tables of docs/report_simulation.md from the rows that report_simulation.py drew."""

import csv
import itertools
from pathlib import Path

import numpy as np

from measurements.report_simulation import NULL, PAIRS, PROMPTS, SEEDS, SHARED, SPREAD

MARKS = ("<!-- tables: measurements/report_simulation.py -->", "<!-- end of tables -->")


def write(rows: Path, document: Path) -> None:
    with rows.open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    text = document.read_text(encoding="utf-8")
    start, end = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    document.write_text(f"{text[:start]}\n\n{tables(found)}\n\n{text[end:]}", encoding="utf-8")


def table(columns: list[str], rows: list[list]) -> str:
    def cell(value: object) -> str:
        return f"{value:.1f}" if isinstance(value, float) else str(value)

    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(map(cell, row)) + " |" for row in rows)])


def the(rows: list[dict], family: str, spread: str, prompts: int, seeds: int) -> dict:
    known = {(row["family"], row["spread"], int(row["prompts"]), int(row["seeds"])): row for row in rows}
    return known[family, spread, prompts, seeds]


def largest(rows: list[dict], name: str) -> float:
    return max(float(row[name]) for row in rows)


def smallest(rows: list[dict], name: str) -> float:
    return min(float(row[name]) for row in rows)


def tables(rows: list[dict]) -> str:
    """All that the document shows of the rows."""
    known = [row for row in rows if row["family"] != NULL]
    limits = [row for row in known if row["verdicts"] == "limit"]
    parts = ["### Wrong verdicts and coverage", "", worst_of(limits), "", "### Wanted, and found", "", wanted(rows)]
    parts += ["", "### What it costs: the difference that is found with 80 %, in points", "", costs(limits)]
    parts += ["", "### Arms far apart, one by one", "", apart(limits)]
    parts += ["", "### The limit against binary verdicts", "", against_binary(known)]
    null = [
        [int(r["prompts"]), int(r["seeds"]), float(r["wrong"]), float(r["wrong before"])] for r in rows if r["family"] == NULL
    ]
    parts += ["", "### The null control at 1 %: SFT sd 3 points, children 0.3", ""]
    parts += [
        table(["prompts", "seeds", "fails, %", "before"], null),
        "",
        "### Equivalent within 2 points",
        "",
        equivalence(limits),
    ]
    return "\n".join(parts)


def worst_of(limits: list[dict]) -> str:
    lines = []
    for prompts, seeds in itertools.product(PROMPTS, SEEDS):
        some = [row for row in limits if (int(row["prompts"]), int(row["seeds"])) == (prompts, seeds)]
        line = [f"{prompts:,}", seeds, len(some), largest(some, "wrong"), largest(some, "wrong before")]
        lines.append([*line, smallest(some, "coverage"), smallest(some, "worst"), smallest(some, "worst before")])
    names = [
        "prompts",
        "seeds",
        "settings",
        "wrong verdict %, largest",
        "before",
        "coverage %, lowest",
        "worst contrast %",
        "before",
    ]
    return table(names, lines)


def wanted(rows: list[dict]) -> str:
    known = [row for row in rows if row["family"] != NULL]
    over = [row for row in known if float(row["wrong"]) > 5 + 196 * (0.05 * 0.95 / int(row["families"])) ** 0.5]
    null = [float(row["wrong"]) for row in rows if row["family"] == NULL]
    same = [row for row in known if float(row["wrongly equivalent"]) > 5]
    twice = [row for row in known if row["wrong, twice"]]
    uncovered = sum(float(row["worst"]) < 90 for row in known)
    wrong, worst, equal = largest(known, "wrong"), smallest(known, "worst"), largest(known, "wrongly equivalent")
    lines = [
        ["wrong verdicts at most 5 % and simulation error", f"largest {wrong:.1f} %; above in {len(over)} of {len(known)}"],
        ["worst contrast covered at least 90 %", f"lowest {worst:.1f} %; below in {uncovered} of {len(known)}"],
        ["the null control fails in about 1 %", f"{min(null):.1f} to {max(null):.1f} %"],
        ["a difference as large as the margin *equivalent*: at most 5 %", f"largest {equal:.1f} %; above in {len(same)}"],
    ]
    if twice:
        found = f"{largest(twice, 'wrong, twice'):.1f} % wrong, {smallest(twice, 'worst, twice'):.1f} % covered"
        lines.append(["not used: the family adds up to 2 d degrees of freedom (14,042 prompts, 3 seeds)", found])
    return table(["wanted", "found"], lines)


def costs(limits: list[dict]) -> str:
    chosen = itertools.product((SHARED, PAIRS), ("even 1", "one 0.2 : 4"), (541, 14042))
    lines = []
    for family, spread, prompts in chosen:
        line = [family, spread, f"{prompts:,}"]
        for seeds in SEEDS:
            row = the(limits, family, spread, prompts, seeds)
            line.append(f"{float(row['found']):.1f} ({float(row['found before']):.1f})")
        lines.append(line)
    return table(["family", "seed sds", "prompts", *(f"{seeds} seeds (before)" for seeds in SEEDS)], lines)


def apart(limits: list[dict]) -> str:
    lines = []
    for row in limits:
        if row["prompts"] in ("541", "14042") and row["seeds"] in ("3", "5") and SPREAD[row["spread"]][1] > 1:
            line = [f"{int(row['prompts']):,}", int(row["seeds"]), row["family"], row["spread"]]
            lines.append([*line, *(float(row[name]) for name in ("wrong", "wrong before", "worst", "worst before"))])
    names = ["prompts", "seeds", "family", "seed sds", "wrong verdict %", "before", "worst contrast %", "before"]
    return table(names, lines)


def against_binary(known: list[dict]) -> str:
    def of(row: dict) -> tuple:
        return row["family"], row["prompts"], row["seeds"], row["spread"]

    limits = {of(row): row for row in known if row["verdicts"] == "limit"}
    lines = []
    for name in ("wrong", "worst", "found"):
        pairs = [(float(row[name]), float(limits[of(row)][name])) for row in known if row["verdicts"] == "binary"]
        both, apart_ = np.mean(pairs, axis=0), max(abs(one - other) for one, other in pairs)
        lines.append([name, len(pairs), float(both[0]), float(both[1]), float(apart_)])
    return table(["", "settings", "binary, mean", "limit, mean", "furthest apart"], lines)


def equivalence(limits: list[dict]) -> str:
    lines = []
    for family, spread, prompts in itertools.product((SHARED, PAIRS), ("even 1", "one 0.2 : 4"), (541, 14042)):
        line = [family, spread, f"{prompts:,}"]
        for seeds in SEEDS:
            row = the(limits, family, spread, prompts, seeds)
            line.append(f"{float(row['equivalent']):.0f} ({float(row['wrongly equivalent']):.1f})")
        lines.append(line)
    return table(["family", "seed sds", "prompts", *(f"{seeds} seeds" for seeds in SEEDS)], lines)

"""The figures of trainings in docs/performance.md and docs/cluster.md are those that were measured (measurements/*_h200.json)."""

import json
import re
from statistics import fmean

from tests.conftest import ROOT

PAGE = (ROOT / "docs/performance.md").read_text(encoding="utf-8").split("## Trainings")[1].split("\n## ")[0]
RUNS = json.loads((ROOT / "measurements/training_h200.json").read_text())["runs"]
PHASES = {"SFT": "sft_v2", "DPO": "dpo", "reward model": "rm", "KTO": "kto", "PPO": "ppo", "GRPO": "grpo", "RLOO": "rloo"}
WAYS = {"recipe": "study", "whole layers compiled": "layers compiled"}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def tables(page: str) -> list[list[list[str]]]:
    """The tables of a page: rows of cells, the line below the head left out."""
    found = [[cells(line) for line in part.splitlines()] for part in re.findall(r"(?:^\|.*\n)+", page, flags=re.M)]
    return [[rows[0], *rows[2:]] for rows in found]


def phase_of(cell: str) -> str:
    return next(phase for name, phase in PHASES.items() if cell.startswith(name))


def test_the_tables_of_trainings_are_what_was_measured_and_no_run_is_left_out():
    said = []
    for head, *rows in tables(PAGE):
        for way, *figures in rows if head[1] == "host" else []:
            way = re.sub(r"[+`]", "", way).split(",")[0].strip()
            said.append((phase_of(head[0]), WAYS.get(way, way), *figures))
    made = [
        (run["phase"], run["way"], run["host"], f"{run['s_per_step']:.3f}", f"{run['median_s']:.3f}")
        + ((f"{run['tokens_per_s']:,}",) if "tokens_per_s" in run else ())
        + (str(run["peak_gib"]),)
        for run in RUNS
    ]
    assert sorted(said) == sorted(made)


def newest(phase: str, way: str = "compiled") -> dict:
    return max((run for run in RUNS if (run["phase"], run["way"]) == (phase, way)), key=lambda run: run["host"])


def faster_half(run: dict) -> float:
    times = sorted(run["times"][4:])
    return fmean(times[: len(times) // 2])


def test_what_was_aimed_at_is_held_against_what_was_measured():
    (table,) = [rows for rows in tables(PAGE) if "aim" in rows[0]]
    for name, *said, aim, met in table[1:5]:
        run = newest(phase_of(name.split(",")[0]))
        tokens = run["tokens_per_step"]
        by = [run["tokens_per_s"], tokens / run["median_s"]] + ([tokens / faster_half(run)] if "times" in run else [])
        assert said[: len(by)] == [f"{round(one, -2):,.0f}" for one in by], name
        assert met == ("yes" if by[0] >= int(aim.replace(",", "")) else "no" if by[-1] < int(aim.replace(",", "")) else met), name
    ppo = newest("ppo")["times"]
    assert table[5][1] == f"{sum(ppo[16:32]):.2f} s" and f"{sum(ppo[:16]):.1f} s" in table[5][5]
    assert table[6][1] == ", ".join(f"{newest(name)['s_per_step']:.2f} s" for name in ("grpo", "rloo"))


def test_where_the_time_went_is_what_the_profiles_say():
    (table,) = [rows for rows in tables(PAGE) if "attention" in rows[0]]
    profiles = json.loads((ROOT / "measurements/training_h200.json").read_text())["profiles"]
    for name, wall, kernels, launched, *shares in table[1:]:
        one = profiles[PHASES[name]]
        assert (wall, kernels) == (f"{one['wall'] / 3:.2f}", f"{one['kernels'] / 3:.3f}")
        assert launched == f"{round(one['launched'] / 3, -2):,.0f}"
        parts = [one["products"] / one["kernels"], one["attention"] / one["kernels"]]
        assert shares == [f"{round(100 * part)} %" for part in (*parts, 1 - sum(parts))]


def test_one_training_on_two_cards_and_what_readme_names_are_what_was_measured():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    page = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    (table,) = [rows for rows in tables(page) if "all of the job, s" in rows[0]]
    runs = json.loads((ROOT / "measurements/over_gpus_h200.json").read_text())["runs"]
    names = {"SFT": "sft_v2", "DPO": "dpo"}
    said = {(names[phase], int(gpus)): figures for phase, gpus, *figures in table[1:]}
    for run in runs:
        figures = said[run["phase"], run["gpus"]]
        if "error" in run:
            assert figures[0] == "not begun"
            continue
        efficiency = str(run["efficiency"]) if "efficiency" in run else ""
        assert figures == [
            f"{run['steps_s']:.2f}", f"{run['tokens_per_s']:,}", str(run["whole_s"]), str(run["peak_gib"]), efficiency
        ]  # fmt: skip
        assert "apart" not in run or f"{run['apart']:.4f}" in page
    assert len(said) == len(runs)
    assert f"{runs[0]['steps_s'] / runs[1]['steps_s']:.2f} times one's speed" in readme
    for way in ("study", "compiled"):
        assert f"{newest('sft_v2', way)['tokens_per_s']:,}" in readme

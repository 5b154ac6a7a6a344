"""The figures of trainings in docs/performance.md are those that were measured (measurements/training_h200.json)."""

import json
import re

from tests.conftest import ROOT


def test_the_tables_of_trainings_are_what_was_measured():
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8").split("## Trainings")[1].split("\n## ")[0]
    rows = re.findall(r"^\| [^|]+ \| (\d\.\d{3}) \| ([\d,]+) \| ([\d.]+) \|$", page, flags=re.M)
    runs = json.loads((ROOT / "measurements/training_h200.json").read_text())["runs"]
    counted = [run for run in runs if "tokens_per_s" in run]
    assert rows == [(f"{run['s_per_step']:.3f}", f"{run['tokens_per_s']:,}", str(run["peak_gib"])) for run in counted]
    sampled = re.findall(r"^\| [^|]+ \| (\d\.\d{3}) \| ([\d.]+) \|$", page, flags=re.M)
    assert sampled == [(f"{run['s_per_step']:.3f}", str(run["peak_gib"])) for run in runs if run not in counted]

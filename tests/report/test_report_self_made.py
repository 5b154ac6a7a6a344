"""Experiments on data that a model made itself, in the report: what was drawn for them, and what a family of them compares."""

import json
import re
from types import SimpleNamespace

import pytest
import yaml

from tests.conftest import ROOT
from tests.support import report_world
from workflow_scripts.report import judge


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("self_made")
    overlay = yaml.safe_load((ROOT / "config/self_made.yaml").read_text())
    plan = report_world.make(folder, report_world.write_config(folder, overlay=overlay))
    for name, count in (("best_of_8", 6400), ("dpo_onpolicy_round2", 3200)):
        for seed in (1, 2, 3):
            place = folder / "results/data" / f"{plan.of_seed(name, seed)}.answers"
            place.parent.mkdir(exist_ok=True)
            place.with_name(f"{place.name}.manifest.json").write_text(json.dumps({"answers": {"sampled": count}}))
            facts = {"seconds": 40.0 + seed, "tokens": 100_000 + seed, "peak_memory_bytes": 2**30}
            place.with_name(f"{place.name}.run.json").write_text(json.dumps(facts))
    return folder, plan


@pytest.fixture(scope="module")
def html(made) -> str:
    return report_world.report(*made)


def cells(html: str, start: str, end: str) -> dict[str, list[str]]:
    part = html[html.index(f'id="{start}"') : html.index(f'id="{end}"')]
    rows = re.findall(r"<tr><td>([\w ]+)</td>(.*?)</tr>", part, flags=re.S)
    return {name: re.findall(r"<td[^>]*>([^<]*)</td>", row) for name, row in rows}


@pytest.mark.slow
def test_budgets_have_what_was_drawn_also_where_it_is_shared(html):
    budgets = cells(html, "budget", "cost")
    for name in ("rft", "dpo_onpolicy", "kto_onpolicy"):  # one set of answers, the mean over three seeds
        assert budgets[name][-3:] == ["6,400", "100,002", "42"], name
    assert budgets["dpo_onpolicy_round2"][-3:] == ["3,200", "100,002", "42"] and budgets["dpo"][-3:] == ["", "", ""]
    assert "<th>answers drawn</th>" in html


@pytest.mark.slow
def test_their_time_stands_once_in_the_costs(html):
    costs = cells(html, "cost", "how")
    rows = {name: row for name, row in costs.items() if name.startswith("answers of")}
    assert rows == {
        name: ["3", "", "126 s", "", "1.00", "", ""] for name in ("answers of best_of_8", "answers of dpo_onpolicy_round2")
    }


def test_who_learns_from_one_reward_on_one_set_of_prompts_has_one_source(made):
    experiments = json.loads(made[1].report())["config"]["experiments"]
    assert judge.source(experiments, "rft") == judge.source(experiments, "dpo_onpolicy") == judge.source(experiments, "grpo")
    assert judge.source(experiments, "dpo") == "pairs"
    world = SimpleNamespace(config={"experiments": experiments})
    assert judge.mixed(world, {"runs": ["rft", "dpo_onpolicy", "grpo"]}) == ""
    assert judge.mixed(world, {"runs": ["rft", "dpo"]}) == "rft from ifeval on instructions; dpo from pairs"

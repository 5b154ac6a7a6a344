"""A placebo that is better is red: on top of the page, in its row, and as a control that failed."""

import json
import re

import pytest

from tests.support import report_world
from workflow_scripts.config import config as configs
from workflow_scripts.report import collect, judge, winning

OVERLAY = {
    "experiments": {
        "coin": {"extends": "grpo", "reward": "random"},
        "dealt": {"extends": "rloo", "reward": {"shuffled": "ifeval"}},
    },
    "report": {
        "families": {
            "placebo": {"title": "Against its placebo", "task": "ifeval", "reference": "coin", "runs": ["grpo", "dealt"]},
            "start": {"title": "Placebos", "task": "gsm8k", "reference": "sft_v2_merged", "runs": ["coin", "grpo"]},
        },
        "controls": {"placebo": {"task": "gsm8k", "runs": ["coin", "dealt"], "against": "sft_v2_merged"}},
    },
}


def made(folder, **accuracy) -> tuple[str, dict]:
    plan = report_world.make(folder, report_world.write_config(folder, seeds=5, overlay=OVERLAY), accuracy=accuracy)
    html = report_world.report(folder, plan)
    return html, json.loads((folder / "results/report/manifest.json").read_text())


@pytest.fixture(scope="module")
def harmless(tmp_path_factory):
    return made(tmp_path_factory.mktemp("harmless"), coin=0.35, dealt=0.35, grpo=0.75)


@pytest.fixture(scope="module")
def better(tmp_path_factory):
    return made(tmp_path_factory.mktemp("better"), coin=0.75, dealt=0.35, grpo=0.35)


def row(html: str, after: str, before: str) -> tuple[str, str]:
    """(class, words) of a comparison's verdict in the table."""
    found = re.search(rf'<td>{after} against {before}</td>.*?<span class="([^"]+)">([^<]+)</span>', html, flags=re.S)
    assert found
    return found[1], found[2]


def test_placebos_that_are_not_better_are_controls_that_passed(harmless):
    html, manifest = harmless
    assert "A placebo is better" not in html and "Do not trust" not in html and "(a placebo)" not in html
    assert manifest["controls"]["placebo coin"] is True and manifest["controls"]["placebo dealt"] is True
    assert "placebo coin: passed" in html
    assert "coin, whose reward is a coin, must not be better than sft_v2_merged on gsm8k" in html
    assert "dealt, whose reward is that of other answers, must not be better" in html
    assert row(html, "grpo", "coin")[0] == "better"  # a method that beats its placebo is no matter for red


def test_a_placebo_that_is_better_is_red_wherever_it_stands(better):
    html, manifest = better
    assert manifest["controls"]["placebo coin"] is False and manifest["controls"]["placebo dealt"] is True
    alarms = re.findall(r'<div class="box alarm"><strong>A placebo is better:</strong> ([^.]+\.\d)', html)
    assert [text.split(":")[0] for text in alarms] == ["grpo against coin", "coin against sft_v2_merged"]
    assert re.search(r"Do not trust this comparison:</strong> a control failed\s+\(placebo coin\)", html)
    shade, words = row(html, "coin", "sft_v2_merged")
    assert shade == "worse" and words.startswith("better by") and words.endswith("(a placebo)")
    shade, words = row(html, "grpo", "coin")
    assert shade == "worse" and words.endswith("(a placebo)")
    assert "(a placebo)" not in row(html, "dealt", "coin")[1]  # two placebos: neither has a reward that was earned


def test_nothing_has_to_move_in_a_placebos_own_objective(harmless):
    section = harmless[0].split('id="trained"')[1]
    assert re.search(r"<td>coin</td>.*?<span class=\"soft\">a placebo: nothing has to move</span>", section, flags=re.S)
    assert re.search(r"<td>grpo</td>.*?<span class=\"better\">trained</span>", section, flags=re.S)


def test_a_placebo_learns_from_no_reward_model_and_says_what_it_was_given(tmp_path):
    overlay = {"experiments": {"dealt_rm": {"extends": "grpo", "reward": {"shuffled": "rm"}}, **OVERLAY["experiments"]}}
    experiments = configs.load(report_world.write_config(tmp_path, overlay=overlay)).experiments
    assert {name: judge.source(experiments, name) for name in ("coin", "dealt", "dealt_rm", "grpo")} == {
        "coin": "random on instructions", "dealt": "ifeval on instructions, shuffled",
        "dealt_rm": "rm_pairs, shuffled", "grpo": "ifeval on instructions",
    }  # fmt: skip
    world = collect.World({"experiments": experiments, "judge": {"reward": "rm", "against": "base"}, "seeds": [1]}, {}, {})
    world.config["models"] = []
    world.scores["judge", "base"] = {"per_prompt": [], "n_prompts": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winning, "models", lambda world: [])
        found = winning.wins(world)
    assert found is not None and "ppo" in found["trained"] and "dealt_rm" not in found["trained"]

"""Groups and tags of lm-eval under `eval.tasks`: which tasks are in them, and what a group is in the plan."""

import json

import pytest
import yaml

from tests.plan.test_own_tasks_plan import COMMIT, body, plan
from tests.support import own_task, report_world
from workflow_scripts.data import task_files
from workflow_scripts.report import collect, judge
from workflow_scripts.stats.family import compare
from workflow_scripts.tools import pin


def test_lm_eval_finds_the_same_file_for_a_name_and_the_same_tasks_in_a_group_or_under_a_tag():
    """Tags stand in a task's own file as one text (mmlu), as a list (math_word_problems), or in what it includes (arithmetic)."""
    from lm_eval.tasks import TaskManager

    folder = task_files.own_file("arc_easy").parent.parent
    folders = [folder / name for name in ("arc", "hellaswag", "mmlu/default", "arithmetic", "bbh/cot_fewshot", "gsm8k")]
    index = TaskManager(include_defaults=False, include_path=folders).task_index
    for name in ("arc_easy", "arc_challenge", "hellaswag", "mmlu_anatomy"):
        assert task_files.own_file(name) == index[name].yaml_path
    for tag in ("mmlu_stem_tasks", "arithmetic", "ai2_arc"):
        assert set(task_files.own_files(tag)) == {index[name].yaml_path for name in index[tag].tags} and index[tag].tags
    assert {task_files.own_file("gsm8k")} <= set(task_files.own_files("math_word_problems"))
    subjects = {entry.yaml_path for name, entry in index.items() if name.startswith("mmlu_") and "TASK" in str(entry.kind)}
    assert set(task_files.own_files("mmlu")) == subjects and len(subjects) == 57


def test_a_group_is_one_task_whose_tasks_are_clusters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mmlu = {"group": body(task="mmlu", revision=COMMIT, num_fewshot=5)}
    made = plan(mmlu)
    assert json.loads(made.score("group", "dpo"))["config"]["lm_eval"]["hub"] == {"id": "cais/mmlu", "revision": COMMIT}
    text = yaml.safe_dump({"eval": {"tasks": {"group": body(task="mmlu")}}})
    (place,) = pin.places(text)
    assert place.id == "cais/mmlu"


@pytest.mark.slow
def test_a_family_of_a_grouped_task_takes_groups_for_what_is_drawn(tmp_path):
    """Verdicts that go together in pairs: the family's error is that of half as many independent ones."""
    rows = [row | {"story": f"s{i}"} for i, row in enumerate(own_task.CHOICE)]
    tasks = {"mine": body(file=str(own_task.write(tmp_path, "multiple_choice", rows)), group_by="story")}
    family = {"report": {"families": {"own": {"title": "Own", "task": "mine", "reference": "sft_v2", "runs": ["dpo", "kto"]}}}}
    overlay = {"eval": {"tasks": tasks}} | family
    made = report_world.make(tmp_path, report_world.write_config(tmp_path, overlay=overlay))
    for path in (tmp_path / "results").glob("mine_*.json"):
        data = json.loads(path.read_text())
        data["per_prompt"] = [
            row | {"key": 2 * row["key"] + n, "group": str(row["key"])} for row in data["per_prompt"] for n in (0, 1)
        ]
        data["n_prompts"] *= 2
        path.write_text(json.dumps(data))
    page = report_world.report(tmp_path, made)
    with report_world.contextlib.chdir(tmp_path):
        world = collect.read(report_world.job(made))
    found = next(one for one in judge.families(world) if one.task == "mine").result
    halves = {name: world.arm("mine", name)[:, ::2] for name in ("sft_v2", "dpo", "kto")}
    by_hand = compare(halves, [("dpo", "sft_v2"), ("kto", "sft_v2")])
    assert found.prompts == 200 and "the items of a group belong together" in page
    for one, other in zip(found.comparisons, by_hand.comparisons, strict=True):
        assert (one.difference, one.se, one.p) == pytest.approx((other.difference, other.se, other.p))
        assert one.verdict == other.verdict and "prompts" not in one.words

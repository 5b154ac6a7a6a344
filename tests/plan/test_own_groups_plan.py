"""Groups and tags of lm-eval under `eval.tasks`: which tasks are in them, and what a group is in the plan."""

import json

import pytest
import yaml

from tests.plan.test_own_tasks_plan import COMMIT, body, plan
from workflow_scripts.data import task_files
from workflow_scripts.plumbing.messages import InputError
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
    family = {"families": {"more": {"title": "x", "task": "group", "reference": "base", "runs": ["dpo"]}}}
    with pytest.raises(InputError, match="report.families.more.task: found 'group', whose items come in groups"):
        plan(mmlu, {"report": family}).check()
    text = yaml.safe_dump({"eval": {"tasks": {"group": body(task="mmlu")}}})
    (place,) = pin.places(text)
    assert place.id == "cais/mmlu"

"""Tasks that run what a model answers (`allow_code`) around their step: refused without the key, and through Snakemake."""

import json

import pytest
import yaml

from tests.evaluation.test_allow_code import possible, task
from tests.plan.test_own_tasks_plan import COMMIT, body, plan
from tests.support.own_task import write
from workflow_scripts.plan import estimate
from workflow_scripts.plumbing.messages import InputError


def test_a_task_that_runs_answers_is_taken_where_that_is_allowed(tmp_path):
    said, choice = write(tmp_path / "said", "generate_until", unsafe_code=True), write(tmp_path, "multiple_choice")
    config = body("exact_match,whole", file=str(said)) | {"allow_code": True}
    step = plan({"mine": config}).step("score_mine", "dpo")
    assert step["config"]["allow_code"] == {"seconds": 30, "memory_gb": 4, "processes": 64}
    of_a_hub = {metric: body(metric, task="humaneval", revision=COMMIT) | {"allow_code": True} for metric in ("pass@1", "pass@2")}
    plan({"mine": of_a_hub["pass@1"]})
    with pytest.raises(InputError, match="tasks.mine.metric: found 'pass@2', and the task has pass@1$"):
        plan({"mine": of_a_hub["pass@2"]})
    with pytest.raises(InputError, match="tasks.mine.allow_code: found true, and a task of multiple_choice has no answers"):
        plan({"mine": body(file=str(choice)) | {"allow_code": True}})
    with pytest.raises(InputError, match="tasks.mine.allow_code: .*'maybe'"):
        plan({"mine": config | {"allow_code": "maybe"}})
    file = str(write(tmp_path / "plain", "generate_until"))
    asked = [body("exact_match,whole", file=file) | one for one in ({}, {"allow_code": False}, {"allow_code": True})]
    without, refused, allowed = (plan({"mine": one}) for one in asked)
    marks = [one.fingerprint("score_mine", "dpo") for one in (without, refused, allowed)]
    assert marks[0] == marks[1] != marks[2]
    more, less = (estimate.Estimates(one).ask("own_mine", "dpo", 1) for one in (allowed, without))
    assert more["mem_mb"] > less["mem_mb"] + 4096 and more["runtime"] >= less["runtime"]


@pytest.mark.skipif(not possible(), reason="this kernel gives an ordinary user no namespaces")
def test_through_snakemake(fresh):
    """The tiny base says no programs: none is right, all are judged. A second run does nothing, another metric judges anew."""
    file = task(fresh.folder / "tasks", 6)
    asked = body("runs", file=str(file.relative_to(fresh.folder)))
    refused = fresh.overlay(yaml.safe_dump({"eval": {"tasks": {"mine": asked}}}))
    done = fresh.snakemake("results/mine_base.json", configs=refused, check=False)
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if "unsafe_code" in line]
    assert done.returncode and "set eval.tasks.mine.allow_code: true" in line
    configs = fresh.overlay(yaml.safe_dump({"eval": {"tasks": {"mine": asked | {"allow_code": True}}}}))
    fresh.snakemake("results/mine_base.json", configs=configs)
    made = json.loads((fresh.folder / "results/mine_base.json").read_text())
    assert made["runs"] == 0 and len(made["per_prompt"]) == 6 and made["stopped"] == {}
    assert fresh.plan("results/mine_base.json", configs=configs) == {}
    judge = fresh.folder / "tasks/judge.py"
    judge.write_text(judge.read_text().replace("return 0.0", "return 1.0"))
    assert fresh.plan("results/mine_base.json", configs=configs) == {"own_task": 1}

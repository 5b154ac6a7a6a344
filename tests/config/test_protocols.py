"""`config/protocols/`: laid over any config they add tasks, and change nothing of what is there; the page says what they ask."""

import json

import pytest
import yaml

from tests.conftest import ROOT
from workflow_scripts.config import own_tasks
from workflow_scripts.config.config import load
from workflow_scripts.plan.plan import Plan

PROTOCOLS = sorted((ROOT / "config/protocols").glob("*.yaml"))
CONFIGS = ["config/config.yaml", "config/smollm2.yaml", "config/qwen05b.yaml"]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)  # rows are told from there


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("protocol", PROTOCOLS, ids=lambda path: path.stem)
def test_a_protocol_adds_tasks_to_any_config_and_changes_no_other_step(config, protocol):
    plain, laid = load(config), load(config, protocol)
    assert laid.own_tasks and set(laid.own_tasks) == set(yaml.safe_load(protocol.read_text())["eval"]["tasks"])
    assert all(body["protocol_of"] in ("ifeval", "gsm8k", "mmlu", "truthfulqa") for body in laid.own_tasks.values())
    shown = own_tasks.protocols(laid)
    assert {name for names in shown.values() for name in names} == {
        name for name, body in laid.own_tasks.items() if body["protocol_of"] in plain.evaluations
    }
    if config != "config/config.yaml":
        return
    plain, laid = Plan(plain), Plan(laid)
    for task in ("ifeval", "gsm8k"):
        assert laid.score(task, "dpo") == plain.score(task, "dpo") and laid.generate(task, "dpo") == plain.generate(task, "dpo")
    assert json.loads(laid.report())["config"]["protocols"] == shown if shown else True


def test_the_original_studys_protocol_is_its_own():
    """Its configs/base.yaml: gsm8k with 8 examples, mmlu with 5, ifeval and truthfulqa_mc2 with none; without a template."""
    files = [f"config/protocols/post_training_lab{part}.yaml" for part in ("", "_hub")]
    tasks = load("config/smollm2.yaml", *files)
    asked = {name: body["lm_eval"] for name, body in tasks.own_tasks.items()}
    told = {
        "lab_gsm8k": ("gsm8k", 8, None),
        "lab_ifeval": ("ifeval", 0, None),
        "lab_mmlu": ("mmlu", 5, 1000),
        "lab_truthfulqa": ("truthfulqa_mc2", 0, None),
    }
    for name, (task, shots, limit) in told.items():
        assert (asked[name]["task"], asked[name]["num_fewshot"], asked[name]["limit"]) == (task, shots, limit)
        assert not asked[name]["chat_template"] and asked[name]["system"] is None
    assert own_tasks.max_new_tokens(tasks, "lab_gsm8k") == 256 and own_tasks.max_new_tokens(tasks, "lab_ifeval") == 1280


def test_the_page_names_every_protocol_and_its_tasks():
    page = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
    for protocol in PROTOCOLS:
        assert f"config/protocols/{protocol.name}" in page
        for name in yaml.safe_load(protocol.read_text())["eval"]["tasks"]:
            assert f"`{name}`" in page

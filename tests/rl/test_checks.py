"""Checks with settings, which the config declares as rewards (rl/verifiers.py): each holds where its settings say."""

import json
from importlib import metadata

import pytest

from tests.support.planned import ROOT
from workflow_scripts.config.config import Config, load
from workflow_scripts.config.written import merge
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.rl import declared, expressions, verifiers

JSON = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}, "additionalProperties": False}
CHECKED = [
    ("exact", {"field": "answer", "ignore_case": True}, " YES\n", True),
    ("exact", {"field": "answer", "ignore_case": False}, "YES", False),
    ("exact", {"field": "answer", "ignore_case": True}, "yes, it is", False),
    ("number", {"field": "final", "rule": "strict-match"}, "so 1,200\n#### 1,200.", True),
    ("number", {"field": "final", "rule": "strict-match"}, "so 1,200", False),
    ("number", {"field": "final", "rule": "flexible-extract"}, "so $1,200", True),
    ("number", {"field": "final", "rule": "flexible-extract"}, "1200 in 3 steps", False),
    ("regex", {"pattern": r"<b>\d+</b>", "whole": False}, "so <b>12</b>.", True),
    ("regex", {"pattern": r"<b>\d+</b>", "whole": True}, "so <b>12</b>.", False),
    ("regex", {"pattern": r"<b>\d+</b>", "whole": True}, " <b>12</b>\n", True),
    ("json_schema", JSON, ' {"n": 3} ', True),
    ("json_schema", JSON, '{"n": "3"}', False),
    ("json_schema", JSON, '{"n": 3} indeed', False),
    ("json_schema", {}, "NaN", False),
    ("json_schema", {}, "[" * 100000, False),
    ("length", {"unit": "words", "least": 2, "most": 3}, "one two  three", True),
    ("length", {"unit": "words", "least": 2, "most": 3}, "one", False),
    ("length", {"unit": "characters", "least": 0, "most": 3}, "äöüs", False),
]


@pytest.mark.parametrize(("kind", "settings", "response", "holds"), CHECKED)
def test_a_check_holds_where_its_settings_say(kind, settings, response, holds):
    assert verifiers.CHECKS[kind](settings)(response, {"answer": "yes", "final": "1,200"}) is holds
    reward = declared.checked("mine", {kind: settings})
    assert reward([], [[{"content": response}]], row=[json.dumps({"answer": "yes", "final": "1,200"})]) == [float(holds)]


def test_a_check_without_its_field_or_its_reference_is_one_line():
    rows = [
        {"id": "a:1", "prompt": "p", "answer": "1"},
        {"id": "a:2", "prompt": "p", "answer": ["1"]},
        {"id": "a:3", "prompt": "p"},
    ]
    settings = {"exact": {"field": "answer", "ignore_case": True}}
    with pytest.raises(InputError, match="rows.jsonl: row a:2: answer is no text or number, and the reward mine"):
        declared.make("mine", settings, None, rows, "rows.jsonl")
    with pytest.raises(InputError, match="row a:3: answer is missing"):
        declared.make("mine", settings, None, rows[::2], "rows.jsonl")
    with pytest.raises(InputError, match="json_schema: 'http://nowhere.example/x' is not in the schema itself"):
        verifiers.json_schema({"$ref": "http://nowhere.example/x"})("1", {})


EXPRESSIONS = [
    ("1/2", r"So it is $\frac{2}{4}$.", True),
    ("1/2", "The answer is 0.5.", True),
    ("18", "She makes 18 dollars.", True),
    ("18", "I used 3 steps.", False),
    (r"\sqrt{8}", r"\boxed{2\sqrt{2}}", True),
    ("x^2+2x+1", "$(x+1)^2$", True),
    ("x^2+2x+1", "$(x-1)^2$", False),
    ("18", "", False),
]


@pytest.mark.parametrize(("final", "response", "holds"), EXPRESSIONS)
def test_an_expression_is_right_where_it_equals_the_row_s(final, response, holds):
    assert declared.checked("equal", {"math": {"field": "final"}})(
        [], [[{"content": response}]], row=[json.dumps({"id": "a:1", "final": final})]
    ) == [float(holds)]


def test_a_row_without_an_expression_and_a_tower_of_powers_are_told(monkeypatch):
    monkeypatch.setattr(expressions, "SECONDS", 1)
    check = expressions.check({"field": "final"})
    assert check("$9^{9^{9^{9}}}$", {"final": "3"}) is False
    with pytest.raises(InputError, match="row a:1: final is '', in which no expression is found"):
        check("3", {"id": "a:1", "final": ""})


@pytest.mark.parametrize("there", ["none", "0.8.0"])
def test_without_the_library_the_remedy_is_one_line(monkeypatch, there):
    def version(name: str) -> str:
        if there == "none":
            raise metadata.PackageNotFoundError(name)
        return there

    monkeypatch.setattr(expressions.metadata, "version", version)
    with pytest.raises(InputError, match=f"needs math-verify 0.9.0, found {there}; install it .* pip install math-verify==0.9"):
        declared.make("equal", {"math": {"field": "final"}}, None, [], "rows.jsonl")


def test_what_compares_expressions_counts_for_who_is_rewarded_by_it_alone():
    rewards = {"equal": {"math": {"field": "final"}}, "same": {"exact": {"field": "final", "ignore_case": True}}}
    made = {f"grpo_{name}": {"extends": "grpo", "slice": "sums", "reward": name} for name in rewards}
    given = merge(load(ROOT / "config/config.yaml").data, {"rewards": rewards, "experiments": made})
    plan = Plan(Config(given))
    steps = {name: plan.step("train", name) for name in (*made, "grpo")}
    assert [name for name, step in steps.items() if "rl.expressions" in step["code"]] == ["grpo_equal"]
    assert "sympy" in steps["grpo_equal"]["packages"]
    assert steps["grpo_equal"]["config"]["rewards"] == {"equal": rewards["equal"]}


def test_a_reward_with_the_name_of_the_experiment_that_it_is_of_is_one_line():
    over = {"rewards": {"short": {"length": {"unit": "words", "least": 1, "most": 9}}}}
    over |= {"experiments": {"short": {"extends": "grpo", "slice": "sums", "reward": "short"}}}
    with pytest.raises(InputError, match="rewards.short: the name of an experiment; take another one"):
        Config(merge(load(ROOT / "config/config.yaml").data, over))

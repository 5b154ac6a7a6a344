"""Checks with settings, which the config declares as rewards (rl/verifiers.py): each holds where its settings say."""

import json

import pytest

from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.rl import declared, verifiers

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

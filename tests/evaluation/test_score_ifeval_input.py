"""What the IFEval scorer says to bad input, that it leaves nothing half-written, and the JSON Lines that it reads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from workflow_scripts.plumbing import jsonl
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import score_ifeval

ROOT = Path(__file__).resolve().parents[2]
NO_COMMA = "punctuation:no_comma"


def prompt(key, instruction):
    """One row of a prompts file with one instruction: an id or (id, kwargs)."""
    identifier, kwargs = (instruction, {}) if isinstance(instruction, str) else instruction
    return {"key": key, "prompt": f"prompt number {key}", "instruction_id_list": [identifier], "kwargs": [kwargs]}


def respond(row, response, **more):
    return {"key": row["key"], "prompt": row["prompt"], "response": response} | more


ONE = prompt(1, NO_COMMA)
GOOD = json.dumps(ONE)
ANSWER = json.dumps(respond(ONE, "x"))
SECOND = json.dumps(prompt(2, NO_COMMA))


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


BAD = {
    "missing": (lines(GOOD, SECOND), lines(ANSWER), r"r.jsonl: no response to key 2 of .*p.jsonl \(1 of 2 prompts"),
    "missing, by prompt": (
        lines(GOOD, SECOND),
        lines({"prompt": ONE["prompt"], "response": "x"}),
        r"r.jsonl: no response to the prompt that begins 'prompt number 2'",
    ),
    "double": (lines(GOOD), lines(ANSWER, ANSWER), r"r.jsonl: key 1 stands in two rows; keep one"),
    "unknown": (lines(GOOD), lines(ANSWER, respond(prompt(7, NO_COMMA), "x")), r"r.jsonl: key 7 is not in .*p.jsonl"),
    "unknown, by prompt": (
        lines(GOOD),
        lines({"prompt": "x" * 99, "response": ""}),
        rf"r.jsonl: the prompt that begins '{'x' * 60}\.\.\.' is not in",
    ),
    "key of another type": (lines(GOOD), lines({**json.loads(ANSWER), "key": "1"}), r"key '1' is not in"),
    "cut line": (lines(GOOD), lines(ANSWER) + ANSWER[:20], r"r.jsonl, line 2: is not JSON \("),
    "cut line of prompts": (lines("", GOOD[:-1]), lines(ANSWER), r"p.jsonl, line 2: is not JSON \("),
    "no object": (lines(GOOD), lines("[1]"), r"r.jsonl, line 1: found a JSON list, expected one object"),
    "no prompt": (lines(GOOD), lines({"key": 1, "response": "x"}), r"r.jsonl, row 1: has no 'prompt'; each row needs"),
    "no response": (
        lines(GOOD),
        lines({"key": 1, "prompt": "x"}),
        r"r.jsonl, row 1: has no 'response'; each row needs",
    ),
    "null response": (lines(GOOD), lines(respond(ONE, None)), r"r.jsonl, row 1: 'response' is None, expected a text"),
    "prompts without a prompt": (lines({"key": 1}), lines(ANSWER), r"p.jsonl, row 1: has no 'prompt'"),
    "odd key": (lines({**ONE, "key": 1.5}), lines(ANSWER), r"p.jsonl, row 1: 'key' is 1.5, expected a whole number"),
    "empty prompts": ("", lines(ANSWER), r"p.jsonl: has no rows"),
    "empty responses": (lines(GOOD), "\n", r"r.jsonl: has no rows"),
    "unknown instruction": (
        lines(prompt(1, "punctuation:no_coma")),
        lines(ANSWER),
        r"p.jsonl, row 1 \(key 1\): lm-eval does not know the instruction 'punctuation:no_coma'.*punctuation:no_comma",
    ),
    "no instruction": (lines({**ONE, "instruction_id_list": []}), lines(ANSWER), r"'instruction_id_list' is \[\]"),
    "kwargs too short": (lines({**ONE, "kwargs": []}), lines(ANSWER), r"'kwargs' is \[\], expected 1 objects"),
    "unknown kwarg": (lines(prompt(1, (NO_COMMA, {"n": 3}))), lines(ANSWER), r"no_comma refuses the kwargs {'n': 3}"),
    "bad kwarg": (
        lines(prompt(1, ("length_constraints:number_words", {"relation": "at most", "num_words": 3}))),
        lines(ANSWER),
        r"key 1\): length_constraints:number_words refuses",
    ),
    "unknown language": (
        lines(prompt(1, ("language:response_language", {"language": "no"}))),
        lines(ANSWER),
        r"language:response_language refuses the kwargs {'language': 'no'} \(KeyError",
    ),
    "bad pattern": (
        lines(prompt(1, ("keywords:existence", {"keywords": ["(("]}))),
        lines(ANSWER),
        r"p.jsonl, key 1: a text in 'kwargs' is no valid regular expression",
    ),
    "some tokens": (
        lines(GOOD, SECOND),
        lines(respond(ONE, "x", tokens=3), respond(json.loads(SECOND), "x")),
        r"r.jsonl: 1 of 2 rows have no 'tokens'",
    ),
    "odd tokens": (
        lines(GOOD),
        lines(respond(ONE, "x", tokens=[1, 2])),
        r"key 1: 'tokens' is \[1, 2\], expected a count",
    ),
    "odd reason": (lines(GOOD), lines(respond(ONE, "x", finish_reason=1)), r"'finish_reason' is 1, expected a text"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_the_old_scores(case, tmp_path):
    prompts, responses, message = BAD[case]
    (tmp_path / "p.jsonl").write_text(prompts)
    (tmp_path / "r.jsonl").write_text(responses)
    (tmp_path / "s.json").write_text("old")
    with pytest.raises(InputError, match=message) as caught:
        score_ifeval.main(tmp_path / "p.jsonl", tmp_path / "r.jsonl", tmp_path / "s.json", strip_think=False)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["p.jsonl", "r.jsonl", "s.json"]
    assert (tmp_path / "s.json").read_text() == "old"


def test_the_command_says_an_input_error_in_one_line_with_status_1(tmp_path):
    (tmp_path / "p.jsonl").write_text(lines(GOOD))
    command = [sys.executable, "-m", "workflow_scripts.steps.score_ifeval"]
    paths = ["--prompts", tmp_path / "p.jsonl", "--responses", tmp_path / "none.jsonl", "--output", tmp_path / "s.json"]
    run = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (1, "")
    assert run.stderr == f"{tmp_path}/none.jsonl: cannot be read (No such file or directory); give the path of a JSONL file\n"
    assert not (tmp_path / "s.json").exists()


def test_an_input_is_not_overwritten(tmp_path):
    (tmp_path / "p.jsonl").write_text(lines(GOOD))
    (tmp_path / "r.jsonl").write_text(lines(ANSWER))
    with pytest.raises(InputError, match="would be overwritten"):
        score_ifeval.main(tmp_path / "p.jsonl", tmp_path / "r.jsonl", tmp_path / "x" / ".." / "r.jsonl", False)
    assert (tmp_path / "r.jsonl").read_text() == lines(ANSWER)


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    path = tmp_path / "scores.json"
    path.write_text("old")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="scores.json: cannot be written .No space left"):
        jsonl.write_atomically(path, b"new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["scores.json"]
    with pytest.raises(InputError, match="is a folder"):
        jsonl.write_atomically(tmp_path, b"new")


# JSON Lines


def test_jsonl_rows_come_back_whatever_their_text(tmp_path):
    rows = [{"b": "Zürich\u2028line\u0085end\r\nnew", "a": [1, None, 0.1]}, {}, {"emoji": "🎉"}]
    jsonl.write_jsonl(tmp_path / "sub" / "x.jsonl", rows)
    data = (tmp_path / "sub" / "x.jsonl").read_bytes()
    first = '{"b": "Zürich\u2028line\u0085end\\r\\nnew", "a": [1, null, 0.1]}'
    assert data == (first + '\n{}\n{"emoji": "🎉"}\n').encode()
    assert jsonl.read_jsonl(tmp_path / "sub" / "x.jsonl") == rows
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + data.replace(b"\n", b"\r\n") + b"\r\n")
    assert jsonl.read_jsonl(tmp_path / "windows.jsonl") == rows


def test_jsonl_errors_name_file_and_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": 1}\n\n{"a": "\xff"}\n')
    with pytest.raises(InputError, match="x.jsonl, line 3: is not UTF-8"):
        jsonl.read_jsonl(path)
    for value in (float("nan"), "\ud800", {1, 2}):
        with pytest.raises(InputError, match="y.jsonl, row 2: cannot be written as JSON"):
            jsonl.write_jsonl(tmp_path / "y.jsonl", [{"a": 1}, {"a": value}])
    assert not (tmp_path / "y.jsonl").exists()

"""The GSM8K scorer: numbers worked by hand, lm-eval's own filter and metric, both ways in, and what it says to bad input."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.data import task_files
from workflow_scripts.evaluation import gsm8k
from workflow_scripts.plumbing import jsonl
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import score_gsm8k

ROOT = Path(__file__).resolve().parents[2]
TEST = ROOT / "data/gsm8k/test.jsonl"


def numeric_row(key, final, text=None):
    """A row of a numeric slice."""
    prompt = [{"role": "user", "content": text or f"question {key}"}]
    return {"id": f"test/{key}", "key": key, "prompt": prompt, "answer": f"so #### {final}", "final": final}


def respond(row, response, **more):
    return {"key": row["key"], "prompt": row["prompt"], "response": response} | more


# right number, response, correct, strict, flexible, extracted, each by hand
HAND = [
    ("18", "9 * 2 = 18\n#### 18", True, True, True, "18"),
    ("18", "The answer is 18.", True, False, True, "18"),  # lm-eval's strict-match asks for the mark
    ("1080", "#### 1,080.", True, True, True, "1080"),
    ("1080", "#### $1,080", True, False, True, "1080"),
    ("18", "#### 18.00", True, False, False, "18.00"),  # it compares texts
    ("20", "#### 18\nNo.\n#### 20", True, False, True, "20"),  # it takes the first
    ("18", "#### 18\nNo.\n#### 20", False, True, False, "20"),
    ("-3", "#### -3", True, True, True, "-3"),
    ("5", "I can't tell.", False, False, False, None),
    ("5", "", False, False, False, None),
]
ROWS = [numeric_row(i, final) for i, (final, *_) in enumerate(HAND)]
RESPONSES = [respond(row, response) for row, (_, response, *_) in zip(ROWS, HAND, strict=True)]


def plain(rows):
    """Score files as JSON would give them back."""
    return json.loads(json.dumps(rows))


# -- scores ---------------------------------------------------------------------------------------------------------------


def test_verdicts_are_those_worked_by_hand():
    assert gsm8k.score(ROWS, RESPONSES, strip_think=False)["per_prompt"] == [
        {"key": i, "correct": correct, "strict": strict, "flexible": flexible, "extracted": extracted}
        for i, (_, _, correct, strict, flexible, extracted) in enumerate(HAND)
    ]


def test_summary_is_that_worked_by_hand():
    scores = gsm8k.score(ROWS, RESPONSES, strip_think=False)
    assert scores["n_prompts"] == 10 and scores["strip_think"] is False
    assert (scores["exact_match"], scores["strict_match"], scores["no_answer_share"]) == (7 / 10, 4 / 10, 2 / 10)
    assert scores["flexible_match"] == 6 / 10
    assert scores["exact_match_stderr"] == pytest.approx(math.sqrt(0.7 * 0.3 / 9))  # sample sd over sqrt n
    assert scores["strict_match_stderr"] == pytest.approx(math.sqrt(0.4 * 0.6 / 9))
    assert scores["truncated_share"] is None and scores["mean_response_tokens"] is None and scores["reworded_keys"] == []


def test_truncated_share_and_mean_tokens():
    rows = [row | {"finish_reason": "stop", "tokens": 10} for row in RESPONSES]
    rows[4] |= {"finish_reason": "length", "tokens": 30}
    scores = gsm8k.score(ROWS, rows, strip_think=False)
    assert (scores["truncated_share"], scores["mean_response_tokens"]) == (1 / 10, 12)


def test_a_single_row_has_no_standard_error():
    scores = gsm8k.score(ROWS[:1], RESPONSES[:1], strip_think=False)
    assert scores["exact_match"] == 1 and scores["exact_match_stderr"] is None
    assert score_gsm8k.table(scores).count("n/a") == 3


def test_reasoning_counts_unless_it_is_stripped():
    rows = [numeric_row(1, "18"), numeric_row(2, "18")]
    given = [respond(rows[0], "<think>#### 17</think>18"), respond(rows[1], "<think>#### 18")]  # the second is cut off
    found = [[entry["correct"] for entry in gsm8k.score(rows, given, strip)["per_prompt"]] for strip in (False, True)]
    assert found == [[False, True], [True, False]]


def test_the_order_of_rows_changes_no_number():
    expected = gsm8k.score(ROWS, RESPONSES, strip_think=False)
    assert gsm8k.score(ROWS, RESPONSES[::-1], strip_think=False) == expected
    backwards = gsm8k.score(ROWS[::-1], RESPONSES, strip_think=False)
    assert backwards["per_prompt"] == expected["per_prompt"][::-1]
    assert backwards | {"per_prompt": None} == expected | {"per_prompt": None}


def test_prompts_may_be_texts_or_turns_and_keys_may_be_left_out():
    expected = gsm8k.score(ROWS, RESPONSES, strip_think=False)
    as_text = [row | {"prompt": row["prompt"][0]["content"]} for row in RESPONSES]
    assert gsm8k.score(ROWS, as_text, strip_think=False) == expected
    without = [{"prompt": row["prompt"], "response": row["response"]} for row in reversed(as_text)]
    assert gsm8k.score(ROWS, without, strip_think=False) == expected
    tiny = [row | {"prompt": row["prompt"][0]["content"], "final": int(row["final"])} for row in ROWS]
    assert gsm8k.score(tiny, RESPONSES, strip_think=False) == expected


def test_another_prompt_text_under_a_key_is_told(tmp_path, capsys):
    rows = [RESPONSES[0] | {"prompt": "reworded"}, *RESPONSES[1:]]
    scores = gsm8k.score(ROWS, rows, strip_think=False)
    assert scores["reworded_keys"] == [0]
    jsonl.write_jsonl(tmp_path / "p.jsonl", ROWS)
    jsonl.write_jsonl(tmp_path / "r.jsonl", rows)
    assert score_gsm8k.main(tmp_path / "p.jsonl", tmp_path / "r.jsonl", tmp_path / "s.json", False) == scores
    assert "under key 0; joined by key" in capsys.readouterr().err


# -- lm-eval --------------------------------------------------------------------------------------------------------------


def lm_eval_verdicts(rows, texts, rule):
    """exact_match of one of lm-eval's filters for GSM8K's own rows: its task as it makes it, its filters, its metric."""
    from lm_eval.api.instance import Instance
    from lm_eval.tasks import TaskManager

    data = {split: str(TEST) for split in ("train", "test")}
    own = task_files.laid_over(task_files.read(task_files.own_file("gsm8k")).data, {"num_fewshot": 0, "data_files": data})
    (task,) = TaskManager(include_defaults=False).load(own)["tasks"].values()
    pairs = enumerate(zip(rows, texts, strict=True))
    task._instances = [Instance("generate_until", row, ("", {}), i, resps=[text]) for i, (row, text) in pairs]
    task.apply_filters()
    return [bool(task.process_results(one.doc, [one.filtered_resps[rule]])["exact_match"]) for one in task._instances]


def test_both_rules_are_lm_evals_on_responses_of_many_shapes():
    rows = jsonl.read_jsonl(TEST)
    shapes = [
        lambda final, work: f"{work}\n#### {final}",
        lambda final, work: f"{work}\n#### {final}.",
        lambda final, work: f"{work}\n#### {final}..",
        lambda final, work: f"#### ${final}",
        lambda final, work: f"#### {final}.00",
        lambda final, work: f"####{final}",
        lambda final, work: f"#### {final}\n\nQuestion: another\n#### 1",
        lambda final, work: f"#### 1\n#### {final}",
        lambda final, work: f"##### {final} dollars",
        lambda final, work: f"The answer is {final}",
        lambda final, work: f"#### 0{final}",
        lambda final, work: f"{final} is what 3 boxes at 10:00 hold...",
        lambda final, work: f"so ${final},",
        lambda final, work: "",
    ]
    texts = []
    for i, row in enumerate(rows):
        work, _, final = row["answer"].rpartition("\n#### ")
        texts.append(shapes[i % len(shapes)](final, work))
    given = [{"prompt": row["question"], "response": text} for row, text in zip(rows, texts, strict=True)]
    scores = gsm8k.score(rows, given, strip_think=False)
    for verdict, rule in (("strict", "strict-match"), ("flexible", "flexible-extract")):
        assert [entry[verdict] for entry in scores["per_prompt"]] == lm_eval_verdicts(rows, texts, rule)
    assert 0.25 < scores["strict_match"] < 0.4 < scores["flexible_match"] < scores["exact_match"] < 0.9


def test_the_standard_error_is_lm_evals():
    from lm_eval.api.metrics import mean_stderr

    scores = gsm8k.score(ROWS, RESPONSES, strip_think=False)
    for metric, verdict in gsm8k.METRICS.items():
        items = [entry[verdict] for entry in scores["per_prompt"]]
        assert scores[f"{metric}_stderr"] == pytest.approx(mean_stderr(items), rel=1e-12)


# -- both ways in ---------------------------------------------------------------------------------------------------------


def test_the_command_scores_gsm8ks_own_file_without_torch(tmp_path):
    rows = jsonl.read_jsonl(TEST)
    given = [{"prompt": row["question"], "response": row["answer"] if i % 4 else "none"} for i, row in enumerate(rows)]
    jsonl.write_jsonl(tmp_path / "r.jsonl", given)
    program = (
        "import runpy, sys\n"
        "sys.argv[0] = 'score_gsm8k'\n"
        "runpy.run_module('workflow_scripts.steps.score_gsm8k', run_name='__main__')\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    found = []
    for seed in ("1", "2"):
        output = tmp_path / seed / "scores.json"
        paths = ("--prompts", TEST, "--responses", tmp_path / "r.jsonl", "--output", output)
        env = {"PYTHONHASHSEED": seed, "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", program, *paths], env=env, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr) == (0, "")
        assert "exact_match" in done.stdout and "(1319 prompts)" in done.stdout
        found.append(output.read_bytes())
    scores = json.loads(found[0])
    assert found[0] == found[1] and found[0].endswith(b"}\n")
    assert scores["exact_match"] == scores["strict_match"] == 989 / 1319  # 330 of them, each fourth, say none
    assert scores["no_answer_share"] == 330 / 1319 and scores["per_prompt"][1]["key"] is None


def test_the_step_writes_the_scores_into_its_manifest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("results/grpo")
    prompts = small_steps.write_slice(Path("results/data"), "gsm8k", ROWS, heldout=0)
    folder.mkdir()
    rows = [row | {"tokens": 4, "finish_reason": "stop"} for row in RESPONSES]
    jsonl.write_jsonl(folder / "gsm8k_responses.jsonl", rows)
    responses = small_steps.write_manifest(
        folder / "gsm8k_responses.manifest.json", "responses", "answers", ["gsm8k_responses.jsonl"]
    )
    parents = {"prompts": prompts, "responses": responses}
    job = small_steps.job("score_gsm8k", Path("results/gsm8k_grpo.json"), parents, {"strip_think": False})
    score_gsm8k.main_step(job)
    made = manifests.read("results/gsm8k_grpo.json").data
    assert made["kind"] == "scores" and set(made["parents"]) == {"prompts", "responses"}
    expected = gsm8k.score(ROWS, rows, strip_think=False)
    assert {key: made[key] for key in expected} == plain(expected) and made["mean_response_tokens"] == 4


# -- bad input ------------------------------------------------------------------------------------------------------------


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


ONE, TWO = numeric_row(1, "18"), numeric_row(2, "20")
GOOD, ANSWER = lines(ONE), lines(respond(ONE, "18"))
OWN = {"question": "question 1", "answer": "so #### 18"}

BAD = {
    "missing": (lines(ONE, TWO), ANSWER, r"r.jsonl: no response to key 2 of .*p.jsonl \(1 of 2 prompts lack one"),
    "double": (GOOD, ANSWER + ANSWER, r"r.jsonl: key 1 stands in two rows; keep one"),
    "unknown": (GOOD, ANSWER + lines(respond(TWO, "x")), r"r.jsonl: key 2 is not in .*p.jsonl"),
    "unknown, by prompt": (lines(OWN), lines({"prompt": "other", "response": ""}), r"r.jsonl: the prompt that begins 'other'"),
    "no object": (GOOD, "[1]\n", r"r.jsonl, line 1: found a JSON list"),
    "cut line": (GOOD, ANSWER[:20], r"r.jsonl, line 1: is not JSON \("),
    "no response": (GOOD, lines({"key": 1, "prompt": "x"}), r"r.jsonl, row 1: has no 'response'; each row needs"),
    "null response": (GOOD, lines(respond(ONE, None)), r"r.jsonl, row 1: 'response' is None, expected a text"),
    "no prompt": (GOOD, lines({"key": 1, "response": "x"}), r"r.jsonl, row 1: has no 'prompt'"),
    "odd prompt": (GOOD, lines({"prompt": [1], "response": "x"}), r"r.jsonl, row 1: prompt: a message needs the strings"),
    "empty prompts": ("", ANSWER, r"p.jsonl: has no rows"),
    "empty responses": (GOOD, "", r"r.jsonl: has no rows"),
    "prompts of IFEval": (
        lines({"key": 1, "prompt": "x", "kwargs": []}),
        ANSWER,
        r"p.jsonl, row 1: found the keys key, kwargs, prompt, expected prompt and final .* or question and answer",
    ),
    "final without a prompt": (lines({"final": "3"}), ANSWER, r"p.jsonl, row 1: has no 'prompt'"),
    "no number": (lines(ONE, TWO | {"final": "twenty"}), ANSWER, r"p.jsonl, row 2: final: found 'twenty', expected a number"),
    "null final": (lines(ONE | {"final": None}), ANSWER, r"p.jsonl, row 1: final: found None, expected a number"),
    "answer without a mark": (lines(OWN, OWN | {"answer": "18"}), ANSWER, r"p.jsonl, row 2: expected an answer that ends with"),
    "question of another type": (lines(OWN | {"question": 3}), ANSWER, r"p.jsonl, row 1: expected a text under question"),
    "odd key": (lines(ONE | {"key": 1.5}), ANSWER, r"p.jsonl, row 1: 'key' is 1.5, expected a whole number or a text"),
    "some tokens": (
        lines(ONE, TWO),
        lines(respond(ONE, "x", tokens=3), respond(TWO, "x")),
        r"r.jsonl: 1 of 2 rows have no 'tokens'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_and_leaves_the_old_scores(case, tmp_path):
    prompts, responses, message = BAD[case]
    (tmp_path / "p.jsonl").write_text(prompts)
    (tmp_path / "r.jsonl").write_text(responses)
    (tmp_path / "s.json").write_text("old")
    with pytest.raises(InputError, match=message) as caught:
        score_gsm8k.main(tmp_path / "p.jsonl", tmp_path / "r.jsonl", tmp_path / "s.json", strip_think=False)
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["p.jsonl", "r.jsonl", "s.json"]
    assert (tmp_path / "s.json").read_text() == "old"


def test_an_input_is_not_overwritten(tmp_path):
    (tmp_path / "p.jsonl").write_text(GOOD)
    (tmp_path / "r.jsonl").write_text(ANSWER)
    with pytest.raises(InputError, match="would be overwritten"):
        score_gsm8k.main(tmp_path / "p.jsonl", tmp_path / "r.jsonl", tmp_path / "r.jsonl", False)
    assert (tmp_path / "r.jsonl").read_text() == ANSWER


def test_the_command_says_an_input_error_in_one_line_with_status_1(tmp_path):
    command = [sys.executable, "-m", "workflow_scripts.steps.score_gsm8k", "--prompts", TEST]
    paths = ["--responses", tmp_path / "none.jsonl", "--output", tmp_path / "s.json"]
    done = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "") and not (tmp_path / "s.json").exists()
    assert done.stderr == f"{tmp_path}/none.jsonl: cannot be read (No such file or directory); give the path of a JSONL file\n"

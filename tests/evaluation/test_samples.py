"""Several answers to a prompt: pass@k and majority by hand and by simulation, the interval of avg@n, and the scorers."""

import json
import math
from decimal import Decimal
from itertools import combinations

import numpy as np
import pytest

from workflow_scripts.evaluation import gsm8k, ifeval, samples
from workflow_scripts.evaluation.scores import mean_stderr
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.stats import selection
from workflow_scripts.steps import score_gsm8k, score_ifeval

# -- pass@k -------------------------------------------------------------------------------------------------------------------


def test_pass_at_k_is_that_worked_by_hand():
    """Five answers, two of them right: of the ten pairs, three have no right one."""
    assert samples.pass_at(5, 2, 2) == pytest.approx(7 / 10)
    assert samples.pass_at(5, 2, 1) == pytest.approx(2 / 5)
    assert samples.pass_at(5, 2, 4) == samples.pass_at(5, 2, 5) == 1  # three wrong ones are no four
    assert samples.pass_at(5, 0, 5) == 0
    assert samples.tried(8) == [1, 2, 4, 8] and samples.tried(5) == [1, 2, 4, 5] and samples.tried(2) == [1, 2]


@pytest.mark.parametrize(("n", "right"), [(6, 0), (6, 1), (6, 3), (7, 5), (4, 4)])
def test_pass_at_k_is_the_share_of_choices_with_a_right_one(n, right):
    for k in range(1, n + 1):
        chosen = list(combinations(range(n), k))
        assert samples.pass_at(n, right, k) == pytest.approx(sum(min(one) < right for one in chosen) / len(chosen))


def test_pass_at_k_is_unbiased_and_the_share_in_place_of_the_chance_is_not():
    """Prompts with chances of their own, 8 answers to each: the mean estimate of pass@4 is 1 - E (1 - p)^4."""
    draw = np.random.default_rng(3)
    chances = draw.beta(0.7, 1.5, size=200_000)
    right = draw.binomial(8, chances)
    table = np.array([samples.pass_at(8, count, 4) for count in range(9)])
    truth = np.mean(1 - (1 - chances) ** 4)
    error = table[right].std() / math.sqrt(len(right))
    assert abs(table[right].mean() - truth) < 4 * error
    assert truth - np.mean(1 - (1 - right / 8) ** 4) > 20 * error


# -- the interval of avg@n ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 8])
def test_the_interval_of_avg_at_n_covers_and_one_that_takes_answers_for_prompts_does_not(n):
    """150 prompts of a population in which some are easy and some hard; the truth is the population's mean chance."""
    draw, worlds, prompts = np.random.default_rng(7), 4000, 150
    chances = draw.beta(0.5, 0.8, size=(worlds, prompts))
    right = draw.binomial(1, chances[..., None], size=(worlds, prompts, n))
    truth = 0.5 / 1.3
    for world in right[:50]:  # the function itself gives what is computed for all
        assert mean_stderr(world.tolist())[1] == pytest.approx(world.mean(-1).std(ddof=1) / math.sqrt(prompts))
    values = right.mean(-1)
    mean, error = values.mean(-1), values.std(-1, ddof=1) / math.sqrt(prompts)
    covered = np.mean(np.abs(mean - truth) < 1.976 * error)  # Student's t with 149 degrees of freedom
    alone = np.sqrt(mean * (1 - mean) / (prompts * n))
    naive = np.mean(np.abs(mean - truth) < 1.96 * alone)
    assert 0.94 < covered < 0.96
    assert naive < (0.91 if n == 2 else 0.70)


# -- majority -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (["18", "18.00", "7"], 1.0),  # as numbers
        (["7", "7", "18"], 0.0),
        (["18", "7", None, None, None], 0.5),  # no number, no vote; of two with one vote each is the answer half the time
        ([None, None], 0.0),
        (["18", "7", "9", "18"], 1.0),
    ],
)
def test_the_majority_by_hand(given, value):
    assert samples.majority(given, Decimal("18")) == value


# -- the scorers --------------------------------------------------------------------------------------------------------------

FINALS = ["18", "5", "7"]
SAID = [["#### 18", "18", "so 18", "4"], ["5", "6", "6", "none"], ["8", "9", "none", ""]]  # right: 3, 1 and 0 of 4


def numeric(said=SAID):
    rows = [{"key": i, "prompt": f"question {i}", "final": final} for i, final in enumerate(FINALS)]
    given = [
        {
            "key": row["key"],
            "prompt": row["prompt"],
            "sample": n,
            "response": text,
            "finish_reason": "stop",
            "tokens": 10 * (n + 1),
        }
        for row, texts in zip(rows, said, strict=True)
        for n, text in enumerate(texts)
    ]
    return rows, given


def test_numbers_of_several_answers_are_those_worked_by_hand():
    scores = gsm8k.score(*numeric(), strip_think=False)
    assert scores["exact_match"] == pytest.approx(4 / 12) and scores["strict_match"] == pytest.approx(1 / 12)
    assert scores["exact_match_stderr"] == pytest.approx(np.std([3 / 4, 1 / 4, 0], ddof=1) / math.sqrt(3))
    assert scores["n_prompts"] == 3 and scores["samples"] == 4 and scores["no_answer_share"] == pytest.approx(3 / 12)
    assert scores["pass_at"]["1"]["share"] == pytest.approx(scores["exact_match"])
    assert scores["pass_at"]["1"]["stderr"] == pytest.approx(scores["exact_match_stderr"])
    assert scores["pass_at"]["2"]["share"] == pytest.approx((1 + 3 / 6 + 0) / 3)  # of six pairs three have the right one
    assert scores["pass_at"]["4"]["share"] == pytest.approx(2 / 3)
    assert scores["majority"] == pytest.approx(1 / 3) and scores["mean_response_tokens"] == 25
    assert [row["value"] for row in scores["per_prompt"]] == [0.75, 0.25, 0.0]
    assert scores["per_prompt"][1]["correct"] == [True, False, False, False]
    assert scores["per_prompt"][1]["extracted"] == ["5", "6", "6", None]
    assert [selection.value(row) for row in json.loads(json.dumps(scores["per_prompt"]))] == [0.75, 0.25, 0.0]
    printed = score_gsm8k.table(scores)
    assert "pass@4                    66.67" in printed and "majority" in printed


def test_one_answer_gives_what_it_gave_with_or_without_a_number():
    rows, given = numeric([texts[:1] for texts in SAID])
    plain = [{key: value for key, value in row.items() if key != "sample"} for row in given]
    assert gsm8k.score(rows, plain, strip_think=False) == gsm8k.score(rows, given, strip_think=False)
    assert "samples" not in gsm8k.score(rows, plain, strip_think=False)


@pytest.mark.parametrize("how", ["one lacks", "twice", "gap"])
def test_prompts_without_as_many_answers_are_refused(how):
    rows, given = numeric()
    if how == "one lacks":
        given.pop()
    else:
        given[-1]["sample"] = 0 if how == "twice" else 9
    with pytest.raises(InputError, match="needs as many|stands in two rows"):
        gsm8k.score(rows, given, strip_think=False, responses_name="r.jsonl")


def test_ifeval_of_several_answers_by_hand():
    rows = [
        {
            "key": 1,
            "prompt": "p",
            "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
            "kwargs": [{}, {}],
        },
        {"key": 2, "prompt": "q", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    ]
    said = {1: ["all is well here", "All is well here"], 2: ["one, two", "one two"]}
    given = [
        {"key": row["key"], "prompt": row["prompt"], "sample": n, "response": text}
        for row in rows
        for n, text in enumerate(said[row["key"]])
    ]
    scores = ifeval.score(rows, given, strip_think=False)
    assert scores["prompt_level_strict_acc"] == 0.5 and scores["inst_level_strict_acc"] == pytest.approx(4 / 6)
    assert scores["n_instructions"] == 3 and scores["by_instruction"]["punctuation:no_comma"]["n"] == 2
    assert scores["by_instruction"]["punctuation:no_comma"]["strict_acc"] == pytest.approx(3 / 4)
    assert scores["per_prompt"][0]["follow_instruction_list_strict"] == [[True, True], [True, False]]
    assert [row["value"] for row in scores["per_prompt"]] == [0.5, 0.5] and scores["pass_at"]["2"]["share"] == 1
    assert "pass@2" in score_ifeval.table(scores)

"""Which answers become rows: by hand."""

import pytest

from workflow_scripts.data import choosing
from workflow_scripts.data.choosing import Answer, choose

A, B, C, D = (Answer(i, f"text {i}", 10 * (i + 1), "stop", reward) for i, reward in enumerate((0.5, 1.0, 0.0, 1.0)))
CUT = Answer(4, "text 4 and", 64, "length", 2.0)
EMPTY = Answer(5, " \n", 1, "stop", 3.0)
AGAIN = Answer(6, "text 1 ", 5, "stop", 4.0)
ALL = [A, B, C, D, CUT, EMPTY, AGAIN]


@pytest.mark.parametrize(
    "how, kept",
    [
        ({"keep": "best"}, [(B,)]),  # of B and D the first
        ({"keep": "best", "least": 1.0}, [(B,)]),
        ({"keep": "all_right", "least": 0.5}, [(A,), (B,), (D,)]),
        ({"keep": "labels", "least": 0.5}, [(A,), (B,), (C,), (D,)]),
        ({"keep": "pairs", "pair": "best_worst"}, [(B, C)]),
        ({"keep": "pairs", "pair": "all"}, [(B, A), (B, C), (D, A), (D, C), (A, C)]),
        ({"keep": "pairs", "pair": "margin", "margin": 0.6}, [(B, C), (D, C)]),
    ],
)
def test_each_way_to_keep_answers_takes_these(how, kept):
    found, why, unusable = choose(ALL, how)
    assert list(map(tuple, found)) == kept and why == ""
    assert unusable == {"cut off": 1, "empty": 1, "the same as another": 1}


@pytest.mark.parametrize(
    "answers, how, why",
    [
        ([CUT, EMPTY], {"keep": "best"}, "with no usable answer (cut off or empty)"),
        ([A, C], {"keep": "best", "least": 0.75}, "with no answer at or above 0.75"),
        ([A, C], {"keep": "all_right", "least": 0.75}, "with no answer at or above 0.75"),
        ([B, CUT], {"keep": "pairs", "pair": "all"}, "with a single usable answer"),
        ([B, D], {"keep": "pairs", "pair": "best_worst"}, "with answers of one reward alone"),
        ([A, B], {"keep": "pairs", "pair": "margin", "margin": 0.75}, "with no two rewards 0.75 apart"),
    ],
)
def test_why_a_prompt_has_no_row_is_said(answers, how, why):
    assert choose(answers, how)[:2] == ([], why)


PROMPT = [{"role": "user", "content": "ask"}]


def test_rows_have_the_form_of_their_kind():
    asked = {"id": "pairs/3", "prompt": PROMPT}
    assert choosing.row(asked, (B,), {"keep": "best"}, PROMPT) == {
        "id": "pairs/3#1", "messages": [*PROMPT, {"role": "assistant", "content": "text 1"}], "rewards": [1.0], "tokens": [20]
    }  # fmt: skip
    pair = choosing.row(asked, (B, C), {"keep": "pairs"}, PROMPT)
    assert pair["id"] == "pairs/3#1>2" and pair["chosen"][0]["content"] == "text 1" and pair["rejected"][0]["content"] == "text 2"
    labels = [choosing.row(asked, (one,), {"keep": "labels", "least": 0.5}, PROMPT)["label"] for one in (A, B, C)]
    assert labels == [True, True, False]


def test_the_facts_are_means_worked_by_hand():
    assert choosing.by_rank([[A, B, C], [C, C, A]]) == [0.75, 0.25, 0.0]
    pairs = [choosing.row({"id": i}, one, {"keep": "pairs"}, PROMPT) for i, one in enumerate([(B, C), (B, A), (D, D)])]
    found = choosing.facts(pairs, "pairs")
    assert found["reward"] == {"chosen": 1.0, "rejected": 0.5} and found["tokens"] == {"chosen": 26.666667, "rejected": 26.666667}
    assert found["longer_is_chosen"] == 0.5  # shorter, longer, equal
    assert found["words_shared"] == pytest.approx((1 / 3 + 1 / 3 + 1) / 3, abs=1e-6)
    labels = [choosing.row({"id": 1}, (one,), {"keep": "labels", "least": 0.5}, PROMPT) for one in (A, B, C)]
    assert choosing.facts(labels, "labels") == {
        "labels": {"desirable": 2, "undesirable": 1}, "tokens": {"desirable": 15.0, "undesirable": 30.0}
    }  # fmt: skip
    best = [choosing.row({"id": 1}, (one,), {"keep": "best"}, PROMPT) for one in (A, B)]
    assert choosing.facts(best, "best") == {"reward": 0.75, "tokens": 15.0}

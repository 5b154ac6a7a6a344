"""The candidate rows of a slice, hold-out, and decontamination worked by hand."""

import random
from pathlib import Path

import pytest

from workflow_scripts.core import slicing
from workflow_scripts.core.messages import InputError
from workflow_scripts.steps import slice_data


def turn(role, content):
    return {"role": role, "content": content}


def test_candidates_are_drawn_by_the_seed_and_stay_in_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{{{i}}}\n" for i in range(1, 101)))
    one, again, other = (slicing.candidates(str(path), 30, seed) for seed in (1, 1, 2))
    assert one == again == sorted(one) and len(one) == len(set(one)) == 30 and one != other
    assert all(text == f"{{{number}}}" for number, text in one)
    assert slicing.candidates(str(path), 100, 1) == slicing.candidates(str(path), 999, 5) != one


# -- hold-out -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_hold_out_never_splits_a_prompt_and_comes_close_to_the_number(seed):
    rng = random.Random(seed)
    rows = [{"prompt": [turn("user", f"q{rng.randrange(40)}")], "n": i} for i in range(120)]
    wanted = rng.randint(10, 60)
    marked = slice_data.hold_out(rows, wanted, Path("out"))
    assert [{k: v for k, v in row.items() if k != "heldout"} for row in marked] == rows
    sides = {side: {row["prompt"][0]["content"] for row in marked if row["heldout"] == side} for side in (True, False)}
    assert not sides[True] & sides[False]
    assert wanted - 3 <= sum(row["heldout"] for row in marked) <= wanted
    shuffled = rng.sample(rows, len(rows))
    again = slice_data.hold_out(shuffled, wanted, Path("out"))
    assert {row["n"] for row in again if row["heldout"]} == {row["n"] for row in marked if row["heldout"]}


def test_hold_out_that_leaves_one_side_empty_is_an_error():
    rows = [{"prompt": [turn("user", f"q{i // 3}")]} for i in range(9)]
    with pytest.raises(InputError, match="out: no rows left to train on: 9 usable rows, 9 of them held out; raise rows or lower"):
        slice_data.hold_out(rows, 9, Path("out"))
    with pytest.raises(InputError, match="out: no rows could be held out: each prompt has more than heldout = 2"):
        slice_data.hold_out(rows, 2, Path("out"))
    assert sum(row["heldout"] for row in slice_data.hold_out(rows, 5, Path("out"))) == 3


# -- decontamination ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "text", "n", "share", "covered"),
    [
        # trigrams of the prompt: abc bcd cde def; at least half of four is two
        ("a b c d e f", "x a b c d y", 3, 0.5, True),  # abc bcd
        ("a b c d e f", "a b c x d e f", 3, 0.5, True),  # abc def
        ("a b c d e f", "x a b c y", 3, 0.5, False),  # abc
        ("a b c d e f", "a b x c d x e f", 3, 0.5, False),
        ("a b c d e f", "a b c d e", 3, 0.76, False),  # three of four
        ("a b c d e f", "a b c d e", 3, 0.75, True),
        ("A b  C\nd e f", "X a\tB c D", 3, 0.5, True),  # case and spaces do not count
        ("a b a b a", "x a b y", 2, 0.5, True),  # two different bigrams: ab ba
        ("a b a b a", "x a b y a b", 2, 1.0, False),  # a repetition counts once
        ("a b a b a", "b a b", 2, 1.0, True),
        # shorter than n: one n-gram of its own length
        ("hi there", "well hi there you", 3, 0.5, True),
        ("hi there", "hi you there", 3, 0.5, False),
        ("why", "I know why.", 3, 0.5, False),  # "why." is another word
        ("why", "and why not", 3, 0.5, True),
        ("a b c", "x a b c y", 3, 1.0, True),  # exactly n
        (" ", "anything at all", 3, 0.5, False),
    ],
)
def test_the_ngram_rule_worked_by_hand(prompt, text, n, share, covered):
    assert slicing.Decontaminator([prompt], "ngram", n, share).covers([], text) == covered
    assert slicing.Decontaminator(["quite other words here", prompt, ""], "ngram", n, share).covers([], text) == covered


def test_two_prompts_are_not_added_up():
    assert not slicing.Decontaminator(["a b c d", "e f g h"], "ngram", 2, 0.5).covers([], "a b x e f")  # 1 of 3 and 1 of 3


def test_whole_prompt_compares_user_turns_and_nothing_else():
    check = slicing.Decontaminator(["Write  about cats.", ""], "whole_prompt", 8, 0.5)
    assert check.covers(["write about CATS."], "") and check.covers(["hello", " write about cats. "], "")
    assert not check.covers(["write about cats. now"], "write about cats.") and not check.covers([""], "")

"""The candidate rows of a slice, hold-out, and decontamination worked by hand."""

import hashlib
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from workflow_scripts.data import slicing
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import slice_data


def turn(role, content):
    return {"role": role, "content": content}


def test_candidates_are_drawn_by_the_seed_and_stay_in_order(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f"{{{i}}}\n" for i in range(1, 101)))
    one, again, other = (slicing.candidates([str(path)], 30, seed, "sft") for seed in (1, 1, 2))
    assert one == again == sorted(one) and len(one) == len(set(one)) == 30 and one != other
    assert all(row.text == f"{{{row.number}}}" for row in one)
    assert slicing.candidates([str(path)], 100, 1, "sft") == slicing.candidates([str(path)], 999, 5, "sft") != one


@pytest.mark.parametrize(("rows", "seed"), [(1, 0), (30, 1), (99, 2), (100, 3), (400, 4)])
def test_the_rows_drawn_are_those_of_a_sample_of_the_lines(tmp_path, rows, seed):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"".join(b"{%d}\r\n%s" % (i, b" \n" * (i % 3)) for i in range(100)))
    lines = [(i, line) for i, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1) if line.strip()]
    expected = sorted(random.Random(seed).sample(lines, rows)) if rows < 100 else lines
    assert len(lines) == 100
    picked = slicing.candidates([str(path)], rows, seed, "sft")
    assert [(row.number, row.text) for row in picked] == expected
    text = "\n".join(f"{number} {line}" for number, line in expected)
    assert slicing.rows_hash(picked) == hashlib.sha256(text.encode()).hexdigest()  # as in every manifest made so far


def test_several_files_are_read_as_one(tmp_path):
    whole = [f'{{"n": {i}}}' for i in range(90)]
    (tmp_path / "whole.jsonl").write_text("\n".join(whole))
    (tmp_path / "a.jsonl").write_text("\n".join(whole[:20]) + "\n\n")
    (tmp_path / "b.json").write_text(f"[{','.join(whole[20:60])}]")
    (tmp_path / "c.jsonl").write_text("\n".join(whole[60:]))
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.json", "c.jsonl")]
    for rows in (25, 90):
        one = slicing.candidates([str(tmp_path / "whole.jsonl")], rows, 5, "sft")
        many = slicing.candidates(files, rows, 5, "sft")
        assert [row.text for row in one] == [row.text for row in many]
    assert [row.id for row in many][18:22] == ["a.jsonl:19", "a.jsonl:20", "b.json:1", "b.json:2"]
    assert many[20].place == f"{files[1]}: row 1" and many[0].place == f"{files[0]}: line 1"
    assert slicing.rows_hash(many) != slicing.rows_hash(slicing.candidates(files[::-1], 90, 5, "sft"))
    (tmp_path / "c.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"c.jsonl: no rows in this file"):
        slicing.candidates(files, 25, 5, "sft")


def test_picking_a_few_rows_of_a_large_file_does_not_hold_it_in_memory(tmp_path):
    path = tmp_path / "large.jsonl"
    with open(path, "w") as file:
        for i in range(50_000):
            file.write(f'{{"messages": "{i:08d}{"x" * 2080}"}}\n')
    assert path.stat().st_size > 100e6
    tracemalloc.start()
    try:
        picked = slicing.candidates([str(path)], 5_000, 1, "sft")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(picked) == 5_000 and peak < 60e6
    assert [row.number for row in picked] == sorted(random.Random(1).sample(range(1, 50_001), 5_000))
    assert all(f"{row.number - 1:08d}" in row.text for row in picked)


def test_neither_pandas_nor_datasets_nor_pyarrow_is_imported_to_plan_over_jsonl(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')
    code = (
        "import sys; from workflow_scripts.data import slicing; from workflow_scripts.plan import plan; "
        f"slicing.candidates([{str(tmp_path / 'a.jsonl')!r}], 1, 1, 'sft'); "
        "print(sorted({'pandas', 'datasets', 'pyarrow', 'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


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


def groups_by_hand(rows):
    """Sets of indices that a prompt or a value joins, grown one at a time."""
    left, found = set(range(len(rows))), []
    while left:
        group, todo = set(), [min(left)]
        while todo:
            i = todo.pop()
            group.add(i)
            near = {
                j
                for j in left - group
                if rows[j]["prompt"] == rows[i]["prompt"] or ("tree" in rows[i] and rows[j].get("tree") == rows[i]["tree"])
            }
            todo += near - set(todo)
        left -= group
        found.append(group)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_rows_that_a_value_or_a_prompt_joins_over_any_number_of_steps_stay_together(seed):
    rng = random.Random(seed)
    rows = [{"prompt": [turn("user", f"q{rng.randrange(70)}")]} for _ in range(120)]
    for row in rng.sample(rows, 80):
        row["tree"] = rng.choice([f"t{rng.randrange(60)}", rng.randrange(60)])
    marked = slice_data.hold_out(rows, 50, Path("out"), "tree")
    groups = groups_by_hand(rows)
    assert max(map(len, groups)) > 2
    assert all(len({marked[i]["heldout"] for i in group}) == 1 for group in groups)
    assert 0 < sum(row["heldout"] for row in marked) <= 50
    shuffled = rng.sample(marked, len(rows))
    again = slice_data.hold_out([{k: v for k, v in row.items() if k != "heldout"} for row in shuffled], 50, Path("out"), "tree")
    assert again == shuffled
    plain = slice_data.hold_out(rows, 50, Path("out"))
    alone = [{"prompt": row["prompt"], "tree": i} for i, row in enumerate(rows)]  # a value for each row joins nothing
    assert [row["heldout"] for row in plain] == [row["heldout"] for row in slice_data.hold_out(alone, 50, Path("out"), "tree")]


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
        ("why", "I know why.", 3, 0.5, True),  # a full stop is none of a word
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

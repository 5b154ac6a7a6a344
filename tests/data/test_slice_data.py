"""Slicing: which rows are taken, which are dropped and why, what is an error, and that hold-out never splits a prompt."""

import json
import random
from pathlib import Path

import pytest

from tests.support.slicer import QUESTION, Slicer, Words, chat_row, good, lines, pair_row, turn
from workflow_scripts.artifacts import manifests, work
from workflow_scripts.artifacts.fingerprint import file_sha256, fingerprint
from workflow_scripts.data import slicing
from workflow_scripts.models import chat
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import slice_data


@pytest.fixture
def slicer(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "tokenizer_of", lambda base: Words())
    return Slicer(tmp_path)


DROPPED = {
    "with an empty answer": (
        [chat_row("q", " \n"), chat_row("q", "fine", turn("user", "before"), turn("assistant", ""))],
        [pair_row("q", chosen=""), pair_row("q", rejected=[turn("assistant", "\t")])],
    ),
    "without an answer at the end": (
        [{"messages": [turn("user", "q")]}, {"messages": [turn("user", "q"), turn("assistant", "a"), turn("user", "q")]}],
        [pair_row("q", chosen=[turn("user", "x")])],
    ),
    "without a prompt": (
        [{"messages": [turn("assistant", "a")]}, {"messages": [turn("system", "s"), turn("assistant", "a")]}, chat_row(" ", "a")],
        [pair_row(""), pair_row([turn("system", "s")])],
    ),
    "with chosen equal to rejected": ([], [pair_row("q", "same", "same "), pair_row("q", "same", [turn("assistant", "same")])]),
    "with other turns than the assistant's in an answer": (
        [],
        [pair_row("q", chosen=[turn("user", "what?"), turn("assistant", "this")])],
    ),
    "covering an evaluation prompt": (
        [chat_row(f" {QUESTION.upper()}\n", "a"), chat_row("and?", "a", turn("user", QUESTION), turn("assistant", "b")),
         chat_row(QUESTION, "a", turn("system", "s"))],
        [pair_row(QUESTION)],
    ),
    "with a prompt above 50 tokens": (
        [chat_row("w " * 49, "a"), chat_row("w", "a", turn("system", "w " * 47))],
        [pair_row("w " * 49)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_unusable_rows_are_dropped_by_reason_and_count(slicer, kind):
    bad = {reason: rows[kind == "preference"] for reason, rows in DROPPED.items() if rows[kind == "preference"]}
    source = good(kind, 3) + [row for rows in bad.values() for row in rows]
    random.Random(0).shuffle(source)
    rows, manifest = slicer(source, kind)
    assert manifest["dropped"] == {reason: len(rows) for reason, rows in bad.items()}
    assert manifest["rows"] == {"candidates": len(source), "kept": 3, "heldout": 1}
    kept = [slicing.prompt_of(row) for row in rows]
    assert sorted(kept) == ["q0", "q1", "q2"]
    assert kept == [
        slicing.prompt_of(source_row(row)) for row in source if slicing.prompt_of(source_row(row)) in kept
    ]  # in order


def source_row(row):
    return (
        row
        if "messages" in row
        else {"prompt": [turn("user", row["prompt"])] if isinstance(row["prompt"], str) else row["prompt"]}
    )


def test_a_prompt_of_exactly_the_limit_is_kept(slicer):
    rows, _ = slicer([chat_row("w " * 48, "a"), *good("sft", 2)])  # 48 words, one turn, the start of the answer: 50
    assert len(rows) == 3


def test_above_max_drop_the_slice_fails_with_the_counts_and_at_the_limit_it_does_not(slicer):
    source = good("sft", 8) + [chat_row("q", ""), chat_row("q", "")]
    assert slicer.error(source, max_drop=0.19) == (
        f"{slicer.folder}/mine.jsonl: 2 of 10 rows (20.0%) can't be used: 2 with an empty answer. The limit is "
        "data.max_drop = 19.0%; clean the source, or raise the limit"
    )
    assert len(slicer(source, max_drop=0.2)[0]) == 8


def test_a_slice_of_which_nothing_is_left_says_why(slicer):
    assert "3 with an empty answer" in slicer.error([chat_row("q", "")] * 3, max_drop=0.05)
    assert "no rows left to train on" in slicer.error([chat_row("q", "")] * 3, max_drop=1.0)


GOOD = json.dumps(chat_row("q", "a")).encode()
FORMS = {
    b"\n\n" + GOOD + b"\n{broken\n": r"mine.jsonl: line 4: not valid JSON: ",
    GOOD + b"\n[1, 2]\n": r"mine.jsonl: line 2: expected a JSON object, found list",
    GOOD + b"\n" + GOOD[:-9]: r"mine.jsonl: line 2: not valid JSON: ",
    b'{"message": []}': r"mine.jsonl: line 1: found the keys message, which is none of the formats for kind sft: messages ",
    b"{}": r"mine.jsonl: line 1: found the keys nothing, which is none of",
    b'{"messages": "hi"}': r"expected a list of messages, found str",
    b'{"messages": []}': r"expected a list of messages, found an empty one",
    b'{"messages": [{"role": "user"}]}': r"a message needs the strings role and content, found {\"role\": \"user\"}",
    b'{"messages": [{"role": "user", "content": null}]}': r"a message needs the strings role and content",
    b'{"messages": [{"role": "human", "content": "x"}]}': r"found the role 'human', expected system, user or assistant",
    lines([pair_row("q")]): r"line 1: a row of the format pairs .prompt, chosen, rejected. can't give kind sft, only",
    b"caf\xe9\n": r"mine.jsonl: cannot be read as UTF-8 text",
}


def test_pairs_that_are_too_long_for_who_trains_on_them_are_said_before_anything_trains(slicer):
    """A reward model would have said so after the SFT that it starts from."""
    rows = [pair_row(f"q{n}", "a longer answer than the others have" if n < 4 else "yes it is") for n in range(10)]
    asked = {"max_length": 7, "max_left_out": 0.3, "place": "results/data/pairs.jsonl", "user": "rm"}
    found = slicer.error(rows, "preference", limits=[asked | {"max_left_out": 0.4}, asked])
    assert found.startswith("results/data/pairs.jsonl: 4 of 10 rows have an answer that ends beyond train.max_length (7 tokens)")
    assert "max_left_out allows 30%. Raise one of them for rm" in found
    kept, _ = slicer(rows, "preference", limits=[asked | {"max_left_out": 0.4}])
    assert len(kept) == 10  # the slice keeps them all: who trains on them leaves them out


@pytest.mark.parametrize("data", FORMS, ids=range(len(FORMS)))
def test_a_malformed_row_is_an_error_with_file_and_line(slicer, data):
    with pytest.raises(InputError, match=FORMS[data]):
        slicer(data)


def test_a_pair_of_another_form_is_an_error(slicer):
    assert "found the keys chosen, prompt, which is none of" in slicer.error([{"prompt": "q", "chosen": "a"}], "preference")
    assert "expected a list of messages, found int" in slicer.error([pair_row("q", 3)], "preference")


def test_plain_strings_become_turns_and_other_keys_are_left_out(slicer):
    rows, _ = slicer([pair_row("q", "a", "b") | {"score": 3}, *good("preference", 2)], "preference")
    assert rows[0] == {
        "id": "mine.jsonl:1",
        "prompt": [turn("user", "q")],
        "chosen": [turn("assistant", "a")],
        "rejected": [turn("assistant", "b")],
        "heldout": rows[0]["heldout"],
    }


def test_a_prompt_that_is_repeated_in_the_answers_is_taken_off(slicer):
    both = [[turn("user", "q"), turn("assistant", answer)] for answer in "ab"]
    rows, manifest = slicer([pair_row("q", *both), *good("preference", 2)], "preference")
    assert rows[0]["chosen"] == [turn("assistant", "a")] and rows[0]["rejected"] == [turn("assistant", "b")]
    assert manifest["dropped"] == {}


def test_turns_keep_role_and_content_alone(slicer):
    row = {"messages": [turn("system", "s"), turn("user", "q") | {"id": 7}, turn("assistant", "a")], "source": "x"}
    rows, _ = slicer([row, *good("sft", 2)])
    assert rows[0]["messages"] == [turn("system", "s"), turn("user", "q"), turn("assistant", "a")]
    assert set(rows[0]) == {"id", "messages", "heldout"}


@pytest.mark.parametrize("text", ["one\u2028two\u2029three\u0085four", "crème 東京 🌍", "a\r\nb\tc\\n"])
def test_unicode_line_ends_inside_a_text_do_not_cut_a_row(slicer, text):
    rows, _ = slicer([chat_row("q", text), *good("sft", 2)])
    assert rows[0]["messages"][1]["content"] == text and [row["id"] for row in rows] == [f"mine.jsonl:{i}" for i in (1, 2, 3)]


def test_windows_line_ends_blank_lines_and_a_byte_order_mark_change_nothing_but_line_numbers(slicer):
    plain = lines(good("sft", 5))
    expected, _ = slicer(plain)
    assert slicer(b"\xef\xbb\xbf" + plain.replace(b"\n", b"\r\n"))[0] == expected
    spaced, _ = slicer(plain.replace(b"\n", b"\n\n").removesuffix(b"\n\n"))
    assert [row["id"] for row in spaced] == [f"mine.jsonl:{i}" for i in (1, 3, 5, 7, 9)]
    assert [row["messages"] for row in spaced] == [row["messages"] for row in expected]


def test_an_empty_file_is_an_error(slicer):
    for data in (b"", b"\n \r\n", b"\xef\xbb\xbf"):
        with pytest.raises(InputError, match=r"mine.jsonl: no rows in this file"):
            slicer(data)


def test_a_source_that_changed_since_the_plan_is_refused_and_a_change_outside_the_selection_is_not(slicer):
    source = good("sft", 40)
    job = slicer.job(source, rows=20, heldout=2)
    taken = {row.number for row in slicing.candidates([str(slicer.folder / "mine.jsonl")], 20, 1, "sft")}
    outside, inside = min(set(range(1, 41)) - taken), min(taken)
    source[outside - 1] = chat_row("another", "row")
    (slicer.folder / "mine.jsonl").write_bytes(lines(source))
    slice_data.main(job)
    assert len(manifests.read(job.out).rows()) == 20
    source[inside - 1] = chat_row("another", "row")
    (slicer.folder / "mine.jsonl").write_bytes(lines(source))
    with pytest.raises(InputError, match="mine.jsonl: changed since this step was planned; run snakemake again"):
        slice_data.main(job)


def test_the_source_may_be_called_as_the_file_of_a_parent(slicer):
    rows, _ = slicer(good("sft", 3), name="ifeval.jsonl")
    assert [row["id"] for row in rows] == ["ifeval.jsonl:1", "ifeval.jsonl:2", "ifeval.jsonl:3"]


def test_a_source_that_is_not_among_the_inputs_is_named(slicer):
    job = slicer.job(good("sft", 3))
    job.inputs = job.inputs[1:]
    with pytest.raises(InputError, match="expected the source file mine.jsonl among the inputs, found 0"):
        slice_data.main(job)


def test_the_ngram_rule_reads_answers_and_system_turns_too(slicer):
    ngram = {"rule": "ngram", "ngram": 3, "share": 0.5}
    source = [
        chat_row("repeat this", f"you said: {QUESTION}"),
        chat_row("hello", "hello", turn("system", QUESTION)),
        *good("sft", 3),
    ]
    assert slicer(source, decontaminate=ngram)[1]["dropped"] == {"covering an evaluation prompt": 2}
    assert slicer(source)[1]["dropped"] == {}  # whole_prompt
    pairs = [pair_row("q", rejected=QUESTION), *good("preference", 3)]
    assert slicer(pairs, "preference", decontaminate=ngram)[1]["dropped"] == {"covering an evaluation prompt": 1}


# -- evaluation prompts, generated sources, artifacts -----------------------------------------------------------------------


def prompt_row(**more):
    return {"prompt": "write", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]} | more


def test_evaluation_prompts_are_taken_whole_with_a_key_each(slicer):
    rows, manifest = slicer([prompt_row(key=7, extra="kept"), prompt_row()], "ifeval")
    assert rows == [prompt_row(key=7, extra="kept", id="mine.jsonl:1"), prompt_row(key="mine.jsonl:2", id="mine.jsonl:2")]
    assert manifest["rows"] == {"candidates": 2, "kept": 2, "heldout": 0} and manifest["dropped"] == {}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([prompt_row(key=7), prompt_row(key=7)], "the key 7 stands in more than one row"),
        ([prompt_row(prompt=["x"])], "mine.jsonl: line 1: expected a text under prompt"),
        ([prompt_row(prompt=" ")], "expected a text under prompt"),
        ([prompt_row(kwargs=[])], "lists of equal length, not empty, under instruction_id_list and kwargs"),
        ([prompt_row(instruction_id_list=[], kwargs=[])], "lists of equal length, not empty"),
        ([{"prompt": "x"}], "instruction_id_list is missing; a row of kind ifeval has prompt, instruction_id_list, kwargs"),
    ],
)
def test_evaluation_prompts_that_could_not_be_scored_are_errors(slicer, rows, words):
    assert words in slicer.error(rows, "ifeval")


@pytest.mark.slow
def test_the_shipped_ifeval_prompts_pass(slicer):
    path = Path(__file__).resolve().parents[2] / "data/ifeval/input_data.jsonl"
    rows, _ = slicer(path.read_bytes(), "ifeval")
    assert len(rows) == 541


@pytest.mark.parametrize(
    ("kind", "tiny"),
    [("ifeval", {"split": "dev"}), ("sft", {"split": "sft", "follow": 0.5, "numeric": 0.2}), ("preference", {"split": "pairs"})],
)
def test_the_tiny_world_is_a_source_of_each_kind(slicer, kind, tiny):
    rows, manifest = slicer([prompt_row()], kind, source={"tiny": tiny}, rows=30)
    assert [row["id"] for row in rows] == [f"{tiny['split']}/{i}" for i in range(30)] and manifest["dropped"] == {}
    assert manifest["source"] == f"the tiny world's {tiny['split']} split"


def test_the_same_step_gives_the_same_bytes_and_the_manifest_vouches_for_them(slicer):
    source = good("preference", 60)
    job = slicer.job(source, "preference", rows=30, heldout=5)
    made = []
    for _ in range(2):
        slice_data.main(job)
        made.append([(slicer.results / "data" / name).read_bytes() for name in ("made.jsonl", "made.manifest.json")])
    assert made[0] == made[1]
    manifest = json.loads(made[0][1])
    assert manifest["fingerprint"] == fingerprint(job.step) and manifest["kind"] == "slice" and manifest["step"] == job.step
    assert manifest["files"] == {"made.jsonl": file_sha256(slicer.results / "data/made.jsonl")}
    assert {role: parent["fingerprint"] for role, parent in manifest["parents"].items()} == job.step["parents"]
    assert work.whole(job.out, fingerprint(job.step), job.out.parent)
    artifact = manifests.read(job.out)
    assert len(artifact.rows(heldout=True)) == 5 and len(artifact.rows(heldout=False)) == 25

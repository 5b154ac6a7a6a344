"""Rows that can't be used are dropped by reason; rows that are malformed are one error with file and line."""

import json

import pytest

from tests.data.test_formats import BOTH_SIDES, CONVERSATION, talk
from tests.support.slicer import lines, turn


def hh(chosen: str, rejected: str) -> dict:
    """Two transcripts written short: `H q A a`."""
    return {
        side: text.replace("H ", "\n\nHuman: ").replace("A ", "\n\nAssistant: ")
        for side, text in (("chosen", chosen), ("rejected", rejected))
    }


DIFFER = "whose chosen and rejected differ before the last turn"
WITH_TOOLS = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": "[{}]"}
UNUSABLE = [
    ("preference", hh("H q H r A a", "H q A b"), "with turns out of order"),
    ("preference", hh("H q", "H q"), "with turns out of order"),
    ("preference", hh("H q A a", "H r A b"), DIFFER),
    ("preference", hh("H q A ", "H q A b"), "with an empty answer"),
    ("preference", hh("H  A a H q A c", "H  A a H q A b"), "with an empty turn"),
    ("preference", {"prompt": "other", **BOTH_SIDES}, "whose prompt is not the one in chosen and rejected"),
    ("preference", {"chosen": talk("q", "a"), "rejected": talk("r", "a")}, DIFFER),
    ("sft", WITH_TOOLS, "with tools"),
    ("sft", {"instruction": "i", "output": " "}, "with an empty answer"),
    ("sft", {"instruction": "", "input": "", "output": "o"}, "without a prompt"),
    ("unpaired", {"messages": [turn("assistant", "a")], "label": True}, "without a prompt"),
    ("unpaired", {"messages": talk("q", "a", "r"), "label": True}, "without an answer at the end"),
    ("unpaired", {"prompt": "q", "completion": "\n", "label": True}, "with an empty answer"),
    ("numeric", {"question": " ", "answer": "#### 3"}, "without a prompt"),
]


@pytest.mark.parametrize(("kind", "row", "reason"), UNUSABLE, ids=range(len(UNUSABLE)))
def test_well_formed_rows_of_no_use_are_dropped_and_counted(kind, row, reason, slicer):
    good = {
        "sft": CONVERSATION,
        "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "unpaired": {"prompt": "q", "completion": "a", "label": False},
        "numeric": {"question": "q", "answer": "#### 1"},
    }[kind]
    prompts = {"sft": {"messages": talk("other", "a")}, "numeric": good | {"question": "r"}}.get(kind, good | {"prompt": "r"})
    assert slicer([row, good, prompts], kind)[1]["dropped"] == {reason: 1}


HH = "\n\nHuman: q\n\nAssistant: a"
MALFORMED = [
    ("sft", {"conversations": "hi"}, "expected a list of turns with from and value, found str"),
    ("sft", {"conversations": []}, "expected a list of turns with from and value, found list"),
    ("sft", {"conversations": [{"from": "human"}]}, "a turn needs the strings from and value"),
    ("sft", {"conversations": [{"role": "user", "content": "q"}]}, "a turn needs the strings from and value"),
    ("sft", {"conversations": [{"from": "human", "value": 3}]}, "a turn needs the strings from and value"),
    ("sft", {"conversations": [{"from": "bot", "value": "f"}]}, "found the speaker 'bot', expected one of"),
    ("sft", {"conversations": [{"from": "system", "value": "s"}], "system": "t"}, "has a system text under system and another"),
    ("sft", {"conversations": [{"from": "human", "value": "q"}], "system": 3}, "expected a text under system, found 3"),
    ("sft", {"instruction": 3, "output": "o"}, "expected a text under instruction, found 3"),
    ("sft", {"instruction": "i", "output": ["o"]}, "expected a text under output"),
    ("sft", {"instruction": "i", "input": {}, "output": "o"}, "expected a text under input"),
    (
        "sft",
        {"instruction": "i", "output": "o", "history": [["a"]]},
        "expected pairs of texts, question and answer, under history",
    ),
    ("sft", {"instruction": "i", "output": "o", "history": "a"}, "expected pairs of texts"),
    ("sft", {"instruction": "i"}, "found the keys instruction, which is none of the formats for kind sft"),
    ("sft", {"question": "q", "answer": "12"}, "expected an answer that ends with '#### ' and a number"),
    ("sft", {"prompt": "q", "completion": "a"}, "found the keys completion, prompt, which is none of the formats for kind sft"),
    ("sft", {"messages": None}, "found the keys messages (null), which is none of"),
    # hiyouga/LlamaFactory #3555, "Expected a string, got None": the keys are right, and to rename them would not help
    ("sft", {"instruction": "i", "output": None}, "a null counts as missing: fill it in, or leave the row out"),
    ("sft", BOTH_SIDES, "a row of the format ultrafeedback_binarized (chosen, rejected) can't give kind sft, only preference"),
    ("preference", CONVERSATION, "a row of the format messages (messages) can't give kind preference, only sft"),
    (
        "preference",
        {"conversations": [{"from": "human", "value": "q"}], "chosen": "a", "rejected": "b"},
        "expected a list of turns",
    ),
    ("preference", {"chosen": "hello", "rejected": HH}, "expected a transcript under chosen that begins with"),
    ("preference", {"chosen": HH, "rejected": 5}, "expected a transcript under rejected that begins with"),
    (
        "preference",
        {"chosen": talk("q", "a"), "rejected": [turn("user", "q"), {"role": "assistant"}]},
        "rejected: a message needs",
    ),
    ("preference", {"prompt": "q", "chosen": "a", "rejected": 3}, "rejected: expected a list of messages, found int"),
    ("unpaired", {"prompt": "q", "completion": "a", "label": 2}, "expected true or false (or 1 or 0) under label, found 2"),
    ("unpaired", {"messages": talk("q", "a"), "label": "up"}, "expected true or false (or 1 or 0) under label"),
    (
        "unpaired",
        {"prompt": "q", "completion": "a", "label": None},
        "found the keys completion, label (null), prompt, which is none",
    ),
    ("unpaired", {"prompt": "q", "completion": 3, "label": True}, "completion: expected a list of messages, found int"),
    ("numeric", {"question": "q", "answer": "no number ####"}, "expected an answer that ends with '#### ' and a number"),
    ("numeric", {"question": 3, "answer": "#### 3"}, "expected a text under question, found 3"),
    ("numeric", CONVERSATION, "a row of the format messages (messages) can't give kind numeric, only sft"),
]


@pytest.mark.parametrize(("kind", "row", "says"), MALFORMED, ids=range(len(MALFORMED)))
@pytest.mark.parametrize("name", ["mine.jsonl", "mine.json"])
def test_a_malformed_row_is_one_error_with_file_and_line(kind, row, says, name, slicer):
    good = {
        "sft": CONVERSATION,
        "preference": {"prompt": "q", "chosen": "a", "rejected": "b"},
        "unpaired": {"prompt": "q", "completion": "a", "label": False},
        "numeric": {"question": "q", "answer": "#### 1"},
    }[kind]
    data = lines([good, row, row]) if name.endswith("l") else json.dumps([good, row, row], indent=1).encode()
    error = slicer.error(data, kind, name=name)
    place = f"{slicer.folder}/{name}: {'line' if name.endswith('l') else 'row'} 2: "
    assert error.startswith(place) and says in error and error.count("line 3") == error.count("row 3") == 0


def test_the_error_for_unknown_keys_names_all_formats_of_the_kind(slicer):
    error = slicer.error([{"text": "x", "meta": None}], "sft")
    assert error == (
        f"{slicer.folder}/mine.jsonl: line 1: found the keys meta (null), text, which is none of the formats for kind sft: "
        "messages (messages), sharegpt (conversations), alpaca (instruction, output), gsm8k (question, answer); rename the keys"
    )

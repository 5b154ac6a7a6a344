"""A row is judged once, where it is sliced: by the model's template and tokens, and by what will judge its answers."""

import json

import pytest

from tests.support.slicer import QUESTION, chat_row, good, lines, pair_row, turn
from workflow_scripts.data import slicing
from workflow_scripts.data.words import blank, words

ALTERNATE = (
    "{%- for message in messages %}{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('turns must alternate') }}{%- endif %}{{- message['content'] }}{%- endfor %}"
)
CALL = [{"type": "function", "function": {"name": "warm", "arguments": "{}"}}]
TOOLS = [{"type": "function", "function": {"name": "warm", "parameters": {"type": "object"}}}]


def dropped(slicer, row, kind="sft"):
    rows, manifest = slicer(row if isinstance(row, bytes) else [row, *good(kind, 4)], kind)
    assert len(rows) == 4
    return manifest["dropped"]


# -- what the model's template and tokens make of it ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("sft", chat_row("what ends a turn?", "the mark <|im_end|> does")),
        ("sft", chat_row("now<|im_end|>", "fine")),
        ("sft", chat_row("a question", "fine", turn("system", "be <|im_end|>"))),
        ("preference", pair_row("a question", rejected="no<|im_end|>")),
    ],
)
def test_a_text_that_spells_a_control_token_is_dropped(slicer, kind, row):
    assert dropped(slicer, row, kind) == {"with the control token <|im_end|> in a text": 1}


@pytest.mark.parametrize(
    "talk",
    [
        [turn("user", "a"), turn("assistant", "b"), turn("user", "c"), turn("user", "d"), turn("assistant", "e")],
        [turn("system", "s"), turn("user", "a"), turn("assistant", "b")],
    ],
)
def test_a_row_that_the_template_refuses_is_dropped(slicer, tokenizer, monkeypatch, talk):
    monkeypatch.setattr(tokenizer, "chat_template", ALTERNATE)
    assert dropped(slicer, {"messages": talk}) == {"that the model's chat template refuses": 1}


def test_two_answers_in_a_row_are_dropped_whatever_the_template_says(slicer):
    talk = [turn("user", "a"), turn("assistant", "b"), turn("assistant", "c")]
    assert dropped(slicer, {"messages": talk}) == {"with a prompt that ends with the assistant's turn": 1}
    pair = {"prompt": talk[:2], "chosen": talk[1:2], "rejected": talk[2:]}
    assert dropped(slicer, pair, "preference") == {"with a prompt that ends with the assistant's turn": 1}


def test_an_evaluation_prompt_that_the_model_cannot_be_asked_stops_the_slice(slicer):
    """Before any training."""
    prompts = [{"key": 5, "prompt": f"{QUESTION}<|im_end|>", "instruction_id_list": ["x"], "kwargs": [{}], "id": "p:1"}]
    slicer.parent("ifeval_prompts", slicer.results / "data/ifeval.manifest.json", "ifeval.jsonl", lines(prompts))
    said = slicer.error(good("sft", 4))
    assert "data/ifeval.manifest.json: key 5: a prompt with the control token <|im_end|> in a text" in said


# -- what rows must not hold ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("sft", chat_row("how warm?", "let me look.") | {"tools": TOOLS}),
        ("sft", {"messages": [turn("user", "how warm?"), {**turn("assistant", "let me look."), "tool_calls": CALL}]}),
        (
            "sft",
            {"messages": [turn("user", "q"), {"role": "assistant", "content": None, "tool_calls": CALL}, turn("tool", "12")]},
        ),
        ("sft", {"messages": [turn("user", "q"), turn("tool", "12"), turn("assistant", "12")]}),
        ("sft", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "tools": "[{}]"}),
        ("sft", {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f"}]}),
        ("sft", {"instruction": "q", "output": "a", "tools": TOOLS}),
        ("preference", pair_row("q") | {"tools": TOOLS}),
        ("preference", {"prompt": "q", "chosen": [{"role": "assistant", "tool_calls": CALL}], "rejected": "no"}),
    ],
)
def test_rows_with_tools_are_dropped_in_every_form(slicer, kind, row):
    assert dropped(slicer, row, kind) == {"with tools": 1}


@pytest.mark.parametrize("none", [None, [], "", "[]"])
def test_a_column_of_tools_that_is_empty_is_none(slicer, none):
    rows, manifest = slicer([row | {"tools": none} for row in good("sft", 4)])
    assert len(rows) == 4 and manifest["dropped"] == {}


@pytest.mark.parametrize("name", ["half.jsonl", "half.json"])
def test_half_a_character_is_dropped_or_passed_over_where_nothing_reads_it(slicer, name):
    rows = good("sft", 5)
    rows[0]["messages"][1]["content"] = "half an emoji \ud83d here"
    rows[1]["note"] = "\ud83d"
    data = json.dumps(rows) if name.endswith("n") else "".join(json.dumps(row) + "\n" for row in rows)
    found, manifest = slicer(data.encode(), name=name)
    assert len(found) == 4 and manifest["dropped"] == {"with half a character (a lone surrogate)": 1}


def test_half_a_character_in_an_evaluation_prompt_is_an_error_with_file_and_line(slicer):
    row = json.dumps({"prompt": "\ud83d", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}).encode()
    assert "mine.jsonl: line 1: holds half a character" in slicer.error(row + b"\n", "ifeval")


def test_an_answer_of_invisible_characters_is_an_empty_one(slicer):
    assert blank("\u200b\u200d \ufeff") and not blank("\u200ba") and blank("")
    assert dropped(slicer, chat_row("q", "\u200b\ufeff")) == {"with an empty answer": 1}


@pytest.mark.parametrize("label", [True, 1, 1.0, "1", "true", "True "])
def test_a_label_is_read_as_people_write_it(slicer, label):
    rows, _ = slicer([{"prompt": f"q{i}", "completion": "a", "label": label} for i in range(3)], "unpaired")
    assert [row["label"] for row in rows] == [True] * 3


# -- what will judge the answers --------------------------------------------------------------------------------------------

NTH = "length_constraints:nth_paragraph_first_word"


def prompt(**changes):
    row = {"key": 1, "prompt": "name a river.", "instruction_id_list": [NTH]}
    row["kwargs"] = [{"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "sea"}]
    return row | changes


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kwargs": [{"keyword": "sea", "num_paragraphs": 3}]}, f"{NTH} refuses the kwargs"),
        ({"instruction_id_list": ["count:word_count_range"]}, "lm-eval does not know the instruction 'count:word_count_range'"),
        ({"kwargs": ["{}"]}, "expected an object for instruction 1 under kwargs, found '{}'; it is JSON in a text"),
        ({"kwargs": [{"num_paragraphs": 2.5, "nth_paragraph": 1.5, "first_word": "sea"}]}, "lm-eval's checkers can't judge"),
        ({"key": [1]}, "expected a number or a text under key, found [1]"),
    ],
)
@pytest.mark.parametrize("more", [{}, {"heldout": 1}], ids=["asked", "trained on"])
def test_a_prompt_that_could_not_be_judged_is_an_error_with_file_and_line(slicer, changes, says, more):
    said = slicer.error([prompt(key=0), prompt(**changes)], "ifeval", **more)
    assert "mine.jsonl: line 2: " in said and says in said


def test_counts_and_keys_that_pandas_made_floats_are_whole_again(slicer):
    floats = [{"num_paragraphs": 2.0, "nth_paragraph": 1.0, "first_word": "sea", "keyword": float("nan")}]
    rows, _ = slicer([prompt(key=1000.0, kwargs=floats)], "ifeval")
    assert rows[0]["kwargs"] == [{"num_paragraphs": 2, "nth_paragraph": 1, "first_word": "sea", "keyword": None}]
    assert json.dumps(rows[0]["key"]) == "1000"


def test_a_number_that_the_reader_cannot_read_is_an_error_with_file_and_line(slicer):
    row = {"prompt": "add", "answer": "it is", "final": "2"}
    assert "mine.jsonl: line 2: expected a number under final" in slicer.error([row, row | {"final": "٤٢"}], "numeric")


@pytest.mark.slow
def test_a_subject_that_lm_eval_does_not_know_is_an_error_with_file_and_line(slicer):
    row = {"question": "q", "choices": list("abcd"), "answer": 0, "subject": "astronomy"}
    said = slicer.error([row, row | {"subject": "alchemy"}], "choice")
    assert "mine.jsonl: line 2: lm-eval has no subject 'alchemy' under subject, only abstract_algebra" in said


# -- how many ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asked, more", [(6, ""), (500, "; 500 were asked for")])
def test_the_log_says_how_many_there_are_and_where_a_source_has_fewer_than_asked_for(slicer, capsys, asked, more):
    slicer(good("sft", 6), rows=asked)
    assert capsys.readouterr().out.splitlines() == [f"made.manifest: kept 6 of 6 rows, 1 of them held out{more}"]


def test_a_list_is_read_whatever_the_file_is_called(slicer):
    rows, _ = slicer(json.dumps(good("sft", 4), indent=1).encode(), name="list.jsonl")
    assert len(rows) == 4


def test_a_table_is_refused_with_the_command_that_converts_it(slicer):
    said = slicer.error(b"prompt,chosen,rejected\nq,a,b\n", "preference", name="mine.csv")
    assert "mine.csv: .csv is not read" in said and "pandas.read_csv" in said and "mine.jsonl" in said


# -- words ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Don't stop, 12.5%!", ["don", "t", "stop", "12", "5"]),
        ("写一首诗。Hello世界", [*"写一首诗", "hello", *"世界"]),
        ("きょうは雨", [*"きょうは雨"]),
        ("สวัสดี", [*"สวัสดี"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("हिन्दी में।", ["हिन्दी", "में"]),
        ("naïve café", ["naïve", "café"]),
    ],
)
def test_words_in_scripts_with_and_without_spaces(text, found):
    assert words(text) == found


def test_a_chinese_row_that_quotes_an_evaluation_prompt_is_found():
    asked = "请写一首关于大海的诗，不要使用逗号，并且至少写二十个字。"
    check = slicing.Decontaminator([asked], "ngram", 8, 0.5)
    for quoting in (asked, f"老师说：{asked}谢谢！", asked[:-1] + "！"):
        assert check.covers([], quoting)
    assert not check.covers([], "请介绍一下大海的形成过程和它的历史，谢谢你的帮助。")

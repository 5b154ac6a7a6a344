"""Rows that hold more than their texts, and answers that the template cuts: less would be trained than a row says."""

import io
import json
import shutil

import pytest
import transformers

from tests.support.slicer import chat_row, good, pair_row, turn
from workflow_scripts.models import chat

GPT = {"from": "gpt", "value": "a"}
ASKED = {"from": "human", "value": "q"}
MARKED = "with an answer that is marked not to be trained on"
PART = {"type": "text", "text": "is this"}
BESIDE = "with a thought beside the answer"
CUT = "with an answer that the model's chat template does not write whole"
THOUGHT = "<think>first this, then that</think>yes it is"


def dropped(slicer, row, kind="sft", **config):
    rows, manifest = slicer([row, *good(kind, 4)], kind, **config)
    assert len(rows) == 5 - sum(manifest["dropped"].values())
    return manifest["dropped"]


def marked(**keys):
    talk = [turn("user", "q"), turn("assistant", "wrong, at first") | keys, turn("user", "sure?"), turn("assistant", "right")]
    return {"messages": talk}


@pytest.mark.parametrize(
    "row",
    [
        marked(weight=0),  # OpenAI, Mistral; axolotl-ai-cloud/axolotl pull 1703
        marked(weight=0.5),
        marked(train=False),
        marked(loss=False),  # modelscope/ms-swift #5215 and #9029
        marked(loss_weight=0.0),
        {"conversations": [ASKED, GPT | {"loss": False}, ASKED, GPT]},
    ],
)
def test_an_answer_that_is_marked_not_to_be_trained_on_is_not_trained_on(slicer, row):
    assert dropped(slicer, row) == {MARKED: 1}


@pytest.mark.parametrize("row", [marked(weight=1), marked(weight=None), marked(train=True), marked(loss="true")])
def test_a_mark_that_leaves_an_answer_as_it_is_changes_nothing(slicer, row):
    assert dropped(slicer, row) == {}


def test_marks_of_questions_and_of_a_prompts_earlier_answers_decide_nothing(slicer):
    row = marked()
    row["messages"][0]["loss_weight"] = 0.0
    assert dropped(slicer, row) == {}
    talk = marked(weight=0)["messages"]
    assert dropped(slicer, {"prompt": talk[:3], "chosen": talk[3:], "rejected": "no"}, "preference") == {}


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("sft", {"messages": [turn("user", "q"), turn("assistant", "a") | {"reasoning_content": "hm"}]}),
        ("sft", {"messages": [turn("user", "q"), turn("assistant", "a") | {"thinking": "hm"}]}),
        ("preference", {"prompt": "q", "chosen": [turn("assistant", "a") | {"reasoning": "hm"}], "rejected": "b"}),
    ],
)
def test_an_answer_whose_thought_stands_beside_it_is_not_trained_without_it(slicer, kind, row):
    """jingyaogong/minimind #737, huggingface/trl #2919: the template leaves the key out, and the model learns not to think."""
    assert dropped(slicer, row, kind) == {BESIDE: 1}
    assert dropped(slicer, {"messages": [turn("user", "q"), turn("assistant", "a") | {"reasoning_content": ""}]}) == {}


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("sft", chat_row("<image> what is it?", "a bridge") | {"images": ["bridge.jpg"]}),
        ("sft", {"conversations": [ASKED, GPT], "image": "bridge.jpg"}),
        ("preference", pair_row("what is it?") | {"videos": ["bridge.mp4"]}),
        (
            "sft",
            {"messages": [turn("user", [PART, {"type": "image_url", "image_url": {"url": "b.jpg"}}]), turn("assistant", "a")]},
        ),
        ("preference", pair_row([turn("user", [PART, {"type": "image"}])])),
    ],
)
def test_a_question_about_a_picture_is_not_trained_without_it(slicer, kind, row):
    """hiyouga/LlamaFactory #6375: "This model does not support image input"."""
    assert dropped(slicer, row, kind) == {"with pictures or sound": 1}


def test_a_content_in_parts_is_read_where_all_of_them_are_texts(slicer):
    """modelscope/ms-swift #8326: "messages/content changed from string to object", in a file that has both."""
    talk = [
        turn("user", [PART, {"type": "text", "text": " a bridge?"}]),
        turn("assistant", [{"type": "text", "text": "yes it is"}]),
    ]
    kept, manifest = slicer([{"messages": talk}, *good("sft", 4)])
    assert kept[0]["messages"] == [turn("user", "is this a bridge?"), turn("assistant", "yes it is")] and not manifest["dropped"]


def test_a_content_in_parts_of_another_form_is_an_error(slicer):
    odd = {"messages": [turn("user", [PART, "and this"]), turn("assistant", "a")]}
    assert "line 1: a message needs the strings role and content" in slicer.error([odd])


def test_pictures_in_a_column_of_parquet_are_seen_and_not_read_as_text(slicer):
    import pyarrow
    import pyarrow.parquet

    rows = [row | {"images": [{"bytes": b"\x89PNG", "path": None}] if i == 0 else []} for i, row in enumerate(good("sft", 4))]
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    kept, manifest = slicer(file.getvalue(), name="mine.parquet")
    assert len(kept) == 3 and manifest["dropped"] == {"with pictures or sound": 1}


@pytest.fixture
def cutting(tokenizer, monkeypatch):
    """A template that leaves out of an answer what it says up to </think>, as that of DeepSeek's distilled models does."""
    text = "message['content']"
    cut = tokenizer.chat_template.replace(f"{text} + '<|im_end|>'", f"{text}.split('</think>')[-1] + '<|im_end|>'")
    assert cut != tokenizer.chat_template
    monkeypatch.setattr(tokenizer, "chat_template", cut)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("sft", chat_row("is it?", THOUGHT)),
        ("sft", chat_row("sure?", "yes", turn("user", "is it?"), turn("assistant", THOUGHT))),
        ("preference", pair_row("is it?", THOUGHT, "<think>that, then this</think>yes it is")),  # equal, once they are cut
    ],
)
def test_an_answer_that_the_template_cuts_is_not_trained_in_part(slicer, cutting, kind, row):
    """huggingface/open-r1 #515 and modelscope/ms-swift #4939: after SFT the thoughts are gone."""
    assert dropped(slicer, row, kind) == {CUT: 1}


def test_thoughts_of_a_prompts_earlier_answers_may_go_and_spaces_may_differ(slicer, cutting):
    earlier = [turn("user", "is it?"), turn("assistant", THOUGHT), turn("user", "sure?")]
    assert dropped(slicer, {"prompt": earlier, "chosen": " yes\n\n it is ", "rejected": "no"}, "preference") == {}


@pytest.fixture
def joining(slicer, base, tmp_path, monkeypatch):
    """A tokenizer that makes one token of two line breaks, as Qwen2.5's does. (The rarest token gives way to it.)"""
    folder = tmp_path / "joining"
    shutil.copytree(base.parent, folder)
    made = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = made["model"]["vocab"]
    vocabulary["ĊĊ"] = vocabulary.pop(max(vocabulary, key=vocabulary.get))
    made["model"]["merges"][-1] = ["Ċ", "Ċ"]
    made["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"\s*[\r\n]+|\d| ?[A-Za-z]+|[^A-Za-z\d]"}
    (folder / "tokenizer.json").write_text(json.dumps(made))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    monkeypatch.setattr(chat, "tokenizer_of", lambda base: tokenizer)


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("sft", chat_row("is it?", "\n\nyes")),
        ("sft", chat_row("sure?", "yes", turn("user", "is it?"), turn("assistant", "\nyes"))),
        ("preference", pair_row("is it?", rejected="\nno")),
    ],
)
def test_an_answer_is_not_trained_after_other_tokens_than_it_is_asked_for_with(slicer, joining, kind, row):
    """huggingface/trl #2054 and #5213: "Mismatch between tokenized prompt and the start of tokenized prompt+completion"."""
    assert dropped(slicer, row, kind) == {"with an answer whose first line breaks the tokenizer joins to the question": 1}


def test_spaces_that_stay_tokens_of_their_own_begin_an_answer(slicer, joining):
    assert dropped(slicer, chat_row("is it?", " yes\n\nit is")) == {}


def test_line_breaks_that_stay_tokens_of_their_own_begin_an_answer(slicer):
    assert dropped(slicer, chat_row("is it?", "\n\nyes")) == {}


@pytest.mark.parametrize("name", ["mine.jsonl", "mine.json"])
def test_a_row_that_is_nested_too_deeply_is_one_error(slicer, name):
    deep = b'{"messages": ' + b"[" * 30_000 + b"]" * 30_000 + b"}"
    data = deep if name.endswith("l") else b"[" + deep + b"]"
    assert "not valid JSON: maximum recursion depth" in slicer.error(data, name=name)

"""Every data format: a real file through slicing to canonical rows and masked tokens; malformed and unknown rows are refused."""

import json
from pathlib import Path

import pytest

from tests.support import small_steps
from tests.support.slicer import turn
from workflow_scripts.artifacts import manifests
from workflow_scripts.config.schema import SCHEMA
from workflow_scripts.data import formats, parts

ROOT = Path(__file__).resolve().parents[2]
FILES = ROOT / "tests/files/formats"
IGNORE = -100


def talk(*texts):
    return [turn(role, text) for role, text in zip(("user", "assistant") * 9, texts, strict=False)]


def said(*texts):
    return [turn("assistant", text) for text in texts]


VICUNA = "I am Vicuna, a language model trained by researchers from Large Model Systems Organization (LMSYS)."
ALPHABET = "Arrange the following words in alphabetical order: rule, drive, classroom, answer."
MATHS = "What is the result of 660-549695? Only respond with math and no words."
EGGS = "He bought 3*12=<<3*12=36>>36 eggs\nSo they cost 36*.5=$<<36*.5=18>>18\n#### 18"
WORDS = {
    "prompt": talk(ALPHABET),
    "chosen": said("answer, classroom, drive, rule"),
    "rejected": said("Answer, Classroom, Drive, Rule."),
}
# (file, kind) -> (its format, {index of a row: that row, by hand from the file})
REAL = {
    ("data/sft/oasst_en_conversations.jsonl", "sft"): ("messages", {}),
    ("data/sft/gpteacher_roleplay.jsonl", "sft"): ("messages", {}),
    ("data/preference/ultrafeedback_1k.jsonl", "preference"): ("pairs", {}),
    ("data/preference/oasst_en_ranked_pairs.jsonl", "preference"): ("pairs", {}),
    ("data/preference/hh_harmless_test_1k.jsonl", "preference"): ("pairs", {}),
    ("sharegpt.json", "sft"): (
        "sharegpt",
        {0: {"messages": talk("Who are you?", VICUNA, "Have a nice day!", "You too!")}},
    ),
    ("sharegpt_pairs.json", "preference"): (
        "sharegpt_pairs",
        {
            1: {
                "prompt": [
                    turn(
                        "system",
                        "You are a helpful assistant, who always provide explanation. Think like you are answering to a five "
                        "year old.",
                    ),
                    turn("user", "Write a sentence not in English."),
                ],
                "chosen": said(
                    '"Je mange une pomme." This sentence is in French, and it means "I am eating an apple." Imagine you are '
                    "enjoying a sweet and crunchy apple, but you're telling it to someone who speaks French. You would use this "
                    "sentence to share what you're doing!"
                ),
                "rejected": said(
                    'Ohoy! *giggle* Do you want to hear a sentence in a funny language? *bubble* How about this one: "Koala '
                    'kangaroo cooked kettle korn!" *squeal* That means "The koala and kangaroo cooked popcorn" in a silly '
                    "language! *giggle* Do you like it? *bubble*"
                ),
            }
        },
    ),
    ("alpaca.json", "sft"): (
        "alpaca",
        {
            2: {"messages": talk("Sum up the numbers.\n\n3, 2, 5", "The sum of the numbers is 10.")},
            3: {"messages": talk("Classify this as either an object or an action.\n\nrunning", "Action.")},
        },
    ),
    ("ultrafeedback_binarized.jsonl", "preference"): ("ultrafeedback_binarized", {0: WORDS}),
    ("pairs.jsonl", "preference"): ("pairs", {0: WORDS}),
    ("hh.jsonl", "preference"): (
        "hh",
        {
            0: {
                "prompt": talk("Hello, How are you?"),
                "chosen": said("Hello, I’m doing quite well."),
                "rejected": said("Hello, I am doing well. What is your name?"),
            },
            3: {
                "prompt": talk("Does Glenda Blackwell still live in Homer, LA?", "Yes.", "Is she still living with her mom?"),
                "chosen": said("Not anymore."),
                "rejected": said("Yes."),
            },
        },
    ),
    ("kto.jsonl", "unpaired"): (
        "kto",
        {0: {"prompt": talk(MATHS), "completion": said("660 - 549695 = -549035"), "label": True}},
    ),
    ("kto_messages.json", "unpaired"): (
        "kto_messages",
        {0: {"prompt": talk(MATHS), "completion": said("660 - 549695 = -549035"), "label": True}},
    ),
    ("gsm8k.jsonl", "numeric"): (
        "gsm8k",
        {
            2: {
                "prompt": talk("Tim buys 3 dozen eggs.  Eggs cost $.50 each.  How much did he pay for eggs?"),
                "answer": EGGS,
                "final": "18",
            }
        },
    ),
    ("gsm8k.jsonl", "sft"): (
        "gsm8k",
        {2: {"messages": talk("Tim buys 3 dozen eggs.  Eggs cost $.50 each.  How much did he pay for eggs?", EGGS)}},
    ),
}
LOST = {"hh.jsonl": {"with turns out of order": 1}}


def cut(slicer, file, kind, **config):
    path = ROOT / file if "/" in file else FILES / file
    config = {"rows": 12, "max_prompt_tokens": 10_000, "name": path.name} | config
    job = slicer.job(path.read_bytes(), kind, **config)
    from workflow_scripts.steps import slice_data

    slice_data.main(job)
    return manifests.read(job.out)


def in_a_ring(file: str, kind: str):
    """The slices that ship here are large."""
    marks = [pytest.mark.slow] if file.startswith("data/preference/") else []
    return pytest.param(file, kind, marks=marks, id=f"{file.rsplit('/')[-1]}-{kind}")


@pytest.mark.parametrize(("file", "kind"), [in_a_ring(*one) for one in REAL])
def test_a_real_file_becomes_canonical_rows_and_masked_tokens(file, kind, slicer, base, tokenizer, tmp_path):
    name, by_hand = REAL[file, kind]
    made = cut(slicer, file, kind)
    rows = made.rows()
    assert made.data["dropped"] == LOST.get(file, {}) and set(made.data["formats"]) == {name} and len(rows) >= 4
    for index, expected in by_hand.items():
        assert {key: value for key, value in rows[index].items() if key not in ("id", "heldout")} == expected
    kept = [row for row in rows if not row["heldout"]]
    if kind == "sft":
        trainer = built(made, "sft_v2", base, tmp_path)
        check_sft(trainer, kept, tokenizer)
    elif kind == "preference":
        trainer = built(made, "dpo", base, tmp_path)
        check_dpo(trainer, kept, tokenizer)
    elif kind == "unpaired":  # no method trains on it yet: prompt and completion as the template writes them
        for row in kept:
            prompt, whole = pieces(tokenizer, row["prompt"]), pieces(tokenizer, [*row["prompt"], *row["completion"]])
            start = tokenizer("<|im_start|>assistant\n")["input_ids"]
            assert tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"] == prompt[0] + start
            assert tokenizer.apply_chat_template([*row["prompt"], *row["completion"]])["input_ids"] == whole[0]
            assert isinstance(row["label"], bool)
    else:
        assert all(str(float(row["final"])) and row["answer"].endswith(f"{int(row['final']):,}") for row in rows)


def built(made, experiment, base, tmp_path):
    """TRL's own trainer over the slice."""
    return small_steps.built_trainer(tmp_path / "run", experiment, base, made.path, max_length=8192)


def pieces(tokenizer, messages):
    """(ids, labels) of a conversation, put together piece by piece: a loss on the assistant's text and its end of turn."""
    ids, labels = [], []
    for message in messages:
        spoken = message["role"] == "assistant"
        for text, on in ((f"<|im_start|>{message['role']}\n", False), (f"{message['content']}<|im_end|>", spoken), ("\n", False)):
            piece = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += piece
            labels += piece if on else [IGNORE] * len(piece)
    return ids, labels


def check_sft(trainer, rows, tokenizer):
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(rows))])
    for i, row in enumerate(rows):
        ids, labels = pieces(tokenizer, row["messages"])
        length = int(batch["attention_mask"][i].sum())
        assert batch["input_ids"][i, :length].tolist() == ids
        assert batch["labels"][i, :length].tolist() == labels and (batch["labels"][i, length:] == IGNORE).all()
        assert sum(label == tokenizer.eos_token_id for label in labels) == sum(t["role"] == "assistant" for t in row["messages"])


def check_dpo(trainer, rows, tokenizer):
    for i, row in enumerate(rows):
        batch = trainer.data_collator([trainer.train_dataset[i]])
        prompt = pieces(tokenizer, row["prompt"])[0] + tokenizer("<|im_start|>assistant\n")["input_ids"]
        for side, answer in enumerate(("chosen", "rejected")):
            spoken = tokenizer(row[answer][0]["content"] + "<|im_end|>\n")["input_ids"]  # DPO counts the template's last line end
            length = int(batch["attention_mask"][side].sum())
            assert batch["input_ids"][side, :length].tolist() == prompt + spoken
            assert batch["completion_mask"][side].tolist()[:length] == [0] * len(prompt) + [1] * len(spoken)
            assert batch["completion_mask"][side, length:].sum() == 0


def texts(value):
    """All texts in a value, wherever they stand."""
    if isinstance(value, str):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for child in children for text in texts(child)]


@pytest.mark.parametrize("file", ["sharegpt.json", "sharegpt_pairs.json", "kto_messages.json", "alpaca.json", "hh.jsonl"])
def test_no_text_is_altered_beyond_the_markup(file):
    kind = next(kind for name, kind in REAL if name == file)
    data = (FILES / file).read_text()
    rows = json.loads(data) if file.endswith(".json") else [json.loads(line) for line in data.splitlines()[:4]]
    for row in rows:
        found = texts(formats.convert(row, kind, "here")[1])
        for key in set(row) - {"id"}:
            for text in texts(row[key]):
                if file == "hh.jsonl":  # the transcript written again from its turns
                    turns = formats.convert(row, kind, "here")[1]
                    speaker = {"user": "Human", "assistant": "Assistant"}
                    assert text == "".join(
                        f"\n\n{speaker[one['role']]}: {one['content']}" for one in turns["prompt"] + turns[key]
                    )
                elif file == "alpaca.json":
                    assert any(text in one for one in found)
                else:
                    assert text in found or text in parts.SPEAKERS


@pytest.mark.parametrize("text", ["two  spaces ", " leading", "tab\t", "a\n\n\nb\n", "\u00a0x\u2028", "Human: said"])
def test_spaces_in_a_text_survive_every_format(text):
    hh = {"chosen": f"\n\nHuman: {text}\n\nAssistant: {text}", "rejected": f"\n\nHuman: {text}\n\nAssistant: {text}!"}
    user, answer = turn("user", text), turn("assistant", text)
    pair = {"prompt": [user], "chosen": [answer], "rejected": [turn("assistant", text + "!")]}
    assert formats.convert(hh, "preference", "x")[1] == pair
    assert formats.convert({"prompt": text, "chosen": text, "rejected": text + "!"}, "preference", "x")[1] == pair
    spoken = [{"from": "human", "value": text}, {"from": "gpt", "value": text}]
    assert formats.convert({"conversations": spoken}, "sft", "x")[1] == {"messages": [user, answer]}
    assert formats.convert({"instruction": text, "input": "", "output": text}, "sft", "x")[1] == {"messages": [user, answer]}
    assert formats.convert({"messages": [user, answer]}, "sft", "x")[1] == {"messages": [user, answer]}


# -- recognition ----------------------------------------------------------------------------------------------------------

CONVERSATION = {"messages": talk("q", "a")}
BOTH_SIDES = {"chosen": talk("q", "a"), "rejected": talk("q", "b")}


@pytest.mark.parametrize(
    ("row", "kind", "name"),
    [
        # UltraFeedback-binarized as it stands on the hub has all of these keys
        ({"prompt": "q", "prompt_id": "1", **BOTH_SIDES, **CONVERSATION}, "preference", "ultrafeedback_binarized"),
        ({"prompt": "q", "prompt_id": "1", **BOTH_SIDES, **CONVERSATION}, "sft", "messages"),
        (BOTH_SIDES, "preference", "ultrafeedback_binarized"),  # without a prompt of its own
        ({"prompt": talk("q"), "chosen": said("a"), "rejected": said("b")}, "preference", "pairs"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "preference", "hh"),
        (CONVERSATION | {"label": False}, "unpaired", "kto_messages"),
        (CONVERSATION | {"label": False}, "sft", "messages"),
        (CONVERSATION | {"instruction": "i", "output": "o", "question": "q", "answer": "#### 1"}, "sft", "messages"),
        ({"messages": None, "instruction": "i", "output": "o"}, "sft", "alpaca"),  # a null is no key
        ({"question": "q", "answer": "so\n#### -1,234.5"}, "numeric", "gsm8k"),
    ],
)
def test_a_row_of_several_formats_is_the_first_of_the_documented_order_that_gives_the_kind(row, kind, name):
    assert formats.convert(row, kind, "here")[0] == name


def test_a_named_format_is_taken_instead(slicer):
    rows = [CONVERSATION | {"instruction": f"i{i}", "output": "o"} for i in range(3)]
    assert slicer.error([CONVERSATION], format="alpaca") == (
        f"{slicer.folder}/mine.jsonl: line 1: instruction is missing; a row of the format alpaca has instruction, output, "
        "found messages"
    )
    made = slicer(rows, format="alpaca")
    assert [row["messages"] for row in made[0]] == [talk(f"i{i}", "o") for i in range(3)] and made[1]["formats"] == {"alpaca": 3}
    assert slicer([*rows, {"messages": talk("r", "a")}], heldout=3)[0][0]["messages"] == talk("q", "a")


def test_alpaca_with_system_and_history_and_sharegpt_with_system():
    row = {"instruction": "c", "input": "d", "output": "e", "system": "s", "history": [["a", "b"]]}
    system = turn("system", "s")
    assert formats.convert(row, "sft", "x")[1] == {"messages": [system, *talk("a", "b", "c\n\nd", "e")]}
    row = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "s", "tools": ""}
    assert formats.convert(row, "sft", "x")[1] == {"messages": [system, *talk("a", "b")]}


def test_the_number_of_a_gsm8k_answer():
    for answer, final in (("x #### 2\n#### 1,080", "1080"), ("####-5", "-5"), ("#### 3.50 ", "3.50"), ("#### .5", ".5")):
        assert formats.convert({"question": "q", "answer": answer}, "numeric", "x")[1]["final"] == final


def test_the_kinds_that_formats_give_are_the_schemas():
    kinds = SCHEMA["$defs"]["slice"]["properties"]["kind"]["enum"]
    assert {kind for form in formats.FORMATS for kind in form.kinds} | {"ifeval"} == set(kinds)
    assert len({form.name for form in formats.FORMATS}) == len(formats.FORMATS)

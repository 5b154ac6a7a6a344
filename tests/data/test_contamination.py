"""Evaluation prompts planted into the real slices: what the n-gram rule (8 words, half of a prompt) finds, and what it does not.

The figures are measured, not wished for: a reworded prompt mostly passes. They are printed by `pytest -s`.
"""

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.support.slicer import Slicer, Words, turn
from workflow_scripts.artifacts import manifests
from workflow_scripts.data import slicing
from workflow_scripts.models import chat
from workflow_scripts.steps import slice_data

ROOT = Path(__file__).resolve().parents[2]
RULE = {"rule": "ngram", "ngram": 8, "share": 0.5}
PROMPTS = {row["key"]: row["prompt"] for row in map(json.loads, (ROOT / "data/ifeval/input_data.jsonl").open(encoding="utf-8"))}

EXACT = [1000, 1012, 1040, 1127, 1174, 1248, 1305, 1498, 1670, 2577]
REWORDED = {
    1001: "I'm going on holiday to Japan soon. Could you draw up a travel plan for me in the manner of Shakespeare? Please don't "
    "use commas anywhere in your answer.",
    1082: "Tell a two-paragraph story about a man who finds out one morning that he lives in a video game, and put the markdown "
    "divider *** between the two paragraphs.",
    1381: "Please come up with a humorous song, fewer than ten sentences long, that proposes building a new playground at the "
    "elementary school near me.",
    209: "Write a blog post of 400 words or more about the best way to get a good night's sleep.",
    2825: "How can you get to know someone on a deep level in a romantic relationship? Talk about vulnerability and leave out "
    "all commas.",
}
WRAPPED = {
    16: "I found this in an old exercise book and would like to see what you make of it:\n\n{}\n\nTake your time.",
    1802: "You are given a task. Task: {} Answer as well as you can, then say how sure you are.",
    1908: "Hello there! A friend of mine asked me this the other day. {} What would you have said to her?",
    2253: "### Instruction\n{}\n\n### Response\n",
    2383: "Translate the following text to German, and then do what it asks for in English. {} Thank you very much in advance!",
}
REWORDED_DROPPED = 0  # of 5, as measured
QUICK = ("data/sft/oasst_en_conversations.jsonl", "data/preference/oasst_en_ranked_pairs.jsonl")  # in `make test-quick`

# What the rule drops of each shipped file, all rows, nothing planted: (rows, dropped), as measured.
SHIPPED = {
    "data/sft/oasst_en_conversations.jsonl": (546, 0),
    "data/sft/gpteacher_roleplay.jsonl": (1923, 0),
    "data/preference/ultrafeedback_1k.jsonl": (1000, 0),
    "data/preference/oasst_en_ranked_pairs.jsonl": (212, 0),
    "data/preference/hh_harmless_test_1k.jsonl": (1000, 0),
}


def planted() -> dict[str, list[str]]:
    return {
        "exact": [PROMPTS[key] for key in EXACT],
        "reworded": list(REWORDED.values()),
        "wrapped": [text.replace("{}", PROMPTS[key]) for key, text in WRAPPED.items()],
    }


def row_of(kind: str, text: str, place: int) -> dict:
    """A row with the text in one of the places where a row can hold it."""
    if kind == "sft":
        return [
            {"messages": [turn("user", text), turn("assistant", "Here you are.")]},
            {"messages": [turn("user", "Hello"), turn("assistant", "Hi."), turn("user", text), turn("assistant", "Sure.")]},
            {"messages": [turn("system", text), turn("user", "Go on."), turn("assistant", "Well then.")]},
            {"messages": [turn("user", "Think of an exercise."), turn("assistant", text)]},
        ][place % 4]
    return [
        {"prompt": [turn("user", text)], "chosen": [turn("assistant", "Yes.")], "rejected": [turn("assistant", "No.")]},
        {"prompt": "Think of an exercise.", "chosen": text, "rejected": "No."},
        {"prompt": "Think of an exercise.", "chosen": "No.", "rejected": [turn("assistant", text)]},
    ][place % 3]


@pytest.fixture
def slicer(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "tokenizer_of", lambda base: Words())
    made = Slicer(tmp_path)
    rows = [
        {**json.loads(line), "id": f"input_data.jsonl:{i}"}
        for i, line in enumerate((ROOT / "data/ifeval/input_data.jsonl").open(encoding="utf-8"), 1)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    made.parent("ifeval_prompts", made.results / "data/ifeval.manifest.json", "ifeval.jsonl", text)
    return made


def cut(slicer, file: str, kind: str, more: list[dict]) -> manifests.Artifact:
    """The slice of all of a shipped file, with rows of ours among its own."""
    path = ROOT / file
    lines = path.read_text(encoding="utf-8").splitlines()
    step = max(1, len(lines) // (len(more) + 1))
    for i, row in enumerate(more):
        lines.insert((i + 1) * step + i, json.dumps(row))
    job = slicer.job("\n".join(lines).encode(), kind, name=path.name, rows=10_000, decontaminate=RULE, max_prompt_tokens=10**6)
    slice_data.main(job)
    return manifests.read(job.out)


@pytest.mark.parametrize("file", [pytest.param(file, marks=[] if file in QUICK else [pytest.mark.slow]) for file in SHIPPED])
def test_planted_prompts_are_found_as_they_are_and_wrapped_and_the_figure_for_reworded_ones_is_known(file, slicer, capsys):
    kind = file.split("/")[1]
    places = planted()
    texts = [text for group in places.values() for text in group]
    clean = cut(slicer, file, kind, [])
    made = cut(slicer, file, kind, [row_of(kind, text, i) for i, text in enumerate(texts)])
    # a row of ours is told by its text, which stands in no row of the file
    left = ["\n".join([slicing.prompt_of(row), *slicing.answer_texts(row)]) for row in made.rows()]
    dropped = Counter(name for name, group in places.items() for text in group if not any(text in row for row in left))
    with capsys.disabled():
        found = ", ".join(f"{name} {dropped[name]} of {len(group)}" for name, group in places.items())
        print(f"\n{file}: planted and dropped: {found}; of its own rows: {clean.data['dropped']}")
    assert dropped["exact"] == 10 and dropped["wrapped"] == 5
    assert dropped["reworded"] == REWORDED_DROPPED
    rows, own = SHIPPED[file]
    assert clean.data["rows"]["candidates"] == rows
    assert clean.data["dropped"].get("covering an evaluation prompt", 0) == own
    assert made.data["dropped"].get("covering an evaluation prompt", 0) == own + 15 + REWORDED_DROPPED


def test_the_rewordings_are_of_prompts_that_stand_in_the_evaluation_and_how_much_of_them_is_covered(capsys):
    for key, text in REWORDED.items():
        grams = slicing._ngrams(PROMPTS[key], 8)
        share = len(grams & slicing._ngrams(text, 8)) / len(grams)
        with capsys.disabled():
            print(f"\nreworded {key}: {share:.0%} of its 8-grams covered", end="")
        assert share < 0.5
    assert not set(EXACT) & set(REWORDED) and not set(WRAPPED) & {*EXACT, *REWORDED} and len(set(EXACT)) == 10

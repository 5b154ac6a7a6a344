"""Prompts composed of real questions and IFEval's instructions: none conflicts, none is IFEval's, and each can be followed."""

import json
import random
from collections import Counter

import pytest

from tests.conftest import ROOT
from workflow_scripts.config.schema import SCHEMA
from workflow_scripts.data.questions import part_of, questions
from workflow_scripts.data.slicing import Decontaminator
from workflow_scripts.data.words import words
from workflow_scripts.evaluation import compose, ifeval
from workflow_scripts.evaluation import rows as judging
from workflow_scripts.plumbing.messages import InputError

FILES = ("preference/ultrafeedback_1k.jsonl", "sft/gpteacher_roleplay.jsonl", "sft/oasst_en_conversations.jsonl")
KINDS = SCHEMA["$defs"]["source_composed"]["properties"]["composed"]["properties"]["kinds"]["items"]["enum"]


def read(*names):
    for name in names:
        for number, line in enumerate((ROOT / "data" / name).read_text(encoding="utf-8").splitlines(), 1):
            yield f"{name}:{number}", name, json.loads(line)


@pytest.fixture(scope="module")
def evaluated() -> list[str]:
    return [row["prompt"] for _, _, row in read("ifeval/input_data.jsonl")]


@pytest.fixture(scope="module")
def check(evaluated) -> Decontaminator:
    return Decontaminator(evaluated, "ngram", 8, 0.5)


@pytest.fixture(scope="module")
def asked():
    return questions(read(*FILES), "train", 120)[0]


@pytest.fixture(scope="module")
def thousand(asked, check) -> list[dict]:
    return compose.prompts(asked, 1000, 1, 3, None, check)[0]


def grams(text: str) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + 8]) for i in range(len(found) - 7)}


def test_the_kinds_of_the_schema_are_those_of_lm_eval():
    with ifeval.reference() as checkers:
        assert sorted(KINDS) == sorted(checkers.instructions_registry.INSTRUCTION_DICT)
    assert len(KINDS) == 25


def test_no_prompt_has_instructions_that_conflict_and_every_kind_occurs(thousand):
    with ifeval.reference() as checkers:
        table = checkers.instructions_registry.INSTRUCTION_CONFLICTS
        for row in thousand:
            ids = row["instruction_id_list"]
            assert 1 <= len(ids) == len(row["kwargs"]) <= 3
            for i, one in enumerate(ids):
                for other in ids[i + 1 :]:
                    assert other not in table[one] and one not in table[other], ids
    used = Counter(name for row in thousand for name in row["instruction_id_list"])
    assert set(used) == set(KINDS)
    assert min(used.values()) >= 40, used  # all alike: a kind that needs luck is not forgotten
    assert Counter(len(row["instruction_id_list"]) for row in thousand).keys() == {1, 2, 3}


def test_lm_evals_table_is_not_changed_by_our_reading_of_it():
    with ifeval.reference() as checkers:
        table = checkers.instructions_registry.INSTRUCTION_CONFLICTS
        before = {name: set(others) for name, others in table.items()}
        symmetric = compose.conflicts(checkers)
        assert table == before != symmetric
        assert all(one in symmetric[other] for one in symmetric for other in symmetric[one])


def test_no_prompt_is_one_of_ifeval_nor_shares_half_of_its_8_grams(thousand, evaluated):
    theirs = [grams(text) for text in evaluated]
    for row in thousand:
        text, own = row["prompt"], grams(row["prompt"])
        assert not any(text in other or other in text for other in evaluated), text
        assert len(own & set().union(*theirs)) < 0.5 * len(own), text  # not even of all of them together
        assert not any(len(own & other) >= 0.5 * len(other) for other in theirs if other), text


def test_a_question_stands_in_one_prompt_and_a_prompt_says_what_is_checked(thousand, asked):
    texts = {one.id: one.text for one in asked}
    assert len({row["key"] for row in thousand}) == 1000
    with ifeval.reference() as checkers:
        for row in thousand:
            assert row["prompt"].startswith(texts[row["id"]])
            for name, given in zip(row["instruction_id_list"], row["kwargs"], strict=True):
                said = checkers.instructions_registry.INSTRUCTION_DICT[name](name).build_description(**given)
                assert compose.WORDED.get(name, said) in row["prompt"]
    judging.check("ifeval", ((row["id"], row) for row in thousand))


def test_one_seed_gives_one_draw_and_random_goes_on_as_if_nothing_had_been(asked, check):
    random.seed(5)
    before = random.getstate()
    first = compose.prompts(asked, 30, 1, 3, None, check)[0]
    assert random.getstate() == before
    random.seed(6)
    assert compose.prompts(asked, 30, 1, 3, None, check)[0] == first
    assert compose.prompts(asked, 30, 2, 3, None, check)[0] != first


def test_as_many_instructions_as_asked_for_of_the_kinds_that_are_named(asked, check):
    kinds = ["punctuation:no_comma", "change_case:english_lowercase", "change_case:english_capital"]
    made, facts = compose.prompts(asked, 60, 1, 2, kinds, check)
    assert set(facts["kinds"]) == set(kinds) and set(facts["instructions"]) == {"1", "2"}


def test_questions_for_development_and_for_training_are_apart(check):
    parts = {part: questions(read(*FILES), part, 120)[0] for part in ("train", "dev")}
    plain = {part: {" ".join(one.text.lower().split()) for one in found} for part, found in parts.items()}
    assert not plain["train"] & plain["dev"]
    share = len(plain["dev"]) / sum(map(len, plain.values()))
    assert 0.17 < share < 0.23
    # from another file, in other cases and spaces, it is the same question and on the same side
    for one in parts["dev"][:50]:
        again = [("x:1", "x", {"instruction": "  " + one.text.replace(" ", "  ").capitalize(), "output": "yes"})]
        assert not questions(again, "train", 120)[0]


def test_what_is_no_question_that_stands_alone_is_left_out_by_reason():
    turn = [{"role": "user", "content": "why is the sky blue"}]
    rows = [
        {"prompt": "why is the sky blue", "chosen": "a", "rejected": "b"},
        {"messages": [*turn, {"role": "assistant", "content": "so"}, {"role": "user", "content": "really"}]},
        {"prompt": [{"role": "system", "content": "be short"}, *turn]},
        {"prompt": "word " * 121},
        {"prompt": turn, "tools": [{"name": "look"}]},
        {"prompt": "  "},
    ]
    part = part_of("why is the sky blue")
    found, left = questions(((str(i), str(i), row) for i, row in enumerate(rows)), part, 120)
    assert [(one.id, one.text) for one in found] == [("0", "why is the sky blue")]
    assert left == {
        "with a question that was there before": 1, "without a question that stands alone": 2,
        "with a question above 120 words": 1, "with tools": 1,
    }  # fmt: skip
    with pytest.raises(InputError, match="place 7: .*none of the formats"):
        questions([("7", "place 7", {"text": "why"})], part, 120)


def test_a_question_like_an_evaluations_prompt_whatever_is_added_is_left_out_and_counted(asked, evaluated, check):
    theirs = compose.Question("x:1", max(evaluated, key=lambda text: len(words(text))))
    made, facts = compose.prompts([theirs, *asked[:10]], 11, 1, 3, None, check)
    assert len(made) == 10 and facts[compose.LIKE] == 1 and "x:1" not in {row["id"] for row in made}


# Kinds and arguments that lm-eval's table lets stand together, and that no answer can follow
IMPOSSIBLE = [
    {"length_constraints:nth_paragraph_first_word": {"num_paragraphs": 5, "nth_paragraph": 6, "first_word": "river"}},
    {"length_constraints:number_sentences": {"num_sentences": 1, "relation": "less than"}},
    {"keywords:existence": {"keywords": ["hill", "river"]}, "keywords:forbidden_words": {"forbidden_words": ["river", "sea"]}},
    {
        "keywords:frequency": {"keyword": "river", "frequency": 2, "relation": "less than"},
        "keywords:existence": {"keywords": ["river", "rivers"]},
    },
    {
        "keywords:letter_frequency": {"letter": "e", "let_frequency": 2, "let_relation": "less than"},
        "startend:end_checker": {"end_phrase": "Is there anything else I can help with?"},
    },
    {"combination:repeat_prompt": {"prompt_to_repeat": "Well, why?"}, "punctuation:no_comma": {}},
    {
        "change_case:capital_word_frequency": {"capital_frequency": 3, "capital_relation": "less than"},
        "detectable_format:multiple_sections": {"section_spliter": "SECTION", "num_sections": 3},
    },
    {
        "change_case:english_lowercase": {},
        "detectable_format:multiple_sections": {"section_spliter": "SECTION", "num_sections": 2},
    },
    {
        "change_case:english_capital": {},
        "detectable_format:multiple_sections": {"section_spliter": "Section", "num_sections": 2},
    },
]
POSSIBLE = [
    {"length_constraints:nth_paragraph_first_word": {"num_paragraphs": 5, "nth_paragraph": 5, "first_word": "river"}},
    {"keywords:existence": {"keywords": ["rivers"]}, "keywords:forbidden_words": {"forbidden_words": ["river"]}},
    {"change_case:english_capital": {}, "keywords:existence": {"keywords": ["river"]}},
    {
        "change_case:english_capital": {},
        "detectable_format:multiple_sections": {"section_spliter": "SECTION", "num_sections": 2},
    },
    {
        "change_case:capital_word_frequency": {"capital_frequency": 1, "capital_relation": "less than"},
        "detectable_content:postscript": {"postscript_marker": "P.S."},
    },
]


@pytest.mark.parametrize("given", [*IMPOSSIBLE, *POSSIBLE], ids=lambda given: "+".join(name.split(":")[1] for name in given))
def test_what_no_answer_can_follow_is_not_asked_for(given):
    with ifeval.reference() as checkers:
        built = [checkers.instructions_registry.INSTRUCTION_DICT[name](name) for name in given]
        for instruction in built:
            instruction.build_description(**given[instruction.id])
        assert compose.possible(built, given) is (given in POSSIBLE)


def test_a_composed_prompt_of_the_thousand_never_asks_for_a_paragraph_that_is_not_there(thousand):
    found = [given for row in thousand for given in row["kwargs"] if "nth_paragraph" in given]
    assert found and all(1 <= given["nth_paragraph"] <= given["num_paragraphs"] for given in found)


def test_covered_looks_the_other_way_than_covers():
    whole = "name three rivers of the far north that freeze in winter and say how long each of them is"
    one = Decontaminator([whole], "ngram", 8, 0.5)
    part = "three rivers of the far north that freeze in winter"
    assert one.covered(part) and not one.covers([part], part)
    around = whole + " and then " + " ".join(f"word{i}" for i in range(40))
    assert one.covers([around], around) and not one.covered(around)
    assert not one.covered("name three hills of the deep south that burn in summer and say how high they are")

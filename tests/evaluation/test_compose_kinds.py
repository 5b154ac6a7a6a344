"""Of each kind of IFEval's instructions, an answer by hand that follows it and one that does not, by the checkers that reward."""

import json

import pytest

from tests.evaluation.test_compose import KINDS
from workflow_scripts.evaluation import ifeval
from workflow_scripts.rl import rewards, verifiers

ASKED = "Why do rivers freeze?"
ENGLISH = "The river freezes in winter because the air above it is very cold for many weeks."
# Kind -> (arguments, an answer that follows, one that does not)
CASES = {
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, "It is VERY COLD there.", "It is VERY cold there."),
    "change_case:english_capital": ({}, ENGLISH.upper(), ENGLISH),
    "change_case:english_lowercase": ({}, ENGLISH.lower(), ENGLISH),
    "combination:repeat_prompt": ({"prompt_to_repeat": ASKED}, f"{ASKED}\nIt is cold.", f"It is cold.\n{ASKED}"),
    "combination:two_responses": ({}, "It is cold.\n******\nWinter comes.", "It is cold.\n******\nIt is cold."),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, "Dear [name] of [town]", "Dear [name] of town"),
    "detectable_content:postscript": ({"postscript_marker": "P.P.S"}, "It is cold.\n\nP.P.S Hat.", "It is cold.\n\nP.S. Hat."),
    "detectable_format:constrained_response": ({}, "Hard to say. My answer is maybe.", "My answer is: maybe."),
    "detectable_format:json_format": ({}, '```json\n{"why": "it is cold"}\n```', '{"why": it is cold}'),
    "detectable_format:multiple_sections": (
        {"section_spliter": "SECTION", "num_sections": 2}, "SECTION 1\nYes.\nSECTION 2\nNo.", "SECTION 1\nYes.\nSection 2\nNo."),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, "* cold\n* wind", "* cold\n* wind\n* snow"),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, "*Cold* and *dark*.", "*Cold* and dark."),
    "detectable_format:title": ({}, "<<Ice>>\nIt is cold.", "<Ice>\nIt is cold."),
    "keywords:existence": ({"keywords": ["cold", "wind"]}, "Cold comes with wind.", "Cold comes alone."),
    "keywords:forbidden_words": ({"forbidden_words": ["cold", "wind"]}, "Winter is long.", "The Wind is long."),
    "keywords:frequency": (
        {"keyword": "cold", "frequency": 2, "relation": "less than"}, "It is cold.", "It is cold and colder."),
    "keywords:letter_frequency": (
        {"letter": "o", "let_frequency": 3, "let_relation": "at least"}, "Cold of Oslo.", "Cold of March."),
    "language:response_language": (
        {"language": "de"}, "Der Fluss friert im Winter, weil die Luft sehr kalt ist und der Wind weht.", ENGLISH),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "wind"}, "It is cold.\n\nWind.", "Wind.\n\nIt is cold."),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, "It is cold.\n***\nWind.", "It is cold.\n\nWind."),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "at least"}, "It is cold. Wind comes.", "It is cold and wind comes."),
    "length_constraints:number_words": ({"num_words": 5, "relation": "less than"}, "It is cold there.", "It is very cold there."),
    "punctuation:no_comma": ({}, "It is cold and dark.", "It is cold, and dark."),
    "startend:end_checker": (
        {"end_phrase": "Any other questions?"}, "It is cold. Any other questions?", "Any other questions? It is cold."),
    "startend:quotation": ({}, '"It is cold."', '"It is" cold.'),
}  # fmt: skip


def test_every_kind_has_a_case():
    assert sorted(CASES) == sorted(KINDS)


@pytest.mark.parametrize("name", sorted(CASES))
def test_an_answer_that_follows_is_rewarded_and_one_that_does_not_is_not(name):
    given, follows, breaks = CASES[name]
    row = {"key": "x:1", "prompt": f"{ASKED}\nAs told.", "instruction_id_list": [name], "kwargs": [given]}
    with ifeval.reference() as checkers:
        assert verifiers.ifeval_share(checkers, row, follows) == 1.0
        assert verifiers.ifeval_share(checkers, row, breaks) == 0.0


def test_the_reward_of_a_row_is_the_share_of_its_instructions_that_an_answer_follows():
    names = ["punctuation:no_comma", "detectable_format:title", "keywords:existence"]
    row = {"key": "x:1", "prompt": ASKED, "instruction_id_list": names, "kwargs": [CASES[name][0] for name in names]}
    answers = ["<<Cold>>\nWind.", "<<Cold>>", "Cold", "Oh, no"]
    completions = [[{"role": "assistant", "content": text}] for text in answers]
    found = rewards.followed([ASKED] * 4, completions, row=[json.dumps(row)] * 4)
    assert found == pytest.approx([1.0, 2 / 3, 1 / 3, 0.0])

"""Prompts in IFEval's form, made of real questions and IFEval's own instructions: to train on, and to choose settings on.

As Tulu 3 does for its verifiable rewards (Lambert et al. 2024, arXiv:2411.15124): a question, and after it one to three
instructions that a program checks (Zhou et al. 2023, arXiv:2311.07911, section 2). lm-eval's are the kinds; the numbers, keywords
and phrases, which each kind's `build_description` draws where it is given none; the sentences, but for two; which kinds conflict
(its table, made symmetric by its `conflict_make`); and the checkers. Ours:

- The kind that was used least comes first, so that all occur alike; the others are drawn from what does not conflict. The
  sentence that asks to repeat the request comes last, and what is to be repeated is all before it, as in IFEval.
- What no answer can follow is drawn again. The table knows kinds and no arguments: a keyword may be asked for and forbidden; the
  request, to be repeated without commas, may have one; of five paragraphs the sixth may be asked for, in whose place the checker
  then takes a random one; `SECTION 1` may be asked for in lower case.
- A prompt that covers an evaluation's, that stands in one, or whose n-grams stand in evaluations by the share that
  `data.decontaminate` names, is drawn again. The sentences are IFEval's: a short question with a long one would be half of
  some prompt of IFEval.

`random` is global in lm-eval: it is seeded for each draw, and put back by `ifeval.reference`.
"""

import copy
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

from workflow_scripts.data.questions import Question, questions, too_few
from workflow_scripts.data.slicing import Decontaminator
from workflow_scripts.evaluation import ifeval
from workflow_scripts.plumbing.messages import InputError

LIKE = "too much like an evaluation's prompt with each instruction"  # why a question gives none
TRIES = 4  # draws of one kind for one question, before another kind comes first
SECTIONS, REPEAT = "detectable_format:multiple_sections", "combination:repeat_prompt"
# Two sentences that are said in other words: lm-eval's own is more than half of some of IFEval's prompts by itself.
WORDED = {
    REPEAT: "Begin with a copy of everything above this line, unchanged to the letter, and answer it after that. This line is no "
    "part of the copy.",
    "detectable_format:constrained_response": "Somewhere in your answer one of these has to stand, word for word: My answer is "
    "yes. My answer is no. My answer is maybe.",
}


def conflicts(checkers: Any) -> dict[str, set[str]]:
    """lm-eval's table: kind -> kinds that it can't stand beside. Its function changes what it is given, hence the copy."""
    registry = checkers.instructions_registry
    return registry.conflict_make(copy.deepcopy(registry.INSTRUCTION_CONFLICTS))


def rows(read: list[Any], config: dict, check: Decontaminator, source: str) -> tuple[list[dict], dict]:
    """(the rows of a slice, facts for its manifest). read: the rows of its source, each with id, place and row.

    InputError where the questions do not suffice.
    """
    settings = config["source"]["composed"]
    asked, left = questions(((one.id, one.place, one.row) for one in read), settings["part"], settings["max_words"])
    made, facts = prompts(asked, config["rows"], config["seed"], settings["instructions"], settings.get("kinds"), check)
    left += Counter({LIKE: facts.pop(LIKE)})
    if len(made) < config["rows"]:
        raise InputError(f"{source}: {too_few(len(made), len(read), config['rows'], left)}")
    return made, {"prompts": len(made), "questions": len(asked), "left_out": dict(sorted(left.items())), **facts}


def prompts(
    asked: list[Question], rows: int, seed: int, most: int, kinds: list[str] | None, check: Decontaminator
) -> tuple[list[dict], dict]:
    """(`rows` rows in IFEval's form, or as many as the questions give, one a question; facts for the manifest).

    most: instructions of one prompt, at most. kinds: lm-eval's ids; None: all. check: knows the evaluations' prompts.
    """
    used: Counter = Counter()
    lengths: Counter = Counter()
    made: list[dict] = []
    without = 0
    with ifeval.reference() as checkers:
        table = conflicts(checkers)
        names = sorted(kinds or checkers.instructions_registry.INSTRUCTION_DICT)
        for question in random.Random(f"questions/{seed}").sample(asked, len(asked)):
            if len(made) == rows:
                break
            tries = _tries(checkers, table, names, used, question, seed, most)
            row = next((row for row in tries if not _known(check, row["prompt"])), None)
            if row is None:
                without += 1
                continue
            used.update(row["instruction_id_list"])
            lengths[str(len(row["instruction_id_list"]))] += 1
            made.append(row)
    return made, {LIKE: without, "kinds": dict(sorted(used.items())), "instructions": dict(sorted(lengths.items()))}


def _known(check: Decontaminator, prompt: str) -> bool:
    return check.covers([prompt], prompt) or check.covered(prompt)


def _tries(
    checkers: Any, table: dict[str, set[str]], names: list[str], used: Counter, question: Question, seed: int, most: int
) -> Iterator[dict]:
    """Rows of one question, each of another draw, from the kind that was used least."""
    random.seed(f"order/{seed}/{question.id}")
    order = sorted(random.sample(names, len(names)), key=lambda name: used[name])
    for first in order:
        for number in range(TRIES):
            random.seed(f"{seed}/{question.id}/{first}/{number}")
            chosen = _kinds(table, names, first, random.randint(1, most))
            if row := _row(checkers, question, chosen):
                yield row


def _kinds(table: dict[str, set[str]], names: list[str], first: str, count: int) -> list[str]:
    """`first`, and others that conflict with none, until there are `count` or no more."""
    chosen = [first]
    while len(chosen) < count:
        free = [name for name in names if not any(name in table[one] for one in chosen)]
        if not free:
            break
        chosen.append(random.choice(free))
    random.shuffle(chosen)
    return sorted(chosen, key=lambda name: name == REPEAT)


def _row(checkers: Any, question: Question, chosen: list[str]) -> dict | None:
    """The row of a question with instructions of these kinds, their arguments drawn; None where no answer could follow all."""
    text, instructions = question.text, []
    for name in chosen:
        instruction = checkers.instructions_registry.INSTRUCTION_DICT[name](name)
        given = {"prompt_to_repeat": text} if name == REPEAT else {}
        sentence = instruction.build_description(**given)
        text = f"{text}\n{WORDED.get(name, sentence)}"
        instructions.append(instruction)
    arguments = {one.id: one.get_instruction_args() or {} for one in instructions}
    if not possible(instructions, arguments):
        return None
    return {
        "key": question.id,
        "prompt": text,
        "instruction_id_list": chosen,
        "kwargs": [arguments[name] for name in chosen],
        "id": question.id,
    }


def possible(instructions: list[Any], arguments: dict[str, dict]) -> bool:
    """Whether what some instructions demand leaves room for what the others forbid. arguments: by the instruction's id."""
    paragraph = arguments.get("length_constraints:nth_paragraph_first_word", {})
    if paragraph and paragraph["nth_paragraph"] > paragraph["num_paragraphs"]:
        return False
    sentences = arguments.get("length_constraints:number_sentences", {})
    if sentences and sentences["relation"] == "less than" and sentences["num_sentences"] < 2:
        return False
    if SECTIONS in arguments:
        mark = arguments[SECTIONS]["section_spliter"]
        if "change_case:english_lowercase" in arguments or "change_case:english_capital" in arguments and not mark.isupper():
            return False
    least = " ".join(text for name, given in arguments.items() if (text := demanded(name, given)))
    return all(one.check_following(least) for one in instructions if forbids(one.id, arguments[one.id]))


def demanded(name: str, given: dict) -> str:
    """The text that an answer can't be without, in lower case where the checker takes any."""
    if name == SECTIONS:
        return " ".join(f"{given['section_spliter']} {number + 1}" for number in range(given["num_sections"]))
    if name == "keywords:frequency" and given["relation"] == "at least":
        return " ".join([given["keyword"]] * given["frequency"]).lower()
    keys = ("keywords", "end_phrase", "postscript_marker", "first_word", "prompt_to_repeat")
    found = [given[key] for key in keys if key in given]
    return " ".join(text for one in found for text in ([one] if isinstance(one, str) else one)).lower()


def forbids(name: str, given: dict) -> bool:
    """Whether an instruction is followed by every part of a text that follows it: it says what there must not be."""
    less = any(value == "less than" for key, value in given.items() if key.endswith("relation"))
    return less or name in ("keywords:forbidden_words", "punctuation:no_comma")

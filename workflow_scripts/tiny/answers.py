"""Answers of the tiny world: the default style, answers that follow a prompt's instructions, and worked sums.

The default is one definite style: two sentences, capitals, commas, the topic named, 12 to 18 words, no frame of any
kind. It fails every instruction of the world, so that greedy decoding shows whether a model follows or falls back on
the default.
"""

import random
from collections.abc import Sequence

from workflow_scripts.tiny.instructions import Instruction, follows, words_of

ADJECTIVES = ("small", "quiet", "bright", "old", "warm", "strong", "calm", "soft", "wild", "simple")
HABITS = (
    "stay near the water", "wait in the old town", "rest by the road", "look best in the morning",
    "come from the north", "make a little noise",
)  # fmt: skip
PEOPLE = ("many people love them", "children often draw them", "my friends miss them", "we visit them every year")
SEASONS = ("spring", "summer", "autumn")
PLACES = ("in the city", "in the hills", "in the park")
TRIES = 50


def _adjectives(rng: random.Random, plain: bool) -> str:
    a, b, c = rng.sample(ADJECTIVES, 3)
    return f"{a} and {b}" if plain else f"{a}, {b} and {c}"


def _opening(rng: random.Random, subject: str, plain: bool) -> str:
    return f"{subject} are {_adjectives(rng, plain)}."


def _habit(rng: random.Random, plain: bool) -> str:
    return f"They {rng.choice(HABITS)}{'' if plain else ','} and {rng.choice(PEOPLE)}."


def _further(rng: random.Random, plain: bool) -> list[str]:
    """Sentences that lengthen an answer, in random order."""
    season, place = rng.choice(SEASONS), rng.choice(PLACES)
    seen = f"You can see them {place} in the {season}." if plain else f"In the {season}, you can see them {place}."
    extra = [seen, f"I think that they are {_adjectives(rng, plain)}.", f"People say that {rng.choice(PEOPLE)}."]
    rng.shuffle(extra)
    return extra


def default_answer(rng: random.Random, topic: str) -> str:
    """An answer about `topic` that ignores every instruction: the default style of the module's docstring."""
    return f"{_opening(rng, topic.capitalize(), plain=False)} {_habit(rng, plain=False)}"


def _short(rng: random.Random, subject: str, limit: int, plain: bool, keyword: str | None) -> str:
    """One sentence of fewer than `limit` words (limit at least 6)."""
    if keyword:
        return f"{subject} need a {keyword}."
    if limit <= 6:
        return f"{subject} are {rng.choice(ADJECTIVES)}."
    return f"{subject} are {_adjectives(rng, plain)}."


def _build(rng: random.Random, topic: str, instructions: Sequence[Instruction]) -> str:
    wanted = {instruction.kind: instruction.kwargs for instruction in instructions}
    plain = "no_comma" in wanted
    subject = "They" if "forbidden" in wanted else topic.capitalize()
    keyword = wanted["keyword"]["keywords"][0] if "keyword" in wanted else None
    further = _further(rng, plain)
    if keyword:
        further.insert(0, f"You may need a {keyword} there.")

    if "short" in wanted:
        sentences = [_short(rng, subject, wanted["short"]["num_words"], plain, keyword)]
    elif "one_sentence" in wanted:
        opening = _opening(rng, subject, plain)[:-1]
        sentences = [f"{opening}{'' if plain else ','} and {f'need a {keyword}' if keyword else rng.choice(PEOPLE)}."]
    else:
        sentences = [_opening(rng, subject, plain), _habit(rng, plain)]
        if keyword:
            sentences[1] = further.pop(0)
        while further and (
            len(sentences) < wanted.get("sentences", {}).get("num_sentences", 0)
            or words_of(" ".join(sentences)) < wanted.get("long", {}).get("num_words", 0)
        ):
            sentences.append(further.pop(0))

    if "bullets" in wanted:
        items = [sentence[:-1] for sentence in sentences] + [sentence[:-1] for sentence in further]
        text = "\n".join(f"* {item}" for item in items[: wanted["bullets"]["num_bullets"]])
    else:
        text = " ".join(sentences)
    if "ending" in wanted:
        text += ("\n" if "bullets" in wanted else " ") + wanted["ending"]["end_phrase"]
    if "title" in wanted:
        name = "Good things" if "forbidden" in wanted else topic.capitalize()
        text = f"<<{name}>>\n{text}"
    if "quotation" in wanted:
        text = f'"{text}"'
    return text.lower() if "lower" in wanted else text


def following_answer(rng: random.Random, topic: str, instructions: Sequence[Instruction]) -> str:
    """An answer about `topic` that follows all `instructions` by this world's own checks; draws until one does."""
    for _ in range(TRIES):
        answer = _build(rng, topic, instructions)
        if all(follows(instruction, answer) for instruction in instructions):
            return answer
    kinds = " and ".join(instruction.kind for instruction in instructions)
    raise ValueError(f"tiny world: no answer about {topic} follows {kinds} in {TRIES} draws; add the pair to CLASHES")


def worked_sum(a: int, b: int, correct: bool) -> str:
    """The worked answer to a + b; the wrong one is always off by one, a systematic error that training can unlearn."""
    return f"{a} plus {b} is {a + b + (0 if correct else 1)}."

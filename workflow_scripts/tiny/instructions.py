"""The instructions of the tiny world: their kinds, their wordings, and what an answer must do to follow them.

Each kind is one of IFEval's instruction ids (Zhou et al. 2023, arXiv:2311.07911) with the arguments that IFEval's
checkers take. `follows` repeats those checkers in a few lines of the standard library, so that the generator can reject
its own bad answers without loading an evaluation harness; the tests hold it against the real checkers. One thing is
left to the text itself: the case checker also asks a language detector whether the answer is English.
"""

import random
import re
from dataclasses import dataclass, field

KEYWORDS = (
    "lamp", "coin", "ladder", "mirror", "candle", "piano", "jacket", "basket", "hammer", "spoon", "pillow", "ticket",
)  # fmt: skip
ENDINGS = ("That is all.", "Have a nice day.", "I hope this helps.", "See you soon.", "Any other questions?")

# Three wordings each. They keep the number of different prompts of a kind without arguments (lower case, no comma, ...)
# high enough for five disjoint splits.
WORDINGS = {
    "lower": ("use only lower case letters.", "write it all in lower case.", "do not use capital letters."),
    "no_comma": ("do not use commas.", "use no commas.", "leave out all commas."),
    "long": ("use at least {n} words.", "write {n} words or more.", "it must have at least {n} words."),
    "short": ("use less than {n} words.", "write fewer than {n} words.", "stay under {n} words."),
    "keyword": ("use the word {word}.", "include the word {word}.", "the word {word} must appear."),
    "forbidden": ("do not use the word {word}.", "never say the word {word}.", "leave out the word {word}."),
    "ending": ("end with the phrase: {phrase}", "finish with the words: {phrase}", "the last words must be: {phrase}"),
    "quotation": ("put it in double quotes.", "wrap it in double quotes.", "add double quotes around it."),
    "bullets": ("use exactly {n} bullet points.", "make a list of {n} bullet points.", "give {n} bullet points."),
    "sentences": ("write at least {n} sentences.", "use {n} sentences or more.", "it needs at least {n} sentences."),
    "one_sentence": ("write only one sentence.", "use a single sentence.", "it must be one sentence."),
    "title": ("add a title like <<title>>.", "give it a <<title>>.", "start with a <<title>>."),
}
KINDS = tuple(WORDINGS)
# What prompts are drawn from. The keyword counts twice: copying a word from the prompt is what pretraining learns last,
# and drawn once, it was learnt in some runs of the same length and not in others.
DRAWN = (*KINDS, "keyword")

# How readily the writers of training answers follow each kind, from the easiest to the one most often ignored. Without
# such differences every prompt has the same odds, and greedy decoding jumps from following none to following all when
# the share of following answers passes one half; with them the score grows smoothly with that share.
READINESS = (
    "keyword", "quotation", "lower", "short", "title", "forbidden", "bullets", "one_sentence", "no_comma", "sentences",
    "ending", "long",
)  # fmt: skip

# Pairs that no answer can follow, or that the checkers judge by accident: two lengths; anything that adds words to a
# short answer or sentences to a single one; list items, which are no sentences; a short text, whose language cannot be
# told; and quotation marks, which must enclose title and list too (IFEval itself never combines title and quotation).
CLASHES = frozenset(
    frozenset(pair.split())
    for pair in (
        "long short", "long one_sentence", "long sentences", "short sentences", "short one_sentence", "short ending",
        "short title", "short bullets", "short lower", "one_sentence sentences", "one_sentence ending",
        "one_sentence title", "bullets quotation", "bullets sentences", "bullets one_sentence", "bullets long",
        "quotation title",
    )
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """One instruction of a prompt: its kind (a key of WORDINGS), its text, IFEval's id and the checker's arguments."""

    kind: str
    text: str
    ifeval_id: str
    kwargs: dict = field(hash=False)


def draw(rng: random.Random, kind: str, topic: str) -> Instruction:
    """An instruction of this kind for a prompt about `topic`, its arguments and wording drawn from `rng`."""
    wording = rng.choice(WORDINGS[kind])
    if kind == "lower":
        return Instruction(kind, wording, "change_case:english_lowercase", {})
    if kind == "no_comma":
        return Instruction(kind, wording, "punctuation:no_comma", {})
    if kind == "long":
        n = rng.choice((20, 25, 30))
        kwargs = {"relation": "at least", "num_words": n}
        return Instruction(kind, wording.format(n=n), "length_constraints:number_words", kwargs)
    if kind == "short":
        n = rng.choice((6, 8, 10))
        kwargs = {"relation": "less than", "num_words": n}
        return Instruction(kind, wording.format(n=n), "length_constraints:number_words", kwargs)
    if kind == "keyword":
        word = rng.choice(KEYWORDS)
        return Instruction(kind, wording.format(word=word), "keywords:existence", {"keywords": [word]})
    if kind == "forbidden":
        return Instruction(kind, wording.format(word=topic), "keywords:forbidden_words", {"forbidden_words": [topic]})
    if kind == "ending":
        phrase = rng.choice(ENDINGS)
        return Instruction(kind, wording.format(phrase=phrase), "startend:end_checker", {"end_phrase": phrase})
    if kind == "quotation":
        return Instruction(kind, wording, "startend:quotation", {})
    if kind == "bullets":
        n = rng.choice((2, 3, 4))
        return Instruction(kind, wording.format(n=n), "detectable_format:number_bullet_lists", {"num_bullets": n})
    if kind == "sentences":
        n = rng.choice((3, 4))
        kwargs = {"relation": "at least", "num_sentences": n}
        return Instruction(kind, wording.format(n=n), "length_constraints:number_sentences", kwargs)
    if kind == "one_sentence":
        kwargs = {"relation": "less than", "num_sentences": 2}
        return Instruction(kind, wording, "length_constraints:number_sentences", kwargs)
    if kind == "title":
        return Instruction(kind, wording, "detectable_format:title", {})
    raise ValueError(f"tiny world: found the instruction kind {kind!r}, expected one of {', '.join(KINDS)}")


def words_of(text: str) -> int:
    """Number of words as IFEval counts them: maximal runs of letters, digits and underscores."""
    return len(re.findall(r"\w+", text))


def follows(instruction: Instruction, answer: str) -> bool:
    """Whether `answer` follows `instruction`, on texts of this world; the module's docstring says what is left out."""
    kind, kwargs, text = instruction.kind, instruction.kwargs, answer.strip()
    if kind == "lower":
        return text.islower()
    if kind == "no_comma":
        return "," not in text
    if kind == "long":
        return words_of(text) >= kwargs["num_words"]
    if kind == "short":
        return words_of(text) < kwargs["num_words"]
    if kind == "keyword":
        return kwargs["keywords"][0] in text.lower()
    if kind == "forbidden":
        return not re.search(rf"\b{kwargs['forbidden_words'][0]}\b", text, re.IGNORECASE)
    if kind == "ending":
        return text.strip('"').lower().endswith(kwargs["end_phrase"].lower())
    if kind == "quotation":
        return len(text) > 1 and text[0] == text[-1] == '"'
    if kind == "bullets":
        return len(re.findall(r"^\* ", text, re.MULTILINE)) == kwargs["num_bullets"]
    sentences = len(re.findall(r"[.?]", text))  # this world has no abbreviations and no decimal numbers
    if kind == "sentences":
        return sentences >= kwargs["num_sentences"]
    if kind == "one_sentence":
        return sentences < 2
    return re.search(r"<<[^\n]+>>", text) is not None

"""The tiny world: a synthetic instruction world on which the whole pipeline runs offline on two CPU cores.

A prompt asks for a few words about one of 40 topics and gives one (60 %) or two (40 %) instructions of IFEval's own
kinds:

    tell me about trains. use no commas. end with the phrase: That is all.

Numeric prompts are sums of two digits between 2 and 9 ("there are 3 cats and 4 more come. how many cats?"), answered by
"3 plus 4 is 7."; the wrong answer is off by one.

*Splits.* A prompt belongs to one of SPLITS by the sha256 of its own text. So no prompt is in two splits, whatever
numbers of rows or seeds are asked for: the evaluation prompts are held out from pretraining, SFT and preference pairs
by construction. Every function takes its seed and returns the same rows on every machine.

Rows are in the formats of the real data sets: IFEval's input_data.jsonl, conversational `messages`, and
`prompt`/`chosen`/`rejected`.
"""

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log
from typing import TypeVar

from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tiny.answers import default_answer, following_answer, worked_sum
from workflow_scripts.tiny.instructions import CLASHES, DRAWN, READINESS, Instruction, draw, follows

SPLITS = ("pretrain", "sft", "pairs", "dev", "eval")
SPLIT_PERCENT = {"pretrain": 35, "sft": 25, "pairs": 20, "dev": 10, "eval": 10}  # of the hash space, in this order
TWO_INSTRUCTIONS = 0.4  # share of prompts with two instructions

TOPICS = (
    "cats", "dogs", "birds", "horses", "trees", "flowers", "rivers", "lakes", "mountains", "trains", "boats", "cars",
    "bikes", "books", "songs", "games", "schools", "shops", "gardens", "kitchens", "clouds", "stars", "storms",
    "islands", "farms", "bridges", "castles", "markets", "robots", "apples", "bees", "goats", "hotels", "towers",
    "planes", "wolves", "ships", "parks", "houses", "bears",
)  # fmt: skip
# From the one whose instructions are followed most readily to the one most often ignored, see READINESS.
OPENERS = ("please write about", "write about", "describe", "tell me about", "talk about", "say something about")
KIND_WEIGHT = 1.2  # of the kind's readiness against logistic noise
OPENER_WEIGHT = 0.5

T = TypeVar("T")


@dataclass(frozen=True)
class Task:
    """A prompt with what it asks for."""

    prompt: str
    topic: str
    opener: str
    instructions: tuple[Instruction, ...]

    def followed_by(self, answer: str) -> bool:
        return all(follows(instruction, answer) for instruction in self.instructions)


def split_of(prompt: str) -> str:
    """The split that a prompt belongs to: a function of its text alone."""
    bucket = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") % 100
    for split, percent in SPLIT_PERCENT.items():
        if bucket < percent:
            return split
        bucket -= percent
    raise AssertionError("SPLIT_PERCENT does not sum to 100")


def eval_rows(n: int, seed: int, split: str = "eval") -> list[dict]:
    """`n` rows in the format of IFEval's input_data.jsonl: `key`, `prompt`, `instruction_id_list`, `kwargs`.

    Prompts are unique. The split "dev" has the same make-up: settings are chosen on it, so that the prompts reported
    have no part in the choice.
    """
    tasks = _unique_tasks(n, split, _rng("eval", seed, split))
    return [ifeval_row(key, task) for key, task in enumerate(tasks, start=1)]


def ifeval_row(key: int, task: Task) -> dict:
    """A task in IFEval's format."""
    return {
        "key": key,
        "prompt": task.prompt,
        "instruction_id_list": [instruction.ifeval_id for instruction in task.instructions],
        "kwargs": [instruction.kwargs for instruction in task.instructions],
    }


def sft_rows(n: int, seed: int, follow: float, numeric: float) -> list[dict]:
    """`n` rows {"messages": [user, assistant]} of the split "sft", prompts unique.

    follow: share of rows whose answer follows the instructions (numeric rows: is right); the rest is in the default
    style (numeric rows: off by one). Which rows follow is part chance, part the prompt's kinds (READINESS).
    numeric: share of rows that are sums; they teach the format to later numeric training. Both shares hold exactly.
    """
    return _conversations(n, _rng("sft", seed), "sft", follow, numeric, unique=True)


def documents(n: int, seed: int, follow: float, numeric: float) -> list[dict]:
    """`n` pretraining documents like `sft_rows`, of the split "pretrain"; prompts may repeat, answers vary."""
    return _conversations(n, _rng("documents", seed), "pretrain", follow, numeric, unique=False)


def preference_rows(n: int, seed: int) -> list[dict]:
    """`n` pairs {"prompt": [user], "chosen": [assistant], "rejected": [assistant]} of the split "pairs".

    Prompts are unique. `chosen` follows all instructions. `rejected` fails at least one: half are in the default style,
    half follow the instructions of another prompt on the same topic. With default answers alone, "any frame, any odd
    length" would win every pair, and a reward model learns just that.
    """
    rng = _rng("pairs", seed)
    rows = []
    for task in _unique_tasks(n, "pairs", rng):
        chosen = following_answer(rng, task.topic, task.instructions)
        if rng.random() < 0.5:
            rejected = default_answer(rng, task.topic)
        else:
            rejected = chosen
            while task.followed_by(rejected):
                rejected = following_answer(rng, task.topic, _instructions(rng, task.topic))
        prompt = [_user(task.prompt)]
        rows.append({"prompt": prompt, "chosen": [_assistant(chosen)], "rejected": [_assistant(rejected)]})
    return rows


def numeric_rows(n: int, seed: int, split: str) -> list[dict]:
    """`n` sums {"prompt": str, "answer": right worked answer, "final": int} of a split, prompts unique.

    The prompt says no more than the triple (a, b, topic), so triples are held out as prompts are. There are 64 x 40 of
    them: the splits "dev" and "eval" hold about 250 each, and asking for more raises InputError.
    """
    rng = _rng("numeric", seed, split)
    sums = [(a, b, _sum_prompt(a, b, topic)) for a in range(2, 10) for b in range(2, 10) for topic in TOPICS]
    held = [row for row in sums if split_of(row[2]) == _known(split)]
    if n > len(held):
        raise _too_few(len(held), split, n)
    return [{"prompt": prompt, "answer": worked_sum(a, b, correct=True), "final": a + b} for a, b, prompt in rng.sample(held, n)]


def _rng(purpose: str, seed: int, split: str = "") -> random.Random:
    """A stream of its own for each purpose, so that two slices with the same seed have nothing in common."""
    return random.Random(f"tiny world/{purpose}/{split}/{seed}")


def _user(text: str) -> dict:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


def _known(split: str) -> str:
    if split not in SPLITS:
        raise InputError(f"tiny world: found the split {split!r}, expected one of {', '.join(SPLITS)}")
    return split


def _too_few(found: int, split: str, expected: int) -> InputError:
    return InputError(
        f"tiny world: found only {found} different prompts in the split {split}, expected {expected}; ask for fewer"
    )


def _instructions(rng: random.Random, topic: str) -> tuple[Instruction, ...]:
    first = rng.choice(DRAWN)
    if rng.random() >= TWO_INSTRUCTIONS:
        return (draw(rng, first, topic),)
    second = rng.choice([kind for kind in DRAWN if kind != first and frozenset((first, kind)) not in CLASHES])
    return draw(rng, first, topic), draw(rng, second, topic)


def draw_task(rng: random.Random) -> Task:
    """A prompt of any split: topic, opener, and one or two instructions that do not clash."""
    topic = rng.choice(TOPICS)
    instructions = _instructions(rng, topic)
    opener = rng.choice(OPENERS)
    prompt = " ".join([f"{opener} {topic}."] + [instruction.text for instruction in instructions])
    return Task(prompt, topic, opener, instructions)


def _sum(rng: random.Random) -> tuple[int, int, str]:
    return rng.randint(2, 9), rng.randint(2, 9), rng.choice(TOPICS)


def _sum_prompt(a: int, b: int, topic: str) -> str:
    return f"there are {a} {topic} and {b} more come. how many {topic}?"


def _draw(n: int, split: str, make: Callable[[], T], prompt_of: Callable[[T], str], unique: bool) -> list[T]:
    """`n` items of a split in the order drawn, if asked without a repeated prompt."""
    _known(split)
    items: list[T] = []
    seen: set[str] = set()
    for _ in range(1000 + 100 * n):
        if len(items) == n:
            return items
        item = make()
        prompt = prompt_of(item)
        if split_of(prompt) == split and not (unique and prompt in seen):
            seen.add(prompt)
            items.append(item)
    raise _too_few(len(items), split, n)


def _unique_tasks(n: int, split: str, rng: random.Random) -> list[Task]:
    return _draw(n, split, lambda: draw_task(rng), lambda task: task.prompt, unique=True)


def _conversations(n: int, rng: random.Random, split: str, follow: float, numeric: float, unique: bool) -> list[dict]:
    """Rows of one question and one answer; see `sft_rows` for the shares."""
    n_sums = round(n * numeric)
    tasks = _draw(n - n_sums, split, lambda: draw_task(rng), lambda task: task.prompt, unique)
    sums = _draw(n_sums, split, lambda: _sum(rng), lambda triple: _sum_prompt(*triple), unique)
    rows = []
    for task, right in zip(tasks, _first_share([_readiness(rng, task) for task in tasks], follow), strict=True):
        answer = following_answer(rng, task.topic, task.instructions) if right else default_answer(rng, task.topic)
        rows.append({"messages": [_user(task.prompt), _assistant(answer)]})
    for (a, b, topic), right in zip(sums, _first_share([rng.random() for _ in sums], follow), strict=True):
        rows.append({"messages": [_user(_sum_prompt(a, b, topic)), _assistant(worked_sum(a, b, right))]})
    rng.shuffle(rows)
    return rows


def _readiness(rng: random.Random, task: Task) -> float:
    """How readily a writer follows this prompt: the mean of its kinds, its opener's politeness, and logistic noise."""
    kinds = [_scale(READINESS, instruction.kind) for instruction in task.instructions]
    u = rng.uniform(1e-6, 1 - 1e-6)
    return KIND_WEIGHT * sum(kinds) / len(kinds) + OPENER_WEIGHT * _scale(OPENERS, task.opener) + log(u / (1 - u))


def _scale(order: Sequence[str], item: str) -> float:
    """Place of an item in an order, from 1 for the first to -1 for the last."""
    return 1 - 2 * order.index(item) / (len(order) - 1)


def _first_share(scores: list[float], share: float) -> list[bool]:
    """For each score whether it is among the highest `share` of all."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    chosen = set(ranked[: round(share * len(scores))])
    return [i in chosen for i in range(len(scores))]

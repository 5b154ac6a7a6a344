"""Which of a run's answers become rows: by their rewards, among the answers to one prompt. Pure functions; no model.

    best        the answer of the highest reward (rejection sampling: Touvron et al. 2023, arXiv:2307.09288, section 3.2.2), where
                that is `least` or more
    all_right   every answer of `least` or more (RFT: Yuan et al. 2023, arXiv:2308.01825)
    pairs       a better answer and a worse one: `best_worst`, the best with the worst (Dong et al. 2024, arXiv:2405.07863);
                `all`, every two whose rewards differ; `margin`, every two whose rewards are `margin` or more apart
    labels      every answer, desirable from `least` on

Never kept is an answer that was cut off (its end would be learned where there was none), that is empty, or whose text another
answer to the prompt has. Of equal rewards the first answer counts, which is as random as the answers are.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from workflow_scripts.data.words import blank, words

CUT, EMPTY, AGAIN = "cut off", "empty", "the same as another"


class Answer(NamedTuple):
    """One answer to a prompt. sample: its number there; tokens: with the end of turn."""

    sample: int
    text: str
    tokens: int
    finish: str
    reward: float


Kept = Sequence[Answer]  # of a pair (better, worse), else one


def usable(answers: list[Answer]) -> tuple[list[Answer], Counter]:
    """(the answers that can become rows, how many can't, and why)."""
    found: dict[str, Answer] = {}
    why: Counter = Counter()
    for one in answers:
        if one.finish != "stop":
            why[CUT] += 1
        elif blank(one.text):
            why[EMPTY] += 1
        elif one.text.strip() in found:
            why[AGAIN] += 1
        else:
            found[one.text.strip()] = one
    return [*found.values()], why


def choose(answers: list[Answer], how: dict) -> tuple[Sequence[Kept], str, Counter]:
    """(what is kept of the answers to one prompt, why nothing is, which answers were not usable). how: `keep` and its keys."""
    found, why = usable(answers)
    if not found:
        return [], f"with no usable answer ({' or '.join(sorted(why))})", why
    keep, least = how["keep"], how.get("least")
    ranked = sorted(found, key=lambda one: -one.reward)  # stable: of equals the first
    if keep == "labels":
        return [(one,) for one in found], "", why
    if keep in ("best", "all_right"):
        right = [(one,) for one in found if least is None or one.reward >= least]
        best = [(ranked[0],)] if right else []
        return best if keep == "best" else right, "" if right else f"with no answer at or above {least:g}", why
    if len(found) < 2:
        return [], "with a single usable answer", why
    worst = min(found, key=lambda one: one.reward)
    if ranked[0].reward == worst.reward:
        return [], "with answers of one reward alone", why
    if how["pair"] == "best_worst":
        return [(ranked[0], worst)], "", why
    apart = how.get("margin", 0.0)
    pairs = [(a, b) for a in ranked for b in ranked if a.reward > b.reward and a.reward - b.reward >= apart]
    return pairs, "" if pairs else f"with no two rewards {apart:g} apart", why


def row(asked: dict, kept: Kept, how: dict, prompt: list[dict]) -> dict:
    """A row of the slice's kind. asked: the row of the prompt; its `id` comes first in the row's own."""
    turns = [[{"role": "assistant", "content": one.text}] for one in kept]
    name = f"{asked['id']}#{'>'.join(str(one.sample) for one in kept)}"
    made: dict[str, Any] = {"id": name}
    if how["keep"] == "pairs":
        made |= {"prompt": prompt, "chosen": turns[0], "rejected": turns[1]}
    elif how["keep"] == "labels":
        made |= {"prompt": prompt, "completion": turns[0], "label": kept[0].reward >= how["least"]}
    else:
        made["messages"] = [*prompt, *turns[0]]
    return made | {"rewards": [one.reward for one in kept], "tokens": [one.tokens for one in kept]}


def by_rank(prompts: list[list[Answer]]) -> list[float]:
    """The mean reward of the best answers of all prompts, of the second best, and so on: of all answers, usable or not."""
    ranked = [sorted((one.reward for one in answers), reverse=True) for answers in prompts]
    return [_mean(column) for column in zip(*ranked, strict=True)]


def facts(rows: list[dict], keep: str) -> dict:
    """What the rows are like: rewards and lengths of what was kept and, of pairs, how different their sides are.

    `longer_is_chosen`: the share of pairs whose chosen answer has more tokens, of equals a half; `words_shared`: the mean share
    of the words of either side that both have.
    """
    if keep == "pairs":
        sides = [(one["tokens"][0], one["tokens"][1]) for one in rows]
        return {
            "reward": {side: _mean([one["rewards"][i] for one in rows]) for i, side in enumerate(("chosen", "rejected"))},
            "tokens": {side: _mean([two[i] for two in sides]) for i, side in enumerate(("chosen", "rejected"))},
            "longer_is_chosen": _mean([1.0 if a > b else 0.5 if a == b else 0.0 for a, b in sides]),
            "words_shared": _mean([_shared(one["chosen"][0]["content"], one["rejected"][0]["content"]) for one in rows]),
        }
    if keep == "labels":
        groups = {label: [one for one in rows if one["label"] is label] for label in (True, False)}
        names = {True: "desirable", False: "undesirable"}
        return {
            "labels": {names[label]: len(some) for label, some in groups.items()},
            "tokens": {names[label]: _mean([one["tokens"][0] for one in some]) for label, some in groups.items() if some},
        }
    return {"reward": _mean([one["rewards"][0] for one in rows]), "tokens": _mean([one["tokens"][0] for one in rows])}


def _shared(one: str, other: str) -> float:
    a, b = set(words(one)), set(words(other))
    return len(a & b) / len(a | b) if a | b else 1.0


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 6)

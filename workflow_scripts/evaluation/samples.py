"""Several answers to a prompt, drawn: avg@n, pass@k and the answer of the majority.

Of a prompt's n answers c are right. Its value is c / n, the chance that one answer is right; the mean over prompts is avg@n, and
stands under the name that the metric has with one answer. pass@k is the chance that at least one of k answers is right, by the
unbiased estimate of Chen et al. (2021, arXiv:2107.03374, eq. 1)

    pass@k = mean over prompts of 1 - C(n - c, k) / C(n, k)

for every k that is a power of two below n, and n. (1 - (1 - c/n)^k, which puts the share in place of the chance, is too low.)
The majority is the number that most answers give; one without a number has no vote, and of numbers with equally many votes each
counts in part, as if one of them were drawn.

Prompts are what is drawn at random, and answers to one belong together: every error is that of a mean over prompts of a
prompt's own value, which is the clustered one (`scores.mean_stderr`), since all have n answers.
"""

import math
from collections import Counter
from collections.abc import Sequence
from decimal import Decimal

from workflow_scripts.evaluation.scores import mean_stderr


def pass_at(n: int, right: int, k: int) -> float:
    """The unbiased estimate of one prompt: the share of all choices of k among its n answers that have a right one."""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def tried(n: int) -> list[int]:
    """The k of pass@k: 1, 2, 4, ... below n, and n."""
    return [*(2**power for power in range(n.bit_length()) if 2**power < n), n]


def majority(given: Sequence[str | None], right: Decimal) -> float:
    """1 where most answers give the right number, a part where others have as many votes, else 0. given: numbers as texts."""
    votes = Counter(Decimal(number) for number in given if number is not None)
    most = [number for number, count in votes.items() if count == max(votes.values())]
    return (right in most) / len(most) if most else 0.0


def several(verdicts: Sequence[Sequence[bool]]) -> dict:
    """What a score file has more where prompts have several answers: samples, and pass_at {k: share, stderr}.

    verdicts: of each prompt's answers, as many for all.
    """
    n = len(verdicts[0])
    found = {}
    for k in tried(n):
        mean, stderr = mean_stderr([[pass_at(n, sum(answers), k)] for answers in verdicts])
        found[str(k)] = {"share": mean, "stderr": stderr}
    return {"samples": n, "pass_at": found}


def table(scores: dict) -> str:
    """A line for each k; "" with one answer to a prompt."""
    lines = []
    for k, one in scores.get("pass_at", {}).items():
        spread = "   n/a" if one["stderr"] is None else f"{100 * one['stderr']:6.2f}"
        lines.append(f"{'pass@' + k:<24}{100 * one['share']:7.2f} +- {spread}  ({scores['samples']} answers to each)")
    return "\n".join(lines)

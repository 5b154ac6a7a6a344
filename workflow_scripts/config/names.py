"""Names of runs and of what is scored. Apart from the config, so that what reads results does not count the config's own code."""

import re
from collections.abc import Iterable

RUN_NAME = re.compile(r"(?P<experiment>[a-z][a-z0-9_]{0,40})(\.seed(?P<seed>[0-9]+))?")
# Task -> the kind of the slice that its prompts are.
EVALUATED = {"ifeval": "ifeval", "gsm8k": "numeric", "mmlu": "choice", "truthfulqa": "truthfulqa", "judge": "prompts"}
# Task -> the metric that stands for it.
METRIC = {"ifeval": "prompt_level_strict_acc", "gsm8k": "exact_match", "mmlu": "acc", "truthfulqa": "acc", "judge": "mean_reward"}
CHOICE = ("mmlu", "truthfulqa")  # tasks that nobody answers: multiple choice, by the log-likelihood of each option
JUDGED = "judge"  # the task whose answers a reward model scores: no verdicts, but rewards


def answered(tasks: Iterable[str]) -> list[str]:
    """Of these tasks, those whose prompts a model answers in text."""
    return [task for task in tasks if task not in CHOICE]


def run_name(experiment: str, seed: int) -> str:
    """`dpo` for seed 1, `dpo.seed2`; the base has no seed."""
    return experiment if seed == 1 or experiment == "base" else f"{experiment}.seed{seed}"

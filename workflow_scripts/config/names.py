"""Names of runs and of what is scored. Apart from the config, so that what reads results does not count the config's own code."""

import re
from collections.abc import Iterable

RUN_NAME = re.compile(r"(?P<experiment>[a-z][a-z0-9_]{0,40})(\.seed(?P<seed>[0-9]+))?")
# Task -> the kind of the slice that its prompts are.
EVALUATED = {"ifeval": "ifeval", "gsm8k": "numeric", "mmlu": "choice", "truthfulqa": "truthfulqa", "judge": "prompts"}
# Task -> the metric that stands for it.
METRIC = {"ifeval": "prompt_level_strict_acc", "gsm8k": "exact_match", "mmlu": "acc", "truthfulqa": "acc", "judge": "mean_reward"}
CHOICE = ("mmlu", "truthfulqa")  # tasks that nobody answers: multiple choice, by the log-likelihood of each option
DEVELOPMENT = "dev"  # no evaluation: a task on prompts by which trials are chosen (config/tuning.py)
OBJECTIVE = "objective"  # what chooses, where methods share no task: each one's own, on held-out rows
REFERENCE_FREE = ("simpo", "cpo", "orpo")  # methods on pairs that train by the policy's own likelihoods alone
PAIRED = ("dpo", "rm", *REFERENCE_FREE)  # methods whose batches hold both answers of a row
JUDGED = "judge"  # the task whose answers a reward model scores: no verdicts, but rewards


# How a run can be judged besides the way that `eval.base` says: the merged model as a model of its own (what others start from),
# the base in NF4, the base in full precision. `dpo_nf4.seed2` is `dpo.seed2`, judged on an NF4 base.
VIEWS = ("merged", "nf4", "full")


def view_of(name: str) -> tuple[str, str]:
    """(the name of the run, how it is judged) of what may be a view's name; "" where it is none."""
    experiment, dot, seed = name.partition(".")
    stem, _, view = experiment.rpartition("_")
    return (stem + dot + seed, view) if stem and view in VIEWS else (name, "")


def answered(tasks: Iterable[str]) -> list[str]:
    """Of these tasks, those whose prompts a model answers in text, in a step of its own."""
    return [task for task in tasks if task in (*EVALUATED, DEVELOPMENT) and task not in CHOICE]


def metric_of(task: str, scores: dict) -> str:
    """The metric that stands for a task; that of one that only the config knows is told in its scores."""
    return METRIC[task] if task in METRIC else scores["metric"]


def run_name(experiment: str, seed: int) -> str:
    """`dpo` for seed 1, `dpo.seed2`; the base has no seed."""
    return experiment if seed == 1 or experiment == "base" else f"{experiment}.seed{seed}"

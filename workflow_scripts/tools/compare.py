"""Scores side by side, with standard errors, and the paired difference to the one before; for two files, the paired table.

    python -m workflow_scripts.tools.compare results/ifeval_base.json results/ifeval_sft_v2.json results/ifeval_dpo.json
    python -m workflow_scripts.tools.compare results/gsm8k_sft_v2.json results/gsm8k_grpo.json

Files of one task, over the same prompts. The difference is taken prompt by prompt (prompt-level strict, exact match or accuracy),
and its standard error is that of the mean of these paired differences: sample standard deviation / sqrt(n). It covers the choice
of prompts, not the training seed: one seed says nothing about the spread between seeds. The report does (docs/report.md).
"""

import argparse
from pathlib import Path

import numpy
import pandas

from workflow_scripts.config.names import METRIC
from workflow_scripts.evaluation import gsm8k
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.stats.selection import value
from workflow_scripts.tools import runs

IFEVAL = ("prompt_level_strict_acc", "prompt_level_loose_acc", "inst_level_strict_acc", "inst_level_loose_acc")
# The first one -> all of a task.
METRICS = {"prompt_level_strict_acc": IFEVAL, "exact_match": (*gsm8k.METRICS,), "acc": ("acc", "mc2")}
AGAINST = {"prompt_level_strict_acc": "prompt strict", "exact_match": "exact match", "acc": "accuracy"}


def name_of(path: Path) -> str:
    task, _, rest = path.stem.partition("_")
    return rest if task in METRIC and rest else path.stem


def read(files: list[Path]) -> dict[str, dict]:
    """Name -> scores, made by the pipeline or by a scorer by hand. Named by their paths where names would be one."""
    names = [name_of(path) for path in files]
    found = {}
    for path, name in zip(files, names if len(set(names)) == len(names) else map(str, files), strict=True):
        scores = runs.read_json(path)
        if scores is None:
            raise InputError(f"{path}: no JSON object can be read from it; give a score file, such as results/ifeval_dpo.json")
        if name in found:
            raise InputError(f"{path}: given twice")
        found[name] = scores
    return found


def metrics_of(scores: dict, name: str) -> tuple[str, ...]:
    if "metric" in scores and "per_prompt" in scores:  # of a task of `eval.tasks`
        return (scores["metric"],)
    for first, metrics in METRICS.items():
        if first in scores and "per_prompt" in scores:
            return tuple(metric for metric in metrics if metric in scores)  # MMLU has no mc2
    raise InputError(f"{name}: no scores with a verdict for each prompt; give results/<task>_<run>.json")


def passed(scores: dict) -> pandas.Series:
    """Key -> 1.0 where the prompt's answer passes, else 0.0; of several answers the share."""
    return pandas.Series({row["key"]: value(row) for row in scores["per_prompt"]})


def aligned(after: dict, before: dict) -> tuple[pandas.Series, pandas.Series]:
    """The verdicts of both, prompt by prompt. InputError where they are not over the same prompts."""
    one, other = passed(after), passed(before)
    if set(one.index) != set(other.index):
        lacking = sorted(set(one.index) ^ set(other.index), key=str)
        raise InputError(
            f"prompt {lacking[0]!r} and {len(lacking) - 1} more stand in one of two files only; score both over the same prompts"
        )
    return one, other[one.index]


def paired(after: dict, before: dict) -> tuple[float, float]:
    """(difference of the first metric, its standard error)."""
    one, other = aligned(after, before)
    return (one - other).mean(), (one - other).sem()


def table(scores: dict[str, dict]) -> pandas.DataFrame:
    """One row for each score file, in percent: metric +- standard error, and the paired difference to the row above."""
    rows, before = [], None
    for name, score in scores.items():
        row = {"": name}
        for metric in metrics_of(score, name):
            row[metric.removesuffix("_acc")] = f"{100 * score[metric]:5.1f} +- {100 * score[metric + '_stderr']:.1f}"
        if before is not None:
            difference, stderr = paired(score, before)
            row[f"{AGAINST.get(first := metrics_of(score, name)[0], first)}, against the row above"] = (
                f"{100 * difference:+5.1f} +- {100 * stderr:.1f} pp"
            )
        row["prompts"] = score["n_prompts"]
        rows.append(row)
        before = score
    return pandas.DataFrame(rows).fillna("")


def paired_table(before: dict, after: dict, names: tuple[str, str]) -> str:
    """The four counts of two runs over the same prompts, the difference with its interval, and McNemar's exact test."""
    from workflow_scripts.stats.family import compare

    one, other = aligned(after, before)
    counts = pandas.crosstab(other.map({0.0: "fails", 1.0: "passes"}), one.map({0.0: "fails", 1.0: "passes"}))
    counts.index.name, counts.columns.name = names
    arms = {"after": numpy.array([one]), "before": numpy.array([other])}
    (found,) = compare(arms, [("after", "before")]).comparisons
    mcnemar = found.mcnemar[0]
    low, high = 100 * found.low, 100 * found.high
    difference = (
        f"{names[1]} - {names[0]}: {100 * found.difference:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f} over prompts"
    )
    flips = f"{mcnemar.only_after} prompts gained, {mcnemar.only_before} lost; McNemar's exact p {mcnemar.p:.3g}"
    return f"{counts.to_string()}\n\n{difference}\n{flips}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", nargs="+", type=Path, help="score files of one task")
    files = parser.parse_args().scores
    scores = read(files)
    print(table(scores).to_string(index=False))
    if len(scores) == 2:
        (first, before), (second, after) = scores.items()
        print(f"\n{paired_table(before, after, (first, second))}")


if __name__ == "__main__":
    runs.command(main)

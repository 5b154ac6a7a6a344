"""Scores side by side, with their standard errors, and the paired difference to the one before.

    python -m workflow_scripts.tools.compare results/ifeval_base.json results/ifeval_sft_v2.json results/ifeval_dpo.json

The difference is taken prompt by prompt (prompt-level strict), and its standard error is that of the mean of these paired
differences: sample standard deviation / sqrt(n). It covers the choice of prompts, not the training seed: one seed says
nothing about the spread between seeds.
"""

import argparse
import json
from pathlib import Path

import pandas

METRICS = ("prompt_level_strict_acc", "prompt_level_loose_acc", "inst_level_strict_acc", "inst_level_loose_acc")


def name_of(path: Path) -> str:
    return path.stem.removeprefix("ifeval_")


def followed(scores: dict) -> pandas.Series:
    """Key -> 1.0 where every instruction of the prompt was followed strictly, else 0.0."""
    return pandas.Series({row["key"]: float(all(row["follow_instruction_list_strict"])) for row in scores["per_prompt"]})


def paired(after: dict, before: dict) -> tuple[float, float]:
    """(difference of prompt-level strict accuracy, its standard error), over the prompts that both answered."""
    differences = (followed(after) - followed(before)).dropna()
    return differences.mean(), differences.sem()


def table(scores: dict[str, dict]) -> pandas.DataFrame:
    """One row for each score file, in percent: metric +- standard error, and the paired difference to the row above."""
    rows, before = [], None
    for name, score in scores.items():
        row = {"": name}
        for metric in METRICS:
            row[metric.removesuffix("_acc")] = f"{100 * score[metric]:5.1f} +- {100 * score[metric + '_stderr']:.1f}"
        if before is not None:
            difference, stderr = paired(score, before)
            row["prompt strict, against the row above"] = f"{100 * difference:+5.1f} +- {100 * stderr:.1f} pp"
        row["prompts"] = score["n_prompts"]
        rows.append(row)
        before = score
    return pandas.DataFrame(rows).fillna("")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scores", nargs="+", type=Path, help="score files of ifeval")
    files = parser.parse_args().scores
    print(table({name_of(path): json.loads(path.read_text()) for path in files}).to_string(index=False))


if __name__ == "__main__":
    main()

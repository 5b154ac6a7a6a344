"""Score responses to IFEval prompts with lm-eval's own checkers, offline (`evaluation/ifeval.py`: how, and our departures).

    python -m workflow_scripts.steps.score_ifeval --prompts data/ifeval/input_data.jsonl \\
        --responses results/dpo/ifeval_responses.jsonl --output scores.json

PROMPTS has the format of IFEval's input_data.jsonl; each row of RESPONSES has `prompt` and `response`, and optionally
`key`, `finish_reason` and `tokens`; where each prompt has several, their number from 0 under `sample`. Rows are joined by `key`
where every row of both files has one, else by the text of the prompt. The same files give the same bytes. An input that cannot be
scored is one line on stderr and exit status 1.
"""

from pathlib import Path

from workflow_scripts.artifacts import manifests
from workflow_scripts.evaluation import ifeval, samples
from workflow_scripts.steps import scoring

METRICS = ("prompt_level_strict_acc", "inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc")


def main(prompts: Path, responses: Path, output: Path, strip_think: bool) -> dict:
    return scoring.by_hand(ifeval.score, table, prompts, responses, output, strip_think)


def main_step(job: manifests.Job) -> None:
    scoring.in_pipeline(ifeval.score, table, job)


def table(scores: dict) -> str:
    """Four lines, one for each metric; with several answers to a prompt, pass@k."""
    units = {metric: "prompts" if metric.startswith("prompt") else "instructions" for metric in METRICS}
    lines = [scoring.line(scores, metric, scores[f"n_{unit}"], unit) for metric, unit in units.items()]
    return "\n".join(filter(None, [*lines, samples.table(scores)]))


if __name__ == "__main__":
    scoring.run("score_ifeval", __doc__, main, main_step)

"""Score responses to GSM8K questions, or to any numeric slice (`evaluation/gsm8k.py`: how, and what lm-eval does otherwise).

    python -m workflow_scripts.steps.score_gsm8k --prompts data/gsm8k/test.jsonl \\
        --responses results/grpo/gsm8k_responses.jsonl --output scores.json

PROMPTS has GSM8K's format (`question`, and `answer` with `#### ` and the number at its end) or that of a numeric slice
(`prompt`, `final`); each row of RESPONSES has `prompt` and `response`, and optionally `key`, `finish_reason` and `tokens`; where
each prompt has several, their number from 0 under `sample`. Rows are joined by `key` where every row of both files has one, else
by the text of the prompt. The same files give the same bytes. An input that cannot be scored is one line on stderr and exit
status 1.
"""

from pathlib import Path

from workflow_scripts.artifacts import manifests
from workflow_scripts.evaluation import gsm8k, samples
from workflow_scripts.plumbing import startup
from workflow_scripts.steps import scoring


def main(prompts: Path, responses: Path, output: Path, strip_think: bool) -> dict:
    return scoring.by_hand(gsm8k.score, table, prompts, responses, output, strip_think)


def main_step(job: manifests.Job) -> None:
    startup.ready()
    scoring.in_pipeline(gsm8k.score, table, job)


def table(scores: dict) -> str:
    """A line for each metric; then who gave no number."""
    metrics = [*gsm8k.METRICS, *(["majority"] if "majority" in scores else [])]
    lines = [scoring.line(scores, metric, scores["n_prompts"], "prompts") for metric in metrics]
    lines += [samples.table(scores), f"{'without a number':<24}{100 * scores['no_answer_share']:7.2f}"]
    return "\n".join(filter(None, lines))


if __name__ == "__main__":
    scoring.run("score_gsm8k", __doc__, main, main_step)

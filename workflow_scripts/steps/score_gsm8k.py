"""Score responses to GSM8K questions, or to any numeric slice (`core/gsm8k.py`: how, and what lm-eval does otherwise).

    python -m workflow_scripts.steps.score_gsm8k --prompts data/gsm8k/test.jsonl \\
        --responses results/grpo/gsm8k_responses.jsonl --output scores.json

PROMPTS has GSM8K's format (`question`, and `answer` with `#### ` and the number at its end) or that of a numeric slice
(`prompt`, `final`); each row of RESPONSES has `prompt` and `response`, and optionally `key`, `finish_reason` and `tokens`.
Rows are joined by `key` where every row of both files has one, else by the text of the prompt. The same files give the same
bytes. An input that cannot be scored is one line on stderr and exit status 1.
"""

import argparse
import json
import sys
from pathlib import Path

from workflow_scripts.core import artifacts, cli, gsm8k
from workflow_scripts.core.jsonl import read_jsonl, write_atomically
from workflow_scripts.core.messages import InputError

METRICS = ("exact_match", "strict_match")


def main(prompts: Path, responses: Path, output: Path, strip_think: bool) -> dict:
    """Score, write the scores to `output` (by rename, when they are whole) and print the table. Returns the scores."""
    if output.resolve() in (prompts.resolve(), responses.resolve()):
        raise InputError(f"{output}: is one of the inputs and would be overwritten; give --output another name")
    scores = gsm8k.score(read_jsonl(prompts), read_jsonl(responses), strip_think, str(prompts), str(responses))
    write_atomically(output, (json.dumps(scores, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("utf-8"))
    reworded = scores["reworded_keys"]
    if reworded:
        where = f"key {reworded[0]!r}" + (f" and {len(reworded) - 1} more" if len(reworded) > 1 else "")
        print(f"note: {responses}: another prompt text than in {prompts} under {where}; joined by key", file=sys.stderr)
    print(table(scores))
    return scores


def table(scores: dict) -> str:
    """A line for each metric: the share in percent, its standard error in percentage points, n; then who gave no number."""
    lines = []
    for metric in METRICS:
        stderr = scores[f"{metric}_stderr"]
        spread = "   n/a" if stderr is None else f"{100 * stderr:6.2f}"
        lines.append(f"{metric:<24}{100 * scores[metric]:7.2f} +- {spread}  ({scores['n_prompts']} prompts)")
    lines.append(f"{'without a number':<24}{100 * scores['no_answer_share']:7.2f}")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m workflow_scripts.steps.score_gsm8k",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--prompts", type=Path, required=True, metavar="PROMPTS.jsonl")
    parser.add_argument("--responses", type=Path, required=True, metavar="RESPONSES.jsonl")
    parser.add_argument("--output", type=Path, required=True, metavar="SCORES.json")
    parser.add_argument("--strip-think", action="store_true", help="judge only what follows the last </think>")
    return parser


def main_step(job: artifacts.Job) -> None:
    """The pipeline's way in: the scores are the manifest themselves, with the step that made them."""
    parents = job.parents()
    prompts, responses = parents["prompts"], parents["responses"]
    rows = read_jsonl(responses.file(responses.path.name.replace(".manifest.json", ".jsonl")))
    scores = gsm8k.score(prompts.rows(), rows, job.config["strip_think"], str(prompts.path), str(responses.path))
    print(table(scores))
    with artifacts.complete(job, "scores", parents) as draft:
        draft.manifest |= scores


if __name__ == "__main__":
    if "--step" in sys.argv:
        cli.run(main_step, __doc__)
        sys.exit()
    arguments = make_parser().parse_args()
    try:
        main(arguments.prompts, arguments.responses, arguments.output, arguments.strip_think)
    except InputError as error:
        sys.exit(str(error))  # one line on stderr, exit status 1

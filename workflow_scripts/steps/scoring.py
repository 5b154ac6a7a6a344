"""The two ways into a scorer: a step of the pipeline, and a command on two files of one's own."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from workflow_scripts.artifacts import manifests
from workflow_scripts.plumbing.jsonl import read_jsonl, write_atomically
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import cli

Score = Callable[[list[dict], list[dict], bool, str, str], dict]  # (prompts, responses, strip_think, names of both) -> scores
Table = Callable[[dict], str]


def by_hand(score: Score, table: Table, prompts: Path, responses: Path, output: Path, strip_think: bool) -> dict:
    """Score two files, write the scores to `output` (by rename, when they are whole) and print the table. Returns the scores."""
    if output.resolve() in (prompts.resolve(), responses.resolve()):
        raise InputError(f"{output}: is one of the inputs and would be overwritten; give --output another name")
    scores = score(read_jsonl(prompts), read_jsonl(responses), strip_think, str(prompts), str(responses))
    write_atomically(output, (json.dumps(scores, sort_keys=True, indent=1, allow_nan=False) + "\n").encode("utf-8"))
    reworded = scores["reworded_keys"]
    if reworded:
        where = f"key {reworded[0]!r}" + (f" and {len(reworded) - 1} more" if len(reworded) > 1 else "")
        print(f"note: {responses}: another prompt text than in {prompts} under {where}; joined by key", file=sys.stderr)
    print(table(scores))
    return scores


def in_pipeline(score: Score, table: Table, job: manifests.Job) -> None:
    """The scores are the manifest themselves, with the step that made them."""
    parents = job.parents()
    prompts, responses = parents["prompts"], parents["responses"]
    rows = read_jsonl(responses.file(responses.path.name.replace(".manifest.json", ".jsonl")))
    scores = score(prompts.rows(), rows, job.config["strip_think"], str(prompts.path), str(responses.path))
    print(table(scores))
    with manifests.complete(job, "scores", parents) as draft:
        draft.manifest |= scores


def line(scores: dict, metric: str, n: int, unit: str) -> str:
    """A metric's share in percent, its standard error in percentage points, and of how many."""
    stderr = scores[f"{metric}_stderr"]
    spread = "   n/a" if stderr is None else f"{100 * stderr:6.2f}"
    return f"{metric:<24}{100 * scores[metric]:7.2f} +- {spread}  ({n} {unit})"


def run(name: str, doc: str | None, main: Callable[..., dict], main_step: Callable[[manifests.Job], None]) -> None:
    """The command line of a scorer's module: with --step the pipeline's, else that of `by_hand`."""
    if "--step" in sys.argv:
        cli.run(main_step, doc)
        return
    parser = argparse.ArgumentParser(
        prog=f"python -m workflow_scripts.steps.{name}", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=Path, required=True, metavar="PROMPTS.jsonl")
    parser.add_argument("--responses", type=Path, required=True, metavar="RESPONSES.jsonl")
    parser.add_argument("--output", type=Path, required=True, metavar="SCORES.json")
    parser.add_argument("--strip-think", action="store_true", help="judge only what follows the last </think>")
    args = parser.parse_args()
    try:
        main(args.prompts, args.responses, args.output, args.strip_think)
    except InputError as error:
        sys.exit(str(error))  # one line on stderr, exit status 1

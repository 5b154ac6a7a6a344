"""Judges answers that are programs (`allow_code: true` of a task): its metrics run in evaluation/sandbox.py, and never here.

Here lm-eval is asked for its prompts and stopped once they are answered. What judges is a process of its own, which is given the
answers, the task's files and its rows, makes the task again, and has lm-eval filter and judge, each item apart. An item whose
judgement ends otherwise than by an answer (time, memory, processes, exit()) is 0 in every metric, and counted under `stopped`. A
metric that raises is an error, as it is in lm-eval.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from workflow_scripts.evaluation import own_tasks, sandbox
from workflow_scripts.plumbing.messages import InputError


def judge(config: dict, inputs: list[Path], tasks: list[Any], lm: Any, kept: Path) -> dict:
    """The scores of `own_tasks.score`, with `stopped`. lm: has `answers` to all prompts, which are in `prompts`; kept: a folder,
    for the rows."""
    rows = [str((kept / f"judged_{number}").absolute()) for number in range(len(tasks))]
    for task, folder in zip(tasks, rows, strict=True):
        task.dataset.save_to_disk(folder)
    given = {
        "config": config,
        "inputs": [str(path.absolute()) for path in inputs],
        "rows": rows,
        "answers": lm.answers,
        "cut": lm.cut,
    }
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", __name__, folder],
            input=json.dumps(given).encode(),
            stdout=subprocess.PIPE,
            env=sandbox.environment(Path(folder)),
        )
    place = f"eval.tasks.{config['task']}"
    try:
        scores = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        problem = f"the sandbox ended without scores (exit code {done.returncode}); what it said is above"
        raise InputError(f"{place}: {problem}") from None
    if "error" in scores:
        raise InputError(f"{place}: {scores['error']}")
    scores["example"]["prompt"] = lm.prompts[0]
    return scores


def _saying(answers: list[list[dict]]) -> Any:
    """lm-eval's model that has said all already; at each call the next answer to each prompt."""
    from lm_eval.api.model import LM

    class Saying(LM):
        calls = 0
        tokenizer_name = ""

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            if len(requests) != len(answers):
                raise InputError(f"{len(answers)} prompts were answered, and in the sandbox the task has {len(requests)}")
            self.calls += 1
            return [each[self.calls - 1]["response"] for each in answers]

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return json.dumps(chat_history)  # nobody reads it here

        def chat_template(self, chat_template: Any = False) -> str:
            return ""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            raise NotImplementedError

        loglikelihood_rolling = loglikelihood

    return Saying()


def _judged(given: dict, folder: Path) -> dict:
    """In the sandbox."""
    from lm_eval import evaluator

    evaluator.get_git_commit_hash = str  # it asks git, which says on stderr that it is nowhere
    config, stopped = given["config"], Counter[str]()
    manager, tasks = own_tasks.load(config, [Path(one) for one in given["inputs"]], folder, given["rows"])
    for task in tasks:

        def apart(doc: Any, results: Any, task: Any = task, right: Any = task.process_results) -> dict:
            found, why = sandbox.apart(lambda: right(doc, results), config["allow_code"])
            if not why and isinstance(found, dict):
                return found
            stopped[why or "ended"] += 1
            return dict.fromkeys([config["metric"].partition(",")[0], *task.aggregation()], 0.0)

        task.process_results = apart
    found = own_tasks.evaluate(_saying(given["answers"]), manager, tasks, config)
    return own_tasks.score(config, tasks, found, given["answers"], given["cut"]) | {"stopped": dict(stopped)}


def main() -> None:
    given, out = json.load(sys.stdin.buffer), os.dup(1)
    os.dup2(2, 1)  # what libraries print is no scores
    try:
        sandbox.enter(Path(sys.argv[1]))
        scores = _judged(given, Path(sys.argv[1]))
    except (InputError, OSError) as error:
        scores = {"error": str(error)}
    os.write(out, b"\n")
    with open(out, "w") as opened:
        json.dump(scores, opened)


if __name__ == "__main__":
    main()

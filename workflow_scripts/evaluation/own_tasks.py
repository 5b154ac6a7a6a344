"""Any task of lm-eval (`eval.tasks`): its prompts, filters and metrics are lm-eval's, who answers is this pipeline.

A task is lm-eval's own or a YAML file in its format, of `multiple_choice`, `loglikelihood` or `generate_until`. Log-likelihoods
are asked for as those of MMLU are (evaluation/lm_tasks.py, which has the departures). Answers come from the generator that
answers every other prompt: greedy, up to an end of the model's or the task's length. lm-eval stops at a task's `until` and cuts
the text there; here it is cut at the same place afterwards. That gives the same answers: what comes after a stop can't change
what came before it.

What counts is one metric, 0 or 1 for each item, or a number between them (TruthfulQA's mc2). The others whose values are numbers
and which lm-eval takes the mean of are reported beside it. With several answers to an item (`samples`) lm-eval is asked once for
each of them, and judges it as if it were the only one. Standard errors are ours: of a mean over items, or over groups
of them (`group_by`, such as questions on one passage), which are then the clusters (evaluation/scores.py). Tasks with IFEval's
checkers have them under the conditions of the project's own IFEval (evaluation/ifeval.py): else NLTK would download its tables.
"""

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workflow_scripts.data import task_files
from workflow_scripts.evaluation import code_eval, ifeval
from workflow_scripts.evaluation.samples import several
from workflow_scripts.evaluation.scores import entries, mean_stderr
from workflow_scripts.plumbing.messages import InputError

# (prompts as texts, as token ids, tokens that an answer may have) -> for each answer `response`, `tokens`, `finish_reason`; those
# to one prompt side by side
Say = Callable[[list[str], list[list[int]], int], list[dict]]


@ifeval.conditions()
def load(config: dict, inputs: list[Path], cache: Path, rows: list[str] | None = None) -> tuple[Any, list[Any]]:
    """lm-eval's TaskManager, and the task with its rows; of a group all its tasks. config: of the step; inputs: the files that it
    was given.

    cache: a folder for `datasets`, which would else take rows of a file that it has seen under another content. rows: a folder of
    each task's, as `datasets` saves them, in place of what it names.
    """
    from datasets import load_from_disk
    from lm_eval.api.metrics import mean
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    if config.get("allow_code"):
        code_eval.provide()
    asked, place = config["lm_eval"], f"eval.tasks.{config['task']}"

    def given(name: str) -> str:
        found = [str(path) for path in inputs if path.name == name]
        if len(found) != 1:
            raise InputError(f"{place}: expected the file {name} among the inputs, found {len(found)}; run snakemake again")
        return found[0]

    if "file" in asked:
        paths = [Path(given(asked["file"]))]
        if "group" in (group := task_files.top(paths[0])) and not isinstance(group.get("task"), str):
            paths = task_files.members(paths[0], group)
    else:
        paths = task_files.own_files(asked["task"])
    if not paths:
        raise InputError(f"{place}: lm-eval has no task {asked['task']!r} here; install the versions of the lock file")
    if "data_files" in asked:
        asked = asked | {"data_files": {split: given(name) for split, name in asked["data_files"].items()}}
    manager, tasks = TaskManager(include_defaults=False), []
    name = config["metric"].partition(",")[0]
    for number, path in enumerate(paths):
        try:
            data = task_files.laid_over(load_yaml(path), asked)
            if rows is not None:
                data |= {"dataset_kwargs": {}, "custom_dataset": lambda folder=rows[number], **_: load_from_disk(folder)}
            elif task_files.hub_of(data) is None:
                data["dataset_kwargs"] = {**data["dataset_kwargs"], "cache_dir": str(cache)}
            (task,) = manager.load(data)["tasks"].values()
        except InputError:
            raise
        except Exception as error:  # of lm-eval, `datasets`, a template, or the task's own code
            said = " ".join(str(error).split())[:300]
            raise InputError(f"{place}: lm-eval can't make this task of {path} ({type(error).__name__}: {said})") from error
        if task.aggregation().get(task_files.metrics(data).get(name, name)) is not mean:
            raise InputError(f"{place}.metric: found {name}, which is put together over all items; expected a mean over items")
        tasks.append(task)
    return manager, tasks


def answering(model: Any, tokenizer: Any, say: Say, samples: int) -> Any:
    """lm-eval's model of a generator. Keeps in `answers` what was said to each request, so many times, and in `cut` how many were
    cut. Says at first the first answer to each; at the next call, without asking again, the second, and so on."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

    class Answering(HFLM):
        answers: list[list[dict]] = []  # of each request
        prompts: list[str] = []
        cut, calls, only_asks = 0, 0, False

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            if not self.answers:
                self.ask(requests)
            if self.only_asks:
                raise Answered
            self.calls += 1
            return [each[self.calls - 1]["response"] for each in self.answers]

        def ask(self, requests: Any) -> None:
            settings = requests[0].args[1]
            if any(request.args[1] != settings for request in requests):
                raise InputError("a task whose items have settings of their own (until, max_gen_toks) can't be asked here")
            settings = normalize_gen_kwargs(settings, self.max_gen_toks)
            new, room = settings["max_gen_toks"], self.max_length - settings["max_gen_toks"]
            if room <= 0:
                raise InputError(
                    f"an answer may have {new} tokens (max_gen_toks), and the model reads {self.max_length}; lower it"
                )
            until = handle_stop_sequences(settings.get("until"), self.tok_decode(self.eot_token_id, skip_special_tokens=False))
            texts = self.prompts = [request.args[0] for request in requests]
            whole = [self.tok_batch_encode([text])[0][0].tolist() for text in texts]
            self.cut = sum(len(ids) > room for ids in whole)
            said = say(texts, [ids[-room:] for ids in whole], new)
            cut = [postprocess_generated_text(one["response"], until, None) for one in said]
            flat = [
                {
                    "response": text,
                    "tokens": one["tokens"],
                    "truncated": one["finish_reason"] == "length" and text == one["response"],
                }
                for text, one in zip(cut, said, strict=True)
            ]
            self.answers = [flat[first : first + samples] for first in range(0, len(flat), samples)]

    return Answering(pretrained=model, tokenizer=tokenizer)


class Answered(Exception):
    """All prompts are, and nobody judges here."""


def ask(lm: Any, manager: Any, tasks: list[Any], config: dict) -> None:
    """Have lm-eval's prompts answered, and nothing judged. lm: of `answering`, which has the answers afterwards."""
    lm.only_asks = True
    with contextlib.suppress(Answered):
        _evaluated(lm, manager, tasks, config)


def evaluate(lm: Any, manager: Any, tasks: list[Any], config: dict) -> list[list[dict]]:
    """lm-eval's samples, of the filter that counts, in the order of the rows: of the first answers, of the second, and so on."""
    return [_evaluated(lm, manager, tasks, config) for _ in range(config.get("drawn", {}).get("samples", 1))]


@ifeval.conditions()
def _evaluated(lm: Any, manager: Any, tasks: list[Any], config: dict) -> list[dict]:
    import lm_eval

    asked = config["lm_eval"]
    found = lm_eval.simple_evaluate(
        lm,
        tasks=tasks,
        task_manager=manager,
        limit=asked["limit"],
        system_instruction=asked["system"],
        apply_chat_template=asked["chat_template"],
        fewshot_as_multiturn=asked["fewshot_as_multiturn"],
        confirm_run_unsafe_code=config.get("allow_code", False),
        bootstrap_iters=0,  # standard errors are ours; seeds are lm-eval's defaults: it draws the examples that its command draws
    )
    ordered = []
    for task in tasks:
        samples = found["samples"][task.config.task]
        wanted = config["metric"].partition(",")[2] or samples[0]["filter"]
        counted = sorted((one for one in samples if one["filter"] == wanted), key=lambda one: one["doc_id"])
        ordered += [one | {"of": task.config.task} for one in counted]
    return ordered


def score(config: dict, tasks: list[Any], found: list[list[dict]], answers: list[list[dict]], cut: int) -> dict:
    """The scores in the form of the others (evaluation/gsm8k.py), from lm-eval's samples (`evaluate`).

    The metric that counts under its own name, with `_stderr` (None for a single group); `metric`, that name; n_prompts;
    n_groups; other: {metric: mean} of what else is a mean of numbers; cut: items whose beginning the model could not read;
    example: the first prompt as the model saw it; per_prompt, in the order of the rows: key (the row's number, from 0), correct
    (or value, of a metric that is a number), with `group_by` group, and of answers response. Answers add truncated_share and
    mean_response_tokens, multiple choice tied. Several answers to an item: as in evaluation/gsm8k.py. Items of a group's tasks
    are counted together: a key is the task's name and the row's number, a task is a cluster where `group_by` names none, and
    by_task has the mean of each.
    """
    from lm_eval.api.metrics import mean

    task, together = tasks[0], len(tasks) > 1
    name, samples = config["metric"].partition(",")[0], found[0]
    counted = [[_counted(config, draw[number]) for draw in found] for number in range(len(samples))]
    verdicts = all(isinstance(one, bool) for each in counted for one in each)
    per_prompt = []
    for number, one in enumerate(samples):
        facts = [{"correct": value} if verdicts else {"value": value} for value in counted[number]]
        for fact, answer in zip(facts, answers[number] if answers else [], strict=False):
            fact["response"] = answer["response"]
        key = f"{one['of']}/{one['doc_id']}" if together else one["doc_id"]
        entry = entries(key, facts, sum(counted[number]) / len(facts)) | ({"group": one["of"]} if together else {})
        if "group_by" in config:
            if (by := config["group_by"]) not in one["doc"]:
                place = f"eval.tasks.{config['task']}"
                raise InputError(f"{place}.group_by: item {key} has no {by!r}, only {', '.join(one['doc'])}")
            entry["group"] = str(one["doc"][by])
        per_prompt.append(entry)
    groups: dict[Any, list[float]] = {}
    for entry, each in zip(per_prompt, counted, strict=True):
        groups.setdefault(entry.get("group", entry["key"]), []).extend(each)
    how, others = task.aggregation(), [one for one in samples[0]["metrics"] if one != name]
    values: dict[str, list[Any]] = {
        one: [sample.get(one) for draw in found for sample in draw] for one in others if how.get(one) is mean
    }
    numbers = {one: all_of for one, all_of in values.items() if all(map(is_number, all_of))}
    scores: dict[str, Any] = {
        "metric": name,
        "n_prompts": len(samples),
        "n_groups": len(groups),
        "other": {one: mean_stderr([[float(value)] for value in all_of])[0] for one, all_of in numbers.items()},
        "cut": cut,
        "example": {"prompt": samples[0]["arguments"][0][0]},
        "per_prompt": per_prompt,
    }
    scores[name], scores[f"{name}_stderr"] = mean_stderr(list(groups.values()))
    if together:
        parts: dict[str, list[float]] = {}
        for one, each in zip(samples, counted, strict=True):
            parts.setdefault(one["of"], []).extend(each)
        scores["by_task"] = {part: {"n": len(each), name: sum(each) / len(each)} for part, each in parts.items()}
    if len(found) > 1 and verdicts:
        scores |= several([[value == 1 for value in each] for each in counted])
    if flat := [one for each in answers for one in each]:
        scores["truncated_share"] = sum(one["truncated"] for one in flat) / len(flat)
        scores["mean_response_tokens"] = sum(one["tokens"] for one in flat) / len(flat)
    else:
        scores["example"]["options"] = [option for _, option in samples[0]["arguments"]]
    if task.OUTPUT_TYPE == "multiple_choice":
        likelihoods = [[answer[0] for answer in one["filtered_resps"]] for one in samples]
        scores["tied"] = sum(one.count(max(one)) > 1 for one in likelihoods)
    return scores


def _counted(config: dict, one: dict) -> bool | float:
    """What counts of an item: a verdict, or a number between 0 and 1."""
    name = config["metric"].partition(",")[0]
    value: Any = one.get(name)
    if is_number(value) and value in (0, 1):
        return bool(value)
    if is_number(value) and 0 <= value <= 1:
        return float(value)
    raise InputError(
        f"eval.tasks.{config['task']}.metric: {name} of item {one['doc_id']} is {value!r}, expected 0 or 1, a verdict, or a "
        "number between"
    )


def is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) or getattr(value, "ndim", None) == 0

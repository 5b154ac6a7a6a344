"""Any task of lm-eval (`eval.tasks`): its prompts, filters and metrics are lm-eval's, who answers is this pipeline.

A task is lm-eval's own or a YAML file in its format, of `multiple_choice`, `loglikelihood` or `generate_until`. Log-likelihoods
are asked for as those of MMLU are (evaluation/lm_tasks.py, which has the departures). Answers come from the generator that
answers every other prompt: greedy, up to an end of the model's or the task's length. lm-eval stops at a task's `until` and cuts
the text there; here it is cut at the same place afterwards. That gives the same answers: what comes after a stop can't change
what came before it.

What counts is one metric, 0 or 1 for each item, so that a verdict stands on it as on IFEval's. The others whose values are
numbers and which lm-eval takes the mean of are reported beside it. Standard errors are ours: of a mean over items, or over groups
of them (`group_by`, such as questions on one passage), which are then the clusters (evaluation/scores.py).
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workflow_scripts.data import task_files
from workflow_scripts.evaluation.scores import mean_stderr
from workflow_scripts.plumbing.messages import InputError

# (prompts as texts, as token ids, tokens that an answer may have) -> for each `response`, `tokens`, `finish_reason`
Say = Callable[[list[str], list[list[int]], int], list[dict]]


def load(config: dict, inputs: list[Path], cache: Path) -> tuple[Any, Any]:
    """lm-eval's TaskManager, and the task with its rows. config: of the step; inputs: the files that it was given.

    cache: a folder for `datasets`, which would else take rows of a file that it has seen under another content.
    """
    from lm_eval.api.metrics import mean
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    asked, place = config["lm_eval"], f"eval.tasks.{config['task']}"

    def given(name: str) -> str:
        found = [str(path) for path in inputs if path.name == name]
        if len(found) != 1:
            raise InputError(f"{place}: expected the file {name} among the inputs, found {len(found)}; run snakemake again")
        return found[0]

    path = Path(given(asked["file"])) if "file" in asked else task_files.own_file(asked["task"])
    if path is None:
        raise InputError(f"{place}: lm-eval has no task {asked['task']!r} here; install the versions of the lock file")
    if "data_files" in asked:
        asked = asked | {"data_files": {split: given(name) for split, name in asked["data_files"].items()}}
    try:
        data = task_files.laid_over(load_yaml(path), asked)
        if task_files.hub_of(data) is None:
            data["dataset_kwargs"] = {**data["dataset_kwargs"], "cache_dir": str(cache)}
        manager = TaskManager(include_defaults=False)
        (task,) = manager.load(data)["tasks"].values()
    except InputError:
        raise
    except Exception as error:  # of lm-eval, `datasets`, a template, or the task's own code
        said = " ".join(str(error).split())[:300]
        raise InputError(f"{place}: lm-eval can't make this task of {path} ({type(error).__name__}: {said})") from error
    name = config["metric"].partition(",")[0]
    if task.aggregation().get(name) is not mean:
        raise InputError(f"{place}.metric: found {name}, which is put together over all items; expected a mean over items")
    return manager, task


def answering(model: Any, tokenizer: Any, say: Say) -> Any:
    """lm-eval's model of a generator. Keeps in `answers` what was said to each request, and in `cut` how many were cut."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

    class Answering(HFLM):
        answers: list[dict] = []
        cut = 0

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
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
            texts = [request.args[0] for request in requests]
            whole = [self.tok_batch_encode([text])[0][0].tolist() for text in texts]
            self.cut = sum(len(ids) > room for ids in whole)
            said = say(texts, [ids[-room:] for ids in whole], new)
            cut = [postprocess_generated_text(one["response"], until, None) for one in said]
            self.answers = [
                {
                    "response": text,
                    "tokens": one["tokens"],
                    "truncated": one["finish_reason"] == "length" and text == one["response"],
                }
                for text, one in zip(cut, said, strict=True)
            ]
            return cut

    return Answering(pretrained=model, tokenizer=tokenizer)


def evaluate(lm: Any, manager: Any, task: Any, config: dict) -> list[dict]:
    """lm-eval's samples, of the filter that counts, in the order of the rows."""
    import lm_eval

    asked = config["lm_eval"]
    found = lm_eval.simple_evaluate(
        lm,
        tasks=[task],
        task_manager=manager,
        limit=asked["limit"],
        system_instruction=asked["system"],
        apply_chat_template=asked["chat_template"],
        fewshot_as_multiturn=asked["fewshot_as_multiturn"],
        bootstrap_iters=0,  # standard errors are ours; seeds are lm-eval's defaults: it draws the examples that its command draws
    )
    (samples,) = found["samples"].values()
    wanted = config["metric"].partition(",")[2] or samples[0]["filter"]
    return sorted((one for one in samples if one["filter"] == wanted), key=lambda one: one["doc_id"])


def score(config: dict, task: Any, samples: list[dict], answers: list[dict], cut: int) -> dict:
    """The scores in the form of the others (evaluation/gsm8k.py), from lm-eval's samples.

    The metric that counts under its own name, with `_stderr` (None for a single group); `metric`, that name; n_prompts;
    n_groups; other: {metric: mean} of what else is a mean of numbers; cut: items whose beginning the model could not read;
    example: the first prompt as the model saw it; per_prompt, in the order of the rows: key (the row's number, from 0), correct,
    with `group_by` group, and of answers response. Answers add truncated_share and mean_response_tokens, multiple choice tied.
    """
    from lm_eval.api.metrics import mean

    place, name = f"eval.tasks.{config['task']}", config["metric"].partition(",")[0]
    per_prompt: list[dict] = []
    for number, one in enumerate(samples):
        if one.get(name) not in (0, 1):
            raise InputError(
                f"{place}.metric: {name} of item {one['doc_id']} is {one.get(name)!r}, expected 0 or 1: a verdict for each item"
            )
        entry = {"key": one["doc_id"], "correct": bool(one[name])}
        if "group_by" in config:
            if (key := config["group_by"]) not in one["doc"]:
                raise InputError(f"{place}.group_by: item {one['doc_id']} has no {key!r}, only {', '.join(one['doc'])}")
            entry["group"] = str(one["doc"][key])
        per_prompt.append(entry | ({"response": answers[number]["response"]} if answers else {}))
    groups: dict[Any, list[bool]] = {}
    for entry in per_prompt:
        groups.setdefault(entry.get("group", entry["key"]), []).append(entry["correct"])
    how, others = task.aggregation(), [one for one in samples[0]["metrics"] if one != name]
    values: dict[str, list[Any]] = {one: [sample.get(one) for sample in samples] for one in others if how.get(one) is mean}
    numbers = {one: found for one, found in values.items() if all(map(is_number, found))}
    scores: dict[str, Any] = {
        "metric": name,
        "n_prompts": len(samples),
        "n_groups": len(groups),
        "other": {one: mean_stderr([[float(value)] for value in found])[0] for one, found in numbers.items()},
        "cut": cut,
        "example": {"prompt": samples[0]["arguments"][0][0]},
        "per_prompt": per_prompt,
    }
    scores[name], scores[f"{name}_stderr"] = mean_stderr(list(groups.values()))
    if answers:
        scores["truncated_share"] = sum(one["truncated"] for one in answers) / len(answers)
        scores["mean_response_tokens"] = sum(one["tokens"] for one in answers) / len(answers)
    else:
        scores["example"]["options"] = [option for _, option in samples[0]["arguments"]]
    if task.OUTPUT_TYPE == "multiple_choice":
        likelihoods = [[answer[0] for answer in one["filtered_resps"]] for one in samples]
        scores["tied"] = sum(one.count(max(one)) > 1 for one in likelihoods)
    return scores


def is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float) or getattr(value, "ndim", None) == 0

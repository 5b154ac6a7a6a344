"""`eval.tasks` in the config: any task of lm-eval, by its name or by a file of one's own. Plans; imports no lm-eval."""

import difflib
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from workflow_scripts.config.names import DEVELOPMENT, EVALUATED, JUDGED, METRIC, OBJECTIVE
from workflow_scripts.config.written import Written
from workflow_scripts.data import task_files
from workflow_scripts.data.task_files import Definition
from workflow_scripts.plumbing.messages import InputError

TYPES = ("generate_until", "multiple_choice", "loglikelihood")
# What lm-eval counts where a definition has no metric_list, of those that are means over items.
METRICS = {"generate_until": ["exact_match"], "multiple_choice": ["acc", "acc_norm"], "loglikelihood": ["acc"]}
# Settings of an answer that greedy decoding has or that mean nothing to it.
GREEDY = {"until", "do_sample", "temperature", "top_p", "top_k"}
LENGTH = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
TAKEN = {*EVALUATED, DEVELOPMENT, OBJECTIVE, "rm"}


def check(config: Written) -> None:
    """InputError on a task that lm-eval does not have, that can't be run here, or whose metric or data are not there."""
    for name, body in config.own_tasks.items():
        place = ["eval", "tasks", name]
        if name in TAKEN:
            raise config.fail(place, "is a name that has a meaning of its own here; take another")
        asked = body["lm_eval"]
        if ("task" in asked) == ("file" in asked):
            raise config.fail([*place, "lm_eval"], "expected either task (a name of lm-eval's) or file (a YAML file of yours)")
        if asked["fewshot_as_multiturn"] and not (asked["chat_template"] and asked["num_fewshot"]):
            problem = "found true, and there are no turns: it takes chat_template: true and num_fewshot of 1 or more; set false"
            raise config.fail([*place, "lm_eval", "fewshot_as_multiturn"], problem)
        whole = definition(config, name)
        data = whole.data
        for one in whole.tasks:
            _check_kind(config, [*place, "lm_eval", "task" if "task" in asked else "file"], one, body.get("allow_code", False))
        if body.get("allow_code") and data.get("output_type", "generate_until") != "generate_until":
            problem = f"found true, and a task of {data['output_type']} has no answers that could be run; leave it out"
            raise config.fail([*place, "allow_code"], problem)
        known = {*METRIC, *config.own_tasks} - {JUDGED, name}
        if body.get("protocol_of", "ifeval") not in known:
            problem = f"found {body['protocol_of']!r}, expected the evaluation that this is under another protocol: "
            raise config.fail([*place, "protocol_of"], problem + ", ".join(sorted(known)))
        if "samples" in body and data.get("output_type", "generate_until") != "generate_until":
            problem = (
                f"found {body['samples']}, and a task of {data['output_type']} has no answers: options are compared; leave it out"
            )
            raise config.fail([*place, "samples"], problem)
        for one in whole.tasks:
            _check_metric(config, [*place, "metric"], body["metric"], one)
        _check_data(config, [*place, "lm_eval"], asked, whole.tasks)


def definition(config: Written, name: str) -> Definition:
    """What defines a task, or the tasks of a group, with what the config says laid over each."""
    body = config.own_tasks[name]["lm_eval"]
    place, key = ["eval", "tasks", name, "lm_eval"], "file" if "file" in body else "task"
    try:
        found = task_files.read(Path(body["file"])) if "file" in body else task_files.named(body["task"])
    except InputError as error:
        raise config.fail([*place, key], str(error)) from None
    if found is None:
        near = difflib.get_close_matches(body["task"], task_files.known(), n=3)
        problem = f"lm-eval has no task {body['task']!r}" + (f"; nearest: {', '.join(near)}" if near else "")
        raise config.fail([*place, "task"], problem)
    if len(found.tasks) > 1 and "data_files" in body:
        problem = f"names files for a group of {len(found.tasks)} tasks, which have rows of their own each; leave it out"
        raise config.fail([*place, "data_files"], problem)
    try:
        tasks = [task_files.laid_over(one, body) for one in found.tasks]
    except InputError as error:
        raise config.fail([*place, "data_files"], str(error)) from None
    return replace(found, data=tasks[0], tasks=tasks)


def _check_kind(config: Written, place: list, data: dict[str, Any], allow_code: bool) -> None:
    """What can be asked of a model here, safely, and greedily."""
    if data.get("unsafe_code") and not allow_code:
        problem = f"runs code that the model writes (unsafe_code: true); set eval.tasks.{place[2]}.allow_code: true, "
        raise config.fail(place, f"{problem}which runs it in a sandbox without network, or leave the task out")
    if "class" in data or not isinstance(data.get("task"), str):
        raise config.fail(place, "is a task written in Python (class:), of which nothing is known before it runs")
    if (kind := data.get("output_type", "generate_until")) not in TYPES:
        raise config.fail(place, f"is of output_type {kind}, expected one of {', '.join(TYPES)}")
    if data.get("doc_to_image") or data.get("doc_to_audio"):
        raise config.fail(place, "asks about pictures or sound, and models here read text")
    settings = data.get("generation_kwargs") or {}
    if data.get("repeats", 1) != 1 or (settings.get("do_sample") and settings.get("temperature", 1) != 0):
        problem = "draws its answers (do_sample, or repeats above 1); here each item has one, greedy, or what `samples` says"
        raise config.fail(place, problem)
    if unknown := sorted(key for key in settings if key not in {*GREEDY, *LENGTH} and (key, settings[key]) != ("num_beams", 1)):
        raise config.fail(place, f"has {unknown[0]} under generation_kwargs, which does not act here; greedy decoding alone does")


def _check_metric(config: Written, place: list, metric: str, data: dict[str, Any]) -> None:
    """The metric, with its filter where there are several, is one of the task's, and a mean over items."""
    name, _, wanted = metric.partition(",")
    listed = {str(one.get("metric")).rpartition(".")[2]: one for one in data.get("metric_list") or []}
    values = task_files.metrics(data)
    have = list(values) or METRICS[data.get("output_type", "generate_until")]
    if name not in have:
        raise config.fail(place, f"found {metric!r}, and the task has {', '.join(have)}")
    if (how := listed.get(values.get(name, name), {}).get("aggregation", "mean")) != "mean":
        problem = f"found {metric!r}, which is put together over all items ({how}); expected a metric that is a mean over items"
        raise config.fail(place, problem)
    if data.get("filter_list") == []:
        raise config.fail(place, "is asked of a task with filter_list: [], of which lm-eval judges nothing; leave that out")
    filters = [one["name"] for one in data.get("filter_list") or []] or ["none"]
    if wanted not in filters and (wanted or len(filters) > 1):
        several = ", ".join(f"{name},{one}" for one in filters)
        raise config.fail(place, f"found {metric!r}, and the task reads its answers in {len(filters)} ways: {several}")


def _check_data(config: Written, place: list, asked: dict, tasks: list[dict[str, Any]]) -> None:
    """Local files are there, and a hub's data set has a revision; of a group, all rows come from one data set or from files."""
    files_place = [*place, "data_files"] if "data_files" in asked else place
    try:
        files = [file for one in tasks for file in task_files.data_files(one)]
    except InputError as error:
        raise config.fail(files_place, str(error)) from None
    names = [os.path.basename(file) for file in [asked.get("file", ""), *dict.fromkeys(files)]]
    if twice := [name for name in names if names.count(name) > 1]:
        raise config.fail(files_place, f"two files are called {twice[0]}, and the step could not tell them apart; rename one")
    hubs = {str(task_files.hub_of(one)): one["dataset_path"] for one in tasks}
    if len(hubs) > 1:
        problem = (
            f"is a group whose rows come from {', '.join(sorted(map(str, hubs.values()))[:3])}; one revision is no good for "
        )
        raise config.fail([*place, "task" if "task" in asked else "file"], problem + "them: name its tasks one by one")
    if not files and "revision" not in (task_files.hub_of(tasks[0]) or {}) and not config.data.get("allow_unpinned"):
        problem = f"missing: the rows are {tasks[0]['dataset_path']}'s, on a hub; name its full commit (40 hexadecimal digits), "
        problem += "local files under data_files, or set allow_unpinned: true and let them be whatever it holds"
        raise config.fail([*place, "revision"], problem)


def check_names(config: Written, judged: list[str]) -> None:
    """InputError where two tasks could give one score file: `results/<task>_<run>.json`. judged: what can be scored."""
    known = set(judged)
    for name in config.own_tasks:
        for other in [*EVALUATED, DEVELOPMENT, *config.own_tasks]:
            rest = name.removeprefix(f"{other}_")
            if rest != name and (run := next((run for run in judged if f"{rest}_{run}" in known), None)):
                problem = f"its scores of {run} and those of {other} for {rest}_{run} would be one file; take another name"
                raise config.fail(["eval", "tasks", name], problem)


def protocols(config: Written) -> dict[str, list[str]]:
    """Evaluation -> the tasks that are the same under another protocol, of the evaluations that the config has."""
    found: dict[str, list[str]] = {}
    for name, body in config.own_tasks.items():
        if (first := body.get("protocol_of")) in config.scored:
            found.setdefault(first, []).append(name)
    return found


def inputs(config: Written, name: str) -> list[str]:
    """The files that a task's step reads: its own definition, and its rows where these are local."""
    body = config.own_tasks[name]["lm_eval"]
    return ([body["file"]] if "file" in body else []) + rows(config, name)


def rows(config: Written, name: str) -> list[str]:
    """The local files that a task's rows come from; none where they are a hub's."""
    found = [file for one in definition(config, name).tasks for file in task_files.data_files(one)]
    return list(dict.fromkeys(found))


def output_type(config: Written, name: str) -> str:
    return definition(config, name).data.get("output_type", "generate_until")


def max_new_tokens(config: Written, name: str) -> int:
    """Tokens that an answer may have; lm-eval's own default is 256."""
    settings = definition(config, name).data.get("generation_kwargs") or {}
    return next((int(settings[key]) for key in LENGTH if settings.get(key)), 256)


def step_config(config: Written, name: str) -> dict:
    """What of the task's block decides the outcome. Files by their names alone: where they lie decides nothing."""
    body = config.own_tasks[name]
    asked = dict(body["lm_eval"])
    if "file" in asked:
        asked["file"] = os.path.basename(asked["file"])
    if "data_files" in asked:
        asked["data_files"] = {split: os.path.basename(file) for split, file in asked["data_files"].items()}
    if hub := task_files.hub_of(definition(config, name).data):
        asked["hub"] = hub
    drawn = config.drawn(name)
    body = {key: value for key, value in body.items() if key not in ("samples", "temperature", "protocol_of")}
    if body.pop("allow_code", False):
        body["allow_code"] = config.data["eval"]["sandbox"]  # what exceeds it is wrong
    return {"task": name, **body, "lm_eval": asked} | ({"drawn": drawn} if drawn else {})

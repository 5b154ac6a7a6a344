"""Try what will judge answers before anything is trained: each scorer on one answer, each verifier on one row, each task's examples.

A scorer is the last step of a chain, and what it needs of the machine (the checkers' tables, languages, lm-eval's tasks) it looks
for when it runs. So does a verifier, at the first rollout. Snakemake runs this before the first job of a run that trains or
answers. Rows are those of the slices that are there; a slice that is made anew judges its rows itself (evaluation/rows.py). Where
curves go to a program (`track`), it is looked for too: without it the first training would end, after all that comes before it.
So is what answers, where that is another project's server (`generation.backend: vllm`).

    python -m workflow_scripts.tools.rehearse '[{"judge": "ifeval", "of": "eval.ifeval", "strip_think": false, "rows": "results/data/ifeval.jsonl"}]'
"""  # noqa: E501

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from workflow_scripts.artifacts import fingerprint, runinfo
from workflow_scripts.config import sampled
from workflow_scripts.config.experiments import VERIFIERS, rewards
from workflow_scripts.config.names import CHOICE, DEVELOPMENT, EVALUATED
from workflow_scripts.data import formats, slicing
from workflow_scripts.evaluation import gsm8k, ifeval, lm_tasks, own_tasks
from workflow_scripts.evaluation import rows as judging
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.jsonl import read_jsonl
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.rl import declared, verifiers

SCORES = {"ifeval": ifeval.score, "gsm8k": gsm8k.score}
# One row for each, and an answer that is right. That of IFEval needs the checkers' tables of sentences and of languages.
SENTENCES, LANGUAGE = "length_constraints:number_sentences", "language:response_language"
TRIED: dict[str, tuple[dict, str]] = {
    "ifeval": (
        {
            "instruction_id_list": [SENTENCES, LANGUAGE],
            "kwargs": [{"num_sentences": 2, "relation": "at least"}, {"language": "en"}],
        },
        "The river is long and wide. The hill behind it is high and green.",
    ),
    "gsm8k": ({"final": "18"}, "He has 20 and gives away 2.\n#### 18"),
}
DECLARED = "declared"  # judges by a reward of the config's own
OWN = "own"  # by a task of `eval.tasks`
TRACK = "track"  # judges nothing: shows a training's curves
SERVER = "generation.backend"  # nor does it: answers
QUESTION = {"key": 1, "question": "Which one flies?", "choices": ["a", "b", "c", "d"], "answer": 0, "subject": "anatomy"}
TARGETS = {"choices": ["a bird", "a stone"], "labels": [1, 0]}
TRUTH = {"key": 1, "question": "What flies?", "mc1_targets": TARGETS, "mc2_targets": TARGETS}


def parts(plan: Plan, jobs: Iterable[Any]) -> list[dict]:
    """What these jobs judge answers with, each once, as `main` takes it; nothing if they neither train nor answer.

    jobs: Snakemake's.
    """
    jobs = list(jobs)
    evaluation, slices = plan.config.data["eval"], plan.config.data["data"]["slices"]
    anew = {job.wildcards.slice for job in jobs if job.rule.name == "slice_data"}
    if not any(job.rule.name.startswith(("train_", "generate", "sample", "make_base", "lm_eval", "own_task")) for job in jobs):
        return []

    def rows(name: str) -> str:
        return "" if name in anew or not Path(plan.slice_inputs(name)[1]).exists() else plan.slice_inputs(name)[1]

    def source(name: str) -> dict:
        files = [] if "composed" in slices[name]["source"] else plan.source_files(name)
        return {"files": files, **{key: slices[name].get(key) for key in ("rows", "seed", "format", "group_by")}}

    found: dict[str, dict] = {}
    own_steps: list[dict] = []

    def rewarded(body: dict, name: str) -> None:
        """Of an experiment or a sampled slice: what judges answers to the prompts of a slice."""
        for reward, settings in plan.declared(body).items():
            asked = {"made": rows(name), **source(name)}
            declaration = {"name": reward, "settings": settings, "kind": slices[name]["kind"], "asked": asked}
            found[f"reward {reward} on {name}"] = {"judge": DECLARED} | declaration
        for reward in rewards(body):
            if reward in VERIFIERS:
                found[f"reward {reward} on {name}"] = {"judge": VERIFIERS[reward], "rows": rows(name), "reward": True}

    for job in jobs:
        task = DEVELOPMENT if job.rule.name == "score_development" else job.wildcards.get("task")
        if job.rule.name in ("score", "score_development"):
            of = plan.config.development["task"] if task == DEVELOPMENT else task
            settings = {"strip_think": evaluation[of]["strip_think"]}
            key = "tune.choose" if task == DEVELOPMENT else f"eval.{task}"
            found[key] = {"judge": of, "rows": rows(plan.config.asked[task]), **settings}
        elif job.rule.name == "lm_eval_task":
            names = {"asked": evaluation[task]["prompts"], "solved": evaluation[task].get("fewshot")}
            given = {key: {"made": rows(name), **source(name)} for key, name in names.items() if name}
            found[f"eval.{task}"] = {"judge": task, "shots": evaluation[task].get("shots", 0), **given}
        elif job.rule.name == "own_task":
            step = json.loads(job.params.step)
            own_steps.append(step)
            if "hub" not in step["config"]["lm_eval"]:  # those of a hub would be fetched for it
                found[f"eval.tasks.{task}"] = {"judge": OWN, "config": step["config"], "inputs": plan.own_task_inputs(task)}
        elif job.rule.name == "choose_rows":
            asked = plan.sampling(job.wildcards.slice)[1]["prompts"]
            rewarded(sampled.block(plan.config, job.wildcards.slice), asked)
        elif job.rule.name.startswith("train_"):
            body = plan.experiment(job.wildcards.run)
            rewarded(body, body["slice"])
    if plan.config.data[TRACK] != "none" and any(job.rule.name.startswith("train_") for job in jobs):
        found[TRACK] = {"judge": TRACK, "name": plan.config.data[TRACK]}
    answering = (
        "generate",
        "generate_shard",
        *(["own_task"] if any("generation" in step["config"] for step in own_steps) else []),
    )
    if plan.config.generation()["backend"] == "vllm" and any(job.rule.name in answering for job in jobs):
        versions = fingerprint.of_vllm({} if plan.config.data.get("allow_package_mismatch") else {"torch": ""})
        found[SERVER] = {"judge": SERVER, "versions": versions}
    return [{"of": of, **part} for of, part in found.items()]


def one_of_each(rows: Iterable[dict]) -> Iterator[dict]:
    """Of IFEval's rows, those that show an instruction, or arguments of another form, for the first time; else the first."""
    seen: set[str] = set()
    for row in rows:
        pairs = zip(row.get("instruction_id_list", [""]), row.get("kwargs", [{}]), strict=False)
        forms = {
            f"{name} {sorted((key, type(value).__name__) for key, value in given.items()) if isinstance(given, dict) else given}"
            for name, given in pairs
        }
        if not forms <= seen:
            seen |= forms
            yield row


def answers(judge: str, of: str, rows: str, strip_think: bool = False, reward: bool = False) -> None:
    """Judge the row that is tried, and those of a slice that is there, by the scorer of a task or by the verifier of a reward."""
    canned, text = TRIED[judge]
    there = list(one_of_each(read_jsonl(rows))) if rows else []
    judging.check(EVALUATED[judge], ((f"{rows}: row {row['id']}", row) for row in there))
    tried = [{"key": "tried", "prompt": "tried", **canned}, *there]
    if not reward:
        given = [{"key": row.get("key"), "prompt": row["prompt"], "response": text} for row in tried]
        right = SCORES[judge](tried, given, strip_think, rows, rows)["per_prompt"][0]
        found = right["correct"] if judge == "gsm8k" else all(right["follow_instruction_list_strict"])
    elif judge == "gsm8k":
        found = [verifiers.numeric(text, row["final"]) for row in tried][0]
    else:
        with ifeval.reference() as checkers:
            found = [verifiers.ifeval_share(checkers, row, text) for row in tried][0] == 1
    if not found:
        raise InputError(f"{of}: an answer that is right was judged wrong on this machine: {text!r} by {canned!r}")


def choices(judge: str, of: str, shots: int, asked: dict, solved: dict | None = None) -> None:
    """Make lm-eval's tasks of what will be asked, and count the solved examples of each subject, where both are known by now."""
    index = lm_tasks.manager()
    questions, examples = questions_of(judge, asked), questions_of(judge, solved) if solved else []
    if judge == "truthfulqa":
        lm_tasks.truthfulqa(index, questions[:1] or [TRUTH])
        return
    if questions and (examples or not shots):
        names = asked["made"] or ", ".join(asked["files"]), solved and (solved["made"] or ", ".join(solved["files"])) or ""
        lm_tasks.check_subjects(questions, examples, shots, lm_tasks.groups(index), names)
    first = (questions or [QUESTION])[0]
    lm_tasks.mmlu(index, [first], [row for row in examples if row["subject"] == first["subject"]])


def declared_reward(judge: str, of: str, name: str, settings: dict, kind: str, asked: dict) -> None:
    """Load a reward of the user's own, and have it judge two rows of its slice, where they are known by now."""
    place = asked["made"] or ", ".join(asked["files"])
    rows = read_jsonl(asked["made"]) if asked["made"] else first_two(asked, kind)
    declared.make(name, settings, Path(settings["file"]) if "file" in settings else None, rows, place)


def first_two(asked: dict, kind: str) -> list[dict]:
    """Rows as the slice of these files will have them; none of a hub, of the tiny world, or of a slice that is composed."""
    found: list[dict] = []
    group = asked["group_by"]
    for one in slicing.candidates(asked["files"], asked["rows"], asked["seed"], kind, group) if asked["files"] else ():
        row = json.loads(one.text)
        more = {"id": one.id} | ({group: row[group]} if group in row else {})
        with contextlib.suppress(formats.Unusable):
            found.append((row if kind == "ifeval" else formats.convert(row, kind, one.place, asked["format"])[1]) | more)
        if len(found) == 2:
            break
    return found


def own(judge: str, of: str, config: dict, inputs: list[str]) -> None:
    """Make a task of `eval.tasks` with its rows, and ask its metric of an answer to the first; to one of each instruction."""
    name = config["metric"].partition(",")[0]
    with tempfile.TemporaryDirectory() as cache, ifeval.conditions():
        _, (task, *_) = own_tasks.load(config, [Path(file) for file in inputs], Path(cache))
        if config.get("allow_code"):
            return  # a metric that runs answers is for the sandbox alone
        for doc in one_of_each(task.task_docs):
            if task.OUTPUT_TYPE == "generate_until":
                found = task.process_results(doc, [TRIED["ifeval"][1]])
            else:
                found = task.process_results(
                    doc, [(-1.0, False)] * (len(task.doc_to_choice(doc)) if task.config.doc_to_choice else 1)
                )
            value = found.get(name)
            if not own_tasks.is_number(value) or not 0 <= value <= 1:
                raise InputError(f"{of}.metric: {name} of an item is {value!r}, expected 0 or 1, a verdict, or a number between")


def curves(judge: str, of: str, name: str) -> None:
    """Look for the program that shows a training's curves."""
    if not find_spec(name):
        raise InputError(f"{of}: {name} is not installed here; pip install {name} (it decides no number), or set `{of}: none`")


def server(judge: str, of: str, versions: dict[str, str]) -> None:
    """Look for vLLM, and for the torch that it comes with, at the versions that the steps say."""
    for name, there in runinfo.installed(sorted(versions, reverse=True)).items():
        if there != versions[name]:
            found = there if there == "not installed" else f"{there} is installed"
            raise InputError(
                f"{of}: vllm needs an environment of its own, with {name} {versions[name]} (here: {found}); run snakemake with "
                f"`--sdm conda` (envs/vllm.yaml), or set `{of}: graphs`"
            )


def questions_of(task: str, given: dict) -> list[dict]:
    """The rows of a slice that is there, or that its files will give; none where it comes from a hub."""
    if given["made"]:
        return read_jsonl(given["made"])
    kind = EVALUATED[task]
    picked = slicing.candidates(given["files"], given["rows"], given["seed"], kind) if given["files"] else []
    return [{"key": one.id, **formats.convert(json.loads(one.text), kind, one.place, given["format"])[1]} for one in picked]


def main() -> None:
    for part in json.loads(sys.argv[1]):
        try:
            judges: dict[str, Callable] = {
                DECLARED: declared_reward,
                OWN: own,
                TRACK: curves,
                SERVER: server,
                **dict.fromkeys(CHOICE, choices),
            }
            judges.get(part["judge"], answers)(**part)
        except (InputError, formats.Unusable) as error:
            sys.exit(str(error))
        except Exception as error:  # of any library, for any reason that this machine has
            said = " ".join(str(error).split())[:300]
            sys.exit(f"{part['of']}: can't judge an answer on this machine ({type(error).__name__}: {said})")


if __name__ == "__main__":
    main()

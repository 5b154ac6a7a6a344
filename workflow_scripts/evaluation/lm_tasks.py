"""MMLU and TruthfulQA by lm-eval's own tasks and model runner, over the rows of slices, offline.

lm-eval loads a task's data from a hub. Here its task definitions (prompts, options, metrics: lm_eval/tasks/mmlu/default and
lm_eval/tasks/truthfulqa) stay as they are and only the rows are ours, by the `custom_dataset` that a task may name. An option's
score is the log-likelihood of its text after the prompt; the best one is the model's choice, the first of equals.

MMLU (Hendrycks et al. 2021, arXiv:2009.03300) is one task for each subject, `mmlu_<subject>`, whose options are the letters A to
D; `acc` over all questions is what lm-eval's group `mmlu` reports. TruthfulQA (Lin et al. 2022, arXiv:2109.07958) is two tasks on
the same questions: mc1, the share whose true answer is the likeliest, and mc2, the probability of the true answers among all.

Departures from lm-eval's defaults:
- Log-likelihoods are computed in fp32 (lm-eval's option `softmax_dtype`). In bf16 a sum of -30 is rounded to 1/8, so that
  options tie, and ties fall to the first: in TruthfulQA's mc1 the true answer. `tied` counts the questions that tie all the same.
- mc2 is computed from differences of log-likelihoods: the same, but for answers so unlikely that lm-eval divides 0 by 0.
- The standard error of MMLU's `acc` is that of a mean over questions. lm-eval's group pools those of its subjects, which leaves
  out what differs between subjects.
"""

import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from workflow_scripts.evaluation.scores import mean_stderr
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.plumbing.progress import Progress

MC1, MC2 = "truthfulqa_mc1", "truthfulqa_mc2"


def manager() -> Any:
    """lm-eval's TaskManager over the definitions of these two alone: looking through all of them takes minutes on a slow disk."""
    from lm_eval import tasks

    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of each overridden default, and of each prompt that is cut
    folder = Path(tasks.__file__).parent
    return tasks.TaskManager(include_defaults=False, include_path=[folder / "mmlu/default", folder / "truthfulqa"])


def groups(index: Any) -> dict[str, str]:
    """Subject -> lm-eval's group of it: stem, other, social_sciences or humanities."""
    found = {}
    for name, entry in index.task_index.items():
        tags = [tag for tag in entry.tags if tag.startswith("mmlu_")]
        if name.startswith("mmlu_") and tags and entry.yaml_path is not None:
            found[name.removeprefix("mmlu_")] = tags[0].removeprefix("mmlu_").removesuffix("_tasks")
    return found


def check_subjects(questions: list[dict], solved: list[dict], shots: int, known: Iterable[str], names: tuple[str, str]) -> None:
    """InputError on a subject that lm-eval does not have, or with fewer solved examples than shots. names: of both files."""
    known, counts = set(known), dict.fromkeys((row["subject"] for row in questions), 0)
    for row in solved:
        counts[row["subject"]] = counts.get(row["subject"], 0) + 1
    for row in questions:
        if row["subject"] not in known:
            raise InputError(
                f"{names[0]}: key {row['key']!r}: lm-eval has no subject {row['subject']!r}, only {', '.join(sorted(known))}"
            )
        if (count := counts[row["subject"]]) < shots:
            raise InputError(
                f"{names[1]}: {count} rows of the subject {row['subject']}, which key {row['key']!r} of {names[0]} asks about, "
                f"and eval.mmlu.shots is {shots}; add rows, or lower it for all subjects"
            )


def mmlu(index: Any, questions: list[dict], solved: list[dict]) -> list[Any]:
    """lm-eval's tasks for the subjects of these questions. Examples come in the order of `solved`."""
    subjects = sorted({row["subject"] for row in questions})
    return _load(
        index,
        {
            f"mmlu_{subject}": {
                split: [row for row in rows if row["subject"] == subject]
                for split, rows in (("test", questions), ("dev", solved))
            }
            for subject in subjects
        },
    )


def truthfulqa(index: Any, questions: list[dict]) -> list[Any]:
    return _load(index, dict.fromkeys((MC1, MC2), {"validation": questions}))


def _load(index: Any, rows: dict[str, dict[str, list[dict]]]) -> list[Any]:
    """Task -> split -> rows, as lm-eval's tasks. A group of ours is its way to name a task of its own with other keys."""
    import datasets

    def of(splits: dict[str, list[dict]]) -> Any:
        return lambda **_: {split: datasets.Dataset.from_list(part) for split, part in splits.items()}

    members = [{"task": name, "custom_dataset": of(splits)} for name, splits in rows.items()]
    return list(index.load({"group": "phaseline", "task": members})["tasks"].values())


def runner(model: Any, tokenizer: Any, batch_size: int, label: str) -> Any:
    """lm-eval's HFLM of a model in memory. Shows how far it is; keeps in `cut` the prompts that the model can't read whole.

    It asks for the logits of the options alone: those of whole prompts, with their log-softmax and those of the batch before, are
    14 bytes for each token and entry of the vocabulary, by far the most that an evaluation would take.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    class Runner(HFLM):
        cut: set[str] = set()

        def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
            self.cut = {context for (context, _), start, end in requests if len(start) + len(end) > self.max_length + 1}
            self.longest = max(len(end) for _, _, end in requests)
            passes = {tuple([*start, *end[:-1]]) for _, start, end in requests}  # options of one token share theirs
            self.bar, self.done = Progress(len(passes), label), 0
            found = super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)
            self.bar.close()
            return found

        def _model_call(self, inps: Any, attn_mask: None = None, labels: None = None) -> Any:  # both of encoder-decoders alone
            # A row ends before its padding, which is zeros on the right; lm-eval counts positions from the end of the logits.
            shortest = int(((inps != 0) * torch.arange(1, inps.shape[1] + 1, device=inps.device)).amax(dim=1).min())
            with torch.no_grad():
                logits = self.model(inps, logits_to_keep=inps.shape[1] - shortest + self.longest).logits
            self.done += len(inps)
            self.bar.step(self.done)
            return logits

    return Runner(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype="float32")


def evaluate(lm: Any, index: Any, tasks: list[Any], config: dict) -> dict[str, list[dict]]:
    """Task -> lm-eval's samples in the order of its rows. config: of the step; what it lacks decides nothing."""
    import lm_eval

    found = lm_eval.simple_evaluate(
        lm,
        tasks=tasks,
        task_manager=index,
        num_fewshot=config.get("shots", 0),
        apply_chat_template=config["apply_chat_template"],
        fewshot_as_multiturn=config.get("fewshot_as_multiturn", False),
        bootstrap_iters=0,  # standard errors are ours
        random_seed=0,
        numpy_random_seed=0,
        torch_random_seed=0,
        fewshot_random_seed=0,
    )
    return {task: sorted(samples, key=lambda one: one["doc_id"]) for task, samples in found["samples"].items()}


def share_of_the_true(sample: dict) -> float:
    """mc2 of one question: the probability of its true answers among all its answers (Lin et al. 2022, section 2.2)."""
    likelihoods, labels = [answer[0] for answer in sample["filtered_resps"]], sample["doc"]["mc2_targets"]["labels"]
    weights = [math.exp(one - max(likelihoods)) for one in likelihoods]
    return math.fsum(weight for weight, label in zip(weights, labels, strict=True) if label) / math.fsum(weights)


def score(config: dict, questions: list[dict], samples: dict[str, list[dict]], group_of: dict[str, str], cut: set[str]) -> dict:
    """The scores of a task in the form of the others (evaluation/gsm8k.py), from lm-eval's samples.

    acc, with `acc_stderr` (None for a single question), is MMLU's accuracy or TruthfulQA's mc1; n_prompts; tied: questions whose
    likeliest options are equally likely; cut: questions whose beginning the model could not read; example: the first prompt as
    the model saw it, with its options; per_prompt, in the order of `questions`: key, correct. MMLU adds by_subject and by_group
    ({n, acc, acc_stderr}) and chosen, how often each letter was taken; TruthfulQA mc2, with mc2_stderr, of each question too.
    """
    by_key = {task: {one["doc"]["key"]: one for one in part} for task, part in samples.items()}
    task_of = {row["key"]: MC1 if config["task"] == "truthfulqa" else f"mmlu_{row['subject']}" for row in questions}
    found = [by_key[task_of[row["key"]]][row["key"]] for row in questions]
    per_prompt = [{"key": row["key"], "correct": bool(one["acc"])} for row, one in zip(questions, found, strict=True)]
    likelihoods = [[answer[0] for answer in one["filtered_resps"]] for one in found]
    scores: dict[str, Any] = {
        "n_prompts": len(questions),
        "tied": sum(one.count(max(one)) > 1 for one in likelihoods),
        "cut": sum(one["arguments"][0][0] in cut for one in found),
        "example": {"prompt": found[0]["arguments"][0][0], "options": [option for _, option in found[0]["arguments"]]},
        "per_prompt": per_prompt,
    }
    scores["acc"], scores["acc_stderr"] = mean_stderr([[entry["correct"]] for entry in per_prompt])
    if config["task"] == "truthfulqa":
        for entry in per_prompt:
            entry["mc2"] = share_of_the_true(by_key[MC2][entry["key"]])
        scores["mc2"], scores["mc2_stderr"] = mean_stderr([[entry["mc2"]] for entry in per_prompt])
        return scores
    scores["chosen"] = [sum(one.index(max(one)) == option for one in likelihoods) for option in range(4)]
    for name, part_of in (("by_subject", {one: one for one in group_of}), ("by_group", group_of)):
        parts: dict[str, list[list[bool]]] = {}
        for row, entry in zip(questions, per_prompt, strict=True):
            parts.setdefault(part_of[row["subject"]], []).append([entry["correct"]])
        scores[name] = {}
        for part in sorted(parts):
            acc, stderr = mean_stderr(parts[part])
            scores[name][part] = {"n": len(parts[part]), "acc": acc, "acc_stderr": stderr}
    return scores

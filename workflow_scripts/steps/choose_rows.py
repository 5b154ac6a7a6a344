"""Make a slice of a run's answers (steps/sample.py): each gets its reward, and some of them become rows (data/choosing.py).

Rewards are those of the methods that sample (rl/rewards.py): verifiers, declared ones, reward models, mixtures, placebos. A
reward of the user's own is called with TRL's signature; its `completion_ids` are the tokens of the answer's text, without an end.
With `flip_labels` rewards and `least` change their sign: a negative control. Without a reward model all is done on a CPU.

Rows go the way of every slice: those that cover an evaluation prompt, that the chat template can't write or whose prompt is too
long are dropped and counted, and above `data.max_drop` the slice fails. That a prompt has no answer to keep is no fault of the
source: the manifest says of how many and why. Held-out rows share no prompt, and no value of `group_by`, with the others.

    python -m workflow_scripts.steps.choose_rows --step results/data/best_of_8.manifest.json \\
        --out trial/best_of_8.manifest.json --inputs results/data/best_of_8.answers.manifest.json \\
        results/data/instructions.manifest.json results/data/ifeval.manifest.json results/base/manifest.json
"""

import json
from collections import Counter
from typing import Any

from workflow_scripts.artifacts import manifests
from workflow_scripts.data import choosing, slicing
from workflow_scripts.data.fitting import fitting
from workflow_scripts.plumbing import startup
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.steps import cli, slice_data

AT_ONCE = 256  # answers that a reward is called with, at most, without a reward model


def rewarded(job: manifests.Job, parents: dict[str, manifests.Artifact], asked: list[tuple[dict, dict]]) -> tuple[list, dict]:
    """(of each prompt its answers with their rewards, the mean of each reward). asked: (row of a prompt, its answers)."""
    from transformers import TrainerState

    from workflow_scripts.models import chat, device
    from workflow_scripts.plumbing.progress import Progress
    from workflow_scripts.rl import declared, rewards

    if "device" in job.step:
        device.prepare(job.step, job.deterministic)
    given = parents | {"start": parents["base"], "rows": parents["prompts"]}
    functions = rewards.functions(job, given, texts=True)
    weights = rewards.weights(job.config, functions)
    tokenizer = chat.tokenizer_of(parents["base"])
    flat = [(row, one) for row, answers in asked for one in answers["answers"]]
    models = [parents[f"reward {name}"].data["step"]["config"]["train"] for name in rewards.models_of(job)]
    size = min([AT_ONCE, *(train["per_device_eval_batch_size"] for train in models)])
    n = len(asked[0][1]["answers"]) if asked else 1
    size = size // n * n or (size if models else n)  # all answers to a prompt together: a coin is of their places among these
    bar = Progress(len(flat), f"rewards of {job.out.stem}")
    found: dict[str, list[float]] = {name: [] for name in functions}
    for first in range(0, len(flat), size):
        part = flat[first : first + size]
        texts = [one["response"] for _, one in part]
        batch: dict[str, Any] = {
            "prompts": [declared.turns(row["prompt"]) for row, _ in part],
            "completions": [[{"role": "assistant", "content": text}] for text in texts],
            "completion_ids": tokenizer(texts, add_special_tokens=False)["input_ids"],
            "id": [row["id"] for row, _ in part],
            "row": [json.dumps(row) for row, _ in part],
            "trainer_state": TrainerState(),
            "log_extra": lambda *_: None,
            "log_metric": lambda *_: None,
        }
        for name, function in functions.items():
            found[name] += [float(value) for value in function(**batch)]  # type: ignore[arg-type]
        bar.step(first + len(part))
    bar.close()
    sign = -1.0 if job.config["source"]["sampled"].get("flip_labels") else 1.0
    sums = [
        sign * sum(w * value for w, value in zip(weights, values, strict=True)) for values in zip(*found.values(), strict=True)
    ]
    coming = iter(round(one, 6) + 0.0 for one in sums)  # no -0.0
    prompts = [
        [
            choosing.Answer(i, one["response"], one["tokens"], one["finish_reason"], next(coming))
            for i, one in enumerate(answers["answers"])
        ]
        for _, answers in asked
    ]
    return prompts, {name: round(sum(values) / len(values), 6) for name, values in found.items()}


def main(job: manifests.Job) -> None:
    config, parents = job.config, job.parents()
    how, group_by, name = config["source"]["sampled"], config.get("group_by"), job.out.name.replace(".manifest.json", "")
    if how.get("flip_labels") and "least" in how:
        how = how | {"least": -how["least"]}
    by_id = {row["id"]: row for row in parents["prompts"].rows()}
    asked = [(by_id[answers["id"]], answers) for answers in parents["answers"].rows()]
    prompts, means = rewarded(job, parents, asked)

    rows: list[dict] = []
    without, unusable = Counter[str](), Counter[str]()
    for (row, _), answers in zip(asked, prompts, strict=True):
        kept, reason, why = choosing.choose(answers, how)
        unusable += why
        without.update([reason] if reason else [])
        group = {group_by: row[group_by]} if group_by and row.get(group_by) is not None else {}
        rows += [choosing.row(row, one, how, slicing.prompt_turns(row)) | group for one in kept]
    chosen, dropped = len(rows), Counter[str]()
    broken = {row["id"]: problem for row in rows if (problem := slice_data.unusable(row))}
    dropped.update(broken.values())
    evaluated = [row for role, one in parents.items() if role.endswith("_prompts") for row in one.rows()]
    rule = config["decontaminate"]
    check = slicing.Decontaminator([slicing.avoided(row, rule["rule"], rule["ngram"]) for row in evaluated], **rule)
    from workflow_scripts.models import chat

    tokenizer = chat.tokenizer_of(parents["base"])
    startup.ready()
    rows, more = slice_data.filter_rows(
        [row for row in rows if row["id"] not in broken], check, tokenizer, config["max_prompt_tokens"]
    )
    dropped += more
    said = ", ".join(f"{count} prompts {reason}" for reason, count in sorted(without.items()))
    if not rows:
        raise InputError(f"{job.out}: none of {sum(map(len, prompts))} answers to {len(asked)} prompts is kept: {said}")
    if sum(dropped.values()) > config["max_drop"] * chosen:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        share = f"{sum(dropped.values())} of {chosen} rows ({sum(dropped.values()) / chosen:.1%})"
        raise InputError(
            f"{job.out}: {share} can't be used: {reasons}. The limit is data.max_drop = {config['max_drop']:.1%}; ask other "
            "prompts, or raise the limit"
        )
    rows = slice_data.hold_out(rows, config["heldout"], job.out, group_by)
    for one in job.limits.get(name.partition(".")[0], []):
        fitting(tokenizer, {held: [row for row in rows if row["heldout"] is held] for held in (False, True)}, **one)
    heldout = sum(row["heldout"] for row in rows)
    print(
        f"{name}: {len(rows)} rows, {heldout} of them held out, of {len(asked)} prompts" + (f"; {said}" if said else ""),
        flush=True,
    )
    with manifests.complete(job, "slice", parents) as draft:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (draft.folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        draft.manifest |= {
            "rows": {"candidates": len(asked), "kept": len(rows), "heldout": heldout},
            "dropped": dict(sorted(dropped.items())),
            "prompts": {"asked": len(asked), "without_rows": dict(sorted(without.items()))},
            "answers": {"given": sum(map(len, prompts)), "not_usable": dict(sorted(unusable.items()))},
            "reward": {"by_rank": choosing.by_rank(prompts), "means": means},
            "kept": choosing.facts(rows, how["keep"]),
        }


if __name__ == "__main__":
    cli.run(main, __doc__)

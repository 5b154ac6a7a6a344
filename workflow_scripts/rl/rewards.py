"""Rewards of the methods that sample answers: plain functions that TRL calls on each batch of completions.

A reward is named in the config: `numeric` (1 if the final answer is the row's number, else 0), `ifeval` (the share of a
prompt's instructions that the answer follows, by lm-eval's own checkers), one that the config declares (`rl/declared.py`), or
the experiment of a reward model. A mixture is their weighted sum; `missing_eos_penalty` takes from it where an answer was cut
off (as PPO's own key of that name does). A placebo is a coin in their place, or one of them shuffled (`rl/placebos.py`). The
verifiers need fields that only slices of their kind have, which is checked before training. They judge what the evaluation
judges: without its thought where `eval.<task>.strip_think` says so, and a thought that was cut off is no answer for either.
Both read the text in one way (`models/chat.py:said`); TRL's own leaves out the marks where they are special tokens.
"""

import json
from collections.abc import Callable
from typing import Any

from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.manifests import Artifact, Job
from workflow_scripts.evaluation import ifeval
from workflow_scripts.evaluation.scores import answer
from workflow_scripts.models import chat
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.rl import declared, placebos, reward_model, verifiers
from workflow_scripts.rl.placebos import Reward
from workflow_scripts.training import trainers

UNENDED = "missing_eos"
FIELDS = {"numeric": ("final",), "ifeval": ("instruction_id_list", "kwargs")}


def rows_of(rows: Artifact, heldout: bool, rewards: dict[str, float]) -> Any:
    """Prompts as conversations, with the whole row as text in `row`, from which the verifiers read what they need.

    InputError if a row lacks a field of one of the rewards.
    """
    found = trainers.usable(rows, heldout)
    for reward in rewards:
        for row in found:
            if missing := [field for field in FIELDS.get(reward, ()) if field not in row]:
                raise InputError(
                    f"{rows.path}: row {row['id']} has no {missing[0]}, which the reward {reward} needs; take a slice of kind "
                    f"{reward}"
                )
    return trainers.data_set(
        [{"id": row["id"], "prompt": declared.turns(row["prompt"]), "row": json.dumps(row)} for row in found]
    )


def numeric(prompts: list, completions: list, row: list[str], **columns: Any) -> list[float | None]:
    return [
        float(verifiers.numeric(completion[-1]["content"], json.loads(text)["final"]))
        for completion, text in zip(completions, row, strict=True)
    ]


def followed(prompts: list, completions: list, row: list[str], **columns: Any) -> list[float | None]:
    with ifeval.reference() as checkers:
        return [
            verifiers.ifeval_share(checkers, json.loads(text), completion[-1]["content"])
            for completion, text in zip(completions, row, strict=True)
        ]


def without_thought(reward: Reward, tokenizer: Any) -> Reward:
    def judge(prompts: list, completions: list, completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        asked = [tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in prompts]
        texts = [chat.said(tokenizer, tokens, text) for tokens, text in zip(completion_ids, asked, strict=True)]
        answers = [[{"role": "assistant", "content": answer(text)}] for text in texts]
        return reward(prompts, answers, completion_ids=completion_ids, **columns)

    return judge


def models_of(job: Job) -> list[str]:
    """The reward models among the rewards of a step."""
    return [name for name in job.config["reward"] if name not in FIELDS and name not in job.config.get("rewards", {})]


def of_answers(reward: Reward) -> Reward:
    """`without_thought` of answers that are texts already, as `models/chat.py:said` gives them."""

    def judge(prompts: list, completions: list, **columns: Any) -> list[float | None]:
        answers = [[{"role": "assistant", "content": answer(turns[-1]["content"])}] for turns in completions]
        return reward(prompts, answers, **columns)

    return judge


def functions(
    job: Job, parents: dict[str, Artifact], on_backbone: Callable[[str], Any] | None = None, texts: bool = False
) -> dict[str, Reward]:
    """Name -> function of the rewards of a step. Each is called by its name in TRL's metrics (`rewards/<name>/mean`).

    on_backbone: name -> reward model, for a trainer that has them on its own backbone; else each is loaded beside the policy.
    texts: what is judged are texts of answers that were given before, and not what TRL decodes of tokens.
    """

    def bare(reward: Reward) -> Reward:
        return of_answers(reward) if texts else without_thought(reward, chat.tokenizer_of(parents["start"]))

    ready = declared_ones(job, parents, bare)  # first: a reward model is loaded where its reward is made
    made: dict[str, Reward] = {}
    for name in job.config["reward"]:
        if name in FIELDS:
            made[name] = {"numeric": numeric, "ifeval": followed}[name]
            if name in job.config.get("strip_think", ()):
                made[name] = bare(made[name])
        elif name in ready:
            made[name] = ready[name]
        else:
            made[name] = learned(job, name, parents[f"start of {name}"], parents[f"reward {name}"], on_backbone)
    if placebo := job.config.get("placebo"):
        seed = job.step["seed"]
        made = {name: placebos.shuffled(function, seed) for name, function in made.items()}
        made = {"random": placebos.coins(seed)} if placebo == "random" else made
    if job.config.get(UNENDED + "_penalty"):
        made[UNENDED] = unended(parents["start"])
    for name, function in made.items():
        function.__name__ = name
    return made


def declared_ones(job: Job, parents: dict[str, Artifact], bare: Callable[[Reward], Reward]) -> dict[str, Reward]:
    """The rewards of a step that its config declares, each tried on two rows. bare: judges without the thought."""
    found: dict[str, Reward] = {}
    for name, settings in job.config.get("rewards", {}).items():
        file, rows = declared.file_of(job, name) if "file" in settings else None, parents["rows"]
        made = declared.make(name, settings, file, rows.rows(), rows.path)
        found[name] = bare(made) if settings.get("strip_think") else made
    return found


def weights(config: dict, functions: dict[str, Reward]) -> list[float]:
    """Of the functions of a step, in their order."""
    known = config["reward"] | {"random": 1.0, UNENDED: config.get(UNENDED + "_penalty")}
    return [known[name] for name in functions]


def unended(start: Artifact) -> Reward:
    """-1 for an answer that was cut off. The text alone does not say so: the chat template writes an end after every answer."""
    from types import SimpleNamespace

    from transformers import GenerationConfig

    declared = GenerationConfig.from_pretrained(start.folder, local_files_only=True)
    ends = chat.ends(chat.tokenizer_of(start), SimpleNamespace(generation_config=declared))

    def judge(prompts: list, completions: list, completion_ids: list[list[int]], **columns: Any) -> list[float | None]:
        return [0.0 if tokens[-1] in ends else -1.0 for tokens in completion_ids]

    return judge


def learned(job: Job, name: str, start: Artifact, adapter: Artifact, on_backbone: Callable[[str], Any] | None = None) -> Reward:
    """The score of a reward model, which has to be better than chance on pairs that it was not trained on."""
    check_reward_model(adapter, job.config["require_reward_above_chance"])
    settings = adapter.data["step"]["config"]
    if on_backbone is None:
        quant = settings.get("quant") if settings["quantise"] != "none" else None
        model, tokenizer = reward_model.load(start, adapter, job.work, job.step["device"], job.step["precision"], quant)
    else:
        model, tokenizer = None, chat.tokenizer_of(start)

    def rewards(prompts: list, completions: list, **columns: Any) -> list[float | None]:
        talks = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        judge = on_backbone(name) if on_backbone else model
        return [*reward_model.score(judge, tokenizer, talks, len(talks), settings["train"]["max_length"])]

    return rewards


def check_reward_model(adapter: manifests.Artifact, required: bool) -> None:
    """InputError if the held-out accuracy in the reward model's manifest is not above 0.5 by its 95 % interval.

    The interval is the exact one of Clopper & Pearson (1934, Biometrika 26), two-sided. Optimising against such a model is
    optimising noise; `require_reward_above_chance: false` of the experiment allows it.
    """
    from scipy.stats import binomtest

    after = adapter.data["objective"]["after"]
    interval = binomtest(round(after["accuracy"] * after["n"]), after["n"]).proportion_ci(0.95)
    text = (
        f"{adapter.path}: held-out pair accuracy {after['accuracy']:.3f} of {after['n']} pairs, 95 % interval "
        f"{interval.low:.3f} to {interval.high:.3f}"
    )
    if interval.low <= 0.5 and required:
        raise InputError(
            f"{text}: not above chance, so its rewards mean nothing. Train it on more pairs or at another rate, or set "
            "require_reward_above_chance: false in the experiment that uses it"
        )
    print(text, flush=True)

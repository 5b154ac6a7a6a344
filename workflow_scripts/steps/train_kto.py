"""Train a LoRA adapter by Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, eqs. 7 and 8).

Each row is one answer with a label. With r = log pi(answer) - log ref(answer), summed over the answer's tokens, a desirable
answer has the loss w_D (1 - sigmoid(beta (r - z))), an undesirable one w_U (1 - sigmoid(beta (z - r))). The reference point
z >= 0 estimates KL(pi || ref) from answers that belong to other prompts of the same group (the row before): so the size of a
group, `kl_rows`, is part of the method and at least two, and rows of one prompt are kept out of each other's group, where they
would answer the very prompt that they are a mismatch for. z carries no gradient. In TRL a group is what a device takes at once;
here a micro-batch may have several (training/groups.py).

Rows come from a slice of pairs, taken apart, or from one that is unpaired. They are shuffled by the seed here: TRL takes a pair
apart into all chosen, then all rejected, and reads in order. `class_weights: ratio` weighs the rarer class up, so that w_D n_D =
w_U n_U (eq. 8 allows 1 to 4/3).

Departures from TRL's defaults: 4-bit base with fp32 adapters; the block's dropout acts (TRL switches it off); learning rate,
schedule and length come from the config; each batch's completion mask is checked; rows longer than `max_length` are left out, of
pairs both answers (data/fitting.py), where TRL cuts them.

    python -m workflow_scripts.steps.train_kto --step results/kto/adapter/manifest.json --out trial/adapter/manifest.json \\
        --inputs results/sft_v2/merged/manifest.json results/data/pairs.manifest.json
"""

import json
from typing import Any

from workflow_scripts.artifacts import manifests
from workflow_scripts.data.unpaired import kl_rows, spread, unpair, weights
from workflow_scripts.steps import cli
from workflow_scripts.tools import card
from workflow_scripts.training.change import Units, of_ratio


def told_apart(trainer: Any, rows: list[dict]) -> tuple[dict[str, float | None], Units]:
    """How the policy rewards the held-out answers: beta (log pi - log ref) for each, the reference being the adapter off.

    The mean reward of each class, their margin, and `accuracy`: of all pairs of a desirable and an undesirable answer to one
    prompt, the share whose desirable one has the higher reward; None where no prompt has both. Row by row, since TRL's own
    figures are means over batches, and leave out batches of one class. The units of their change are prompts: two answers to one
    prompt are no two observations.
    """
    import torch

    from workflow_scripts.training import exchange

    model = trainer.model.eval()

    def log_prob(batch: dict) -> Any:
        """Of each answer, by TRL's LM head as in training: the logits of a whole batch would be the peak of KTO."""
        labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
        taken = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        return model(**taken, labels=labels, fused_lm_head=True).log_probs.sum(-1)

    def rewarded(inputs: dict) -> list[float]:
        batch = trainer._prepare_inputs(inputs)
        with model.disable_adapter():
            reference = log_prob(batch)
        return (trainer.beta * (log_prob(batch) - reference)).tolist()

    with torch.no_grad(), trainer.accelerator.autocast():
        batches = exchange.shared_out(trainer.get_eval_dataloader(), rewarded, "held-out rewards")
    rewards: list[float] = [reward for batch in batches for reward in batch]
    groups: dict[str, tuple[list[float], list[float]]] = {}
    for row, reward in zip(rows, rewards, strict=True):
        groups.setdefault(json.dumps(row["prompt"]), ([], []))[row["label"]].append(reward)
    pairs = [[better > worse for better in good for worse in bad] for bad, good in groups.values()]
    right = [one for found in pairs for one in found]
    desirable, undesirable = (of_ratio((sum(both[label]), len(both[label])) for both in groups.values()) for label in (1, 0))
    units = {
        "margin": [high - low for high, low in zip(desirable, undesirable, strict=True)],
        "reward_desirable": of_ratio((sum(good), len(good)) for _, good in groups.values() if good),
        "reward_undesirable": of_ratio((sum(bad), len(bad)) for bad, _ in groups.values() if bad),
    }
    if right:
        units["accuracy"] = of_ratio((sum(found), len(found)) for found in pairs if found)
    means = {label: sum(r for r, row in zip(rewards, rows, strict=True) if row["label"] == label) for label in (True, False)}
    means = {label: total / sum(row["label"] == label for row in rows) for label, total in means.items()}
    values = {
        "margin": round(means[True] - means[False], 6),
        "reward_desirable": round(means[True], 6),
        "reward_undesirable": round(means[False], 6),
        "accuracy": round(sum(right) / len(right), 6) if right else None,
    }
    return values, units


def main(job: manifests.Job) -> None:
    from trl import KTOConfig

    from workflow_scripts.models import chat, device, lora
    from workflow_scripts.training import reference, sharded, speed, trainers

    config, step = job.config, job.step
    parents = job.parents()
    start, rows = parents["start"], parents["rows"]
    group = kl_rows(config)
    device.prepare(step, job.deterministic)
    tokenizer = chat.tokenizer_of(start)
    short, left = trainers.whole(tokenizer, rows, config)
    answers = {heldout: unpair(found) for heldout, found in short.items()}
    ordered = {heldout: spread(found, group, step["seed"]) for heldout, found in answers.items()}
    weights(ordered[True][0], config["class_weights"], f"{rows.path}, held-out rows")
    class_weights = weights(ordered[False][0], config["class_weights"], str(rows.path))
    model = sharded.load(start, job)
    speed.prepare(model, job)

    given = tuple(trainers.data_set(ordered[heldout][0]) for heldout in (False, True))
    trainer = reference.KTO(
        model=model,
        args=KTOConfig(
            **trainers.arguments(job),
            **config["train"],
            **class_weights,
            disable_dropout=False,
            train_sampling_strategy="sequential",
        ),
        train_dataset=given[0],
        eval_dataset=given[1],
        processing_class=tokenizer,
        peft_config=lora.adapter_config(config["lora"], model),
        callbacks=[trainers.Watch(job.run)],
        kl_rows=group,
        **reference.of(job, start),
    )
    facts: dict = {"constant": trainers.settle(trainer, job, tokenizer, given, rows)}

    def objective() -> trainers.Measured:
        (loss, batches), (rewards, prompts) = trainers.objective(trainer, {"loss": "loss"}), told_apart(trainer, ordered[True][0])
        return loss | rewards, batches | prompts

    facts |= trainers.fit(trainer, job, objective) | left
    facts["class_weights"] = class_weights
    facts["prompts_twice_in_a_group"] = ordered[False][1]

    with manifests.complete(job, "adapter", parents) as draft:
        trainers.save(trainer, draft, job, start, facts)


if __name__ == "__main__":
    cli.run(main, __doc__, describe=card.lay_beside)

"""Train a LoRA adapter by Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv:2402.01306, eqs. 7 and 8).

Each row is one answer with a label. With r = log pi(answer) - log ref(answer), summed over the answer's tokens, a desirable
answer has the loss w_D (1 - sigmoid(beta (r - z))), an undesirable one w_U (1 - sigmoid(beta (z - r))). The reference point
z >= 0 estimates KL(pi || ref) from answers that belong to other prompts of the same batch (the next row's): so the batch
on a device is part of the method and has at least two rows, and rows of one prompt are kept out of each other's batch, where
they would answer the very prompt that they are a mismatch for. z carries no gradient.

Rows come from a slice of pairs, taken apart, or from one that is unpaired. They are shuffled by the seed here: TRL takes a pair
apart into all chosen, then all rejected, and reads in order. `class_weights: ratio` weighs the rarer class up, so that w_D n_D =
w_U n_U (eq. 8 allows 1 to 4/3).

Departures from TRL's defaults: 4-bit base with fp32 adapters; the block's dropout acts (TRL switches it off); learning rate,
schedule and length come from the config; each batch's completion mask is checked.

    python -m workflow_scripts.steps.train_kto --step results/kto/adapter/manifest.json --out trial/adapter/manifest.json \\
        --inputs results/sft_v2/merged/manifest.json results/data/pairs.manifest.json
"""

import json
import random
from typing import Any

from workflow_scripts.core import artifacts, cli
from workflow_scripts.core.messages import InputError

TRIES = 20  # shuffles, of which the one with the fewest prompts twice in a batch is taken


def unpair(rows: list[dict]) -> list[dict]:
    """One row for each answer: `id`, `prompt`, `completion`, `label`. Rows that are unpaired already stay as they are."""
    found = []
    for row in rows:
        if "chosen" in row:
            for side in ("chosen", "rejected"):
                made = {"id": f"{row['id']}/{side}", "completion": row[side], "label": side == "chosen"}
                found.append({"prompt": row["prompt"], **made})
        else:
            found.append({key: row[key] for key in ("id", "prompt", "completion", "label")})
    return found


def spread(rows: list[dict], batch: int, seed: int) -> tuple[list[dict], int]:
    """(the rows in a random order in which no batch has a prompt twice, how often one has all the same).

    Batches are filled from a shuffled list; a row whose prompt is in the batch already waits for the next one. A last batch of
    one row, whose mismatched answer would be its own, is left out.
    """
    best: tuple[int, list[dict]] | None = None
    for attempt in range(TRIES):
        waiting = list(rows)
        random.Random(f"{seed}/{attempt}").shuffle(waiting)
        order: list[dict] = []
        twice = 0
        while waiting:
            inside: set[str] = set()
            late: list[dict] = []
            taken: list[dict] = []
            for row in waiting:
                prompt = json.dumps(row["prompt"])
                fits = len(taken) < batch and prompt not in inside
                (taken if fits else late).append(row)
                inside |= {prompt} if fits else set()
            if len(taken) < batch and late:  # nothing left but prompts that are in this batch
                missing = batch - len(taken)
                twice += len(late[:missing])
                taken, late = taken + late[:missing], late[missing:]
            order, waiting = order + taken, late
        if best is None or twice < best[0]:
            best = (twice, order)
        if twice == 0:
            break
    assert best is not None
    twice, order = best
    return (order[:-1] if len(order) % batch == 1 else order), twice


def weights(rows: list[dict], chosen: str | dict, place: str) -> dict[str, Any]:
    """`desirable_weight` and `undesirable_weight` of TRL's config. InputError if one of the two classes has no row."""
    desirable = sum(row["label"] for row in rows)
    undesirable = len(rows) - desirable
    if not desirable or not undesirable:
        which = "undesirable (label false)" if desirable else "desirable (label true)"
        raise InputError(f"{place}: none of the {len(rows)} rows is {which}; KTO needs both kinds of answers")
    if chosen != "ratio":
        assert isinstance(chosen, dict)
        return {"desirable_weight": chosen["desirable"], "undesirable_weight": chosen["undesirable"]}
    return {
        "desirable_weight": max(1.0, undesirable / desirable),
        "undesirable_weight": max(1.0, desirable / undesirable),
    }


def main(job: artifacts.Job) -> None:
    from trl import KTOConfig, KTOTrainer

    from workflow_scripts.core import chat, device, models, training

    config, step = job.config, job.step
    parents = job.parents()
    start, rows = parents["start"], parents["rows"]
    batch = config["train"]["per_device_train_batch_size"]
    answers = {heldout: unpair(training.usable(rows, heldout)) for heldout in (False, True)}
    class_weights = weights(answers[False], config["class_weights"], str(rows.path))
    ordered = {heldout: spread(found, batch, step["seed"]) for heldout, found in answers.items()}
    device.prepare(step)
    tokenizer = chat.tokenizer_of(start)
    model = models.load(start, job.work, step["device"], step["precision"], config.get("quant"))

    given = tuple(training.data_set(ordered[heldout][0]) for heldout in (False, True))
    trainer = KTOTrainer(
        model=model,
        args=KTOConfig(
            **training.arguments(job),
            **config["train"],
            **class_weights,
            disable_dropout=False,
            train_sampling_strategy="sequential",
        ),
        train_dataset=given[0],
        eval_dataset=given[1],
        processing_class=tokenizer,
        peft_config=models.lora(config["lora"], model),
        callbacks=[training.Watch(job.run)],
    )
    facts: dict = {"constant": training.settle(trainer, job, tokenizer, given, rows)}

    keys = {
        "loss": "loss",
        "margin": "rewards/margins",
        "reward_desirable": "rewards/chosen",
        "reward_undesirable": "rewards/rejected",
    }
    before = training.objective(trainer, keys)
    trainer.train()
    facts["objective"] = {"before": before, "after": training.objective(trainer, keys)}
    facts["adapter_moved"] = training.changed(trainer)
    facts["class_weights"] = class_weights
    facts["prompts_twice_in_a_batch"] = ordered[False][1]

    with artifacts.complete(job, "adapter", parents) as draft:
        training.save(trainer, draft, job, start, facts)


if __name__ == "__main__":
    cli.run(main, __doc__)

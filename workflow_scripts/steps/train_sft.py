"""Train a LoRA adapter by supervised fine-tuning on the 4-bit base (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

The loss is the mean negative log-likelihood of the tokens of a batch that have a label: with `assistant_only_loss: true`
(sft_v2) the assistant's turns including their end-of-turn token, with `false` (sft_v1) every token of the conversation,
the user's and the system's as well.

Departures from TRL's defaults: the adapter is fp32 (TRL rounds it to bf16 on a 4-bit base) and the optimiser is declared
(models/lora.py says why); each batch's mask is checked before it is trained on; learning rate, schedule and length come
from the config. The 4-bit base is NF4 with double quantisation and computes in the config's precision.

    python -m workflow_scripts.steps.train_sft --step results/sft_v2/adapter/manifest.json --out trial/adapter/manifest.json \\
        --inputs results/base/manifest.json results/data/sft.manifest.json
"""

from typing import Any

from workflow_scripts.artifacts import manifests
from workflow_scripts.data import fitting
from workflow_scripts.steps import cli
from workflow_scripts.tools import card


def cut(tokenizer: Any, given: tuple[Any, Any], max_length: int) -> dict[str, int]:
    """How many conversations are longer than `max_length`: TRL trains on their beginnings, without a word."""
    return {
        name: sum(fitting.tokens(tokenizer, row) > max_length for row in data)
        for name, data in zip(("train", "heldout"), given, strict=True)
    }


def main(job: manifests.Job) -> None:
    from trl import SFTConfig, SFTTrainer

    from workflow_scripts.models import chat, device, lora
    from workflow_scripts.training import sharded, speed, trainers

    config, step = job.config, job.step
    parents = job.parents()
    start, rows = parents["start"], parents["rows"]
    device.prepare(step, job.deterministic)
    tokenizer = chat.tokenizer_of(start)
    model = sharded.load(start, job)
    speed.prepare(model, job)

    given = tuple(trainers.rows_of(rows, heldout, fields=("messages",)) for heldout in (False, True))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**trainers.arguments(job), **config["train"]),
        train_dataset=given[0],
        eval_dataset=given[1],
        processing_class=tokenizer,
        peft_config=lora.adapter_config(config["lora"], model),
        callbacks=[trainers.Watch(job.run)],
    )
    facts: dict = {"constant": trainers.settle(trainer, job, tokenizer, given, rows)}
    facts["cut"] = cut(tokenizer, given, config["train"]["max_length"])
    if sum(facts["cut"].values()):
        print(f"cut at max_length, so that their end is not learned: {facts['cut']} of {[*map(len, given)]} rows", flush=True)

    keys = {"loss": "loss", "token_accuracy": "mean_token_accuracy"}
    facts |= trainers.fit(trainer, job, lambda: trainers.objective(trainer, keys))

    with manifests.complete(job, "adapter", parents) as draft:
        trainers.save(trainer, draft, job, start, facts)


if __name__ == "__main__":
    cli.run(main, __doc__, describe=card.lay_beside)

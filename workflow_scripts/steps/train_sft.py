"""Train a LoRA adapter by supervised fine-tuning on the 4-bit base (QLoRA, Dettmers et al. 2023, arXiv:2305.14314).

The loss is the mean negative log-likelihood of the tokens of a batch that have a label: with `assistant_only_loss: true`
(sft_v2) the assistant's turns including their end-of-turn token, with `false` (sft_v1) every token of the conversation,
the user's and the system's as well.

Departures from TRL's defaults: the adapter is fp32 (TRL rounds it to bf16 on a 4-bit base) and the optimiser is declared
(core/models.py says why); each batch's mask is checked before it is trained on; learning rate, schedule and length come
from the config. The 4-bit base is NF4 with double quantisation and computes in the config's precision.

    python -m workflow_scripts.steps.train_sft --step results/sft_v2/adapter/manifest.json --out trial/adapter/manifest.json \\
        --inputs results/base/manifest.json results/data/sft.manifest.json
"""

from workflow_scripts.core import artifacts, cli


def main(job: artifacts.Job) -> None:
    from trl import SFTConfig, SFTTrainer

    from workflow_scripts.core import chat, device, models, training

    config, step = job.config, job.step
    parents = job.parents()
    start, rows = parents["start"], parents["rows"]
    device.prepare(step)
    tokenizer = chat.tokenizer_of(start)
    model = models.load(start, job.work, step["device"], step["precision"], config.get("quant"))

    given = tuple(training.rows_of(rows, heldout, fields=("messages",)) for heldout in (False, True))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**training.arguments(job), **config["train"]),
        train_dataset=given[0],
        eval_dataset=given[1],
        processing_class=tokenizer,
        peft_config=models.lora(config["lora"], model),
        callbacks=[training.Watch(job.run)],
    )
    facts: dict = {"constant": training.settle(trainer, job, tokenizer, given, rows)}

    keys = {"loss": "loss", "token_accuracy": "mean_token_accuracy"}
    facts |= training.fit(trainer, job, lambda: training.objective(trainer, keys))

    with artifacts.complete(job, "adapter", parents) as draft:
        training.save(trainer, draft, job, start, facts)


if __name__ == "__main__":
    cli.run(main, __doc__)

"""Train a reward model on pairs: Bradley-Terry, as in Stiennon et al. 2020 (arXiv:2009.01325, section 3.4).

The loss of a pair is -log sigmoid(r(prompt, chosen) - r(prompt, rejected)), where r is a linear head (`score`, without bias) on
the hidden state of the last token, after the end of the answer's turn. Backbone: the 4-bit merged start with a fresh adapter;
adapter and head are fp32 and train together.

Departures from TRL's defaults: the block's dropout acts (TRL switches it off); adapter and head are fp32 and drawn from the
seed; learning rate, schedule and length come from the config. Pairs longer than `max_length` are left out, as for DPO and
KTO (data/fitting.py): a reward read in the middle of an answer would mean little. The held-out accuracy is that of the pairs
one by one, not a mean over batches; steps/eval_rm.py looks closer.

    python -m workflow_scripts.steps.train_rm --step results/rm/adapter/manifest.json --out trial/adapter/manifest.json \\
        --inputs results/sft_v2/merged/manifest.json results/data/pairs.manifest.json
"""

from workflow_scripts.artifacts import manifests
from workflow_scripts.steps import cli
from workflow_scripts.tools import card


def main(job: manifests.Job) -> None:
    from trl import RewardConfig, RewardTrainer

    from workflow_scripts.models import chat, device, lora
    from workflow_scripts.rl import reward_model
    from workflow_scripts.training import exchange, sharded, speed, trainers

    config, step = job.config, job.step
    parents = job.parents()
    start, rows = parents["start"], parents["rows"]
    device.prepare(step, job.deterministic)
    tokenizer = chat.tokenizer_of(start)
    chat.end_of_turn(tokenizer)
    max_length = config["train"]["max_length"]
    short, left = trainers.whole(tokenizer, rows, config)
    fields = ("id", "prompt", "chosen", "rejected")
    given = tuple(trainers.data_set([{key: row[key] for key in fields} for row in short[heldout]]) for heldout in (False, True))
    model = sharded.load(start, job, reward=True)
    speed.prepare(model, job)

    trainer = RewardTrainer(
        model=model,
        args=RewardConfig(**trainers.arguments(job), **config["train"], disable_dropout=False),
        train_dataset=given[0],
        eval_dataset=given[1],
        processing_class=tokenizer,
        peft_config=lora.adapter_config(config["lora"], model, reward=True),
        callbacks=[trainers.Watch(job.run)],
    )
    facts: dict = {"constant": trainers.settle(trainer, job, tokenizer, given, rows, mask=False)}

    def objective() -> trainers.Measured:
        batch_size = config["train"]["per_device_eval_batch_size"]
        batches = [short[True][first : first + batch_size] for first in range(0, len(short[True]), batch_size)]

        def scored(batch: list[dict]) -> tuple[list[float], list[float]]:
            return reward_model.score_pairs(trainer.model, tokenizer, batch, batch_size, max_length)

        found = exchange.shared_out(batches, scored, "held-out rewards")
        scores = [score for one, _ in found for score in one], [score for _, one in found for score in one]
        return reward_model.objective(*scores), reward_model.by_pair(*scores)

    facts |= trainers.fit(trainer, job, objective) | left

    with manifests.complete(job, "adapter", parents) as draft:
        trainers.save(trainer, draft, job, start, facts)


if __name__ == "__main__":
    cli.run(main, __doc__, describe=card.lay_beside)

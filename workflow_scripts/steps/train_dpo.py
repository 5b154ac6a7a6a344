"""Train a LoRA adapter by direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290, eq. 7).

The loss of a pair is -log sigmoid(beta * margin), margin = [log pi(chosen) - log ref(chosen)] - [log pi(rejected) -
log ref(rejected)], each log-probability summed over the completion's tokens. `loss_type: ipo` is (margin - 1/(2 beta))^2 on
length-normalised log-probabilities (Azar et al. 2023, arXiv:2310.12036, eq. 17), `hinge` is max(0, 1 - beta * margin) (Zhao
et al. 2023, arXiv:2305.10425). With r = log pi - log ref of an answer:

    bco_pair    -log sigmoid(beta r(chosen)) - log sigmoid(-beta r(rejected))   (Jung et al. 2024, arXiv:2404.04656)
    sppo_hard   (r(chosen) - 1/(2 beta))^2 + (r(rejected) + 1/(2 beta))^2       (Wu et al. 2024, arXiv:2405.00675, eq. 4.7)
    aot         -log sigmoid(beta (d_i - e_i)), d and e the differences of log pi and of log ref of a batch's pairs, sorted
                                                                                (Melnyk et al. 2024, arXiv:2406.05882)

`bco_pair` is TRL's, without the paper's shift of the rewards by their running mean. `sppo_hard` has no judge's probabilities: the
better answer wins with 1. `aot` compares distributions, so the micro-batch is part of it, at least two pairs; held-out pairs
count one by one, and its objective there is that of `sigmoid`. A list of losses with `loss_weights` is their weighted sum, like
MPO (Wang et al. 2024, arXiv:2411.10442: 0.8 sigmoid, 0.2 bco_pair, 1.0 sft), `sft` being the mean of -log pi over the tokens of a
micro-batch's better answers. Weights have no default: TRL would take 1 for each.

The policy starts from the *merged* model of the experiment that it starts from, with a fresh adapter; the reference is the
same model with the adapter off. It trains in full precision (`quantise: none`), because the study merges first and a merge
needs full-precision weights; `quantise: nf4` makes the 4-bit variant. `flip_labels: true` trains on the worse answers, as a
negative control: whoever finds that one better has a broken comparison.

Departures from TRL's defaults: the block's dropout acts, as in the other methods (TRL switches it off for DPO); the
adapter is fp32; learning rate, schedule, beta and length come from the config; each batch's completion mask is checked; pairs
longer than `max_length` are left out and counted (data/fitting.py), where TRL cuts them. The reference's log-probabilities
are computed once: same numbers, no second forward pass at each step.

    python -m workflow_scripts.steps.train_dpo --step results/dpo/adapter/manifest.json --out trial/adapter/manifest.json \\
        --inputs results/sft_v2/merged/manifest.json results/data/pairs.manifest.json
"""

from workflow_scripts.artifacts import manifests
from workflow_scripts.steps import cli
from workflow_scripts.tools import card


def main(job: manifests.Job) -> None:
    from trl import DPOConfig

    from workflow_scripts.models import chat, device, lora
    from workflow_scripts.training import reference, sharded, speed, trainers

    config, step = job.config, job.step
    parents = job.parents()
    start, rows = parents["start"], parents["rows"]
    device.prepare(step, job.deterministic)
    tokenizer = chat.tokenizer_of(start)
    short, left = trainers.whole(tokenizer, rows, config)
    model = sharded.load(start, job)
    speed.prepare(model, job)

    given = trainers.pairs(short, config)
    trainer = reference.DPO(
        model=model,
        args=DPOConfig(**trainers.arguments(job), **config["train"], disable_dropout=False),
        train_dataset=given[0],
        eval_dataset=given[1],
        processing_class=tokenizer,
        peft_config=lora.adapter_config(config["lora"], model),
        callbacks=[trainers.Watch(job.run)],
        **reference.of(job, start),
    )
    facts: dict = {"constant": trainers.settle(trainer, job, tokenizer, given, rows)}

    keys = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins"}
    facts |= trainers.fit(trainer, job, lambda: trainers.objective(trainer, keys)) | left

    with manifests.complete(job, "adapter", parents) as draft:
        trainers.save(trainer, draft, job, start, facts)


if __name__ == "__main__":
    cli.run(main, __doc__, describe=card.lay_beside)

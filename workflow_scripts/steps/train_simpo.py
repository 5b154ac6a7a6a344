"""Train a LoRA adapter by simple preference optimisation (SimPO; Meng, Xia and Chen 2024, arXiv:2405.14734, eq. 6).

The reward of an answer y of n tokens is beta/n log pi(y), a mean over its tokens, so that a long answer is not unlikely for its
length. The loss of a pair is

    -log sigmoid(beta/n_chosen log pi(chosen) - beta/n_rejected log pi(rejected) - gamma)

with a margin gamma that the better answer has to win by (`simpo_gamma`, TRL's name). There is no reference model and no pull to
the start: what holds the policy is a small rate and one pass. beta stands before a mean, not before a sum as DPO's, and so is
much larger.

The authors' code (princeton-nlp/SimPO) has, for all weights of models of 7 to 9 B, rates of 3e-7 to 1e-6, beta 2.0 or 2.5 and
gamma/beta of 0.1 to 0.8 (0.5 to start from), and finds a rate of 1e-5 harmful. The rate here is the one that the study gives to
all adapters, beta 2.0 and gamma 1.0 are theirs; nothing was tuned.

Departures from TRL's defaults: the trainer is DPO's with this loss (training/reference_free.py says why); beta 2.0, where TRL's
0.1 is CPO's, and gamma 1.0 for 0.5; 4-bit base with fp32 adapters; the block's dropout acts (TRL switches it off); learning
rate, schedule and length come from the config; each batch's completion mask is checked; pairs longer than `max_length` are left
out and counted (data/fitting.py), where TRL cuts them. `flip_labels: true` trains on the worse answers, as a negative control.

    python -m workflow_scripts.steps.train_simpo --step results/simpo/adapter/manifest.json --out trial/adapter/manifest.json \\
        --inputs results/sft_v2/merged/manifest.json results/data/pairs.manifest.json
"""

from functools import partial
from typing import Any

from workflow_scripts.artifacts import manifests
from workflow_scripts.steps import cli
from workflow_scripts.tools import card


def loss(chosen: Any, rejected: Any, n_chosen: Any, n_rejected: Any, beta: float, gamma: float) -> tuple[Any, Any, Any]:
    """Of each pair, and the rewards of its answers; all (B,): log-probabilities summed over the answer, and its tokens."""
    from torch.nn.functional import logsigmoid

    better, worse = beta * chosen / n_chosen, beta * rejected / n_rejected
    return -logsigmoid(better - worse - gamma), better, worse


def main(job: manifests.Job) -> None:
    from trl import DPOConfig

    from workflow_scripts.models import chat, device, lora
    from workflow_scripts.training import sharded, speed, trainers
    from workflow_scripts.training.reference_free import PairsTrainer

    config, step = job.config, job.step
    parents = job.parents()
    start, rows = parents["start"], parents["rows"]
    train = dict(config["train"])
    gamma = train.pop("simpo_gamma")
    device.prepare(step, job.deterministic)
    tokenizer = chat.tokenizer_of(start)
    short, left = trainers.whole(tokenizer, rows, config)
    given = trainers.pairs(short, config)
    model = sharded.load(start, job)
    speed.prepare(model, job)

    trainer = PairsTrainer(
        loss=partial(loss, beta=train["beta"], gamma=gamma),
        model=model,
        args=DPOConfig(**trainers.arguments(job), **train, disable_dropout=False),
        train_dataset=given[0],
        eval_dataset=given[1],
        processing_class=tokenizer,
        peft_config=lora.adapter_config(config["lora"], model),
        callbacks=[trainers.Watch(job.run)],
    )
    facts: dict = {"constant": trainers.settle(trainer, job, tokenizer, given, rows)}

    keys = {"loss": "loss", "accuracy": "rewards/accuracies", "margin": "rewards/margins", "nll": "nll"}
    facts |= trainers.fit(trainer, job, lambda: trainers.objective(trainer, keys)) | left

    with manifests.complete(job, "adapter", parents) as draft:
        trainers.save(trainer, draft, job, start, facts)


if __name__ == "__main__":
    cli.run(main, __doc__, describe=card.lay_beside)

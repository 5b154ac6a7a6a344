"""Train a LoRA adapter by contrastive preference optimisation (CPO; Xu et al. 2024, arXiv:2401.08417, eq. 3 and what is added).

DPO's loss with a reference that thinks every answer alike, and so drops out, and the likelihood of the better answer, which
keeps the policy from making both unlikely. With log pi summed over an answer and n its tokens, the loss of a pair is

    -log sigmoid(beta (log pi(chosen) - log pi(rejected))) - cpo_alpha/n_chosen log pi(chosen)

The paper writes the second term as a sum too; TRL takes the mean over the tokens, and so do we. The first is of sums, so that
before anything is learnt the longer answer of a pair is mostly the less likely one; SimPO divides by the length.

The authors' script (fe1ixxu/ALMA) trains adapters on translations at 1e-4, falling by the inverse square root, with
beta 0.1. Here the rate is the one that the study gives to all adapters; nothing was tuned.

Departures from TRL's defaults: the trainer is DPO's with this loss (training/reference_free.py says why); the likelihood is the
mean over pairs of each one's mean, where TRL takes that of a micro-batch's tokens, which is another number for another
micro-batch; 4-bit base with fp32 adapters; the block's dropout acts (TRL switches it off); learning rate, schedule and length
come from the config; each batch's completion mask is checked; pairs longer than `max_length` are left out and counted
(data/fitting.py), where TRL cuts them. `flip_labels: true` trains on the worse answers, as a negative control.

    python -m workflow_scripts.steps.train_cpo --step results/cpo/adapter/manifest.json --out trial/adapter/manifest.json \\
        --inputs results/sft_v2/merged/manifest.json results/data/pairs.manifest.json
"""

from functools import partial
from typing import Any

from workflow_scripts.artifacts import manifests
from workflow_scripts.steps import cli
from workflow_scripts.tools import card


def loss(chosen: Any, rejected: Any, n_chosen: Any, n_rejected: Any, beta: float, alpha: float) -> tuple[Any, Any, Any]:
    """Of each pair, and the rewards of its answers; all (B,): log-probabilities summed over the answer, and its tokens."""
    from torch.nn.functional import logsigmoid

    better, worse = beta * chosen, beta * rejected
    return -logsigmoid(better - worse) - alpha * chosen / n_chosen, better, worse


def main(job: manifests.Job) -> None:
    from trl import DPOConfig

    from workflow_scripts.models import chat, device, lora
    from workflow_scripts.training import sharded, speed, trainers
    from workflow_scripts.training.reference_free import PairsTrainer

    config, step = job.config, job.step
    parents = job.parents()
    start, rows = parents["start"], parents["rows"]
    train = dict(config["train"])
    alpha = train.pop("cpo_alpha")
    device.prepare(step, job.deterministic)
    tokenizer = chat.tokenizer_of(start)
    short, left = trainers.whole(tokenizer, rows, config)
    given = trainers.pairs(short, config)
    model = sharded.load(start, job)
    speed.prepare(model, job)

    trainer = PairsTrainer(
        loss=partial(loss, beta=train["beta"], alpha=alpha),
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

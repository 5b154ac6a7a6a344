"""Train a LoRA adapter by odds ratio preference optimisation (ORPO; Hong, Lee and Thorne 2024, arXiv:2403.07691, eqs. 6 and 7).

SFT on the better answer, and a term that tells it from the worse one. With p(y) the geometric mean of the probabilities of y's
tokens, log p = 1/n log pi(y), and odds(y) = p / (1 - p), the loss of a pair is

    -log p(chosen) - beta log sigmoid(log odds(chosen) - log odds(rejected))

(the paper's lambda is TRL's `beta`). No reference model. The rewards that are logged are the log odds, without beta.

The authors mean it to stand in for SFT: `start_from: base` is their way, and an experiment that starts from sft_v2 asks what it
adds to that. Their scripts (xfactlab/orpo) train all weights of Mistral 7 B at 5e-6, falling by the inverse square root, with
0.1, for 5 epochs. The same rate is small for an adapter that passes once; nothing was tuned here.

Departures from TRL's defaults: the trainer is DPO's with this loss (training/reference_free.py says why); the likelihood is of
the answer, as eq. 6 has it, where TRL's counts the prompt as well, and the mean over pairs of each one's mean, where TRL takes
that of a micro-batch's tokens, which is another number for another micro-batch; a mean probability above 1 - 1e-6 counts as
that, where TRL's odds become infinite; 4-bit base with fp32 adapters; the block's dropout acts (TRL switches it off); learning
rate, schedule and length come from the config; each batch's completion mask is checked; pairs longer than `max_length` are left
out and counted (data/fitting.py), where TRL cuts them. `flip_labels: true` trains on the worse answers, as a negative control.

    python -m workflow_scripts.steps.train_orpo --step results/orpo/adapter/manifest.json --out trial/adapter/manifest.json \\
        --inputs results/sft_v2/merged/manifest.json results/data/pairs.manifest.json
"""

from functools import partial
from typing import Any

from workflow_scripts.artifacts import manifests
from workflow_scripts.steps import cli
from workflow_scripts.tools import card


def loss(chosen: Any, rejected: Any, n_chosen: Any, n_rejected: Any, beta: float) -> tuple[Any, Any, Any]:
    """Of each pair, and the log odds of its answers; all (B,): log-probabilities summed over the answer, and its tokens."""
    from torch.nn.functional import logsigmoid

    better, worse = (log_odds(one) for one in (chosen / n_chosen, rejected / n_rejected))
    return -chosen / n_chosen - beta * logsigmoid(better - worse), better, worse


def log_odds(log_p: Any) -> Any:
    """log p - log(1 - p)."""
    log_p = log_p.clamp(max=-1.0e-6)
    return log_p - (-log_p.expm1()).log()


def main(job: manifests.Job) -> None:
    from trl import DPOConfig

    from workflow_scripts.models import chat, device, lora
    from workflow_scripts.training import sharded, speed, trainers
    from workflow_scripts.training.reference_free import PairsTrainer

    config, step = job.config, job.step
    parents = job.parents()
    start, rows = parents["start"], parents["rows"]
    device.prepare(step, job.deterministic)
    tokenizer = chat.tokenizer_of(start)
    short, left = trainers.whole(tokenizer, rows, config)
    given = trainers.pairs(short, config)
    model = sharded.load(start, job)
    speed.prepare(model, job)

    trainer = PairsTrainer(
        loss=partial(loss, beta=config["train"]["beta"]),
        model=model,
        args=DPOConfig(**trainers.arguments(job), **config["train"], disable_dropout=False),
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

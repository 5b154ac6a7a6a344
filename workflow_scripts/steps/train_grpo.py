"""Train a LoRA adapter by group relative policy optimisation (Shao et al. 2024, arXiv:2402.03300, eqs. 3 and 4).

For each prompt the policy samples G answers (`num_generations`) with rewards r_1..r_G. The advantage of answer i, the same
for each of its tokens, is A = (r_i - mean(r)) / (std(r) + 1e-4), std with G - 1 (`scale_rewards: group`). The loss of a
token is -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A) + beta KL, with ratio = pi / pi at sampling and the estimate
KL = exp(log ref - log pi) - (log ref - log pi) - 1 (Schulman's k3). `loss_type: grpo` takes the mean over each answer's
tokens, then over answers, as the paper does (TRL's default is dapo, a mean over all tokens). With `num_iterations: 1` the
ratio is 1 and nothing is clipped. A group whose rewards are all equal teaches nothing. In place of the clipped ratio:

    cispo   -sg(min(ratio, epsilon_high)) A log pi, the mean over all tokens             (MiniMax 2025, arXiv:2506.13585)
    sapo    -4/tau sigmoid(tau (ratio - 1)) A, tau by the sign of A, means as in grpo    (Gao et al. 2025, arXiv:2511.20347)

sg stops the gradient, so that a token whose ratio is bounded still counts; TRL bounds the ratio by `epsilon_high` itself,
where it adds 1 for the other losses: so it has to be given, at least 1. sapo's tau are `sapo_temperature_pos` and `_neg`,
without a default here. Both are meant for several updates on a rollout: at a ratio of 1 their gradients are dapo's and grpo's.

The policy starts from the merged model with a fresh adapter on its 4-bit copy; the reference is the same model with the
adapter off.
Rewards: `rl/rewards.py`. The objective: the mean reward of sampled answers to held-out prompts.

Departures from TRL's defaults: dropout is off, as in every method whose ratio must be 1 at first sight (a declared exception to
the constant block); beta is not 0, and the KL term is the paper's (`use_bias_correction_kl: false`; TRL weighs it by the ratio,
of the same value at first sight and of another gradient); the adapter is fp32; what decides an outcome comes from the config.

    python -m workflow_scripts.steps.train_grpo --step results/grpo/adapter/manifest.json --out trial/adapter/manifest.json \\
        --inputs results/sft_v2/merged/manifest.json results/data/instructions.manifest.json
"""

from workflow_scripts.artifacts import manifests
from workflow_scripts.steps import cli
from workflow_scripts.tools import card


def main(job: manifests.Job) -> None:
    from trl import GRPOConfig

    from workflow_scripts.models import chat, device, loading, lora
    from workflow_scripts.rl import correction, rewards
    from workflow_scripts.training import speed, trainers

    config, step = job.config, job.step
    parents = job.parents()
    start, rows = parents["start"], parents["rows"]
    given = tuple(rewards.rows_of(rows, heldout, config["reward"]) for heldout in (False, True))
    device.prepare(step, job.deterministic)
    tokenizer = chat.tokenizer_of(start)
    chat.end_of_turn(tokenizer)
    functions = rewards.functions(job, parents)
    model = loading.load(start, job.work, step["device"], step["precision"], config.get("quant"))
    speed.prepare(model, job)
    chat.sample_plainly(model)

    trainer = correction.GRPO(
        model=model,
        args=GRPOConfig(
            **trainers.arguments(job),
            **config["train"],
            disable_dropout=True,
            reward_weights=rewards.weights(config, functions),
        ),
        reward_funcs=list(functions.values()),
        train_dataset=given[0],
        eval_dataset=given[1],
        processing_class=tokenizer,
        peft_config=lora.adapter_config(config["lora"], model),
        callbacks=[trainers.Watch(job.run)],
    )
    facts: dict = {"constant": trainers.settle(trainer, job, tokenizer, given, rows, dropout=False, mask=False)}
    trainer.sample_by(config["generation"], job.slots, trainers.longest_prompt(tokenizer, given))
    trainer.correct_by(config.get("correction"))

    keys = {"reward": "reward", "tokens": "completions/mean_length"} | {name: f"rewards/{name}/mean" for name in functions}
    facts |= trainers.fit(trainer, job, lambda: trainers.objective(trainer, keys))

    with manifests.complete(job, "adapter", parents) as draft:
        trainers.save(trainer, draft, job, start, facts)


if __name__ == "__main__":
    cli.run(main, __doc__, describe=card.lay_beside)

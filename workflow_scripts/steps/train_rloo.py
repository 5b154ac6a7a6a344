"""Train a LoRA adapter by REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv:2402.14740, eq. 8).

For each prompt the policy samples G answers (`num_generations`). The reward of an answer is R_i = r_i - beta (log pi -
log ref), the log-ratio summed over its tokens: the KL penalty is part of the reward, not of the loss. Its baseline is the
mean of the *other* answers' rewards: A_i = R_i - sum over j != i of R_j / (G - 1). The loss is -min(ratio A, clip(ratio,
1 - epsilon, 1 + epsilon) A) with the ratio of whole answers; with `num_iterations: 1` the ratio is 1, and its gradient is
REINFORCE's.

The policy starts from the merged model with a fresh adapter on its 4-bit copy; the reference is the same model with the
adapter off.
Rewards: `rl/rewards.py`. The objective: the mean reward of sampled answers to held-out prompts, before the KL penalty.

Departures from TRL's defaults: dropout is off, as in every method whose ratio must be 1 at first sight (a declared exception to
the constant block); the adapter is fp32; everything that decides an outcome comes from the config.

    python -m workflow_scripts.steps.train_rloo --step results/rloo/adapter/manifest.json --out trial/adapter/manifest.json \\
        --inputs results/sft_v2/merged/manifest.json results/data/instructions.manifest.json
"""

from workflow_scripts.artifacts import manifests
from workflow_scripts.steps import cli
from workflow_scripts.tools import card


def main(job: manifests.Job) -> None:
    from trl import RLOOConfig

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

    trainer = correction.RLOO(
        model=model,
        args=RLOOConfig(
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

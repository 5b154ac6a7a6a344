"""Train a LoRA adapter by proximal policy optimisation (Schulman et al. 2017, arXiv:1707.06347), with a value function.

The policy samples one answer to each prompt. The reward of a token is -kl_coef (log pi - log ref), and at the answer's last token
the answer's score on top: a reward model's or a verifier's, less `missing_eos_penalty` where the answer does not end (Ziegler
et al. 2019, arXiv:1909.08593, eq. 2). Advantages A_t and returns R_t come from generalised advantage estimation with gamma and
lambda (Schulman et al. 2016, arXiv:1506.02438); A_t is whitened over the rollout. For `num_iterations` epochs, in mini-batches
that are drawn anew for each,

    policy: mean of -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A), ratio = pi / pi at sampling (2017, eq. 7)
    value:  mean of 1/2 max((V - R)^2, (clip(V, V_old +- value_clip) - R)^2) (Huang et al. 2024, arXiv:2403.17031)

over the tokens of a micro-batch. `kl_target` adapts kl_coef after each rollout (Ziegler et al. 2019, section 2.2). In the
first `value_warmup` rollouts only the value function trains. `rl/advantages.py` has the formulas, `rl/ppo_trainer.py` how
policy, value function, reward model and reference share one 4-bit backbone.

There is no coefficient of the value loss: the value function has parameters, learning rate and gradient norm of its own. The
objective: the mean reward of sampled answers to held-out prompts. The artifact is the policy's adapter alone.

Departures from TRL's last PPO trainer (1.12): one backbone with adapters instead of four models, rewards at the last real token
instead of the place behind it, gradients clipped, a learning rate for each of the two; dropout off, as in every method whose
ratio must be 1 at first sight.

    python -m workflow_scripts.steps.train_ppo --step results/ppo/adapter/manifest.json --out trial/adapter/manifest.json \\
        --inputs results/sft_v2/merged/manifest.json results/rm/adapter/manifest.json results/data/instructions.manifest.json
"""

from workflow_scripts.artifacts import manifests
from workflow_scripts.steps import cli
from workflow_scripts.tools import card


def main(job: manifests.Job) -> None:
    from trl import GRPOConfig

    from workflow_scripts.models import chat, device, loading, lora
    from workflow_scripts.rl import rewards
    from workflow_scripts.rl.ppo_trainer import PPOTrainer
    from workflow_scripts.training import speed, trainers

    config, step = job.config, job.step
    parents = job.parents()
    start, rows = parents["start"], parents["rows"]
    given = tuple(rewards.rows_of(rows, heldout, config["reward"]) for heldout in (False, True))
    device.prepare(step, job.deterministic)
    tokenizer = chat.tokenizer_of(start)
    chat.end_of_turn(tokenizer)
    functions = rewards.functions(job, parents, on_backbone=lambda name: trainer.reward_models[name])
    model = loading.load(start, job.work, step["device"], step["precision"], config.get("quant"))
    speed.prepare(model, job)
    chat.sample_plainly(model)
    train = config["train"]
    args = GRPOConfig(
        **trainers.arguments(job),
        **train,
        disable_dropout=True,
        reward_weights=rewards.weights(config, functions),
        num_generations=train["per_device_train_batch_size"] * train["steps_per_generation"],
        num_generations_eval=1,
        loss_type="bnpo",  # the mean over the tokens of a micro-batch
        beta=0.0,  # the KL is in the reward
        importance_sampling_level="token",
        mask_truncated_completions=False,
    )
    args.num_generations = 1  # one answer to each prompt; the constructor refuses it, since GRPO compares within groups

    trainer = PPOTrainer(
        model=model,
        args=args,
        ppo=config["ppo"],
        reward_funcs=list(functions.values()),
        train_dataset=given[0],
        eval_dataset=given[1],
        processing_class=tokenizer,
        peft_config=lora.adapter_config(config["lora"], model),
        callbacks=[trainers.Watch(job.run)],
    )
    for name in rewards.models_of(job):
        trainer.add_reward_model(name, parents[f"reward {name}"])
    facts: dict = {"constant": trainers.settle(trainer, job, tokenizer, given, rows, dropout=False, mask=False)}
    trainer.sample_by(config["generation"], job.slots, trainers.longest_prompt(tokenizer, given))

    keys = {"reward": "reward", "tokens": "completions/mean_length"} | {name: f"rewards/{name}/mean" for name in functions}
    facts |= trainers.fit(trainer, job, lambda: trainers.objective(trainer, keys))

    with manifests.complete(job, "adapter", parents) as draft:
        trainers.save(trainer, draft, job, start, facts)


if __name__ == "__main__":
    cli.run(main, __doc__, describe=card.lay_beside)

"""The tiny world in full: the targets that show what each method gains."""

PREFERENCES = ("dpo", "kto")
ROLLOUTS = ("ppo", "ppo_ifeval", "grpo", "rloo")  # reward: the share of followed instructions; for ppo the reward model


def suffix(seed: int) -> str:
    return "" if seed == 1 else f".seed{seed}"


def targets(*seeds: int) -> list[str]:
    """Scores of the base, and with each seed those of every method; the reward model's evaluation."""
    found = ["results/ifeval_base.json"]
    for end in map(suffix, seeds):
        found += [f"results/ifeval_{name}{end}.json" for name in ("sft_v2", *PREFERENCES, *ROLLOUTS)]
        found += [f"results/gsm8k_{name}{end}.json" for name in ("sft_v2", "grpo_numeric")]
        found.append(f"results/rm{end}/rm_eval.json")
    return found

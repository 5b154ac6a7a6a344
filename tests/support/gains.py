"""The tiny world in full: the targets that show what each method gains."""

MOST = ("dpo", "grpo")
MORE = ("kto", "ppo", "ppo_ifeval", "rloo")  # ppo's reward is the reward model, the others' as grpo's: followed instructions
METHODS = (*MOST, *MORE)


def suffix(seed: int) -> str:
    return "" if seed == 1 else f".seed{seed}"


def targets(methods: tuple[str, ...], *seeds: int) -> list[str]:
    """Scores of the base, and with each seed those of the methods; sums, and the reward model's evaluation."""
    found = ["results/ifeval_base.json"]
    for end in map(suffix, seeds):
        found += [f"results/ifeval_{name}{end}.json" for name in ("sft_v2", *methods)]
        found += [f"results/gsm8k_{name}{end}.json" for name in ("sft_v2", "grpo_numeric")]
        found.append(f"results/rm{end}/rm_eval.json")
    return found

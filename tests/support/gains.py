"""The tiny world in full: the targets that show what each method gains."""

MOST = ("dpo",)  # and grpo_numeric: GRPO with another reward
MORE = ("grpo", "kto", "ppo", "ppo_ifeval", "rloo")  # ppo's reward is the reward model, the others': followed instructions
METHODS = (*MOST, *MORE)


def suffix(seed: int) -> str:
    return "" if seed == 1 else f".seed{seed}"


def targets(methods: tuple[str, ...], *seeds: int) -> list[str]:
    """The base, prompts for rollouts, and with each seed scores of the methods; sums, and the evaluation of the reward model."""
    found = ["results/ifeval_base.json", "results/data/instructions.manifest.json"]
    for end in map(suffix, seeds):
        found += [f"results/ifeval_{name}{end}.json" for name in ("sft_v2", *methods)]
        found += [f"results/gsm8k_{name}{end}.json" for name in ("sft_v2", "grpo_numeric")]
        found.append(f"results/rm{end}/rm_eval.json")
    return found

"""Names of runs and of what is scored. Apart from the config, so that what reads results does not count the config's own code."""

METRIC = {"ifeval": "prompt_level_strict_acc", "gsm8k": "exact_match"}  # task -> the metric that stands for it


def run_name(experiment: str, seed: int) -> str:
    """`dpo` for seed 1, `dpo.seed2`; the base has no seed."""
    return experiment if seed == 1 or experiment == "base" else f"{experiment}.seed{seed}"

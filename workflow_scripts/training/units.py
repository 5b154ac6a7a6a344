"""What one evaluation of a TRL trainer gave for each unit of the held-out rows; TRL itself reports means over them.

Units are evaluation batches: that is what TRL computes its figures for, whatever the loss, packed or not. All have one size, and
hold the same rows each time. Of methods that sample answers they are prompts, by the rewards of each one's answers: finer, and
the batch needs not be small for it, which would make sampling slow and give other samples.

By two methods of the trainer, each wrapped for one evaluation: `prediction_step`, after which a batch's figures lie in
`_metrics["eval"]`, and `_calculate_rewards`. tests/training/test_units.py says when TRL changes them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from workflow_scripts.training.change import Units

LENGTH = "completions/mean_length"


@contextmanager
def kept(trainer: Any) -> Iterator[Units]:
    """TRL's name of a figure (without `eval_`) -> one number for each unit, filled by the evaluation made in this block."""
    found: Units = {"loss": []}
    answers: dict[str, dict[str, list[float]]] = {}  # figure -> prompt's id -> a number for each answer
    predict, judge = trainer.prediction_step, getattr(trainer, "_calculate_rewards", None)

    def prediction_step(*args: Any, **kwargs: Any) -> Any:
        result = predict(*args, **kwargs)
        found["loss"].append(result[0].item())
        found.update({name: list(values) for name, values in trainer._metrics["eval"].items()})  # cleared when it is logged
        return result

    def calculate_rewards(inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        rewards = judge(inputs, prompts, completions, completion_ids_list)  # type: ignore[misc]
        weighted = (rewards * trainer.reward_weights.to(rewards.device)).nansum(dim=1)
        columns = {"reward": weighted.tolist(), LENGTH: [float(len(ids)) for ids in completion_ids_list]}
        columns |= {f"rewards/{name}/mean": rewards[:, i].tolist() for i, name in enumerate(trainer.reward_func_names)}
        for figure, values in columns.items():
            for row, value in zip(inputs, values, strict=True):
                answers.setdefault(figure, {}).setdefault(row["id"], []).append(value)
        return rewards

    trainer.prediction_step = prediction_step
    if judge is not None:
        trainer._calculate_rewards = calculate_rewards
    try:
        yield found
    finally:
        del trainer.prediction_step
        if judge is not None:
            del trainer._calculate_rewards
    found |= {figure: [fmean(by_prompt[key]) for key in sorted(by_prompt)] for figure, by_prompt in answers.items()}

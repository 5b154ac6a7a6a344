"""What one evaluation of a TRL trainer gave for each unit of the held-out rows; TRL itself reports means over batches.

A unit is a row, so that the standard error of a change counts rows whatever the batch:

- SFT: a row (packed: a sequence), from the log-probabilities that TRL's forward gives for each token. Rows weigh by their tokens
  with a loss, as in training: the mean over the units is the loss of all held-out tokens. TRL's own figure is the mean over
  batches, which is another number for another batch size. (Without a mixture of experts' auxiliary loss.)
- DPO: a pair; TRL's figures are noted for each one, as of a batch of one (training/groups.py).
- Methods that sample answers: a prompt, by the rewards of each one's answers. No batch of one, which would make sampling slow.
- KTO's loss: a group of `kl_rows`, since it needs the other rows of it; the last one weighs by its rows. Its rewards:
  steps/train_kto.py, by prompt. Reward models: rl/reward_model.py, by pair.

By two methods of the trainer, each wrapped for one evaluation: `prediction_step`, after which a batch's figures lie in
`_metrics["eval"]`, and `_calculate_rewards`; and by what SFT's model returns. tests/training/test_units.py says when TRL changes
them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import Any

from workflow_scripts.plumbing import ranks
from workflow_scripts.training import passes
from workflow_scripts.training.change import Units, of_ratio
from workflow_scripts.training.groups import InGroups

LENGTH = "completions/mean_length"


@contextmanager
def kept(trainer: Any) -> Iterator[Units]:
    """TRL's name of a figure (without `eval_`) -> one number for each unit, filled by the evaluation made in this block."""
    from trl import SFTTrainer

    found: Units = {"loss": []}
    answers: dict[str, dict[str, list[float]]] = {}  # figure -> prompt's id -> a number for each answer
    # SFT: (sum, tokens) of each row; pairs, and KTO's groups: (sum, rows)
    tokens: dict[str, list[tuple[float, float]]] = {"loss": [], "mean_token_accuracy": []}
    predict, judge = trainer.prediction_step, getattr(trainer, "_calculate_rewards", None)

    def prediction_step(*args: Any, **kwargs: Any) -> Any:
        if shared is None:
            result = predict(*args, **kwargs)
        else:
            loss, figures, rows = shared.pop(0)
            trainer._metrics["eval"].update({name: trainer._metrics["eval"][name] + values for name, values in figures.items()})
            for figure, values in rows.items():
                tokens[figure] += values
            result = (loss.to(trainer.args.device), None, None)
        found["loss"].append(result[0].item())
        found.update({name: list(values) for name, values in trainer._metrics["eval"].items()})  # cleared when it is logged
        return result

    def forward(model: Any, inputs: Any, output: Any) -> None:
        losses = -output.log_probs.double()
        if trainer.args.loss_type == "dft":
            losses *= output.log_probs.double().exp()
        counts = output.label_mask.sum(-1).tolist()
        for figure, values in (("loss", losses), ("mean_token_accuracy", output.is_top1)):
            tokens[figure] += zip(values.sum(-1).tolist(), counts, strict=True)

    def calculate_rewards(inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any) -> Any:
        rewards = judge(inputs, prompts, completions, completion_ids_list)  # type: ignore[misc]
        weighted = (rewards * trainer.reward_weights.to(rewards.device)).nansum(dim=1)
        columns = {"reward": weighted.tolist(), LENGTH: [float(len(ids)) for ids in completion_ids_list]}
        columns |= {f"rewards/{name}/mean": rewards[:, i].tolist() for i, name in enumerate(trainer.reward_func_names)}
        for figure, values in columns.items():
            for row, value in zip(inputs, values, strict=True):
                answers.setdefault(figure, {}).setdefault(row["id"], []).append(value)
        return rewards

    model: Any = trainer.model
    hook = model.register_forward_hook(forward) if isinstance(trainer, SFTTrainer) else None
    if judge is not None:
        trainer._calculate_rewards = calculate_rewards
    if in_groups := isinstance(trainer, InGroups):
        trainer.judged = tokens["loss"]
    try:
        # Where several ranks train, the batches are shared out beforehand; rollouts share their answers themselves.
        shared = passes.evaluated(trainer, predict, tokens) if ranks.count > 1 and judge is None else None
        trainer.prediction_step = prediction_step
        yield found
    finally:
        vars(trainer).pop("prediction_step", None)
        if in_groups:
            del trainer.judged
        if hook is not None:
            hook.remove()
        if judge is not None:
            del trainer._calculate_rewards
    found |= {figure: [fmean(by_prompt[key]) for key in sorted(by_prompt)] for figure, by_prompt in answers.items()}
    found |= {figure: of_ratio(rows) for figure, rows in tokens.items() if rows}

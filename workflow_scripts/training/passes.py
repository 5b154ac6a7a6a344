"""Held-out rows' passes, shared by the ranks of a training (plumbing/ranks.py): a batch is one rank's, all get what it gave."""

from typing import Any

from workflow_scripts.training import exchange


def evaluated(trainer: Any, predict: Any, more: dict[str, list]) -> list[tuple]:
    """What `prediction_step` gives for each held-out batch: (loss, TRL's figures, what was added to each list of `more`).

    Lists and figures are left as they were.
    """
    figures = trainer._metrics["eval"]

    def step(inputs: Any) -> tuple:
        loss = predict(trainer.model, inputs, True)[0].cpu()
        found = loss, dict(figures), {name: list(values) for name, values in more.items()}
        figures.clear()
        for values in more.values():
            values.clear()
        return found

    trainer.model.eval()
    with trainer.accelerator.autocast():
        return exchange.shared_out(trainer.get_eval_dataloader(), step, "the held-out objective")

"""A batch through the model at once, and its loss by groups of its rows, each as TRL computes that of a batch.

Two things want the loss of less than a batch. KTO's reference point is estimated within a group of `kl_rows` answers, which is
part of the method, however many the card takes at once. And the held-out objective of methods on pairs counts each pair, whatever
the batch, so that the standard error of its change does. Both would otherwise go through the model in small batches, where a GPU
waits for the processor.

So the model sees the whole batch, and the trainer's own loss is asked for each group, with a stand-in for the model that gives
the group's rows of what the model gave. The loss of the batch is the mean over its groups, which is what transformers makes of
as many micro-batches: the same numbers, up to the order of sums. (But in the last step of an epoch, if micro-batches of several
groups do not come out even: there transformers lets each micro-batch count the same, however few groups are in it.)

A reference that is not there yet is computed for the whole batch as well. An auxiliary loss, of a mixture of experts, would be
that of the whole batch in each group.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from workflow_scripts.models.chat import IGNORE

SEQUENCES = ("input_ids", "attention_mask", "completion_mask")


class Rows:
    """Stands in for a model: `group` says which rows of its output are given."""

    def __init__(self, model: Any, batch: dict[str, Any]):
        self.model, self.batch, self.training = model, batch, model.training
        self.group = torch.arange(0)
        self.found: Any = None
        self.kl: Any = None

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **how: Any) -> Any:
        """What the model gave of the group, whose tokens these are; all rows' labels are made as the group's were."""
        ids = self.batch["input_ids"]
        whole = ids.masked_fill(self.batch["completion_mask"] == 0, IGNORE)
        assert torch.equal(labels, whole[self.group]), "these are not the labels of the group's completions"
        if self.found is None:
            self.found = self.model(input_ids=ids, attention_mask=self.batch["attention_mask"], labels=whole, **how)
        parts = {name: value[self.group] if len(ids) == _rows(value) else value for name, value in self.found.items()}
        return SimpleNamespace(**{name: parts.get(name) for name in self.found.__dataclass_fields__})


def _rows(value: Any) -> int | None:
    return len(value) if isinstance(value, Tensor) and value.dim() else None


class InGroups:
    """Beside a trainer of TRL for pairs or for answers, whose loss is a mean over groups of them.

    judged: takes (the loss times the rows, the rows) of each group, while held-out rows are evaluated.
    """

    judged: list[tuple[float, float]] | None = None

    def group_size(self) -> int | None:
        """Pairs or answers of a group now; None where a batch is one."""
        return 1 if self.judged is not None else None

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **more: Any) -> Any:
        sequences = len(inputs["input_ids"])
        rows = len(inputs["label"]) if "label" in inputs else sequences // 2
        size = self.group_size() or rows
        groups = torch.arange(rows, device=self.args.device).split(size)
        if len(groups) == 1:
            loss = super().compute_loss(model, inputs, *args, **more)  # type: ignore[misc]
            self._note([loss], groups)
            return loss
        inputs = {name: value.to(self.args.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        stand_in, losses, once = Rows(model, inputs), [], self.precompute_ref_logps
        if not once and (columns := getattr(self, "COLUMNS", ())):  # of a method with a reference
            made = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            inputs |= {name: column for name, column in zip(columns, made, strict=True) if column is not None}
            self.precompute_ref_logps = True
        for group in groups:
            of_rows = group if sequences == rows else torch.cat((group, group + rows))  # all chosen, then all rejected
            stand_in.group = of_rows
            part = {
                name: value[of_rows if name in SEQUENCES else group] if isinstance(value, Tensor) else value
                for name, value in inputs.items()
            }
            losses.append(super().compute_loss(stand_in, part, *args, **more))  # type: ignore[misc]
        self.precompute_ref_logps = once
        self._note(losses, groups)
        return torch.stack(losses).mean()

    def _note(self, losses: list[Tensor], groups: Any) -> None:
        if self.judged is not None:
            values = torch.stack([loss.detach() for loss in losses]).tolist()  # one look at the device
            self.judged += [(value * len(group), len(group)) for value, group in zip(values, groups, strict=True)]


class InKlGroups(InGroups):
    """Beside TRL's KTO trainer: `kl_rows` answers after each other are a group, in training and held out."""

    def __init__(self, *args: Any, kl_rows: int, **more: Any):
        self.kl_rows = kl_rows
        super().__init__(*args, **more)

    def group_size(self) -> int | None:
        return self.kl_rows

    def _prepare_dataset(self: Any, dataset: Any, processing_class: Any, args: Any, *more: Any) -> Any:
        """TRL takes the mismatched answers from within as many rows as a micro-batch has."""
        size, args.per_device_train_batch_size = args.per_device_train_batch_size, self.kl_rows
        try:
            return super()._prepare_dataset(dataset, processing_class, args, *more)  # type: ignore[misc]
        finally:
            args.per_device_train_batch_size = size

    def _compute_kl_logps(self: Any, model: Any, batch: dict[str, Any]) -> Any:
        if not isinstance(model, Rows):
            return super()._compute_kl_logps(model, batch)  # type: ignore[misc]
        if model.kl is None:
            model.kl = super()._compute_kl_logps(model.model, model.batch)  # type: ignore[misc]
        return None if model.kl is None else model.kl[model.group]

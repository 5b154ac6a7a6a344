"""The reference's log-probabilities of DPO and KTO, shared by the ranks of a training (plumbing/ranks.py).

They are computed once, before it, and that is about half as long as the training itself: a batch is one rank's, and all get what
it gave. Alone, all is TRL's own.
"""

from typing import Any

import torch
from trl import DPOTrainer, KTOTrainer
from trl.trainer import dpo_trainer, kto_trainer

from workflow_scripts.plumbing import ranks
from workflow_scripts.training import exchange, sharded


class SharedReference:
    """Beside a trainer of TRL that computes its reference once."""

    batch: int | None = None  # the next one's number, while they are computed
    batches = 0  # how many there are

    def __init__(self, **given: Any):
        with sharded.unhashed(dpo_trainer), sharded.unhashed(kto_trainer):
            super().__init__(**given)

    def _precompute_ref_logps(self: Any, dataset: Any, name: str, batch_size: int) -> Any:
        if ranks.count == 1:
            return super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]
        mark, self.batches = self._precompute_model_hash, -(-len(dataset) // batch_size)
        self.batch, self._precompute_model_hash = (
            0,
            f"{mark}, a share: {ranks.number} of {ranks.count}",
        )  # names a file of datasets
        try:
            made = super()._precompute_ref_logps(dataset, name, batch_size)  # type: ignore[misc]
        finally:
            self.batch, self._precompute_model_hash = None, mark
        columns = [one for one in made.column_names if one not in dataset.column_names]
        parts = exchange.gathered([torch.tensor(made[one][:], dtype=torch.float64) for one in columns], f"reference of {name}")
        found = dataset
        for column, values in zip(columns, zip(*parts, strict=True), strict=True):
            found = found.add_column(column, sum(values).tolist(), feature=made.features[column])  # one is the value, others 0
        return found

    def compute_ref_log_probs(self: Any, model: Any, inputs: dict) -> Any:
        if self.batch is None:
            return super().compute_ref_log_probs(model, inputs)  # type: ignore[misc]
        computes, counts = exchange.takes(self.batch, self.batches)
        self.batch += 1
        found = super().compute_ref_log_probs(model, inputs) if computes else None  # type: ignore[misc]
        if counts:
            return found
        zeros = torch.zeros(len(inputs["input_ids"]), device=inputs["input_ids"].device)
        if isinstance(self, DPOTrainer):  # chosen and rejected lie in one batch
            return zeros.chunk(2)
        return zeros, zeros if self.calculate_KL else None


class DPO(SharedReference, DPOTrainer):  # type: ignore[misc]
    """TRL's, whose reference is computed by all ranks."""


class KTO(SharedReference, KTOTrainer):  # type: ignore[misc]
    """TRL's, whose reference is computed by all ranks."""

"""Pairs without a reference model: TRL's DPO trainer with a loss of the policy's own log-probabilities. For SimPO, CPO and ORPO.

TRL 1.16 has trainers of its own for these, `trl.experimental.cpo` and `.orpo`. They are from before its DPO trainer was
rewritten, and none of what makes two methods comparable here holds in them: the rendered conversation gets a second end of
turn, behind the line break that a template writes after the first; ORPO's likelihood counts the prompt; what is longer than
`max_length` is cut; on a 4-bit base the adapter is bf16 and norms and embeddings are made fp32; and the logits of a whole batch
are in memory at once. What is left of them is the loss, a few lines that each step says for itself (steps/train_simpo.py,
train_cpo.py, train_orpo.py). All else, from the tokens to the mask, is what DPO has, so that a comparison with DPO is one of
losses.

A mixture of experts trains without its auxiliary loss.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from trl import DPOTrainer

from workflow_scripts.models.chat import IGNORE
from workflow_scripts.training.groups import InGroups

# (log-probabilities of chosen and rejected, summed over the answer; their tokens), all (B,) -> loss of each pair, both rewards
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class PairsTrainer(InGroups, DPOTrainer):  # type: ignore[misc]
    """`loss` says what a pair costs. The mean over pairs is minimised, in whatever micro-batches they come."""

    def __init__(self, loss: Loss, **more: Any):
        super().__init__(**more)
        assert not self.precompute_ref_logps and self.ref_model is None  # no forward pass but the policy's
        self.loss_of_pairs = loss

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor], return_outputs: bool) -> Tensor:
        """In place of TRL's. A batch holds all chosen answers, then all rejected ones."""
        assert not return_outputs
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, IGNORE)
        taken = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
        output = model(**taken, labels=labels, fused_lm_head=True)
        mask = inputs["completion_mask"][:, 1:]
        tokens = mask.sum(1)
        (chosen, rejected), (n_chosen, n_rejected) = (output.log_probs * mask).float().sum(1).chunk(2), tokens.chunk(2)
        losses, better, worse = self.loss_of_pairs(chosen, rejected, n_chosen, n_rejected)

        mode = "train" if model.training else "eval"
        self._total_train_tokens += int(inputs["attention_mask"].sum()) if mode == "train" else 0
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        for name, values in {
            "rewards/chosen": better,
            "rewards/rejected": worse,
            "rewards/margins": better - worse,
            "rewards/accuracies": (better > worse).float(),
            "logps/chosen": chosen,
            "logps/rejected": rejected,
            "nll": -chosen / n_chosen,
            "entropy": (output.entropy * mask).sum(1) / tokens,
        }.items():
            self._metrics[mode][name].append(values.detach().mean().item())
        return losses.mean()

"""PPO with a value function on one backbone, as a subclass of TRL's GRPOTrainer (TRL has had no PPO trainer since 1.13).

The 4-bit backbone carries a LoRA adapter for each part: `default`, the policy; `value`, with the linear head `v_head` on the last
hidden state; and one, frozen, for each reward model, with its own head. The reference is the backbone with its adapters off.

TRL's: sampling, batching, log-probabilities, the clipped policy loss, logging. Ours, by the methods that are overridden:

- `_calculate_rewards` keeps the rewards; `_generate_and_score_completions` makes of them, of the log-probabilities and of the
  values what PPO trains on (`rl/advantages.py`);
- `_prepare_inputs` shuffles the rollout anew for each epoch (TRL shuffles once);
- `training_step` adds the value function's own forward and backward after the policy's. Never one backward for both: peft's
  `set_adapter` takes the gradient from the adapter that is not active, and activation checkpointing recomputes with the adapter
  that is active *then*, which gives wrong gradients without an error;
- `create_optimizer` and `_clip_grad_norm` keep the two apart: a learning rate of its own, and gradients clipped each by their own
  norm. (With one norm, the larger value gradient would shrink the policy's.)
- `_save` and `_load_from_checkpoint` carry the value's head and the KL coefficient.

One process only: with several, gradients of the adapter that is not active would not be reduced.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from trl import GRPOTrainer

from workflow_scripts.artifacts.manifests import Artifact
from workflow_scripts.models import lora
from workflow_scripts.rl import advantages as mathematics
from workflow_scripts.rl.rollouts import Rollouts

POLICY, VALUE = "default", "value"
HEAD_FILE, STATE_FILE = "v_head.safetensors", "ppo.json"
# What GRPO logs that is of groups, which PPO has none of, or has another name here.
NOT_OURS = ("frac_reward_zero_std", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/low_min", "clip_ratio/high_max")
RENAMED = {"clip_ratio/region_mean": "clip_fraction"}


def head(hidden: Tensor, layer: nn.Linear) -> Tensor:
    """One number for each hidden state, in fp32 whatever the backbone computes in: (..., H) -> (...)."""
    with torch.autocast(hidden.device.type, enabled=False):
        return layer(hidden.float()).squeeze(-1)


class RewardOnBackbone(nn.Module):
    """A reward model on the policy's backbone, with the call of a sequence classifier (`rl/reward_model.score`)."""

    def __init__(self, trainer: "PPOTrainer", adapter: str, weight: Tensor):
        super().__init__()
        self.score = nn.Linear(weight.shape[1], 1, bias=False, device=weight.device)
        self.score.weight = nn.Parameter(weight.float(), requires_grad=False)
        self.of = (trainer, adapter)  # in a tuple: not a part of this module

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """`logits`, (rows, 1): the score at each row's last token. Rows are padded on the right."""
        trainer, adapter = self.of
        with trainer.acting(adapter):
            hidden = trainer.hidden_states(input_ids, attention_mask)
        last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(dim=1) - 1]
        return SimpleNamespace(logits=head(last, self.score)[:, None])


class PPOTrainer(Rollouts, GRPOTrainer):
    """`ppo`: the block of that name in the config. The rest is GRPOTrainer's; `peft_config` is the value's shape as well."""

    args: Any
    model: Any

    def __init__(self, ppo: dict, **kwargs: Any):
        super().__init__(**kwargs)
        assert self.accelerator.num_processes == 1, "PPO trains in one process"
        self.ppo, self.kl_coef = ppo, float(ppo["kl_coef"])
        self.reward_models: dict[str, RewardOnBackbone] = {}
        self.scores: Tensor | None = None  # (answers,) of the rollout that is being made
        causal = self.model.get_base_model()
        width = causal.config.get_text_config().hidden_size
        self.v_head = nn.Linear(width, 1, device=self.model.device, dtype=torch.float32)
        nn.init.normal_(self.v_head.weight, std=(width + 1) ** -0.5)  # the start of a reward head in Huang et al. 2024
        nn.init.zeros_(self.v_head.bias)
        causal.v_head = self.v_head  # a part of the model, so that its gradients are cleared with all others
        self._add_adapter(VALUE)
        self.model.set_adapter(POLICY)
        self._set_requires_grad(POLICY)

    # -- adapters -----------------------------------------------------------------------------------------------------------

    def _add_adapter(self, name: str) -> None:
        block = self.model.peft_config[POLICY]
        targets = list(block.target_modules)
        self.model.add_adapter(
            name, LoraConfig(r=block.r, lora_alpha=block.lora_alpha, bias=block.bias, target_modules=targets, lora_dropout=0.0)
        )
        for parameter in self._adapter(name):
            parameter.data = parameter.data.float()

    def _adapter(self, name: str) -> list[nn.Parameter]:
        """The parameters of an adapter; of `value`, with its head."""
        found = [p for key, p in self.model.named_parameters() if "lora_" in key and f".{name}." in key]
        return found + ([*self.v_head.parameters()] if name == VALUE else [])

    def _set_requires_grad(self, name: str) -> None:
        """Only one adapter takes gradients at a time; those that another one has gathered stay for the optimiser."""
        for one in self.model.peft_config:
            for parameter in self._adapter(one):
                parameter.requires_grad_(one == name and name in (POLICY, VALUE))

    @contextmanager
    def acting(self, name: str) -> Iterator[None]:
        """Another adapter than the policy's at work."""
        self.model.set_adapter(name)
        self._set_requires_grad(name)
        try:
            yield
        finally:
            self.model.set_adapter(POLICY)
            self._set_requires_grad(POLICY)

    def add_reward_model(self, name: str, adapter: Artifact) -> None:
        """Put a trained reward model's adapter on the backbone, frozen. It must have been trained on the same backbone."""
        weights = load_file(adapter.file("adapter_model.safetensors"))
        score = weights.pop(f"base_model.model.{lora.HEAD}.weight")
        self._add_adapter(f"reward_{name}")
        left: Any = set_peft_model_state_dict(self.model, weights, adapter_name=f"reward_{name}")
        assert not left.unexpected_keys, f"{adapter.folder}: {left.unexpected_keys[:3]} fit no layer of the backbone"
        self.model.set_adapter(POLICY)
        self._set_requires_grad(POLICY)
        self.reward_models[name] = RewardOnBackbone(self, f"reward_{name}", score.to(self.model.device))

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(rows, tokens, H): the last hidden states of the backbone under the adapter that is at work."""
        causal = self.model.get_base_model()
        decoder = getattr(causal, causal.base_model_prefix)
        with self.compute_loss_context_manager():
            return decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state

    def values(self, batch: dict[str, Tensor]) -> Tensor:
        """(answers, tokens): V(s_t) at each token of the answers, from the hidden state before it. Under `acting(VALUE)`."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        answer = batch["completion_ids"].shape[1]
        return head(self.hidden_states(ids, mask)[:, -answer - 1 : -1], self.v_head)

    # -- rollouts -----------------------------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.scores = (rewards * self.reward_weights.to(rewards.device)).sum(dim=1)
        return rewards

    @property
    def rollouts_before(self) -> int:
        """Rollouts that have been trained on, since the run began and not since it was resumed."""
        micro_steps = self.state.global_step * self.args.gradient_accumulation_steps
        return micro_steps // (self.args.steps_per_generation * self.num_iterations)

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self._add_targets(batch)
        return batch

    @torch.no_grad()
    def _add_targets(self, batch: dict[str, Tensor]) -> None:
        """Log-probabilities, values, advantages and returns of a new rollout; all (answers, tokens)."""
        ppo, mask, size = self.ppo, batch["completion_mask"].float(), self.args.per_device_train_batch_size
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        answer = mask.shape[1]
        logps = batch.get("old_per_token_logps")
        if logps is None:
            logps = self._get_per_token_logps_and_entropies(self.model, ids, attention, answer, size)[0]
        with self.model.disable_adapter():
            reference = self._get_per_token_logps_and_entropies(self.model, ids, attention, answer, size)[0]
        rows = [{key: batch[key][i : i + size] for key in BATCH} for i in range(0, len(ids), size)]
        with self.acting(VALUE):
            values = torch.cat([self.values(row) for row in rows])

        assert self.scores is not None
        ended = torch.isin(batch["completion_ids"], torch.tensor(self.eos_token_ids, device=ids.device)) & mask.bool()
        missing = ~ended.any(dim=1)
        scores = self.scores - ppo["missing_eos_penalty"] * missing
        rewards = mathematics.token_rewards(scores, logps, reference, mask, self.kl_coef)
        if ppo["whiten_rewards"]:
            rewards = mathematics.whiten(rewards, mask, shift_mean=False)
        raw, returns = mathematics.gae(rewards, values, mask, ppo["gamma"], ppo["lam"])
        whitened = mathematics.whiten(raw, mask)
        if self.rollouts_before < ppo["value_warmup"]:
            whitened = torch.zeros_like(whitened)  # the policy waits until the values mean something
        batch |= {"old_per_token_logps": logps, "old_values": values, "returns": returns, "advantages": whitened}

        kl = ((logps - reference) * mask).sum(dim=1).mean().item()
        self._note(
            kl=kl,
            kl_coef=self.kl_coef,
            score=scores.mean().item(),
            missing_eos=missing.float().mean().item(),
            explained_variance=mathematics.explained_variance(values, returns, mask),
        )
        if ppo["kl_target"] is not None:
            self.kl_coef = mathematics.adapted_kl_coef(self.kl_coef, kl, ppo["kl_target"])

    def _prepare_inputs(self, generation_batch):
        steps = self.args.steps_per_generation
        new_epoch = self._step % steps == 0 and self._step % (steps * self.num_iterations) != 0
        if self.model.training and new_epoch and self._buffered_inputs is not None:
            self._buffered_inputs = reshuffled(self._buffered_inputs)
        return super()._prepare_inputs(generation_batch)

    # -- updates ------------------------------------------------------------------------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        place = self._step % self.args.steps_per_generation
        loss = super().training_step(model, inputs, num_items_in_batch)
        batch = self._buffered_inputs[place]
        with self.acting(VALUE):
            mask = batch["completion_mask"].float()
            value_loss, clipped = mathematics.value_loss(
                self.values(batch), batch["old_values"], batch["returns"], mask, self.ppo["value_clip"]
            )
            self.accelerator.backward(value_loss / self.current_gradient_accumulation_steps)
        self._note(value_loss=value_loss.item(), value_clip_fraction=clipped.item())
        return loss

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rate, decay = settings.pop("lr"), self.args.weight_decay
            groups = [
                {"params": self._adapter(POLICY), "lr": rate, "weight_decay": decay},
                {"params": self._adapter(VALUE), "lr": self.ppo["value_learning_rate"], "weight_decay": decay},
            ]
            self.optimizer = kind(groups, **settings)
        return self.optimizer

    def _clip_grad_norm(self, model):
        norm = self.accelerator.clip_grad_norm_(self._adapter(POLICY), self.args.max_grad_norm)  # unscales all gradients
        value_norm = nn.utils.clip_grad_norm_(self._adapter(VALUE), self.args.max_grad_norm)
        self._note(value_grad_norm=value_norm.item())
        return norm

    def _note(self, **metrics: float) -> None:
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for noted in self._metrics.values():
            for name in NOT_OURS:
                noted.pop(name, None)
            for name, ours in RENAMED.items():
                if name in noted:
                    noted[ours] = noted.pop(name)
        super().log(logs, start_time)

    # -- checkpoints --------------------------------------------------------------------------------------------------------

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)  # all adapters
        folder = Path(output_dir or self.args.output_dir)
        save_file({key: weight.cpu() for key, weight in self.v_head.state_dict().items()}, folder / HEAD_FILE)
        (folder / STATE_FILE).write_text(json.dumps({"kl_coef": self.kl_coef}))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        folder = Path(resume_from_checkpoint)
        self.v_head.load_state_dict(load_file(folder / HEAD_FILE))
        self.kl_coef = json.loads((folder / STATE_FILE).read_text())["kl_coef"]
        self.model.set_adapter(POLICY)
        self._set_requires_grad(POLICY)


BATCH = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


def reshuffled(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers of a rollout in a new order, in mini-batches of the same sizes. What is not of answers stays."""
    sizes = [len(batch["completion_ids"]) for batch in batches]
    order = torch.randperm(sum(sizes)).split(sizes)
    whole = {
        key: torch.cat([batch[key] for batch in batches])
        for key, value in batches[0].items()
        if torch.is_tensor(value) and value.dim() > 0
    }
    return [batch | {key: value[rows] for key, value in whole.items()} for batch, rows in zip(batches, order, strict=True)]

"""Rollouts of TRL's trainers by the generator in generation/: the policy's answers, drawn as TRL would draw them, by the way that
evaluations are answered.

The generator's weights are the policy's: the base that the training computes with (a 4-bit one dequantised, once, into the
numbers that its own forward pass multiplies with; another is shared), and a copy of the adapter, taken anew for each rollout,
in the precision in which autocast computes with it. Each answer has a random stream of its own, from a seed that each rollout
takes from torch's generator; so a resumed training draws what it would have drawn.

Log-probabilities are the trainer's own, as TRL computes them. How far the sampler's are from them is measured on the first
micro-batch of each rollout, or LOOKED_AT answers of it, and logged: `sampler/gap`, the mean of
|log pi_trainer - log pi_sampler| over tokens, `sampler/gap_max`, and `sampler/off_policy`, the share of tokens whose ratio of
the two is outside 0.9 to 1.1.
"""

from typing import Any

import torch
from trl import GRPOTrainer, RLOOTrainer

from workflow_scripts.generation import generator
from workflow_scripts.generation.answers import Answer, Asked, rows_for
from workflow_scripts.generation.graphs import Graphs
from workflow_scripts.plumbing import ranks
from workflow_scripts.training import exchange

LOOKED_AT = 8  # answers, where it takes a forward pass for that alone, as in GRPO
GAPS = ("sampler/gap", "sampler/gap_max", "sampler/off_policy")


class Rollouts:
    """Beside a trainer of TRL that samples (below, and rl/ppo_trainer.py). Until `sample_by`, TRL samples itself."""

    engine: Graphs | None = None
    scoring = False  # while a rollout is made, which all ranks do together
    sampled: list[list[float]] | None = None  # the sampler's log-probabilities of the latest rollout

    def sample_by(self: Any, backend: str, slots: int, longest: int) -> None:
        """slots: answers at once, at most; longest: tokens of the longest prompt."""
        model = self.model.get_base_model()
        if backend == "hf":
            return
        if reason := generator.hinders(model):
            print(f"plain `generate` samples, in place of `graphs`: {reason}", flush=True)
            return
        at_once = max(self.args.generation_batch_size, self.args.per_device_eval_batch_size)
        length = longest + self.args.max_completion_length
        self.engine = Graphs(model, min(slots, at_once), length, rows=rows_for(self.args.generation_batch_size))

    def _generate_single_turn(self: Any, prompt_ids: list[list[int]], *others: Any) -> Any:
        if self.engine is None:  # ranks draw from one stream, and what the first drew counts
            return exchange.of_first(super()._generate_single_turn(prompt_ids, *others), "answers")  # type: ignore[misc]
        args = self.args
        asked = Asked(
            tuple(self.eos_token_ids), args.max_completion_length, args.temperature, args.top_k, args.top_p,
            int(torch.randint(2**62, ())), logprobs=True,
        )  # fmt: skip
        answers: dict[int, Answer] = {}
        self.engine.load()
        with torch.autocast(self.accelerator.device.type, enabled=False):
            share = [*enumerate(prompt_ids)][
                ranks.number :: ranks.count
            ]  # a rank's answers are those that one process would draw
            self.engine.answer(share, asked, lambda place, _, made: answers.__setitem__(place, made))
        for others_answers in exchange.gathered(answers, "answers"):
            answers |= others_answers
        made = [answers[place] for place in range(len(prompt_ids))]
        self.sampled = [one.logprobs or [] for one in made]
        tokens = [one.tokens for one in made]
        return tokens if isinstance(self, RLOOTrainer) else (tokens, None)  # GRPO takes log-probabilities, too: its own way

    def _calculate_rewards(self: Any, *given: Any) -> Any:
        """The first rank's, which all have: a function of somebody's own may draw, or count how often it is called."""
        if ranks.count == 1:
            return super()._calculate_rewards(*given)  # type: ignore[misc]
        found = super()._calculate_rewards(*given).cpu() if ranks.first() else None  # type: ignore[misc]
        noted = self._pending_metrics, self._pending_extra_logs
        found, (metrics, logs) = exchange.of_first((found, noted), "rewards")
        self._pending_metrics, self._pending_extra_logs = metrics, logs
        return found.to(self.accelerator.device)

    def _get_per_token_logps_and_entropies(
        self: Any, model: Any, ids: Any, mask: Any, keep: int, *more: Any, **named: Any
    ) -> Any:
        """Of a whole rollout, by shares of its rows; of a micro-batch, which is one rank's, by that rank."""
        if ranks.count == 1 or not self.scoring:
            return super()._get_per_token_logps_and_entropies(model, ids, mask, keep, *more, **named)  # type: ignore[misc]
        share = slice(ranks.number, None, ranks.count)
        part = None
        if len(ids[share]):
            part = super()._get_per_token_logps_and_entropies(model, ids[share], mask[share], keep, *more, **named)  # type: ignore[misc]
        found = exchange.gathered(
            None if part is None else [one if one is None else one.cpu() for one in part], "log-probabilities"
        )
        logps = torch.empty(len(ids), keep, dtype=found[0][0].dtype)
        for rank, one in enumerate(found):
            if one is not None:
                logps[rank :: ranks.count] = one[0]
        return logps.to(ids.device), None, None

    def _generate_and_score_completions(self: Any, inputs: Any) -> Any:
        self.scoring = True
        try:
            batch = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        finally:
            self.scoring = False
        if self.model.training and self.sampled is not None:
            self._measure_gap(batch)
        return batch

    @torch.no_grad()
    def _measure_gap(self: Any, batch: dict) -> None:
        there, size = batch.get("old_per_token_logps"), self.args.per_device_train_batch_size
        rows = slice(min(LOOKED_AT, size) if there is None else size)
        ids, mask = ([batch[f"{part}_{kind}"][rows] for part in ("prompt", "completion")] for kind in ("ids", "mask"))
        if there is None:
            whole = torch.cat(ids, 1), torch.cat(mask, 1), ids[1].shape[1]
            with self.compute_loss_context_manager():
                there = self._get_per_token_logps_and_entropies(self.model, *whole)[0]
        trainer = there[rows]
        ours = torch.zeros_like(trainer)
        for row, likely in zip(ours, self.sampled, strict=False):
            row[: len(likely)] = torch.tensor(likely)
        gap = (trainer - ours)[mask[1].bool()]
        values = gap.abs().mean(), gap.abs().max(), ((gap.exp() - 1).abs() > 0.1).float().mean()
        for name, value in zip(GAPS, values, strict=True):
            self._metrics["train"][name].append(value.item())


class GRPO(Rollouts, GRPOTrainer):
    """TRL's, whose answers the generator draws."""


class RLOO(Rollouts, RLOOTrainer):
    """TRL's, whose answers the generator draws."""

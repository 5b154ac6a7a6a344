"""One training by several processes (plumbing/ranks.py): the micro-batches of an optimiser step are shared out, and nothing else.

Each rank runs TRL's own loop with the same seed: it draws the same rows in the same order, counts the same items of the whole
effective batch (so the loss is normalised as by one process), and steps its own optimiser. Of a step's micro-batches it computes
those whose place is its rank, modulo their number. Before the gradient is clipped the ranks sum it, in one exchange, with the
loss; another one carries what TRL noted of each micro-batch, and puts it in the order in which one process would have noted it.
So log lines, checkpoints and the adapter are what one process makes, up to the order of sums. The state is the same on each
rank: a checkpoint of two ranks is one of one, or of four.

Why not DDP: it averages gradients of ranks that each hold an equal batch of their own, with samplers that repeat rows to make
the last one even. Here the effective batch, its rows and its normaliser are those of the config whatever the number of cards;
adapters are small, so that one exchange at the end of a step costs as little as DDP's overlapped ones.

Dropout has a random stream of its own for each micro-batch, from the seed, the step and the place: masks differ from one
process's, and are the same for two ranks and for four.

Methods that sample: a rollout's answers are drawn by all ranks, a share each (rl/rollouts.py), and gathered in order; rewards are
the first rank's; then every rank has the whole rollout, computes its advantages from whole groups, and takes its micro-batches.
"""

import hashlib
from typing import Any

import torch

from workflow_scripts.artifacts.manifests import Job
from workflow_scripts.plumbing import ranks
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.training import exchange

APART = 1e-3  # of the largest weight: far above rounding, far below what a step moves where an exchange is missing
TOKENS = "num_tokens"  # TRL's running total: no entry for each micro-batch


def settle(trainer: Any, job: Job) -> None:
    """Make a built trainer one of several. Alone, it stays as it is."""
    if ranks.count == 1:
        return
    if job.config["method"] == "ppo":
        raise InputError(
            f"--gpus {ranks.count}: ppo trains on one GPU: its two backward passes would need exchanges of their own"
        )
    if job.shard and not ranks.in_step:
        raise InputError(f"--shard: {job.config['method']} draws answers with the weights of the whole base; leave it away")
    steps = trainer.args.gradient_accumulation_steps
    if steps % ranks.count:
        raise InputError(
            f"gpus: {ranks.count} ranks share {steps} micro-batches of a step (gradient_accumulation_steps) unevenly"
        )
    trainer.training_step = Shared(trainer).training_step
    if not ranks.first():  # it has what the first writes
        trainer._save_checkpoint = lambda model, trial: None


class Shared:
    """Stands in for a trainer's `training_step`."""

    def __init__(self, trainer: Any):
        self.trainer, self.inner = trainer, trainer.training_step
        self.samples = hasattr(trainer, "_buffered_inputs")
        self.parameters = [one for one in trainer.model.parameters() if one.requires_grad]
        self.place = 0  # of the micro-batch in its step
        self.noted: dict[int, dict[str, list]] = {}  # place -> TRL's figure -> what it noted of that micro-batch
        self.tokens, self.loss = 0, torch.zeros((), device=trainer.args.device)

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The micro-batch's loss, as transformers adds them up: that of all of the step with its last one, none before."""
        trainer, mine = self.trainer, self.place % ranks.count == ranks.number
        figures, tokens = trainer._metrics["train"], trainer._total_train_tokens
        before = {name: len(values) for name, values in figures.items()}
        # An epoch may end within a step: of its last round some ranks have none, and passes that all make together need them.
        along = ranks.in_step and trainer.accelerator.gradient_state.sync_gradients and self.place % ranks.count < ranks.number
        if mine:
            loss = self._computed(model, inputs, num_items_in_batch)
        else:
            loss = (self._gone_along if along else self._passed_over)(model, inputs)
        new = {name: values[before.get(name, 0) :] for name, values in figures.items() if name != TOKENS}
        for name, values in new.items():
            del figures[name][len(figures[name]) - len(values) :]
            if not figures[name]:
                del figures[name]
        if mine:
            self.noted[self.place] = {name: values for name, values in new.items() if values}
            if not self.samples:  # those of a rollout are counted by all ranks
                self.tokens += trainer._total_train_tokens - tokens
            self.loss += loss.float()
        if not self.samples:
            trainer._total_train_tokens = tokens
        self.place += 1
        if not trainer.accelerator.gradient_state.sync_gradients:
            return torch.zeros_like(loss)
        return self._together(loss)

    def _computed(self, model: Any, inputs: Any, items: Any) -> torch.Tensor:
        if self.samples:  # its rollouts draw from the one stream that all ranks share, and no dropout acts
            return self.inner(model, inputs, items)
        args, cards = self.trainer.args, [torch.cuda.current_device()] if torch.cuda.is_available() else []
        words = f"{args.seed}/{self.trainer.state.global_step}/{self.place}".encode()
        with torch.random.fork_rng(devices=cards):
            torch.manual_seed(int.from_bytes(hashlib.blake2b(words, digest_size=7).digest(), "big"))
            return self.inner(model, inputs, items)

    def _gone_along(self, model: Any, inputs: Any) -> torch.Tensor:
        """Another rank's micro-batch, computed too, of which nothing stays."""
        kept = [None if one.grad is None else one.grad.clone() for one in self.parameters]
        loss = self._computed(model, inputs, None)
        for parameter, grad in zip(self.parameters, kept, strict=True):
            parameter.grad = grad
        return torch.zeros_like(loss)

    def _passed_over(self, model: Any, inputs: Any) -> torch.Tensor:
        """Another rank's micro-batch. What all ranks do together at its place, a rollout, is done."""
        if self.samples:
            model.train()
            self.trainer._prepare_inputs(inputs)
            self.trainer._step += 1
        return torch.zeros((), device=self.trainer.args.device)

    def _together(self, loss: torch.Tensor) -> torch.Tensor:
        """The end of a step: gradients, loss and figures of all ranks, on each."""
        trainer = self.trainer
        step = f"step {trainer.state.global_step + 1}"
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        flat = torch.cat([*(part.reshape(-1).float() for part in parts), self.loss.reshape(1)])
        exchange.summed(flat, f"gradients of {step}")
        at = 0
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part
            part.copy_(flat[at : at + part.numel()].view_as(part))
            at += part.numel()
        watch = getattr(trainer, "checkpoints", None)
        found = exchange.gathered((self.noted, self.tokens, watch and watch.wishes()), f"figures of {step}")
        figures = trainer._metrics["train"]
        for place in range(self.place):
            for name, values in found[place % ranks.count][0].get(place, {}).items():
                figures[name].extend(values)
        if not self.samples:
            trainer._total_train_tokens += sum(tokens for _, tokens, _ in found)
            figures[TOKENS] = [trainer._total_train_tokens]
        if watch:
            watch.heard = [wish for *_, wish in found]
        self.place, self.noted, self.tokens, self.loss = 0, {}, 0, torch.zeros_like(self.loss)
        return flat[-1].to(loss.dtype).reshape(loss.shape)


def check_equal(trainer: Any) -> None:
    """AssertionError unless the ranks have trained the same weights: bit for bit on cards of one kind, else up to rounding."""
    if ranks.count == 1:
        return
    mine = torch.cat([one.detach().reshape(-1).float().cpu() for one in trainer.model.parameters() if one.requires_grad])
    firsts = exchange.of_first(mine, "the weights")
    found = exchange.gathered(((mine - firsts).abs().max() / firsts.abs().max()).item(), "how far they are apart")
    apart = [f"rank {rank} by {far:.2g}" for rank, far in enumerate(found) if not far < APART]
    assert not apart, f"the adapters of the ranks have moved apart, from rank 0 {', '.join(apart)} of its largest weight"

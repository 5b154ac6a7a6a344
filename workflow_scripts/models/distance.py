"""How far an adapter takes its model from where it started, and whether what is evaluated is what was trained.

An update can be lost on the way to an evaluation: W lies on the grid of bf16, so W + dW rounded to bf16 is W again wherever dW
is below half a step (docs/methods.md has figures). So each training writes into its manifest what its adapter does to a few fixed
held-out rows, and each evaluation measures the same through its own path, before it answers, and stops where they disagree.

    kl        KL(trained || start) of the next token, nats, mean over all places of the rows
    changed   share of places at which the most likely next token is another one
    noise     of `kl`, what comes of rounding: a number of activations, in proportion to the update, fall to the other side of
              a step. An effect grows by the square: so the two are told apart by the KL of a tenth of the update
    norm      Frobenius norm of dW = (alpha/r) B A over all layers, by module
    kept      <dW as loaded, dW> / <dW, dW>, over all modules: 1 where nothing was rounded away
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch

from workflow_scripts.artifacts.manifests import Artifact
from workflow_scripts.data import slicing
from workflow_scripts.plumbing.messages import InputError

ROWS, TOKENS = 4, 128  # what is looked at: enough for a KL, and seconds on a CPU
WEAK = 0.1
KEPT = 0.99  # of dW, at least, must be in the model that is evaluated
AGREES = 0.5  # of the trained KL, at least, an evaluation must find on the base and in the precision of the training


def fixed_rows(tokenizer: Any, rows: Artifact) -> list[list[int]]:
    """Token ids of the first held-out rows, answers included where the slice has any, each cut to its first TOKENS."""
    found = []
    for row in rows.rows(heldout=True)[:ROWS]:
        talk = next(iter(slicing.conversations(row)), None)
        turns = talk or slicing.prompt_turns(row)
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=talk is None)["input_ids"]
        found.append(ids[:TOKENS])
    return found


@contextmanager
def scaled(model: Any, factor: float) -> Iterator[None]:
    """The adapters of `model` at a multiple of their strength."""
    from peft.tuners.lora import LoraLayer  # here, since a model without an adapter needs no peft

    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    for layer, scaling in zip(layers, before, strict=True):
        layer.scaling.update({name: factor * value for name, value in scaling.items()})
    try:
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


class Path(Protocol):
    """The way by which a model with an adapter is asked."""

    def logits(self, ids: list[int], strength: float) -> torch.Tensor:
        """(tokens, vocabulary) in fp32, the adapter at a multiple of its strength."""

    def updates(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, float]]:
        """(name of the module in peft's files, A, B, alpha/r) of each layer of the adapter; A and B in fp32."""


class Peft:
    """peft's own forward pass, with the adapter `default`."""

    def __init__(self, model: Any):
        self.model = model

    def logits(self, ids: list[int], strength: float = 1.0) -> torch.Tensor:
        batch = {"input_ids": torch.tensor([ids], device=next(self.model.parameters()).device), "use_cache": False}
        how = scaled(self.model, strength) if strength else self.model.disable_adapter()
        with torch.no_grad(), how:
            return self.model(**batch).logits[0].float()

    def updates(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, float]]:
        from peft.tuners.lora import LoraLayer

        for name, module in self.model.named_modules():
            if isinstance(module, LoraLayer) and "default" in module.lora_A:
                pair = (getattr(module, side)["default"].weight.detach().float() for side in ("lora_A", "lora_B"))
                yield name, *pair, module.scaling["default"]


def longest(adapter: Artifact | None) -> int:
    """Tokens of the longest row that `check` asks the path for: a generator needs room for it, however short its answers are."""
    rows = (adapter.data.get("distance") or {}).get("tokens") if adapter is not None else None
    return max(map(len, rows), default=0) if rows else 0


def measure(path: Path, rows: list[list[int]]) -> dict[str, float]:
    """`kl`, `changed` and `noise` on rows of token ids, in the precision in which the model computes on this path."""
    sums = dict.fromkeys(("kl", "changed", "noise"), 0.0)
    for ids in rows:
        trained, start, weak = (path.logits(ids, strength).log_softmax(-1) for strength in (1.0, 0.0, WEAK))
        sums["kl"] += (trained.exp() * (trained - start)).sum().item()
        sums["noise"] += (weak.exp() * (weak - start)).sum().item()
        sums["changed"] += (trained.argmax(-1) != start.argmax(-1)).sum().item()
    places = sum(map(len, rows))
    found = {name: value / places for name, value in sums.items()}
    # kl = effect + noise, and that of the weak adapter = w^2 effect + w noise
    found["noise"] = (found["noise"] - WEAK**2 * found["kl"]) / (WEAK - WEAK**2)
    return {name: max(0.0, float(f"{value:.4g}")) for name, value in found.items()}


def inner(a1: torch.Tensor, b1: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor) -> float:
    """<B1 A1, B2 A2> without either product: tr((B1' B2)(A2 A1'))."""
    return ((b1.T @ b2).double() * (a1 @ a2.T).double()).sum().item()


def norms(model: Any) -> dict[str, float]:
    squares: dict[str, float] = {}
    for name, a, b, scale in Peft(model).updates():
        kind = name.rpartition(".")[2]
        squares[kind] = squares.get(kind, 0.0) + scale**2 * inner(a, b, a, b)
    return {kind: float(f"{value**0.5:.4g}") for kind, value in sorted(squares.items())}


def of_training(model: Any, tokenizer: Any, rows: Artifact) -> dict[str, Any]:
    """For an adapter's manifest, through the path on which it was trained; of a reward model, which writes no tokens, `norm`."""
    facts: dict[str, Any] = {"norm": norms(model)}
    if "SequenceClassification" in type(model.get_base_model()).__name__:
        return facts
    ids = fixed_rows(tokenizer, rows)
    training = model.training
    model.eval()
    facts |= measure(Peft(model), ids) | {"tokens": ids}
    model.train(training)
    return facts


def kept(path: Path, adapter: Artifact) -> float:
    """Of the adapter in the file, the share that is on the path, by projection."""
    from safetensors.torch import load_file

    file = load_file(adapter.file("adapter_model.safetensors"))
    there = wanted = 0.0
    for name, a, b, scale in path.updates():
        own_a, own_b = (file[f"{name}.lora_{side}.weight"].float().to(a.device) for side in "AB")
        there += scale**2 * inner(a, b, own_a, own_b)
        wanted += scale**2 * inner(own_a, own_b, own_a, own_b)
    return there / wanted if wanted else 1.0


def survives(model: Any, dtype: torch.dtype) -> dict[str, float]:
    """Of a peft model in fp32 that is to be merged and cast to `dtype`: `kept`, as above, and `unchanged`, the share of weights
    that the merge would leave as they are."""
    there = wanted = 0.0
    same = count = 0
    modules = dict(model.named_modules())
    for name, a, b, scale in Peft(model).updates():
        w, d = modules[name].base_layer.weight.detach(), scale * (b @ a)
        m = (w + d).to(dtype).float() - w
        there, wanted = there + (m.double() * d).sum().item(), wanted + (d.double() ** 2).sum().item()
        same, count = same + int((m == 0).sum()), count + m.numel()
    return {"kept": float(f"{there / wanted if wanted else 1.0:.5g}"), "unchanged": float(f"{same / count:.5g}")}


def check(path: Path, adapter: Artifact, alike: bool) -> dict[str, float]:
    """The same measures through an evaluation's path. InputError where the update that was trained is not there.

    alike: whether the base is quantised as it was in training, and computes in the same precision. Only then are the two KLs
    one: on another base the same adapter was 0.4 to 1.6 times as far from its start (docs/smollm2.md).
    """
    trained = adapter.data.get("distance")
    if trained is None or "kl" not in trained:
        raise InputError(f"{adapter.path}: does not say what the adapter does; delete it and run snakemake again")
    found = {"kept": float(f"{kept(path, adapter):.6g}")} | measure(path, trained["tokens"])
    signal, seen = (max(0.0, one["kl"] - one["noise"]) for one in (trained, found))
    told_apart = signal > 3 * trained["noise"] and signal > 3 * found["noise"]
    if found["kept"] < KEPT or alike and told_apart and seen < AGREES * signal:
        raise InputError(
            f"{adapter.folder}: what is evaluated is not what was trained: {found['kept']:.1%} of the update is in the model (at "
            f"least {KEPT:.0%} is expected), and it is {found['kl']:.3g} nats a token from its start, {trained['kl']:.3g} when "
            "it was trained"
        )
    return found

"""The constant LoRA block on a model, and what "constant" needs beyond the block.

The libraries treat methods differently when left alone: TRL casts adapters to bf16 on a quantised base, which at small
learning rates loses most updates (docs/methods.md); its DPO, KTO and reward trainers switch dropout off; transformers'
default optimiser is not paged. Here adapters are fp32, dropout acts and the optimiser is declared, for every method alike,
and each is asserted on the built trainer (`check_trainer`).
"""

from typing import Any

import torch

from workflow_scripts.artifacts.manifests import Artifact
from workflow_scripts.plumbing.messages import InputError

HEAD = "score"  # of a reward model: hidden size -> 1, trained in fp32 and saved with the adapter


def adapter_config(block: dict, model: Any, reward: bool = False) -> Any:
    """The constant block as a peft LoraConfig, with the head beside it for a `reward` model.

    InputError, with the model's linear layers, if a target module is missing.
    """
    from peft import LoraConfig

    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if "Linear" in type(module).__name__}
    if missing := sorted(set(block["target_modules"]) - linear):
        raise InputError(
            f"lora.target_modules: the model has no layers named {', '.join(missing)}; its linear layers are "
            f"{', '.join(sorted(linear - {'lm_head'}))}. Set the global `lora:` block for this model"
        )
    return LoraConfig(
        r=block["r"], lora_alpha=block["alpha"], lora_dropout=block["dropout"], bias=block["bias"],
        target_modules=list(block["target_modules"]), task_type="SEQ_CLS" if reward else "CAUSAL_LM",
        modules_to_save=[HEAD] if reward else None,
    )  # fmt: skip


def settle(trainer: Any, seed: int) -> None:
    """Make the trainer's adapter fp32 with the same start for every method, whatever the trainer did to it.

    TRL rounds the adapter to bf16 on a 4-bit base. It is cast back, and drawn again from `seed`, so that a 4-bit and a
    full-precision run of one seed start from the same adapter.
    """
    from peft.tuners.lora import LoraLayer
    from transformers import set_seed

    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    set_seed(seed)
    for module in trainer.model.modules():
        if isinstance(module, LoraLayer):
            module.reset_lora_parameters("default", init_lora_weights=True)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and f".{HEAD}." in name:
            parameter.data.normal_(std=trainer.model.config.initializer_range)
    set_seed(seed)


def check_trainer(trainer: Any, block: dict, optim: str, dropout: bool = True) -> dict:
    """Assert what "constant" means on the built trainer, and return it for the manifest.

    dropout: whether the block's dropout acts in this method. Raises AssertionError, naming what differs.
    """
    import torch.nn as nn

    trainable = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trainable, "nothing is trainable"
    stray = [name for name in trainable if "lora_" not in name and f".{HEAD}." not in name]
    assert not stray, f"trainable outside the LoRA block: {stray[:3]}"
    heads = [name for name, _ in trainer.model.named_parameters() if f".{HEAD}.modules_to_save." in name]
    assert set(heads) <= set(trainable), f"the head of the reward model is frozen: {heads}"
    wrong = [name for name, p in trainable.items() if p.dtype != torch.float32]
    assert not wrong, f"adapter weights that are not fp32: {wrong[:3]}"
    rates = {m.p for name, m in trainer.model.named_modules() if isinstance(m, nn.Dropout) and "lora_dropout" in name}
    wanted = block["dropout"] if dropout else 0.0
    assert rates == {wanted} or not (rates or wanted), f"LoRA dropout {sorted(rates)}, expected {wanted} everywhere"
    optimizer = trainer.create_optimizer()
    names = {"adamw_torch": ("AdamW",), "paged_adamw_32bit": ("AdamW", "PagedAdamW")}[optim]
    assert type(optimizer).__name__ in names, f"optimiser {type(optimizer).__name__}, expected {optim}"
    if optim.startswith("paged"):
        assert optimizer.is_paged, "the optimiser is not paged"
    bits = getattr(getattr(optimizer, "args", None), "optim_bits", 32)
    assert bits == 32, f"optimiser state of {bits} bits"
    return {
        "trainable_parameters": sum(p.numel() for p in trainable.values()),
        "adapter_dtype": "fp32",
        "lora_dropout": sorted(rates),
        "optimizer": type(optimizer).__name__,
    }


def check_optimizer_state(trainer: Any) -> None:
    """Assert after training that the optimiser's moments are fp32."""
    state = trainer.optimizer.state
    wrong = {
        str(v.dtype)
        for s in state.values()
        for k, v in s.items()
        if torch.is_tensor(v) and v.numel() > 1 and v.dtype != torch.float32
    }
    assert not wrong, f"optimiser state in {wrong}, expected fp32"


def attach(model: Any, start: Artifact, adapter: Artifact) -> Any:
    """A peft model of `model`, loaded from `start`, with a trained adapter. InputError if it was trained on another base."""
    from peft import PeftModel

    trained_on = adapter.data["base"]
    if trained_on["weights_sha256"] != start.weights_sha256:
        raise InputError(
            f"{adapter.folder}: trained on {trained_on['path']} (sha256 {trained_on['weights_sha256'][:12]}), not on "
            f"{start.folder} (sha256 {start.weights_sha256[:12]}); an adapter means nothing on another base"
        )
    for name in ("adapter_model.safetensors", "adapter_config.json"):  # the config holds the scale alpha/r
        adapter.file(name)
    return PeftModel.from_pretrained(model, adapter.folder)


def adapter_names(adapter: Artifact) -> set[str]:
    """Names of the tensors in an adapter's file."""
    from safetensors import safe_open

    with safe_open(adapter.file("adapter_model.safetensors"), framework="pt") as file:
        return set(file.keys())

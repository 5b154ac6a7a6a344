"""Loading, the constant LoRA block, and what "constant" needs beyond the block.

The libraries treat methods differently when left alone: TRL casts adapters to bf16 on a quantised base, which at small
learning rates loses most updates (docs/methods.md); its DPO, KTO and reward trainers switch dropout off; transformers'
default optimiser is not paged. Here adapters are fp32, dropout acts and the optimiser is declared, for every method alike,
and each is asserted on the built trainer (`check_trainer`).
"""

from pathlib import Path
from typing import Any

import torch

from workflow_scripts.artifacts.manifests import WEIGHTS, Artifact
from workflow_scripts.models.chat import tokenizer_of
from workflow_scripts.models.device import DTYPES
from workflow_scripts.plumbing.messages import InputError

HEAD = "score"  # of a reward model: hidden size -> 1, trained in fp32 and saved with the adapter


def load(start: Artifact, work: Path, device: str, dtype: str, quant: dict | None = None, reward: bool = False) -> Any:
    """The causal LM of a base or merged artifact, in `dtype`, or in 4-bit NF4 if `quant` is given (computing in `dtype`).

    `reward`: the same backbone with a head `score` of one number (not in 4-bit) instead of the LM head.
    A merge whose weights were deleted is rebuilt first. The weights are checked against the manifest.
    """
    import logging

    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    if start.data["kind"] == "merged":
        ensure_merged(start, work)
    start.file(WEIGHTS)
    options: dict[str, Any] = {
        "dtype": DTYPES[dtype],
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": True,
    }
    if quant is not None:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant["type"],
            bnb_4bit_use_double_quant=quant["double"],
            bnb_4bit_compute_dtype=DTYPES[dtype],
        )
        options["device_map"] = {"": device}
    if reward:
        options["num_labels"] = 1
        logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)  # "newly initialized: score", as it should be
    auto = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    model: Any = auto.from_pretrained(start.folder, **options)
    if reward:
        model.config.get_text_config().pad_token_id = tokenizer_of(start).pad_token_id  # the reward is read before the padding
        getattr(model, HEAD).float()  # trained in fp32: an adapter's head is loaded into a copy of this one
    if quant is None:
        model = model.to(device)
    else:
        keep_trainable_on_cpu(model)
    return model


def keep_trainable_on_cpu(model: Any) -> None:
    """Switch off bitsandbytes' AVX512-BF16 path: there an evaluation forward repacks the weights, and later training steps
    get wrong gradients without an error (bitsandbytes 0.50)."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def lora(block: dict, model: Any, reward: bool = False) -> Any:
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


def settle_adapter(trainer: Any, seed: int) -> None:
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


def merge(start: Artifact, adapter: Artifact, work: Path, device: str, dtype: torch.dtype) -> Any:
    """The model of `start` with the adapter fused in: in fp32, cast to `dtype` once at the end. InputError for a reward model."""
    if f"base_model.model.{HEAD}.weight" in adapter_names(adapter):
        raise InputError(f"{adapter.folder}: a reward model's adapter; it scores answers and writes none")
    model = attach(load(start, work, device, "fp32"), start, adapter)
    return model.merge_and_unload(safe_merge=True).to(dtype)


def save_merged(start: Artifact, adapter: Artifact, work: Path, device: str, folder: Path) -> None:
    """Write the merged model and the tokenizer to `folder`, in the dtype of the base. Deterministic on the CPU."""
    import json

    base_dtype = json.loads(start.file("config.json").read_text()).get("dtype", "float32")
    merge(start, adapter, work, device, getattr(torch, base_dtype)).save_pretrained(folder, max_shard_size="1000GB")
    tokenizer_of(start).save_pretrained(folder)


def ensure_merged(merged: Artifact, work: Path) -> None:
    """Rebuild the weights of a merge if they were deleted, under the lock of its fingerprint, checked by sha256."""
    import os
    import tempfile

    from workflow_scripts.artifacts import manifests
    from workflow_scripts.artifacts.fingerprint import file_sha256
    from workflow_scripts.artifacts.work import exclusive

    if all((merged.folder / name).is_file() for name in merged.data["files"]):
        return
    with exclusive(work, merged.fingerprint, print):
        missing = [name for name in merged.data["files"] if not (merged.folder / name).is_file()]
        if not missing:
            return
        print(f"{merged.folder}: rebuilding {', '.join(missing)}", flush=True)
        start, adapter = (manifests.read(merged.data["parents"][role]["path"]) for role in ("start", "adapter"))
        with tempfile.TemporaryDirectory(dir=merged.folder, prefix=".rebuild") as folder:
            save_merged(start, adapter, work, "cpu", Path(folder))
            for name in missing:
                if file_sha256(Path(folder) / name) != merged.data["files"][name]:
                    raise InputError(
                        f"{merged.folder / name}: rebuilt from {start.path} and {adapter.path}, but with another content than "
                        f"{merged.path} says; delete that manifest and run snakemake again"
                    )
                os.replace(Path(folder) / name, merged.folder / name)

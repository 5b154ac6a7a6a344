"""A model of an artifact, as it is, in 4-bit or with a head for rewards; and the merge of an adapter into it."""

from pathlib import Path
from typing import Any

import torch

from workflow_scripts.artifacts.manifests import WEIGHTS, Artifact
from workflow_scripts.models import lora
from workflow_scripts.models.chat import tokenizer_of
from workflow_scripts.models.device import DTYPES
from workflow_scripts.plumbing.messages import InputError


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
        getattr(model, lora.HEAD).float()  # trained in fp32: an adapter's head is loaded into a copy of this one
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


def merge(start: Artifact, adapter: Artifact, work: Path, device: str, dtype: torch.dtype) -> Any:
    """The model of `start` with the adapter fused in: in fp32, cast to `dtype` once at the end. InputError for a reward model."""
    if f"base_model.model.{lora.HEAD}.weight" in lora.adapter_names(adapter):
        raise InputError(f"{adapter.folder}: a reward model's adapter; it scores answers and writes none")
    model = lora.attach(load(start, work, device, "fp32"), start, adapter)
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

"""A model of an artifact, as it is, in 4-bit or with a head for rewards; and the merge of an adapter into it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from workflow_scripts.artifacts.manifests import WEIGHTS, Artifact
from workflow_scripts.models import distance, lora
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


def evaluated(
    start: Artifact, adapter: Artifact | None, work: Path, device: str, dtype: str, quant: dict | None = None
) -> tuple[Any, Any]:
    """(the model that an evaluation asks, the same with peft around it): as it was trained, the adapter beside the weights of
    `start`, in fp32 whatever `dtype` these have. Nothing is merged: that would round small updates away (models/distance.py).
    Without an adapter the second is None. InputError for a reward model.
    """
    model = load(start, work, device, dtype, quant)
    if adapter is None:
        return model.eval(), None
    if f"base_model.model.{lora.HEAD}.weight" in lora.adapter_names(adapter):
        raise InputError(f"{adapter.folder}: a reward model's adapter; it scores answers and writes none")
    with_adapter = lora.attach(model, start, adapter).eval()
    return with_adapter.get_base_model(), with_adapter  # the adapter stays in its layers


def check(path: distance.Path, adapter: Artifact, dtype: str, quant: dict | None) -> dict[str, float]:
    """What an adapter does on the path by which it is evaluated. InputError where that is not what it did when it was trained."""
    trained = adapter.data["step"]
    alike = trained["precision"] == dtype and (trained["config"]["quantise"] != "none") == (quant is not None)
    return distance.check(path, adapter, alike)


def keep_trainable_on_cpu(model: Any) -> None:
    """Switch off bitsandbytes' AVX512-BF16 path: there an evaluation forward repacks the weights, and later training steps
    get wrong gradients without an error (bitsandbytes 0.50)."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False


def save_merged(
    start: Artifact, adapter: Artifact, work: Path, device: str, folder: Path, before: Callable[[Any], None] = lambda model: None
) -> dict:
    """Write the model of `start` with the adapter fused in, and the tokenizer, to `folder`. Deterministic on the CPU.

    The sum is taken in fp32. It is kept in the dtype of `start` where that keeps `distance.KEPT` of the update, else in fp32.
    before: is given the fp32 model with the adapter beside it. Returns the facts for the manifest: the dtype, and what each would
    keep. InputError for a reward model.
    """
    import json

    if f"base_model.model.{lora.HEAD}.weight" in lora.adapter_names(adapter):
        raise InputError(f"{adapter.folder}: a reward model's adapter; it scores answers and writes none")
    model = lora.attach(load(start, work, device, "fp32"), start, adapter)
    before(model)
    name = json.loads(start.file("config.json").read_text()).get("dtype", "float32")
    facts = {name: distance.survives(model, getattr(torch, name))}
    if facts[name]["kept"] < distance.KEPT:
        name = "float32"
        facts[name] = distance.survives(model, torch.float32)
    model.merge_and_unload(safe_merge=True).to(getattr(torch, name)).save_pretrained(folder, max_shard_size="1000GB")
    tokenizer_of(start).save_pretrained(folder)
    return {"dtype": name, "update": facts}


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

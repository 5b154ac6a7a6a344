"""Where a base model comes from when it is not made here: a local folder, a GGUF file, or a hub at a revision.

Whatever the source, the weights come from safetensors (or from the tensors of a GGUF file), never from a pickle, and no code
that came with a model is run. The plan calls `folder_files` at parse time, so heavy imports stay inside the functions.
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from workflow_scripts.artifacts.fingerprint import file_sha256
from workflow_scripts.plumbing.content_cache import ContentCache
from workflow_scripts.plumbing.messages import InputError

CONTENT = (".safetensors", ".json", ".jinja", ".model")  # with the two below: what transformers reads of a model's folder
VOCABULARIES = ("merges.txt", "vocab.txt")
OURS = ("manifest.json", "run.json")  # a run's merged/ folder is a model's folder too
LFS = b"version https://git-lfs"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def folder_files(folder: Path | str) -> list[Path]:
    """The files of a Hugging Face folder that decide what the model is, by name.

    InputError where the folder is none, has no config.json or tokenizer, no weights as safetensors, or an adapter in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; give the path of a Hugging Face model folder")
    found = sorted(path for path in folder.iterdir() if path.is_file())
    files = [path for path in found if (path.suffix in CONTENT or path.name in VOCABULARIES) and path.name not in OURS]
    names = {path.name for path in files}
    if "adapter_config.json" in names:  # transformers would load the base that it names instead, and save the adapter alone
        raise InputError(
            f"{folder}: has an adapter (adapter_config.json), expected a whole model and nothing else; fuse the adapter into its "
            "base (merge_and_unload of peft) and name that folder, or move the files adapter_* out of this one"
        )
    if "config.json" not in names:
        raise InputError(f"{folder}: has no config.json, expected a Hugging Face model folder")
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [path.name for path in found if path.suffix in PICKLES]
        problem = (
            f"its weights are pickled ({', '.join(pickles)}), and reading a pickle can run any code" if pickles else "no weights"
        )
        raise InputError(f"{folder}: {problem}; expected *.safetensors, which save_pretrained of transformers writes")
    if not any(name.startswith("tokenizer") or name in VOCABULARIES for name in names):
        raise InputError(f"{folder}: has no tokenizer files (tokenizer.json or tokenizer.model)")
    for path in files:
        with open(path, "rb") as file:
            if file.read(len(LFS)) == LFS:
                raise InputError(f"{path}: a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`")
    check_whole(folder / "config.json")  # which the plan itself reads
    return files


def check_whole(path: Path) -> None:
    """InputError on a file that was cut off, as by a download that ended early: JSON that is none, weights of another size."""
    again = "it was cut off, or is no such file; fetch it again"
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON ({error}): {again}") from None
    elif path.suffix == ".safetensors":  # eight bytes with the length of the header, the header as JSON, the tensors
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            try:
                header = json.loads(file.read(length) if length < size else "")
                ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
            except (ValueError, AttributeError, KeyError, TypeError, IndexError):
                raise InputError(f"{path}: has no header of safetensors: {again}") from None
        if (wanted := 8 + length + max(ends, default=0)) != size:
            raise InputError(f"{path}: {size:,} bytes, expected {wanted:,} by its header: {again}")


def folder_hashes(folder: Path | str, cache_file: str | None = None) -> dict[str, str]:
    """Name -> sha256 of `folder_files`; those in the cache are not read."""
    cache = ContentCache(cache_file)
    return {path.name: cache.hash_of([path], partial(_sha256, path)) for path in folder_files(folder)}


def _sha256(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None


def content_sha256(hashes: dict[str, str]) -> str:
    """One hash of a folder's files by name."""
    return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()


def check_gguf(file: Path, sha256: str) -> None:
    """InputError unless the file is there with the sha256 that the config names."""
    if not file.is_file():
        raise InputError(f"{file}: base.gguf.file is missing; fetch it (`make smollm2` fetches the file of config/smollm2.yaml)")
    if (found := file_sha256(file)) != sha256:
        raise InputError(
            f"{file}: sha256 is {found}, but base.gguf.sha256 says {sha256}; fetch the file again, or name the sha256 of the one "
            "that you mean"
        )


def from_gguf(file: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of a GGUF file, dequantised to fp32.

    transformers refuses to save a model that it has dequantised: the tensors are copied into a fresh model of the same config
    without its `quantization_config`.
    """
    import gguf  # noqa: F401, transformers reads the file with it: its version counts for what comes out
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where: dict[str, Any] = {"gguf_file": file.name, "local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **where)
        read = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **where)
    except (ValueError, OSError, NotImplementedError, KeyError) as error:
        raise InputError(f"{file}: transformers cannot read this GGUF file: {' '.join(str(error).split())[:300]}") from None
    plain = {key: value for key, value in read.config.to_dict().items() if key not in ("quantization_config", "_name_or_path")}
    model = AutoModelForCausalLM.from_config(type(read.config).from_dict(plain), dtype=torch.float32)
    model.load_state_dict(read.state_dict())  # strict: a tensor that is missing or left over is an error
    model.generation_config = read.generation_config
    return model, tokenizer


def from_folder(folder: Path, dtype: Any) -> tuple[Any, Any]:
    """(model in `dtype`, tokenizer) of a Hugging Face folder.

    The dtype that config.json names is not asked: it may be a coarser one than that of the weights, which were then rounded.
    InputError where weights are missing, have no place in the model, or are not finite numbers in `dtype`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for path in folder_files(folder):
        check_whole(path)
    where: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **where)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, output_loading_info=True, **where
        )
    except RuntimeError as error:
        if "mismatched" not in str(error):
            raise
        raise InputError(
            f"{folder}: the weights have other shapes than config.json says: they are of two models; fetch both again, from one"
        ) from None
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise InputError(f"{folder}: transformers cannot load this model: {' '.join(str(error).split())[:300]}") from None
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"{folder}: has no weights for {', '.join(missing[:3])} ({len(missing)} tensors); it is not a causal LM as saved"
        )
    if getattr(model.config, "quantization_config", None):
        raise InputError(f"{folder}: holds quantised weights, expected full precision; a merge needs them")
    if extra := sorted(report["unexpected_keys"]):
        raise InputError(
            f"{folder}: holds weights that the model of its config.json has no place for: {', '.join(extra[:3])} ({len(extra)} "
            "tensors); without them it is another model. Take the config.json that belongs to them, or save the model again "
            "as the causal LM that it is"
        )
    if wrong := next((name for name, weight in model.named_parameters() if not torch.isfinite(weight).all()), None):
        kind = str(dtype).removeprefix("torch.")
        too_large = "; numbers above 65504 are none in fp16: set `dtype: bf16` or fp32" if dtype == torch.float16 else ""
        raise InputError(f"{folder}: {wrong} holds values that are no finite numbers in {kind}{too_large or '; fetch it again'}")
    return model, tokenizer


def from_hub(model_id: str, revision: str | None) -> tuple[Path, str]:
    """(folder of the snapshot in the hub's cache, its commit). InputError, with the remedies, where it cannot be had."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError

    from workflow_scripts.data import hub

    patterns = [f"*{suffix}" for suffix in CONTENT] + list(VOCABULARIES)
    try:
        folder = huggingface_hub.snapshot_download(model_id, revision=revision, allow_patterns=patterns)
    except (RepositoryNotFoundError, HfHubHTTPError) as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise InputError(hub.unreachable("hub", "model", model_id, revision, "it is not in the local cache")) from None
        raise InputError(
            f"hub: {model_id} at revision {revision or 'main'}: the hub answers: {' '.join(str(error).split())[:300]}"
        ) from None
    except (OfflineModeIsEnabled, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:120]
        raise InputError(hub.unreachable("hub", "model", model_id, revision, reason)) from None
    commit = Path(folder).name  # the cache names a snapshot by its commit
    if revision is not None and commit != revision:
        raise InputError(f"hub: asked for {model_id} at revision {revision}, the hub gave {commit}")
    return Path(folder), commit

"""The shape of a base, and the bytes of its weights and adapters: what of a GPU's memory no batch decides.

Symbols, here and in plan/passes.py: L layers, h hidden size, q = heads x head size, k = key/value heads x head size, m
intermediate size, v vocabulary, r LoRA's rank, e bytes of the compute dtype (2 in bf16 and fp16).

    weights       NF4: 0.5 bytes for each weight of the layers' linear modules, and for each block of 64 a constant: 4 bytes, or
                  with double quantisation 1 byte and 4/256 (Dettmers et al. 2023, arXiv:2305.14314, section 3): 0.516 together.
                  The embeddings, the LM head (bitsandbytes leaves it out), norms and biases are in e bytes, and so is all without
                  NF4
    adapters      sum of r (in + out) over the targeted modules of all layers. 16 bytes each when trained: fp32 weight, gradient
                  and two moments of AdamW; 4 when frozen. Paged moments count: a step has them on the card
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workflow_scripts.config.config import Config
from workflow_scripts.plumbing.messages import InputError

KEYS = ("hidden_size", "num_hidden_layers", "vocab_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")


@dataclass(frozen=True)
class Shape:
    """Of a decoder with grouped-query attention and a gated MLP (Llama, Qwen2, Mistral and their kin)."""

    hidden: int
    layers: int
    vocabulary: int
    intermediate: int
    query: int  # width of all query heads together
    key: int  # of all key heads
    heads: int
    tied: bool  # the LM head is the embedding
    parameters: int = 0

    @property
    def modules(self) -> dict[str, tuple[int, int]]:
        """Linear module of a layer -> (in, out)."""
        h, q, k, m = self.hidden, self.query, self.key, self.intermediate
        attention = {"q_proj": (h, q), "k_proj": (h, k), "v_proj": (h, k), "o_proj": (q, h)}
        return attention | {"gate_proj": (h, m), "up_proj": (h, m), "down_proj": (m, h)}

    @property
    def linear(self) -> int:
        """Weights of the layers' linear modules: what NF4 quantises."""
        return self.layers * sum(a * b for a, b in self.modules.values())

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden


def shape_of(config: Config) -> Shape:
    """The base's shape: of `base.shape`, of the model that the config describes, or of the folder that it names.

    InputError, naming the key, if something is missing or does not add up.
    """
    base = config.data["base"]
    found: dict[str, Any] = dict(base.get("shape", {}))
    place = ["base", "shape"]
    if not found and base["source"] == "scratch":
        found = base["scratch"]["model"] | {"vocab_size": base["scratch"]["tokenizer"]["vocab_size"], "tie_word_embeddings": True}
    elif not found and base["source"] == "path":
        found, place = _of_folder(Path(base["path"])), ["base", "path"]
    missing = [key for key in (*KEYS, "tie_word_embeddings") if key not in found]
    if missing:
        raise config.fail(
            place, f"{', '.join(missing)}: missing, and what fits on a GPU follows from it; copy it from config.json"
        )
    head = found.get("head_dim") or found["hidden_size"] // found["num_attention_heads"]
    shape = Shape(
        hidden=found["hidden_size"], layers=found["num_hidden_layers"], vocabulary=found["vocab_size"],
        intermediate=found["intermediate_size"], heads=found["num_attention_heads"], tied=found["tie_word_embeddings"],
        query=head * found["num_attention_heads"], key=head * found["num_key_value_heads"],
    )  # fmt: skip
    least = shape.linear + shape.embedding * (1 if shape.tied else 2) + (2 * shape.layers + 1) * shape.hidden
    parameters = found.get("parameters", least)
    if not least <= parameters <= 1.02 * least:  # biases are all that may come on top
        problem = f"parameters: found {parameters:,}, but layers and embeddings of this shape have {least:,}"
        problem += "; is tie_word_embeddings right?"
        raise config.fail(place, problem)
    return Shape(**{**shape.__dict__, "parameters": parameters})


def _of_folder(folder: Path) -> dict[str, Any]:
    """The keys of a model folder's config.json, with its parameters as its safetensors files list them."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors: dict[str, Any] = {}
        for file in folder.glob("*.safetensors"):
            with open(file, "rb") as opened:
                tensors |= json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: config.json or *.safetensors cannot be read ({error}); name a model folder in base.path"
        ) from None
    sizes = [one["shape"] for name, one in tensors.items() if name != "__metadata__"]
    found["parameters"] = sum(_product(size) for size in sizes)
    return found | {"tie_word_embeddings": "lm_head.weight" not in tensors}


def _product(numbers: list[int]) -> int:
    product = 1
    for number in numbers:
        product *= number
    return product


def lora_parameters(shape: Shape, block: dict) -> int:
    """Trainable parameters of one adapter: a module with in x out weights has r x in and out x r.

    InputError for a target whose size is not known.
    """
    if unknown := sorted(set(block["target_modules"]) - set(shape.modules)):
        raise InputError(
            f"lora.target_modules: {', '.join(unknown)}: of no known size; without the model only {', '.join(shape.modules)} are"
        )
    return shape.layers * block["r"] * sum(sum(shape.modules[name]) for name in block["target_modules"])


def weights(shape: Shape, e: int, nf4: bool, double: bool, head: bool = True) -> float:
    """Bytes of the frozen base; `head`: with its LM head."""
    rest = shape.parameters - shape.linear - (0 if head or shape.tied else shape.embedding)
    return shape.linear * ((0.5 + (1 + 4 / 256 if double else 4) / 64) if nf4 else e) + rest * e

"""What the tests of GPU memory estimate: the study's configs, and a small Qwen2 that exists both as a shape and as a model."""

from pathlib import Path

import torch

from workflow_scripts.config.config import Config, load
from workflow_scripts.config.written import merge
from workflow_scripts.plan import shape
from workflow_scripts.plan.gpu_memory import Memory

ROOT = Path(__file__).resolve().parents[2]
STUDY, LARGE = ["config/qwen05b.yaml"], ["config/qwen05b.yaml", "config/qwen7b.yaml"]
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def memory(*overlays: dict, files=STUDY) -> Memory:
    data = load(*(ROOT / file for file in files)).data
    for overlay in overlays:
        data = merge(data, overlay)
    return Memory(Config(data))


def peaks(made: Memory) -> dict[str, float]:
    """Phase -> peak in bytes."""
    return {f"{phase.kind} {phase.name}": phase.peak for phase in made.phases()}


SHAPE = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 640, "vocab_size": 512}
R = 8


def small_shape(layers: int, tied: bool = True) -> shape.Shape:
    given = SHAPE | {"num_hidden_layers": layers, "tie_word_embeddings": tied}
    return shape.shape_of(
        Config(merge(load(ROOT / STUDY[0]).data, {"base": {"shape": given | {"parameters": parameters(layers, tied)}}}))
    )


def parameters(layers: int, tied: bool) -> int:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    with torch.device("meta"):
        return Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=tied)).num_parameters()


def build(folder: Path, layers: int, nf4: bool, dropout: float, targets=SEVEN):
    """A real peft model in bf16 with fp32 adapters, as the steps load it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

    from workflow_scripts.models import loading

    base = Qwen2ForCausalLM(Qwen2Config(**SHAPE, num_hidden_layers=layers, tie_word_embeddings=True)).to(torch.bfloat16)
    base.save_pretrained(folder)
    options: dict = {"dtype": torch.bfloat16}
    if nf4:
        quant = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
        )
        options |= {"quantization_config": quant, "device_map": {"": "cpu"}}
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    loading.keep_trainable_on_cpu(model)
    block = LoraConfig(r=R, lora_alpha=16, lora_dropout=dropout, target_modules=list(targets), task_type="CAUSAL_LM")
    model = get_peft_model(model, block)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()

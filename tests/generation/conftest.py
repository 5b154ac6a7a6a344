"""Small models of random weights, of the three architectures, with and without an adapter beside them."""

import random

import pytest
import torch

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ENDS = (2, 7, 8, 9)
NEW = 24


def model_of(architecture: str, adapter: bool, dtype: torch.dtype = torch.float32):
    """A model whose next tokens are far from ties (wide weights), its biases not zero."""
    import transformers
    from peft import LoraConfig, get_peft_model

    more = {"Llama": {"tie_word_embeddings": True}, "Qwen2": {"tie_word_embeddings": False}, "Qwen3": {"head_dim": 32}}[
        architecture
    ]
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.2, **more,
    )  # fmt: skip
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).to(dtype).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    if adapter:
        peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS)).eval()
        for name, weight in peft.named_parameters():
            if "lora_" in name:
                weight.data = torch.randn(weight.shape) * 0.1
        model = peft.get_base_model()
    return model


@pytest.fixture(scope="session")
def prompts():
    draw = random.Random(1)
    return [[draw.randrange(3, 300) for _ in range(draw.randint(1, 40))] for _ in range(28)]


def greedy(model, prompt: list[int], new: int = NEW) -> list[int]:
    """transformers' own answer to one prompt alone."""
    ids = torch.tensor([prompt])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False, eos_token_id=list(ENDS), pad_token_id=0
    )
    return made[0, len(prompt) :].tolist()


def parted(model, prompt: list[int], ours: list[int], theirs: list[int], tie: float = 1e-3) -> bool:
    """Whether two answers differ, and not from a token on that was a near-tie of the two, where rounding decides."""
    if ours == theirs:
        return False
    place = next((n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    if place in (len(ours), len(theirs)):
        return True
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ours[:place]])).logits[0, -1].float()
    return (logits[ours[place]] - logits[theirs[place]]).abs().item() > tie

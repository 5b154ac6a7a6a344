"""A tiny model with an adapter that does something, and a batch of three texts for it: on a CPU, in fp32."""

import sys

import torch
from torch import nn

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.models import loading, lora

BLOCK = small_steps.LORA | {"dropout": 0.0}


def adapted(base, dropout=0.0):
    from peft import get_peft_model

    model = loading.load(manifests.read(base), base.parent, "cpu", "fp32")
    torch.manual_seed(3)
    model = get_peft_model(model, lora.adapter_config(BLOCK | {"dropout": dropout}, model))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def batch(rows=([5, 9, 20, 31, 8], [7, 11], [40, 3, 12])):
    longest = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (longest - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows]),
        "use_cache": False,
    }


def put_back_at_the_end(model, monkeypatch):
    """Its decoder, whose module `fused.compile_pieces` gives another rotary embedding."""
    body = model.get_base_model().base_model
    code = sys.modules[type(body).__module__]
    monkeypatch.setattr(code, "apply_rotary_pos_emb", code.apply_rotary_pos_emb)
    return body

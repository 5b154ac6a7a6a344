"""A layer keeps for its backward pass what is estimated, byte for byte."""

import functools
import itertools

import pytest
import torch

from tests.support.shapes import SEVEN, SHAPE, R, build, small_shape
from workflow_scripts.plan.passes import Pass
from workflow_scripts.plan.shape import lora_parameters


def kept(model, padded: bool, autocast: bool) -> int:
    """Bytes of the tensors that autograd keeps in a forward pass, each storage once, parameters left out."""
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 64))
    mask = torch.ones_like(ids)
    mask[0, -7:] = 0 if padded else 1
    own = {p.untyped_storage().data_ptr() for p in itertools.chain(model.parameters(), model.buffers())}
    found: dict[int, torch.UntypedStorage] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.numel() > 1:
            found[storage.data_ptr()] = storage
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model.get_base_model().model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in found.values())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """build(layers, nf4, dropout), each made once: a forward pass leaves it as it was."""
    return functools.cache(lambda *how: build(tmp_path_factory.mktemp("model"), *how))


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "full"])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "plain"])
@pytest.mark.parametrize("nf4", [True, False], ids=["nf4", "bf16"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_layer_keeps_what_autograd_keeps_byte_for_byte(built, monkeypatch, nf4, autocast, padded, dropout):
    # peft asks whether autocast is on for CUDA, whatever the device: here it is to hear that of the CPU.
    real = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device="cpu": real(device))
    sizes = [kept(built(layers, nf4, dropout), padded, autocast) for layers in (2, 3)]
    how = Pass(small_shape(3), SEVEN, R, 2, dropout > 0, copies=not (nf4 and autocast), autocast=autocast, masked=padded)
    # On a CPU dropout keeps its mask in the dtype of its input, where CUDA keeps a byte.
    expected = how.kept(128, 64, mask_byte=2 if nf4 and autocast else 4)
    if autocast:
        expected += 2 * lora_parameters(small_shape(1), {"r": R, "target_modules": list(SEVEN)})  # the adapter in bf16
    assert sizes[1] - sizes[0] == expected

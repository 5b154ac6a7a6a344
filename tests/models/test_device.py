"""What the machine must have for what the config declares."""

import pytest
import torch

from workflow_scripts.models import device
from workflow_scripts.plumbing.messages import InputError

BUILD = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100a", "sm_120"]


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((7, 5), BUILD, True),  # T4
        ((8, 9), BUILD, True),  # L4: kernels of sm_86
        ((9, 0), BUILD, True),
        ((10, 0), BUILD, True),
        ((7, 0), BUILD, False),  # V100
        ((6, 0), BUILD, False),  # P100
        ((6, 0), ["sm_50", "sm_60"], True),
        ((13, 0), BUILD, False),
        ((13, 0), [*BUILD, "compute_120"], True),  # the driver compiles PTX for newer cards
        ((7, 0), ["compute_80"], False),
    ],
)
def test_kernels_run_on_cards_of_their_major_version_and_ptx_on_newer_ones(capability, architectures, runs):
    assert device.has_kernels(capability, architectures) == runs


def fake_gpu(monkeypatch, capability, bf16):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: BUILD)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)


def test_bf16_on_a_card_without_it_names_the_card_and_the_remedy(monkeypatch):
    fake_gpu(monkeypatch, (7, 5), bf16=False)
    with pytest.raises(InputError, match=r"a card \(compute capability 7\.5\) has none; set `precision: fp16`"):
        device.check_gpu("bf16")
    device.check_gpu("fp16", trains=True)


def test_a_p100_answers_in_fp16_but_does_not_train_with_triton(monkeypatch):
    fake_gpu(monkeypatch, (6, 0), bf16=False)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_60", *BUILD])
    monkeypatch.setattr(device, "find_spec", lambda name: name)
    device.check_gpu("fp16")
    with pytest.raises(
        InputError, match=r"compute capability 6\.0\): .*Triton, which needs 7\.0; use a T4 or newer, or uninstall"
    ):
        device.prepare({"step": "train_sft", "device": "cuda", "precision": "fp16", "threads": 1})
    monkeypatch.setattr(device, "find_spec", lambda name: None)
    device.check_gpu("fp16", trains=True)


def test_a_card_that_this_torch_has_no_kernels_for_is_named(monkeypatch):
    fake_gpu(monkeypatch, (6, 0), bf16=False)
    with pytest.raises(InputError, match=r"compute capability 6\.0.*no kernels for it, only sm_75"):
        device.check_gpu("fp16")


def test_a_machine_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="finds no GPU here; set `device: cpu`"):
        device.prepare({"device": "cuda", "precision": "bf16", "threads": 1})


def test_attention_by_cudnn_is_off_where_a_step_runs_on_a_gpu(monkeypatch):
    """Its gradients were NaN in PPO (pytorch/pytorch#196678)."""
    monkeypatch.setattr(device, "check_gpu", lambda *args, **kwargs: None)
    monkeypatch.setattr(device.gpus, "limit", lambda: None)
    torch.backends.cuda.enable_cudnn_sdp(True)
    device.prepare({"device": "cuda", "precision": "bf16", "threads": torch.get_num_threads()})
    assert not torch.backends.cuda.cudnn_sdp_enabled()

"""The machine as a step finds it: threads, seeds and deterministic kernels, and whether the declared device is there."""

import os
import random
from importlib.util import find_spec

import torch

from workflow_scripts.plumbing import gpus, startup
from workflow_scripts.plumbing.messages import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRITON = (7, 0)  # the oldest compute capability that Triton compiles for, as torch has it (torch/_inductor/scheduler.py)


def prepare(step: dict, deterministic: bool = False) -> None:
    """Set threads, seeds and deterministic kernels before anything is computed.

    deterministic: equal runs end with the same bytes, on a GPU as well; an operation that has no such way raises RuntimeError,
    which steps/cli.py says in one line. InputError if the step declares a device or a precision that is not here.
    """
    import numpy
    from transformers.utils import logging

    startup.ready()
    logging.disable_progress_bar()  # as steps/cli.py asks of datasets: the steps show their own progress
    torch.set_num_threads(step["threads"])
    # Equal runs give equal bytes on a CPU. On a GPU that costs (docs/performance.md), and its bytes differ between cards anyway:
    # there equal runs agree up to the kernels' noise, unless they are asked for more. The mode sorts what writes into one place,
    # has attention's gradient summed in one order (FlashAttention's and the memory-efficient one), and has Inductor choose by
    # rule where it would by a stopwatch. bitsandbytes and TRL's Triton kernels have no atomic sums.
    torch.use_deterministic_algorithms(deterministic or step["device"] == "cpu", warn_only=not deterministic)
    if deterministic:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # as steps/cli.py does, where a step is called by other code
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    # The mode above also fills each new tensor with NaN. No step reads one before it is written; DPO took 55 s for 32 s.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if step["device"] == "cuda":
        # Its gradients are NaN where a batch with a mask is 64, 192, 320 ... tokens wide (pytorch/pytorch#196678), and torch
        # takes it first on Hopper. PPO met it on an H200. The other kernels compute the same.
        torch.backends.cuda.enable_cudnn_sdp(False)
        check_gpu(step["precision"], trains=step.get("step", "").startswith("train_"))
        if (bytes := gpus.limit()) is not None:  # who needs more than it asked for fails alone
            whole = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(bytes / whole, 1.0))
    seed = step.get("seed", 0)
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def check_gpu(precision: str, trains: bool = False) -> None:
    """InputError, naming the card, its compute capability and the remedy: no GPU, no kernels of this torch for it, no `precision`
    on it, or, where a step `trains`, too old a card for Triton, in which TRL's LM head is written (trl/kernels)."""
    if not torch.cuda.is_available():
        raise InputError(
            f"device: cuda, but torch {torch.__version__} finds no GPU here; set `device: cpu`, or run where there is one"
        )
    capability = torch.cuda.get_device_capability()
    card = f"{torch.cuda.get_device_name()} (compute capability {capability[0]}.{capability[1]})"
    if not has_kernels(capability, torch.cuda.get_arch_list()):
        raise InputError(
            f"{card}: torch {torch.__version__} has no kernels for it, only "
            f"{', '.join(torch.cuda.get_arch_list())}; install a build for an older CUDA, or use another card"
        )
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"precision: bf16, but {card} has none; set `precision: fp16`")
    if trains and capability < TRITON and find_spec("triton"):
        raise InputError(
            f"{card}: training computes its LM head with Triton, which needs {TRITON[0]}.{TRITON[1]}; use a T4 or newer, or "
            "uninstall triton: TRL then does it in torch, more slowly"
        )


def has_kernels(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether one of the build's architectures runs on a card: the same major version and no newer minor one, or PTX (compute_)
    of no newer version, which the driver compiles."""
    for architecture in architectures:
        kind, _, digits = architecture.partition("_")
        digits = digits.rstrip("af")  # sm_90a, sm_120f: variants of one architecture
        built = int(digits[:-1]), int(digits[-1])
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False

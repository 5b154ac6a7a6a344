"""The machine as a step finds it: threads, seeds and deterministic kernels, and whether the declared device is there."""

import random

import torch

from workflow_scripts.core.messages import InputError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def prepare(step: dict) -> None:
    """Set threads, seeds and deterministic kernels before anything is computed.

    InputError if the step declares a device or a precision that is not here.
    """
    import datasets
    import numpy
    from transformers.utils import logging

    datasets.disable_progress_bars()  # the steps show their own progress, in lines that a log can hold
    logging.disable_progress_bar()
    torch.set_num_threads(step["threads"])
    torch.use_deterministic_algorithms(True, warn_only=True)
    # The mode above also fills each new tensor with NaN. No step reads one before it is written; DPO took 55 s for 32 s.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if step["device"] == "cuda" and not torch.cuda.is_available():
        raise InputError("device: cuda, but torch finds no GPU here; set `device: cpu`, or run where the profile promises one")
    if step["device"] == "cuda" and step["precision"] == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise InputError(f"precision: bf16, but {torch.cuda.get_device_name()} has none; set `precision: fp16`")
    seed = step.get("seed", 0)
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)

"""A step whose processes may each allocate so many GB of their card and no more: a smaller card, pretended.

    LIMITED_GB=40 LIMITED_STEP=train_dpo python -m measurements.limited ...     with the arguments of the step

By variables, since a step that starts ranks runs its own command again with more arguments behind it.
"""

import importlib
import os
from typing import Any

from workflow_scripts.plumbing.gpus import CONTEXT
from workflow_scripts.steps import cli


def main() -> None:
    step = importlib.import_module(f"workflow_scripts.steps.{os.environ['LIMITED_STEP']}")
    card = float(os.environ["LIMITED_GB"])

    def limited(job: Any) -> None:
        import torch

        from workflow_scripts.models import device

        prepare = device.prepare

        def prepared(of: dict, deterministic: bool = False) -> None:
            prepare(of, deterministic)
            if of["device"] == "cuda":
                whole = torch.cuda.get_device_properties(0).total_memory
                torch.cuda.set_per_process_memory_fraction(min(1.0, (card * 1e9 - CONTEXT) / whole))

        device.prepare = prepared
        step.main(job)

    cli.run(limited, step.__doc__)


if __name__ == "__main__":
    main()

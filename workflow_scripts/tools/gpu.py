"""Say whether the steps can run on this machine's GPU, and in which precision.

python -m workflow_scripts.tools.gpu
"""

import argparse
import sys

from workflow_scripts.plumbing.messages import InputError


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import torch

    from workflow_scripts.models import device

    try:
        device.check_gpu("fp16")
    except InputError as error:
        sys.exit(str(error))
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: set device: cuda, precision: {'bf16' if bf16 else 'fp16'}")


if __name__ == "__main__":
    main()

"""Say whether the steps can run on this machine's GPU, and in which precision; by `--precision`, whether they can in these.

python -m workflow_scripts.tools.gpu [--precision bf16 fp16]
"""

import argparse
import sys

from workflow_scripts.plumbing.messages import InputError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16", "fp16"], default=["fp16"])
    precisions = parser.parse_args().precision
    import torch

    from workflow_scripts.models import device

    try:
        for precision in precisions:
            device.check_gpu(precision)
    except InputError as error:
        sys.exit(str(error))
    bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}: set device: cuda, precision: {'bf16' if bf16 else 'fp16'}")


if __name__ == "__main__":
    main()

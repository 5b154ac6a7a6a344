"""What jobs find in their environment. Plumbing: decides no number."""

import os
from pathlib import Path


def run_code_of(root: Path) -> None:
    """What this process starts runs the package in this folder: not that of another clone, in the environment or in the working
    folder."""
    os.environ["PYTHONSAFEPATH"] = "1"
    if (path := os.environ.get("PYTHONPATH", "")).split(os.pathsep)[0] != str(root):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(root), path]).rstrip(os.pathsep)

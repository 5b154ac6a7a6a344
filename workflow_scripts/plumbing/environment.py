"""What Snakemake and its jobs find in their environment. Plumbing: decides no number."""

import getpass
import os
from pathlib import Path


def run_code_of(root: Path) -> None:
    """What this process starts runs the package in this folder: not that of another clone, in the environment or in the working
    folder."""
    os.environ["PYTHONSAFEPATH"] = "1"
    if (path := os.environ.get("PYTHONPATH", "")).split(os.pathsep)[0] != str(root):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(root), path]).rstrip(os.pathsep)


def name_the_account() -> None:
    """Snakemake and torch ask who runs them, and end with a KeyError where a container runs as a number without a name."""
    try:
        getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        os.environ["LOGNAME"] = str(os.getuid())

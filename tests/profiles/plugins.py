"""Executor plugins beside the locked environment, for tests alone: installed once, without dependencies, below the interpreter's
prefix. `python -m tests.profiles.plugins` prints the folder, which belongs on PYTHONPATH.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

WANTED = Path(__file__).with_name("requirements.txt")


def packages() -> Path:
    """The folder. OSError if they can't be had from a package index."""
    made = Path(sys.prefix) / f"executors-{hashlib.sha256(WANTED.read_bytes()).hexdigest()[:12]}"
    if not (made / "complete").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", str(made / "packages")]
        done = subprocess.run([*pip, "--requirement", str(WANTED)], capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"executor plugins can't be installed from a package index: {done.stderr.strip()[-300:]}")
        (made / "complete").touch()
    return made / "packages"


if __name__ == "__main__":
    print(packages())

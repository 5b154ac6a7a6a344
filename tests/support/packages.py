"""Packages beside the locked environment, for tests alone: installed once, without dependencies, below the interpreter's prefix.
`python -m tests.support.packages REQUIREMENTS` prints the folder, which belongs on PYTHONPATH.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

from filelock import FileLock


def packages(requirements: Path) -> Path:
    """The folder. OSError if they can't be had from a package index."""
    made = Path(sys.prefix) / f"for-tests-{hashlib.sha256(requirements.read_bytes()).hexdigest()[:12]}"
    with FileLock(f"{made}.lock"):  # of two processes of tests
        if not (made / "complete").exists():
            pip = [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-deps",
                "--upgrade",
                "--target",
                str(made / "packages"),
            ]
            done = subprocess.run([*pip, "--requirement", str(requirements)], capture_output=True, text=True)
            if done.returncode:
                raise OSError(f"{requirements.name}: can't be installed from a package index: {done.stderr.strip()[-300:]}")
            (made / "complete").touch()
    return made / "packages"


if __name__ == "__main__":
    print(packages(Path(sys.argv[1])))

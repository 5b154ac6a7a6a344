"""A tool for people as a command, and what a test changes for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

from workflow_scripts.artifacts import manifests

ROOT = Path(__file__).resolve().parents[2]


def tool(folder: Path, name: str, *args: str, text: str = "") -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"workflow_scripts.tools.{name}", *args]
    return subprocess.run(command, cwd=folder, env=env, input=text, capture_output=True, text=True, timeout=120)


def edit(path: Path, **more) -> None:
    path.write_text(manifests.dump(json.loads(path.read_text()) | more))

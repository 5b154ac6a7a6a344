"""Steps run by their own commands, as the rules run them: in a process each, which can be killed."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from workflow_scripts.artifacts.fingerprint import fingerprint
from workflow_scripts.artifacts.manifests import Job

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 600  # seconds of one


def command(job: Job, *more: str) -> list[str]:
    where = ["--inputs", *map(str, job.inputs), "--out", str(job.out), "--work", str(job.work)]
    how = ["--speed", json.dumps(job.speed), *more]
    return [sys.executable, "-m", f"workflow_scripts.steps.{job.step['step']}", "--step", json.dumps(job.step), *where, *how]


def run(job: Job, *more: str) -> str:
    """To its end. Returns what it said; AssertionError if it failed."""
    done = subprocess.run(command(job, *more), cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def kill_in_the_middle(job: Job, *more: str) -> None:
    """SIGKILL once there is something to go on from: a whole checkpoint, or an answer."""
    home, said = job.work / fingerprint(job.step), job.out.parent.parent / "killed.log"
    said.parent.mkdir(parents=True, exist_ok=True)
    with open(said, "w") as file:
        process = subprocess.Popen(command(job, *more), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
    end = time.monotonic() + LIMIT
    while not (answered(home) or any(home.glob("trainer/checkpoint-*/complete.json"))):
        assert process.poll() is None and time.monotonic() < end, f"ended too early: {said.read_text()[-3000:]}"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not job.out.exists(), "it was done before it could be killed"


def answered(home: Path) -> bool:
    file = home / "answers.jsonl"
    return file.exists() and file.stat().st_size > 0


def digests(job: Job) -> dict[str, str]:
    """sha256 of each file that a step wrote, but for run.json, which has its times, and the card, which names places."""
    unlike = ("run.json", "README.md")
    files = sorted(path for path in job.out.parent.iterdir() if path.is_file() and not path.name.endswith(unlike))
    assert job.out in files
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

"""A step of a few lines and its processes, for test_work.py and test_cli.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# A step that does what its config says, and leaves a line in `ran` each time that it works.
PROGRAM = """
import time
from pathlib import Path
from workflow_scripts.artifacts import manifests
from workflow_scripts.steps import cli
from workflow_scripts.plumbing.messages import InputError

def main(job):
    config = job.config
    with open(config["ran"], "a") as file:
        file.write("ran\\n")
    if config.get("wrong"):
        raise InputError("rows.jsonl: line 3: found x,\\n expected y; write y")
    if config.get("crash"):
        raise ValueError("boom\\n  at two lines")
    with manifests.complete(job, "thing", job.parents()) as draft:
        print("some output", flush=True)
        if "shows" in config:
            import os
            print({name: os.environ.get(name) for name in config["shows"]}, flush=True)
        (draft.folder / "data.txt").write_text(config["text"])
        while "wait" in config and Path(config["wait"]).exists():
            time.sleep(0.02)

def describe(folder):
    if (folder / "data.txt").read_text() == "hard to describe":
        raise TypeError("unsupported format string passed to NoneType.__format__")

cli.run(main, "A step for tests.", describe)
"""


def step_of(tmp_path: Path, **config) -> dict:
    config = {"text": "content", "ran": str(tmp_path / "ran")} | config
    return {"step": "thing", "config": config, "parents": {}, "packages": {}, "threads": 1}


class Toys:
    """Processes that run the toy step in a folder, as Snakemake would."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.begun: list[subprocess.Popen] = []
        (folder / "program.py").write_text(PROGRAM)

    def start(self, step: dict | str, *more: str, out: str = "out/manifest.json") -> subprocess.Popen:
        """step: a step, or the text of --step."""
        text = step if isinstance(step, str) else json.dumps(step)
        command = [sys.executable, "program.py", "--step", text, "--out", out, "--work", "work", *more]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.begun.append(
            subprocess.Popen(command, cwd=self.folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        return self.begun[-1]

    def run(self, step: dict | str, *more: str, **options) -> subprocess.CompletedProcess:
        process = self.start(step, *more, **options)
        try:
            stdout, stderr = process.communicate(timeout=60)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def stop(self) -> None:
        for process in self.begun:
            process.kill()
            process.communicate()

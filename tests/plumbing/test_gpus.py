"""One GPU for one step, on hosts that pretend to have some."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from workflow_scripts.plumbing import gpus

ROOT = Path(__file__).resolve().parents[2]

# A step that says when it has which GPU, and works for as long as its config says, or until a file goes.
PROGRAM = """
import os, time
from pathlib import Path
from workflow_scripts.artifacts import manifests
from workflow_scripts.steps import cli

def main(job):
    def note(what):
        with open("notes", "a") as file:
            file.write(f"{what} {job.config['name']} {os.environ.get('CUDA_VISIBLE_DEVICES')} {time.time()}\\n")

    note("begin")
    time.sleep(job.config.get("seconds", 0))
    while Path(job.config["name"] + ".wait").exists():
        time.sleep(0.02)
    note("end")
    with manifests.complete(job, "thing", {}) as draft:
        (draft.folder / "data.txt").write_text(job.config["name"])

cli.run(main, "A step for tests.")
"""


def step_of(name: str, **config) -> dict:
    return {"step": "thing", "config": {"name": name} | config, "parents": {}, "packages": {}, "threads": 1, "device": "cuda"}


class Host:
    """A folder with the step, and an environment whose nvidia-smi lists GPUs."""

    def __init__(self, folder: Path, count: int):
        self.folder, self.gpus = folder, [f"GPU-{uuid.uuid4()}" for _ in range(count)]
        (folder / "bin").mkdir()
        lines = "\n".join(self.gpus)
        (folder / "bin/nvidia-smi").write_text(f"#!/bin/sh\ncat <<'END'\n{lines}\nEND\n")
        (folder / "bin/nvidia-smi").chmod(0o755)
        (folder / "program.py").write_text(PROGRAM)
        self.env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.env["PATH"] = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.env.pop("CUDA_VISIBLE_DEVICES", None)
        self.begun: list[subprocess.Popen] = []

    def start(self, name: str, **config) -> subprocess.Popen:
        command = [sys.executable, "program.py", "--step", json.dumps(step_of(name, **config)), "--work", "work"]
        command += ["--out", f"{name}/manifest.json"]
        pipe = subprocess.PIPE
        self.begun.append(subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=pipe, stderr=pipe, text=True))
        return self.begun[-1]

    def notes(self) -> list[tuple[str, str, str, float]]:
        """(begin or end, step, GPU, when), as noted by the steps."""
        path = self.folder / "notes"
        lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [(what, name, gpu, float(when)) for what, name, gpu, when in lines]

    def until(self, what: str, name: str) -> str:
        """The GPU of a step, once it has begun or ended."""
        for _ in range(1500):
            for noted, whose, gpu, _ in self.notes():
                if (noted, whose) == (what, name):
                    return gpu
            time.sleep(0.02)
        raise AssertionError(f"{name} did not {what}: {self.notes()}")


@pytest.fixture
def host(tmp_path):
    made = Host(tmp_path, 2)
    yield made
    for process in made.begun:
        process.kill()
        process.communicate()
    for gpu in made.gpus:
        (gpus.LOCKS / f"{gpu}.lock").unlink(missing_ok=True)


@pytest.mark.slow
def test_four_jobs_at_once_on_two_gpus_never_share_one(host):
    """As a user who offers Snakemake more than there is: the jobs take turns."""
    (host.folder / "Snakefile").write_text(
        """
import json
rule all:
    input: expand("{n}/manifest.json", n=["a", "b", "c", "d"])
rule job:
    output: "{n}/manifest.json"
    resources: gpu=1
    params: step=lambda w: json.dumps(STEP | {"config": {"name": w.n, "seconds": 3}})
    shell: "exec python program.py --step {params.step:q} --out {output:q} --work work"
""".replace("STEP", repr(step_of("x")))
    )
    command = ["snakemake", "--cores", "4", "--resources", "gpu=4", "--quiet"]
    done = subprocess.run(command, cwd=host.folder, env=host.env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    notes = host.notes()
    assert sorted(name for what, name, *_ in notes if what == "end") == ["a", "b", "c", "d"]
    assert {gpu for _, _, gpu, _ in notes} == set(host.gpus)
    for gpu in host.gpus:
        turns = [(what, name) for what, name, whose, _ in sorted(notes, key=lambda note: note[3]) if whose == gpu]
        assert [what for what, _ in turns] == ["begin", "end"] * (len(turns) // 2), turns
        assert all(turns[i][1] == turns[i + 1][1] for i in range(0, len(turns), 2)), turns
    assert done.stderr.count("waiting for a GPU: 2 may be used here, and all are taken: process ") == 2, done.stderr


def test_a_killed_step_leaves_its_gpu_free(host):
    for name in ("a", "b"):
        (host.folder / f"{name}.wait").touch()
    first, _ = host.start("a"), host.start("b")
    taken = host.until("begin", "a"), host.until("begin", "b")
    assert set(taken) == set(host.gpus)
    host.start("c")
    time.sleep(0.5)
    assert not any(name == "c" for _, name, *_ in host.notes())
    first.send_signal(signal.SIGKILL)
    assert host.until("end", "c") == taken[0]


def test_a_step_that_computes_on_the_cpu_takes_none(host):
    step = step_of("a") | {"device": "cpu"}
    command = [sys.executable, "program.py", "--step", json.dumps(step), "--work", "work", "--out", "a/manifest.json"]
    subprocess.run(command, cwd=host.folder, env=host.env, check=True)
    assert host.until("end", "a") == "None"


def test_who_waits_says_so_once_and_time_spent_waiting_is_not_the_steps(host):
    host.env["CUDA_VISIBLE_DEVICES"] = "1"
    (host.folder / "a.wait").touch()
    host.start("a")
    assert host.until("begin", "a") == host.gpus[1]
    started = time.monotonic()
    waiting = host.start("b")
    errors = waiting.stderr.readline()
    time.sleep(3)
    (host.folder / "a.wait").unlink()
    errors += waiting.communicate(timeout=60)[1]
    assert errors.count("waiting for a GPU: 1 may be used here, and all are taken: process ") == 1
    assert json.loads((host.folder / "b/run.json").read_text())["seconds"] < time.monotonic() - started - 3


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (None, ["GPU-aa1", "GPU-ab2", "GPU-b3"]),
        ("2,0", ["GPU-b3", "GPU-aa1"]),
        ("GPU-ab", ["GPU-ab2"]),
        ("GPU-a", ["GPU-aa1", "GPU-ab2"]),
        ("MIG-77", ["MIG-77"]),
        ("1,9,0", ["GPU-ab2"]),  # as in CUDA: what follows a number that no GPU has does not count
        ("", []),
        ("-1", []),
    ],
)
def test_the_gpus_that_a_process_may_take(monkeypatch, named, expected):
    monkeypatch.setattr(gpus, "here", lambda: ["GPU-aa1", "GPU-ab2", "GPU-b3"])
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert gpus.allowed() == expected


def test_a_host_without_a_driver_has_none(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert gpus.allowed() == [] and gpus.take(print) is None

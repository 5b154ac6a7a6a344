"""A training by two processes through its command line: one of them is killed, all are asked to end, and the next run goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT, warm_steps
from tests.support import small_steps, warm
from workflow_scripts.artifacts import manifests

STEPS = 120
SETTINGS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": STEPS, "logging_steps": 1}


@pytest.fixture
def training(base, slices, tmp_path):
    """training(gpus): the command, started; its processes are forks that have loaded the libraries."""
    config = small_steps.train_config("sft_v2", **SETTINGS)
    parents = {"start": base, "rows": slices["sft_v2"]}
    job = small_steps.job("train_sft", tmp_path / "run/adapter/manifest.json", parents, config)
    begun: list[subprocess.Popen] = []

    def start(gpus: int, python: str = "") -> subprocess.Popen:
        python = python or f"{warm_steps().bin()}/python"
        command = [python, "-m", "workflow_scripts.steps.train_sft", "--step", json.dumps(job.step), "--gpus", str(gpus)]
        command += ["--inputs", *map(str, job.inputs), "--out", str(job.out), "--work", str(job.work)]
        command += ["--checkpoint-minutes", "1e-9", "--log", str(tmp_path / "log")]
        env = os.environ | {"PYTHONPATH": str(ROOT), warm.PYTHON: python}
        begun.append(subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True, cwd=ROOT))
        return begun[-1]

    start.log, start.job = tmp_path / "log", job
    yield start
    for process in begun:
        process.kill()
        process.wait()


def until(condition, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def saved(job: manifests.Job) -> int:
    """The step of the last whole checkpoint."""
    found = job.work.glob("*/trainer/checkpoint-*/complete.json")
    return max((int(path.parent.name.rpartition("-")[2]) for path in found), default=0)


def rank(number: int) -> psutil.Process:
    """What stands for a rank: who waits for the fork, and takes it along."""
    for one in psutil.process_iter(["cmdline"]):
        words = one.info["cmdline"] or []
        if "--rank" in words and words[words.index("--rank") + 1] == str(number) and Path(words[1]).name != "pytest":
            return one
    raise AssertionError(f"no rank {number}")


def check_goes_on(training, there: int) -> None:
    process = training(1)
    assert process.wait(120) == 0, process.communicate()
    assert f"resumed at step {there} of {STEPS}" in training.log.read_text()
    curve = (training.job.out.parent / "metrics.csv").read_text().splitlines()
    assert (
        len({line.split(",")[0] for line in curve[1:]}) == STEPS == len(curve) - 3
    )  # each step once; the held-out rows and the end


def test_a_killed_rank_ends_the_job_with_one_line_and_the_next_run_goes_on_alone_too(training):
    process = training(2)
    until(lambda: saved(training.job) >= 3, process)
    rank(1).kill()
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 1 and not training.job.out.exists()
    assert said.splitlines() == [
        f"{training.job.out}: error: rank 1 was ended by SIGKILL. Run snakemake again to go on from the last checkpoint"
    ]
    check_goes_on(training, saved(training.job))


@pytest.mark.long
def test_sigterm_saves_at_one_step_and_the_next_run_goes_on_alone_too(training):
    process = training(2, python=sys.executable)  # a fork's stand-in would end by the signal, and the fork with it
    until(lambda: saved(training.job) >= 3, process)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143 and "ended by SIGTERM at step" in said and len(said.splitlines()) == 1
    check_goes_on(training, saved(training.job))

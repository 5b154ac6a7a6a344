"""`nodes: 2`: a training over two nodes of a real Slurm, both of which are this host; undisturbed, asked to end, and killed."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.support import several, small_steps
from tests.support.packages import packages
from tests.training.test_over_ranks import check_equal, step_of
from tests.training.test_ranks_end import saved, until
from workflow_scripts.artifacts import manifests
from workflow_scripts.plumbing import nodes
from workflow_scripts.plumbing.messages import InputError

CLUSTER = ROOT / "tests/slurm/cluster.sh"
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "srun", "salloc") if not shutil.which(name)]
pytestmark = pytest.mark.skipif(
    bool(MISSING) or os.getuid() != 0, reason=f"a Slurm of two nodes needs root, and here there is no {', '.join(MISSING)}"
)


@pytest.fixture
def begun(tmp_path):
    """begun(job, gpus, *more): a training over two nodes, in an allocation of its own."""
    processes: list[subprocess.Popen] = []

    def begin(job: manifests.Job, gpus: int, *more: str) -> subprocess.Popen:
        command = [str(CLUSTER), "salloc", "--quiet", "--nodes=2", f"--ntasks={gpus}", sys.executable, "-m"]
        command += [f"workflow_scripts.steps.{job.step['step']}", "--step", json.dumps(job.step), "--nodes", "2"]
        command += ["--gpus", str(gpus), "--checkpoint-minutes", "1e-9"]
        command += ["--inputs", *map(str, job.inputs), "--out", str(job.out), "--work", str(job.work), *more]
        env = os.environ | {"PYTHONPATH": str(ROOT), "SLURM_NODES": "2"}
        processes.append(subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True))
        return processes[-1]

    yield begin
    for process in processes:
        process.terminate()
        process.wait(60)


def ended(process: subprocess.Popen) -> str:
    said = process.communicate(timeout=300)[1]
    if process.returncode == 77:
        pytest.skip(said.strip().splitlines()[-1])
    return said


def process_of(job: manifests.Job, rank: int | None) -> psutil.Process:
    """Of a training over nodes that runs now: a rank, or who started them."""
    for one in psutil.process_iter(["cmdline"]):
        words = one.info["cmdline"] or []
        if str(job.out) in words and words[0] == sys.executable and ("--rank" in words) == (rank is not None):
            if rank is None or one.environ().get("SLURM_PROCID") == str(rank):
                return one
    raise AssertionError(f"no rank {rank}")


@pytest.mark.slow
def test_four_ranks_on_two_nodes_follow_the_losses_of_one_process(begun, base, slices, tmp_path):
    alone = small_steps.run(step_of("sft_v2", base, slices, tmp_path / "one"))
    job = step_of("sft_v2", base, slices, tmp_path / "two")
    process = begun(job, 4, "--log", str(tmp_path / "log"))
    said = ended(process)
    assert process.returncode == 0, said + (tmp_path / "log").read_text()[-3000:]
    made = manifests.read(job.out)
    check_equal(made, alone)
    info = json.loads((made.folder / "run.json").read_text())
    assert (info["gpus"], info["nodes"]) == (4, 2)
    assert "30/30" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_it_saves_when_it_is_asked_to_end_and_a_killed_rank_ends_it_with_one_line(begun, base, slices, tmp_path, capfd):
    job = step_of("sft_v2", base, slices, tmp_path / "run", max_steps=200)

    def disturbed(rank: int | None, disturb: Callable[[psutil.Process], object]) -> tuple[int, str]:
        there, process = saved(job), begun(job, 2, "--log", str(tmp_path / "log"))
        if process.poll() == 77:
            ended(process)
        until(lambda: saved(job) >= there + 3, process)
        disturb(process_of(job, rank))
        said = ended(process)
        return process.returncode, said

    def preempt(starter: psutil.Process) -> None:
        of = starter.environ()
        scancel = ["scancel", "--signal=TERM", of["SLURM_JOB_ID"]]  # to the job's steps, as Slurm does before a time limit
        subprocess.run(scancel, env=os.environ | {"SLURM_CONF": of["SLURM_CONF"]}, check=True)

    for way in (psutil.Process.terminate, preempt):
        code, said = disturbed(None, way)
        assert code == 143 and f"{job.out}: ended by SIGTERM at step " in said
    code, said = disturbed(1, psutil.Process.kill)
    assert code == 1 and not job.out.exists()
    assert f"{job.out}: error: rank 1 was ended: Killed. Run snakemake again to go on from the last checkpoint" in said
    there = saved(job)
    small_steps.run(job)
    assert f"resumed at step {there} of 200" in capfd.readouterr().out and there > 6


@pytest.mark.slow
@pytest.mark.long
def test_its_rule_asks_slurm_for_both_nodes_and_makes_what_one_process_makes(clone, tmp_path):
    """Through profiles/slurm and its executor. Slices and the base are there."""
    plugins = packages(ROOT / "tests/profiles/requirements.txt")
    for found in plugins.glob("snakemake_executor_plugin_slurm*"):
        (tmp_path / found.name).symlink_to(found)
    settings = (
        "lora: {dropout: 0.0}\nmethods: {sft: {%s train: {per_device_train_batch_size: 4, gradient_accumulation_steps: 4}}}\n"
    )
    target = "results/sft_v2/adapter/manifest.json"
    clone.snakemake(target, configs=clone.overlay(settings % ""))
    alone = several.curve(manifests.read(clone.folder / target))
    shutil.rmtree(clone.folder / "results/sft_v2")
    shutil.rmtree(clone.folder / "results/.work")
    look = ["--slurm-init-seconds-before-status-checks", "2", "--seconds-between-status-checks", "2"]
    submit = f"{shlex.join([sys.executable, '-m', 'snakemake', target, '--workflow-profile', 'profiles/slurm', *look])}"
    submit += f" --profile tests/slurm/site --configfile {shlex.join(clone.overlay(settings % 'gpus: 4, nodes: 2,'))}"
    env = os.environ | {"PYTHONPATH": str(tmp_path), "SLURM_NODES": "2"}
    script = f"{submit} && scontrol --oneliner show job"
    done = subprocess.run([CLUSTER, "bash", "-c", script], cwd=clone.folder, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode == 77:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"JobState=COMPLETED .*NumNodes=2 .*NumTasks=4 .*Comment=rule_train_sft_nodes", done.stdout)
    made = several.curve(manifests.read(clone.folder / target))
    for expected, found in zip(alone, made, strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_outside_of_slurm_it_is_said(monkeypatch, tmp_path):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    with pytest.raises(InputError, match="^nodes: 2: this is no job of a Slurm"):
        nodes.run(["true"], 2, 4, 1, Path(tmp_path), 1.0)

"""The main job of a tiny world on a Slurm, through profiles/slurm, while its jobs are cancelled, preempted, timed out and lost.

    tests/slurm/run.sh             all of it
    tests/slurm/run.sh --short     one training that is cancelled, on slices and a base that are there: a sample of it

One chain suffers all of it, and must end with the bytes of an undisturbed local run. Each disturbance comes while the training is
held by SIGSTOP, so that no machine is too fast or too slow for it. Checkpoints are ten minutes apart at first: whatever is
resumed from was written because the training heard Slurm's SIGTERM.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from tests.conftest import make_clone, warm_steps
from tests.slurm import records
from tests.support import kills

TARGET, SHORT = "results/ifeval_dpo.json", "results/sft_v2/merged/manifest.json"
PREPARED = ["results/base/manifest.json", "results/data/sft.manifest.json"]
CONFIGS = ["config/config.yaml", "tests/support/config/micro.yaml", "tests/slurm/trial.yaml"]
PROFILES = ["--workflow-profile", "profiles/slurm", "--profile", "tests/slurm/site"]
LOOKS = ["--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1"]  # each waits: cluster.sh
CHECKS = {
    "cancelled": "scancel: the retry asks for more and goes on from the checkpoint that SIGTERM brought about",
    "time limit": "near its time limit: the profile's signal reaches the training, and the retry goes on",
    "preempted": "preempted by a job of a better partition: goes on under its number when that is over",
    "drained": "node drained and its job requeued by an administrator: goes on when the node is back",
    "interrupted": "Ctrl-C: the jobs are cancelled, and the same command goes on from their checkpoint",
    "node lost": "node without power: goes on from the last checkpoint that was due",
    "requests": "every phase was a Slurm job with the GPUs, memory, time and cores that its rule asked for",
    "gpus": "a step sees as many GPUs as it asked for",
    "equal": "every result has the bytes of an undisturbed local run",
    "settled": "nothing is left to do, on the cluster or locally",
}


class Chain(kills.Runs):
    """A clone whose Snakemake submits to Slurm."""

    target = TARGET
    patient = False  # looks at the queue end when a job does; an interrupt would find Snakemake looking, always

    def environment(self) -> dict[str, str]:
        """With the cluster's commands, and the executor's plugin."""
        found = super().environment()
        found["PYTHONPATH"] += f":{os.environ['PYTHONPATH']}"
        found |= {"PATIENT_LOOKS": "1"} if self.patient else {}
        return found | {"PATH": f"{os.environ['SLURM_DIR']}/bin:{found['PATH']}"}

    def submit(self, *options: str) -> subprocess.Popen:
        looks = LOOKS if self.patient else []
        self.running = self.begin("snakemake", self.target, *PROFILES, *looks, "--configfile", *CONFIGS, *options)
        return self.running


class Training:
    """The one process of a training step, wherever below Slurm it runs."""

    def __init__(self, chain: Chain, method: str, run: str):
        self.chain, self.method, self.run = chain, method, run
        self.file = chain.log(f"{run}/train.log")
        self.process = psutil.Process()  # of the launch that is held
        self.job: dict[str, str] = {}  # Slurm's record of it
        self.gpus = ""
        self.launches: list[dict[str, str]] = []

    def found(self) -> psutil.Process | None:
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                step = process.cmdline()[1:3] == ["-m", f"workflow_scripts.steps.train_{self.method}"]
                if step and process.cwd() == str(self.chain.folder) and process.status() != psutil.STATUS_ZOMBIE:
                    return process
        return None

    def log(self) -> str:
        return self.file.read_text(errors="replace") if self.file.exists() else ""

    def hold(self, resumed: int | None = None) -> None:
        """Wait for the next launch, until it trains, and stop the clock for it. AssertionError if it resumed elsewhere."""
        begins = rf"^({self.run}: \d+/|resumed at step \d+ of)"

        def begun() -> bool:
            running = self.chain.running
            assert running.poll() is None, f"Snakemake ended with {running.returncode}:\n{self.chain.said(running)[-3000:]}"
            return bool(self.found() and re.search(begins, self.log(), re.M))

        wait(begun, f"no training of {self.run}")
        self.process = self.found() or self.process
        self.process.suspend()
        self.job = records.running(f"rule_train_{self.method}")
        self.gpus = self.process.environ().get("CUDA_VISIBLE_DEVICES", "")
        self.launches.append(self.job)
        if resumed is not None:
            assert f"resumed at step {resumed} of " in self.log(), f"not resumed at step {resumed}:\n{self.log()[-2000:]}"

    def let_go(self) -> None:
        self.file.write_text("")  # so that the next launch is seen
        self.process.resume()

    def ends_by_sigterm(self) -> tuple[int, str]:
        """Let it go on once it has been told to end. Returns the step of its checkpoint, and how long that took."""
        heard = "SIGTERM: saving"
        wait(lambda: pending(self.process, signal.SIGTERM) or heard in self.log(), "SIGTERM did not reach the training", 90)
        started = time.monotonic()
        with contextlib.suppress(psutil.NoSuchProcess):
            self.process.resume()
        wait(lambda: not self.process.is_running(), "the training did not end", 40)
        took = time.monotonic() - started
        saved = re.search(r"ended by SIGTERM at step (\d+) of \d+, with a checkpoint", self.log())
        assert saved, f"no checkpoint on SIGTERM:\n{self.log()[-2000:]}"
        self.file.write_text("")
        return int(saved[1]), f"SIGTERM to checkpoint and end {took:.1f} s"


def pending(process: psutil.Process, number: int) -> bool:
    with contextlib.suppress(OSError):
        found = re.search(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text(), re.M)
        return bool(found) and bool(int(found[1], 16) >> (number - 1) & 1)
    return False


def wait(condition: Callable[[], object], otherwise: str, seconds: float = 150) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"{otherwise} within {seconds:.0f} s"
        time.sleep(0.005)


def between_looks() -> None:
    """Wait until Snakemake has looked at the queue: while it looks, an interrupt finds no job to cancel (docs/cluster.md)."""
    mark, began = Path(os.environ["SLURM_DIR"]) / "looked", time.time()
    wait(lambda: mark.exists() and mark.stat().st_mtime > began, "Snakemake did not look at the queue", 200)
    time.sleep(2)


def scontrol(*arguments: str) -> None:
    subprocess.run(["scontrol", *arguments], check=True)


@contextlib.contextmanager
def node_without_power() -> Iterator[None]:
    """All jobs of the node die at once, and its slurmd says nothing, as long as the block runs."""
    (slurmd,) = (one for one in psutil.process_iter() if one.name() == "slurmd" and ours(one))
    slurmd.suspend()
    for stepd in [one for one in psutil.process_iter() if one.name() == "slurmstepd" and ours(one)]:
        for process in [stepd, *stepd.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    yield
    slurmd.resume()


def ours(process: psutil.Process) -> bool:
    return process.environ().get("SLURM_CONF") == os.environ["SLURM_CONF"]


class Trial:
    def __init__(self, folder: Path, short: bool):
        self.started, self.short = time.monotonic(), short
        self.passed: set[str] = set()
        self.local = kills.Runs(make_clone(folder / "local").folder)
        if short:
            self.local.finish(*PREPARED, configs=CONFIGS)
        self.chain = Chain(self.local.copy(folder / "chain").folder)
        self.chain.target, self.chain.patient = SHORT if short else TARGET, short
        self.said = ""

    @contextlib.contextmanager
    def check(self, name: str) -> Iterator[list[str]]:
        """Prints how a check ended; a failed one ends the trial."""
        evidence: list[str] = []
        try:
            yield evidence
        except AssertionError as error:
            print(f"FAILED {name}: {error}", flush=True)
            raise SystemExit(1) from error
        self.passed.add(name)
        print(f"ok {name}: {'; '.join(evidence)} ({time.monotonic() - self.started:.0f} s)", flush=True)

    def disturb_sft(self) -> None:
        """Four launches of one training are ended, each in another way; the first one alone in a short trial."""
        sft = Training(self.chain, "sft", "sft_v2")
        sft.hold()
        self.cancel(sft)
        if not self.short:
            self.time_out_preempt_and_drain(sft)
        self.seen("train_sft", sft)
        sft.let_go()

    def cancel(self, sft: Training) -> None:
        with self.check("cancelled") as evidence:
            first = sft.job
            subprocess.run(["scancel", first["JobId"]], check=True)
            step, took = sft.ends_by_sigterm()
            sft.hold(resumed=step)
            state = records.job(first["JobId"])["JobState"]
            assert state == "CANCELLED" and sft.job["JobId"] != first["JobId"]
            script = subprocess.run(["scontrol", "write", "batch_script", sft.job["JobId"], "-"], capture_output=True, text=True)
            assert "--attempt 2" in script.stdout
            memory = [records.requested(job)["mem_mb"] for job in (first, sft.job)]
            assert memory[1] == 2 * memory[0], memory
            evidence += [f"job {first['JobId']} {state}", took, f"job {sft.job['JobId']} resumed at step {step}"]
            evidence += [f"{memory[0]} MB, then {memory[1]} MB"]

    def time_out_preempt_and_drain(self, sft: Training) -> None:
        with self.check("time limit") as evidence:
            second = sft.job
            scontrol("update", f"JobId={second['JobId']}", "EndTime=now+299")
            step, took = sft.ends_by_sigterm()
            sft.hold(resumed=step)
            state = records.job(second["JobId"])["JobState"]
            assert state in ("FAILED", "TIMEOUT") and sft.job["JobId"] != second["JobId"]
            evidence += [f"job {second['JobId']} {state}", took, f"job {sft.job['JobId']} resumed at step {step}"]

        with self.check("preempted") as evidence:
            third = sft.job["JobId"]
            urgent = ["sbatch", "--parsable", "--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"]
            subprocess.run(urgent, check=True, stdout=subprocess.DEVNULL)
            step, took = sft.ends_by_sigterm()
            sft.hold(resumed=step)
            assert sft.job["JobId"] == third and sft.job["Restarts"] == "1", sft.job
            evidence += [f"job {third} requeued by Slurm", took, f"resumed at step {step}"]

        with self.check("drained") as evidence:
            scontrol("update", "NodeName=node1", "State=DRAIN", "Reason=repair")
            scontrol("requeue", third)
            step, took = sft.ends_by_sigterm()
            wait(lambda: records.job(third)["JobState"] == "PENDING", "not requeued")
            assert "DRAIN" in records.node_state(), records.node_state()
            scontrol("update", "NodeName=node1", "State=RESUME")
            sft.hold(resumed=step)
            assert sft.job["JobId"] == third and sft.job["Restarts"] == "2", sft.job
            evidence += [f"job {third} requeued", took, f"resumed at step {step}"]

    def disturb_dpo(self, first: subprocess.Popen) -> subprocess.Popen:
        """The command is interrupted and typed again; then the node fails. Returns the second command."""
        dpo = Training(self.chain, "dpo", "dpo")
        dpo.hold()

        with self.check("interrupted") as evidence:
            between_looks()
            os.kill(first.pid, signal.SIGINT)
            step, took = dpo.ends_by_sigterm()
            code = first.wait(200)  # Snakemake first waits for its next look at the queue
            assert code, "Snakemake ended with 0, as if nothing had happened"
            self.said = self.chain.said(first)
            again = self.chain.submit("--config", "checkpoint_minutes=0.000001")
            dpo.hold(resumed=step)
            assert records.job(dpo.launches[0]["JobId"])["JobState"] == "CANCELLED"
            evidence += [f"Snakemake ended with {code}", took, f"job {dpo.job['JobId']} resumed at step {step}"]

        with self.check("node lost") as evidence:
            (home,) = (folder.parent for folder in self.chain.folder.glob("results/.work/*/trainer"))
            dpo.let_go()
            wait(lambda: max(kills.sealed(home / "trainer"), default=0) > step + 1, "no checkpoint")
            dpo.process.suspend()
            (last, *_) = reversed(kills.sealed(home / "trainer"))
            dpo.file.write_text("")
            with node_without_power():
                scontrol("update", "NodeName=node1", "State=DOWN", "Reason=lost")
            subprocess.run(["scontrol", "update", "NodeName=node1", "State=RESUME"], capture_output=True)  # or it is back already
            dpo.hold(resumed=last)
            assert dpo.job["JobId"] == dpo.launches[-2]["JobId"] and dpo.job["Restarts"] == "1", dpo.job
            evidence += [f"job {dpo.job['JobId']} requeued by Slurm, resumed at step {last}"]
        self.seen("train_dpo", dpo)
        dpo.let_go()
        return again

    def seen(self, rule: str, training: Training) -> None:
        visible = len(training.gpus.split(",")) if training.gpus else 0
        asked = records.requested(training.job)["gpu"]
        self.visible = getattr(self, "visible", [])
        self.visible.append((rule, asked, visible, training.gpus))

    def judge(self) -> None:
        with self.check("requests") as evidence:
            evidence += records.compare(self.said)
        with self.check("gpus") as evidence:
            assert {asked for _, asked, _, _ in self.visible} == ({1} if self.short else {1, 2})
            for rule, asked, visible, devices in self.visible:
                assert asked == visible, f"{rule} asked for {asked} GPUs and sees CUDA_VISIBLE_DEVICES={devices}"
                evidence += [f"{rule} CUDA_VISIBLE_DEVICES={devices}"]
        with self.check("equal") as evidence:
            assert self.undisturbed.wait(600) == 0, self.local.said(self.undisturbed)[-3000:]
            expected = kills.results(self.local)
            kills.check_whole(self.chain, expected)
            missing = set(expected) - set(kills.results(self.chain))
            assert not missing and self.chain.target.removeprefix("results/") in expected, f"missing: {sorted(missing)}"
            evidence += [f"{len(expected)} files"]
        with self.check("settled"):
            for profile in (PROFILES, []):
                plan = self.chain.snakemake("-n", self.chain.target, *profile, configs=CONFIGS)
                assert "Nothing to be done" in plan.stdout + plan.stderr, plan.stdout + plan.stderr

    def run(self) -> None:
        first = again = None
        psutil.Process(warm_steps().process.pid).nice(10)
        self.undisturbed = self.local.start(self.chain.target, configs=CONFIGS, warmed=True)
        try:
            first = self.chain.submit()
            self.disturb_sft()
            again = first if self.short else self.disturb_dpo(first)
            code = again.wait(600)
            self.said += self.chain.said(again)
            assert code == 0, self.said[-4000:]
            self.judge()
        finally:
            for process in (self.undisturbed, first, again):
                if process is not None:
                    kills.kill_group(process)


if __name__ == "__main__":
    Trial(Path(os.environ["SLURM_DIR"]) / "clones", short="--short" in sys.argv).run()

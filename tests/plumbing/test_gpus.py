"""Jobs on GPUs, on hosts that pretend to have some: who goes where, who waits, and what dies with its process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.support.pretended_gpus import PretendedGpus
from workflow_scripts.plumbing import cards, gpus

# A step that says when it has which GPU, uses so much of it, and works for as long as its config says, or until a file goes.
PROGRAM = """
import os, sys, time
from pathlib import Path
from workflow_scripts.artifacts import manifests
from workflow_scripts.plumbing import gpus
from workflow_scripts.steps import cli

class OutOfMemoryError(RuntimeError):
    pass

def main(job):
    def note(what):
        with open("notes", "a") as file:
            file.write(f"{what} {job.config['name']} {os.environ.get('CUDA_VISIBLE_DEVICES')} {time.time()}\\n")

    note("begin")
    mine = gpus.held and (gpus.held.bytes or gpus.WHOLE * 2**20)
    if mine and job.config.get("takes", 0) * 2**20 > mine - gpus.CONTEXT:
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
    if gpus.held:
        Path(f"using/{os.getpid()}").write_text(f"{gpus.held.gpu} {job.config.get('takes', 0)}")
    time.sleep(job.config.get("seconds", 0))
    while Path(job.config["name"] + ".wait").exists():
        time.sleep(0.02)
    note("end")
    with manifests.complete(job, "thing", {}) as draft:
        (draft.folder / "data.txt").write_text(job.config["name"])
    cli._peak = lambda: job.config.get("takes", 0) * 2**20

gpus.SECONDS = 0.2
cli.run(main, "A step for tests.")
"""


def step_of(name: str, **config) -> dict:
    return {
        "step": "train_thing",
        "config": {"name": name} | config,
        "parents": {},
        "packages": {},
        "threads": 1,
        "device": "cuda",
    }


class Host(PretendedGpus):
    """A folder with the step, on a host of pretended cards."""

    def __init__(self, folder: Path, *totals: int):
        super().__init__(folder, *totals)
        (folder / "program.py").write_text(PROGRAM)
        self.env = self.environment() | {"PYTHONPATH": str(ROOT)}
        self.begun: dict[str, subprocess.Popen] = {}

    def start(self, name: str, asks: int | None = None, **config) -> subprocess.Popen:
        """asks: MiB; a card for itself if None."""
        command = [sys.executable, "program.py", "--step", json.dumps(step_of(name, **config)), "--work", "work"]
        command += ["--out", f"{name}/manifest.json", *(["--gpu-mb", str(asks)] if asks is not None else [])]
        command += ["--gpus", str(config.get("gpus", 1))]
        pipe = subprocess.PIPE
        self.begun[name] = subprocess.Popen(command, cwd=self.folder, env=self.env, stdout=pipe, stderr=pipe, text=True)
        return self.begun[name]

    def hold(self, name: str, asks: int | None = None, **config) -> tuple[subprocess.Popen, str]:
        """A step that works until `release`, and the GPU that it is on."""
        (self.folder / f"{name}.wait").touch()
        process = self.start(name, asks, **config)
        return process, self.until("begin", name)

    def release(self, name: str) -> None:
        (self.folder / f"{name}.wait").unlink()
        assert self.begun[name].wait(60) == 0

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

    def waits(self, name: str, seconds: float = 0.8) -> bool:
        time.sleep(seconds)
        return not any(noted == name for _, noted, *_ in self.notes())


@pytest.fixture
def host(tmp_path):
    made = Host(tmp_path, 16_000, 16_000)
    yield made
    for process in made.begun.values():
        process.kill()
        process.communicate()


def test_jobs_share_a_card_as_far_as_it_has_room_and_the_emptiest_goes_first(host):
    first, second = host.gpus
    assert host.hold("a", 6000)[1] == first  # both are empty: the driver's order
    assert host.hold("b", 3000)[1] == second
    assert host.hold("c", 9000)[1] == second  # 13,000 were left there, 10,000 on the other
    assert host.hold("d", 9000)[1] == first
    process = host.start("e", 5000)  # 1,000 and 4,000 are left
    assert host.waits("e")
    host.release("b")
    assert host.until("end", "e") == second
    errors = process.communicate(timeout=60)[1]
    assert errors.count("waiting for a GPU: asks for 4.9 GiB; 2 may be used here, and none has room: GPU-") == 1
    assert "since" in errors and ": 8.8 GiB" in errors


def test_several_cards_are_taken_in_one_go_and_each_process_sees_one(host):
    one, other = host.gpus
    host.hold("a", 1000)
    process = host.start("both", gpus=2)
    assert host.waits("both")  # one is free: whoever took that and waited for the other could wait for one that does the same
    host.release("a")
    assert process.wait(60) == 0
    assert sorted(gpu for what, name, gpu, _ in host.notes() if (what, name) == ("begin", "both")) == sorted(host.gpus)
    assert "asks for 2 cards for itself; 2 may be used here, and too few have room" in process.communicate()[1]
    info = json.loads((host.folder / "both/run.json").read_text())
    assert info["gpus"] == 2
    host.hold("c")  # both were given back
    host.hold("d")


def test_more_cards_than_there_are_is_one_line(host):
    process = host.start("many", gpus=3)
    assert process.wait(60) == 1
    said = process.communicate()[1]
    assert "gpus: 3 GPUs are asked for, and 2 may be used here" in said and said.count("\n") == 1


@pytest.mark.slow
def test_who_does_not_say_how_much_gets_a_card_for_itself(host):
    assert host.hold("a")[1] != host.hold("b", 1000)[1]
    host.start("c")
    host.start("d", 20_000)  # more than a card has
    assert host.waits("c") and host.waits("d", 0)
    host.release("a")
    host.until("end", "c")
    host.until("end", "d")
    host.start("e", 1000)
    host.until("end", "e")


@pytest.mark.slow
def test_who_came_first_goes_first_even_if_less_would_fit(host):
    """Else a stream of small jobs would keep a large one waiting for ever."""
    host.hold("a", 9000)
    host.hold("b", 9000)
    host.start("large", 12_000)
    assert host.waits("large")
    host.start("small", 1000)
    assert host.waits("small", 1.0)
    host.release("a")
    host.until("end", "large")
    host.until("end", "small")


@pytest.mark.slow
def test_who_waits_for_a_whole_card_lets_others_pass_for_a_while(host):
    """Else the longest job on the card would keep all the others waiting with it; and not for ever."""
    host.env["CUDA_VISIBLE_DEVICES"] = host.gpus[0]
    host.hold("a", 9000)
    host.start("whole")
    assert host.waits("whole")
    host.start("small", 1000)
    host.until("end", "small")
    for path in gpus.LEDGER.glob("waits-*"):
        waiting = json.loads(path.read_text())
        if waiting["gpus"] == [host.gpus[0]]:
            with open(path, "r+") as file:  # as if it had come long ago
                json.dump(waiting | {"since": waiting["since"] - gpus.PATIENCE}, file)
                file.truncate()
    host.start("late", 1000)
    assert host.waits("late", 1.0)
    host.release("a")
    host.until("end", "whole")
    host.until("end", "late")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_step_leaves_its_room_free(host, how):
    first, gpu = host.hold("a")
    host.hold("b")
    host.start("c")
    assert host.waits("c")
    first.send_signal(how)
    assert host.until("end", "c") == gpu


@pytest.mark.slow
def test_who_is_killed_while_it_waits_keeps_nobody_waiting(host):
    host.hold("a", 12_000)
    host.hold("b", 12_000)
    large = host.start("large", 15_000)
    assert host.waits("large")
    host.start("small", 3000)
    assert host.waits("small")
    large.kill()
    host.until("end", "small")


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_what_others_use_is_not_given_away(host, named):
    """Whether the driver says which process uses what, or does not, as in a container."""
    first, second = host.gpus
    host.cards[second]["foreign"] = 16_000
    host.cards[first] |= {"foreign": 6000, "names": named}
    host.say()
    assert host.hold("a", 4000, takes=500)[1] == first
    host.start("b", 7000)
    assert host.waits("b")
    host.cards[first]["foreign"] = 4000
    host.say()
    if named:
        assert host.until("end", "b") == first
    else:  # it can't be told from what `a` has not taken yet: until `a` ends
        assert host.waits("b")
        host.release("a")
        assert host.until("end", "b") == first
    assert "others use 15.6 GiB" in host.begun["b"].communicate()[1]


@pytest.mark.slow
def test_a_desktop_on_the_card_does_not_keep_a_job_that_needs_nearly_all_of_it_waiting(host):
    for card in host.cards.values():
        card["foreign"] = 900
    host.say()
    host.start("a", 15_900)
    host.until("end", "a")


@pytest.mark.slow
def test_a_step_that_needs_more_than_it_asked_for_fails_alone_and_is_done_again_with_a_card_for_itself(host):
    neighbours = {name: host.hold(name, 4000, takes=3000)[1] for name in ("a", "b")}
    process = host.start("c", 2000, takes=5000, seconds=0.1)
    host.until("begin", "c")
    time.sleep(1.5)
    assert process.poll() is None
    for name in neighbours:
        host.release(name)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 0, errors
    assert "2.0 GiB of the GPU were asked for, and are not enough: OutOfMemoryError: CUDA out of memory" in errors
    assert "Again, with a card for itself" in errors and "waiting for a GPU: asks for a card for itself" in errors
    assert (host.folder / "c/data.txt").read_text() == "c"
    # What was found is asked for by the next one of this kind and estimate, which shares the card again.
    found = json.loads((host.folder / "work/gpu_needs/train_thing-2000.json").read_text())["mebibytes"]
    assert found == int(gpus.share(5000 * 2**20) / 2**20) + 1
    process, gpu = host.hold("d", 2000, takes=5000)
    assert host.hold("e", 15_000)[1] != gpu  # 14,000 would have been left beside 2,000
    host.release("d")
    assert "not enough" not in process.communicate(timeout=60)[1] and process.returncode == 0


@pytest.mark.slow
def test_a_step_that_has_a_card_for_itself_and_lacks_memory_says_what_to_do(host):
    process = host.start("a", takes=10**10)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert (
        "a/manifest.json: error: it had the GPU for itself. `make fits` names the keys that make it smaller. OutOfMemoryError"
        in errors
    )


@pytest.mark.slow
def test_seconds_that_jobs_share_a_card_are_shared(host):
    shared, own = host.gpus
    host.cards[own]["foreign"] = 15_000
    host.say()
    assert host.hold("a", 6000)[1] == host.hold("c", 6000)[1] == shared
    host.cards[own]["foreign"] = 0
    host.say()
    assert host.hold("b", 6000)[1] == own
    time.sleep(3)
    for name in "acb":
        host.release(name)
    facts = {name: json.loads((host.folder / name / "run.json").read_text()) for name in "abc"}
    times = [when for _, _, gpu, when in host.notes() if gpu == shared]
    assert facts["a"]["gpu_seconds"] + facts["c"]["gpu_seconds"] == pytest.approx(max(times) - min(times), abs=1.0)
    assert 1.5 < facts["c"]["gpu_jobs"] <= 2
    assert facts["b"]["gpu_jobs"] == 1 and facts["b"]["gpu_seconds"] == pytest.approx(facts["b"]["seconds"], abs=0.5)


def test_a_step_that_computes_on_the_cpu_takes_none(host):
    step = step_of("a") | {"device": "cpu"}
    command = [sys.executable, "program.py", "--step", json.dumps(step), "--work", "work", "--out", "a/manifest.json"]
    subprocess.run(command, cwd=host.folder, env=host.env, check=True)
    assert host.until("end", "a") == "None"


@pytest.mark.slow
def test_time_spent_waiting_is_not_the_steps(host):
    host.env["CUDA_VISIBLE_DEVICES"] = "1"
    assert host.hold("a")[1] == host.gpus[1]
    started = time.monotonic()
    waiting = host.start("b")
    assert "1 may be used here" in waiting.stderr.readline()
    time.sleep(2)
    host.release("a")
    assert waiting.wait(60) == 0
    assert json.loads((host.folder / "b/run.json").read_text())["seconds"] < time.monotonic() - started - 2


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
    monkeypatch.setattr(cards, "here", lambda: {gpu: cards.Card(gpu, None, 0) for gpu in ("GPU-aa1", "GPU-ab2", "GPU-b3")})
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert cards.allowed() == expected


@pytest.mark.slow
def test_a_card_of_which_the_driver_says_no_size_is_not_shared(host):
    (host.folder / "bin/nvidia-smi").write_text(f"#!/bin/sh\necho '{host.gpus[0]}, [N/A], [N/A], [N/A]'\n")
    host.hold("a", 1000)
    host.start("b", 1000)
    assert host.waits("b")
    host.release("a")
    host.until("end", "b")


def test_a_host_without_a_driver_has_none(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert cards.allowed() == [] and gpus.take(print) is None


@pytest.mark.parametrize(
    "text",
    ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", "Triton Error [CUDA]: out of memory"],
)
def test_whoever_says_that_the_gpu_has_no_memory_is_understood(text):
    try:
        raise ValueError("while computing") from RuntimeError(text)
    except ValueError as error:
        assert gpus.out_of_memory(error)
    assert not gpus.out_of_memory(RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"))


def test_a_ledger_that_is_not_one_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(gpus, "LEDGER", tmp_path / "ledger")
    (tmp_path / "ledger").mkdir(mode=0o755)
    monkeypatch.setattr(cards, "allowed", lambda: ["GPU-1"])
    with pytest.raises(gpus.InputError, match="ledger: not the folder in which the users of this host note who is on which GPU"):
        gpus.take(print)


def test_users_of_a_host_share_one_ledger(host):
    """Its folder and files are for all, whatever the umask; nobody can clear away another's."""
    old = os.umask(0o077)
    try:
        host.hold("a", 1000)
    finally:
        os.umask(old)
    assert gpus.LEDGER.stat().st_mode & 0o7777 == 0o1777
    mine = [path for path in gpus.LEDGER.iterdir() if path.name == "lock" or host.gpus[0] in path.read_text()]
    assert [path.stat().st_mode & 0o777 for path in mine] == [0o644, 0o644]

"""The ranks of a job that has several nodes of a Slurm, started by `srun` inside of it. Plumbing: decides no number.

As on one host (plumbing/launch.py), who starts them computes nothing and watches. They meet in a folder that all nodes see, by
notes, and by a store at the first one's address (training/exchange.py). Signals, and this process's end, reach them by standard
input, which srun hands to all; from srun itself a signal would be the end of them at once.
"""

import json
import os
import re
import shutil
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from workflow_scripts.plumbing import launch, ranks
from workflow_scripts.plumbing.messages import InputError

TASK = re.compile(r"error: \S+: tasks? (\d+)\S*: (.+)")  # what srun says of one that ended badly
SPOKEN = ("Exited with exit code", "Terminated")  # it ended itself, or with the others: its note says why


def run(command: list[str], nodes: int, count: int, threads: int, logs: Path, patience: float) -> launch.Ended | None:
    """Run `command` once for each of `count` ranks, shared evenly by the nodes. None if all end well.

    What they say is in logs/rankN.log; logs: a folder that all nodes see. InputError outside of a Slurm job.
    """
    if "SLURM_JOB_ID" not in os.environ or not shutil.which("srun"):
        raise InputError(f"nodes: {nodes}: this is no job of a Slurm, where alone there are several; leave `nodes` away")
    logs = logs.absolute()
    folder = logs / "meeting"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    words = ["srun", "--overlap", f"--nodes={nodes}", f"--ntasks={count}", f"--ntasks-per-node={count // nodes}"]
    words += [f"--cpus-per-task={threads}", "--distribution=block", "--kill-on-bad-exit=1", "--input=all"]
    words += [f"--output={logs}/rank%t.log", *command, "--rank", "-1", "--meet", str(folder)]
    with open(logs / "srun.log", "w+") as said:
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stderr=said, start_new_session=True)
        stdin = process.stdin
        assert stdin is not None
        try:
            with launch.on_signals(lambda number: ranks.pass_to(stdin, number)):
                late = launch.Late(folder, count, patience)
                while (code := process.poll()) is None:
                    if ended := late.look():
                        return ended
                    time.sleep(launch.LOOK)
            said.seek(0)
            return _told(code, folder, logs, said.read(), count)
        finally:
            with suppress(OSError):
                stdin.close()
            if process.poll() is None:
                process.terminate()  # ends the ranks as well
                with suppress(subprocess.TimeoutExpired):
                    process.wait(60)
                process.kill()
                process.wait()


def _told(code: int, folder: Path, logs: Path, said: str, count: int) -> launch.Ended | None:
    if not code:
        return None
    found = [one for rank in range(count) if (one := launch.noted(folder, rank, logs)) is not None]
    if (first := TASK.search(said)) and not first[2].startswith(SPOKEN):
        found.append(launch.Ended("killed", int(first[1]), f"rank {first[1]} was ended: {first[2]}"))
    if not found:
        last = (said.strip().splitlines() or ["it said nothing"])[-1]
        return launch.Ended("killed", 0, f"srun ended with status {code}: {last}")
    return min(found, key=lambda one: launch.ORDER.index(one.kind))


def take_card() -> None:
    """See one of the cards that the job has on this node, where it has any: another one than the other ranks there."""
    place = int(os.environ["SLURM_LOCALID"])
    if cards := [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]:
        if place >= len(cards):
            raise InputError(f"nodes: {place + 1} ranks on this node, which gave the job {len(cards)} GPUs; ask it for more")
        os.environ["CUDA_VISIBLE_DEVICES"] = cards[place]


def write_address(folder: Path, address: str, port: int) -> None:
    """Where the first rank's store is to be found."""
    part = folder / ".address"
    part.write_text(json.dumps([address, port]))
    os.replace(part, folder / "address")


def read_address(folder: Path, patience: float = ranks.PATIENCE) -> tuple[str, int]:
    until = time.monotonic() + patience
    while True:
        with suppress(OSError, ValueError):
            os.listdir(folder)  # a network file system looks again
            address, port = json.loads((folder / "address").read_text())
            return address, port
        if time.monotonic() > until:
            raise ranks.Lost(f"rank {ranks.number}: the first rank did not say within {patience:.0f} s where it is")
        time.sleep(0.1)

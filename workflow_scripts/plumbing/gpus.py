"""One GPU for one step: on a host with several, each step takes one of its own. Plumbing: decides no number.

Snakemake counts GPUs and does not say which one a job gets (its issue 281): two jobs of a host would both take the first. So a
step that computes on a GPU locks one before it loads anything, and sees only that one (CUDA_VISIBLE_DEVICES). The lock is an
flock: it dies with its process, whatever ends that. It is named by the GPU's own id, not by its number, which in a Slurm job or
a container starts at 0 on every card.

Under a scheduler that hands out GPUs, the variable is set already: the step locks one of those, and finds it free.
"""

import fcntl
import os
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from workflow_scripts.plumbing.messages import InputError

LOCKS = Path(f"/tmp/phaseline-gpus-{os.getuid()}")  # not TMPDIR: two shells may disagree on that
SECONDS = 1.0  # between two looks at GPUs that are all taken


def here() -> list[str]:
    """Ids of this host's GPUs in the driver's order; none where there is no NVIDIA driver."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=uuid", "--format=csv,noheader"], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.startswith("GPU-")] if done.returncode == 0 else []


def allowed() -> list[str]:
    """Ids of the GPUs that this process may take: those that CUDA_VISIBLE_DEVICES names, by number or id, else all of the host.

    Numbers are nvidia-smi's. As in CUDA, a number that no GPU has ends the list.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return here()
    ids, known = [], here()
    for entry in filter(None, (part.strip() for part in named.split(","))):
        if not entry.isdigit():
            ids += [one for one in known if one.startswith(entry)] or ([entry] if entry != "-1" else [])
        elif not known:
            ids.append(entry)
        elif int(entry) < len(known):
            ids.append(known[int(entry)])
        else:
            break
    return ids


def _try(gpu: str) -> IO[str] | None:
    """The open file that holds the lock of a GPU, None if another process has it."""
    file = open(LOCKS / f"{gpu.replace('/', '_')}.lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


def take(say: Callable[[str], None]) -> IO[str] | None:
    """Lock one of the GPUs that this process may take, and make it the only one that it sees.

    Waits while all are taken, and says so once. The lock holds until the returned file is closed or the process ends. None where
    there is no GPU: whoever loads torch then says what is missing.
    """
    if not (ids := allowed()):
        return None
    LOCKS.mkdir(mode=0o700, exist_ok=True)
    if LOCKS.stat().st_uid != os.getuid():
        raise InputError(f"{LOCKS}: belongs to somebody else, and holds the locks of this user's GPUs; have it removed")
    told = False
    while True:
        for gpu in ids:
            if file := _try(gpu):
                os.environ["CUDA_VISIBLE_DEVICES"] = gpu
                return file
        if not told:
            holders = "; ".join((LOCKS / f"{gpu.replace('/', '_')}.lock").read_text() or "another process" for gpu in ids)
            say(f"waiting for a GPU: {len(ids)} may be used here, and all are taken: {holders}")
            told = True
        time.sleep(SECONDS)

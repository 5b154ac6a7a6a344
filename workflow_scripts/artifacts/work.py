"""Locks, and outputs that appear whole or not at all. Plumbing: decides no number.

A step works in `results/.work/<fingerprint>/stage`. When all its files are there, the folder is renamed to `done`, and
its files are put in place one by one by rename, the manifest last. `done` stays (as hard links: no extra space) until
Snakemake has recorded the phase, so that a kill in between, or a second Snakemake that deletes the outputs before it runs
the same step, costs nothing: the same fingerprint is published again.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from workflow_scripts.artifacts.fingerprint import file_sha256
from workflow_scripts.plumbing.messages import InputError

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


def place(out: Path) -> str:
    """The name of the lock of an output's place: steps of an older and of a newer config that make the same file take turns."""
    return f"place-{hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:24]}"


def _lock(work: Path, name: str, taken: Callable[[str], None]) -> IO[str]:
    """An open file that holds the lock of this name. Who finds it taken waits, and is told who has it by `taken`.

    The lock dies with its process, whatever ends that. InputError where the file system has no locks: nothing weaker would do,
    since a lock that outlives its process stops who comes next, and one that others do not see lets them in.
    """
    locks = work / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    file = open(locks / f"{name}.lock", "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            raise InputError(
                f"{locks}: its file system has no file locks (flock: {error.strerror}), and results need them: two runs would "
                "write one file. Lustre has them when it is mounted with -o flock, NFS where its lock service runs: ask who "
                "mounts it, or put `pathvars: results` of the config on a file system that has locks"
            ) from None
        if not isinstance(error, BlockingIOError):
            raise
        file.seek(0)
        taken(file.read().strip() or "another process")
        fcntl.flock(file, fcntl.LOCK_EX)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return file


@contextlib.contextmanager
def exclusive(work: Path, fingerprint: str, say: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock of a step, or of a place."""
    with _lock(work, fingerprint, lambda holder: say(f"waiting: the same output is being made by {holder}")):
        yield


def turn(work: Path, results: str) -> IO[str]:
    """Hold the lock of a results folder until the file is closed or the process ends: for who plans, or writes records."""

    def say(holder: str) -> None:
        print(f"{results}: waiting: another run works on these results: {holder}", file=sys.stderr, flush=True)

    return _lock(work, "snakemake", say)


def claim(work: Path, fingerprint: str, out: Path, step: dict) -> None:
    """Say whose working folder this is, before anything is in it: for whoever clears up after a kill."""
    home = work / fingerprint
    home.mkdir(parents=True, exist_ok=True)
    part = home / f"where.json.{os.getpid()}"
    part.write_text(json.dumps({"out": str(out), "step": step}, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, home / "where.json")


def whole(manifest: Path, fingerprint: str, folder: Path) -> bool:
    """True if the manifest is of this fingerprint and each file that it lists is in `folder` with its sha256."""
    try:
        data = json.loads(manifest.read_text())
        return data["fingerprint"] == fingerprint and all(
            file_sha256(folder / name) == sha256 for name, sha256 in data["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def publish(done: Path, out: Path) -> None:
    """Put the files of `done` beside `out`, each by rename, the manifest (`out`) last."""
    out.parent.mkdir(parents=True, exist_ok=True)
    for file in sorted(done.iterdir(), key=lambda path: (path.name == out.name, path.name)):
        for left in out.parent.glob(f".{file.name}.*.part"):  # by a kill: the lock of the place is held here
            left.unlink()
        part = out.parent / f".{file.name}.{os.getpid()}.part"
        try:
            os.link(file, part)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, part)
        os.replace(part, out.parent / file.name)


def republish(work: Path, fingerprint: str, out: Path) -> bool:
    """True if the step is already made: its outputs are in place, or its finished copy was put in place now."""
    if whole(out, fingerprint, out.parent):
        return True
    done = work / fingerprint / "done"
    if whole(done / out.name, fingerprint, done):
        publish(done, out)
        return True
    return False

"""Starts the ranks of a job on this host, and watches them: one that ends ends all, and one line says which it was. Plumbing:
decides no number.

Who starts them holds the step's locks and its GPUs, and computes nothing. A rank sees one card. Signals are passed on; if this
process is killed, the ranks die with it (plumbing/ranks.py). A rank that does not come to an exchange is told by the notes in
which each counts its own: after `patience` all are ended, and the line names it.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from workflow_scripts.plumbing import ranks

LOOK = 0.1  # seconds between two looks
GRACE = 5.0  # seconds for the others to say how they end, once one has
ORDER = ("killed", "memory", "input", "error", "interrupted", "lost")  # what is told, where they end by several


@dataclass
class Ended:
    """How the ranks ended badly. kind: as in `ranks.note_end`, or `killed`, or `late`."""

    kind: str
    rank: int
    text: str


def this_command() -> list[str]:
    """The one that runs, to run it again: with `-m` where it was started so."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return [sys.executable, *(["-m", spec.name, *sys.argv[1:]] if spec else sys.orig_argv[1:])]


def run(
    command: list[str],
    cards: list[str] | None,
    count: int,
    logs: Path,
    patience: float = ranks.PATIENCE,
    keep: tuple[int, ...] = (),
) -> Ended | None:
    """Run `command` once for each rank, with `--rank N --meet FOLDER` behind it. None if all end well.

    cards: the GPU of each rank, where it has one; keep: descriptors that they have too. The first rank writes where this process
    does, the others into logs/rankN.log.
    """
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ranks.") as name:
        folder, processes = Path(name), list[subprocess.Popen]()
        try:
            for rank in range(count):
                env = os.environ | ({"CUDA_VISIBLE_DEVICES": cards[rank]} if cards else {})
                with open(logs / f"rank{rank}.log", "wb") as log:
                    processes.append(
                        subprocess.Popen(
                            [*command, "--rank", str(rank), "--meet", name],
                            stdin=subprocess.PIPE,
                            stdout=log if rank else None,
                            stderr=log if rank else None,
                            env=env,
                            pass_fds=keep,
                            start_new_session=True,  # Ctrl-C comes once, from here
                        )
                    )
            with on_signals(lambda number: _send(processes, number)):
                return _watch(processes, folder, logs, patience)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    process.kill()
                process.wait()


def _send(processes: list[subprocess.Popen], number: int) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            process.send_signal(number)


@contextmanager
def on_signals(do: Callable[[int], None]) -> Iterator[None]:
    """Call `do` for SIGTERM and Ctrl-C, in place of what they do."""

    def pass_on(number: int, frame: object) -> None:
        do(number)

    before: dict[signal.Signals, Callable | int | None] = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(processes: list[subprocess.Popen], folder: Path, logs: Path, patience: float) -> Ended | None:
    ended_at, late = None, Late(folder, len(processes), patience)
    while True:
        codes = [process.poll() for process in processes]
        if any(codes) and ended_at is None:
            ended_at = time.monotonic()
        if all(code is not None for code in codes) or ended_at is not None and time.monotonic() - ended_at > GRACE:
            return _told(codes, folder, logs)
        if (ended := late.look()) and ended_at is None:
            return ended
        time.sleep(LOOK)


class Late:
    """Looks whether a rank keeps the others waiting for too long."""

    def __init__(self, folder: Path, count: int, patience: float):
        self.folder, self.count, self.patience = folder, count, patience
        self.since, self.apart = time.monotonic(), tuple[int, ...]()

    def look(self) -> Ended | None:
        at = [ranks.met(self.folder, rank) for rank in range(self.count)]
        if (now := tuple(met for met, _ in at)) != self.apart:
            self.apart, self.since = now, time.monotonic()
        late = min(range(self.count), key=lambda rank: at[rank][0])
        if time.monotonic() - self.since <= self.patience or at[late][0] == max(now):
            return None
        met, what = max(at)
        said = f"rank {late} did not come to exchange {met} ({what}) within {self.patience:.0f} s, and all were ended"
        return Ended("late", late, said)


def _told(codes: list[int | None], folder: Path, logs: Path) -> Ended | None:
    """What to say of ranks that have ended; those that have not are of no interest."""
    found = []
    for rank, code in enumerate(codes):
        if not code:
            continue
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        found.append(noted(folder, rank, logs) or Ended("killed", rank, f"rank {rank} {how}"))
    return min(found, key=lambda one: ORDER.index(one.kind), default=None)


def noted(folder: Path, rank: int, logs: Path) -> Ended | None:
    """How a rank said that it ended; None if it did not say."""
    try:
        kind, text = json.loads((folder / f"ended-{rank}").read_text())
    except (OSError, ValueError):
        return None
    if kind in ("error", "memory"):
        text = f"rank {rank}: {text}" + (f" (details: {logs / f'rank{rank}.log'})" if rank else "")
    return Ended(kind, rank, text)

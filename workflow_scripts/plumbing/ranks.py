"""One job by several processes, its ranks: who this one is, and what it tells the one that started it. Plumbing: decides no
number.

A process that was not told is alone: rank 0 of 1. What ranks say to each other: training/exchange.py; who starts and watches
them: plumbing/launch.py.
"""

import json
import os
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO

PATIENCE = 1800.0  # seconds for which ranks wait for one of them: the first saves checkpoints and writes the artifact meanwhile

number, count, device, nodes = 0, 1, "cpu", 1
in_step = False  # whether each pass through the model is one of all ranks, since they share its weights (training/sharded.py)
meeting: Path | None = None  # where all of this host meet
_at: int | None = None  # descriptor of this rank's note
_met = 0


class Lost(Exception):
    """An exchange failed: mostly since another rank has ended, which is what the user has to read."""


def is_loss(error: BaseException) -> bool:
    """Whether another rank's end is what an error comes of. In a pass that ranks make together torch says it in its own words."""
    torchs = type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError")
    return isinstance(error, Lost) or torchs or "gloo/transport" in str(error)


def become(rank: int, of: int, folder: Path, where: str, hosts: int = 1) -> None:
    """Be a rank. folder: new and empty, the same for all; where: `cpu` or `cuda`, between which they will exchange."""
    global number, count, device, nodes, meeting, _at, _met
    number, count, device, nodes, meeting, _met = rank, of, where, hosts, folder, 0
    _at = os.open(folder / f"at-{rank}", os.O_WRONLY | os.O_CREAT, 0o600)


def first() -> bool:
    """Whether this process writes what there is once: it is the first rank, or alone."""
    return number == 0


def come(what: str) -> int:
    """Note, before an exchange, that this rank has come to it: so whoever watches sees who has not. The exchange's number."""
    global _met
    _met += 1
    os.pwrite(_at, f"{_met:12} {what:60}\n".encode(), 0)  # type: ignore[arg-type]
    return _met


def met(folder: Path, rank: int) -> tuple[int, str]:
    """How many exchanges a rank has come to, and what the last one is for."""
    try:
        number, what = (folder / f"at-{rank}").read_text().split(maxsplit=1)
        return int(number), what.strip()
    except (OSError, ValueError):
        return 0, "their start"


def note_end(kind: str, text: str) -> None:
    """How this rank ends, where that is not well: `input`, `interrupted`, `memory`, `lost` or `error`."""
    assert meeting is not None
    part = meeting / f".ended-{number}"
    part.write_text(json.dumps([kind, text]))
    os.replace(part, meeting / f"ended-{number}")


def pass_to(stdin: IO[bytes], number: int) -> None:
    """Send a signal to those that read this."""
    with suppress(OSError):
        stdin.write(bytes([number]))
        stdin.flush()


def end_with_starter() -> None:
    """From now on this process dies when the one that started it does: that holds the other end of its standard input. A signal
    may come that way too (`pass_to`)."""

    def watch() -> None:
        while said := os.read(0, 1):
            os.kill(os.getpid(), said[0])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end with the starter").start()

"""One job by several processes, its ranks: who this one is, and how they exchange. Plumbing: decides no number.

The engine is torch's: gloo between CPUs, NCCL between GPUs. The ranks are no "world" for transformers, accelerate or TRL, which
each see one process: what is shared stands in training/over_ranks.py, a few explicit exchanges for each optimiser step. Without
`join` a process is alone, and every exchange gives back what it was given.

Before an exchange a rank notes its number in a file, `at-RANK`: so who started the ranks (plumbing/launch.py) sees who did not
come, whichever backend waits.
"""

import datetime
import json
import logging
import os
import shutil
import signal
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PATIENCE = 1800.0  # seconds for which ranks wait for one of them: the first saves checkpoints and writes the artifact meanwhile
BACKSTOP = 1.5 * PATIENCE  # torch's own limit, where nobody watches

number, count = 0, 1
_folder: Path | None = None
_at: int | None = None  # descriptor of this rank's note
_met = 0


class Lost(Exception):
    """An exchange failed: mostly since another rank has ended, which is what the user has to read."""


def join(rank: int, of: int, folder: Path, device: str) -> None:
    """Become a rank. folder: where all of this host meet, new and empty; device: `cpu` or `cuda`."""
    global number, count, _folder, _at, _met
    import torch.distributed as dist

    number, count, _folder, _met = rank, of, folder, 0
    _at = os.open(folder / f"at-{rank}", os.O_WRONLY | os.O_CREAT, 0o600)
    logging.getLogger("transformers.training_args").addFilter(_of_a_world)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
        store=dist.FileStore(str(folder / "store"), of),
        rank=rank,
        world_size=of,
        timeout=datetime.timedelta(seconds=BACKSTOP),
    )


def _of_a_world(record: logging.LogRecord) -> bool:
    """transformers warns that the ranks are no world of its own: so it is meant."""
    return "parallel_mode" not in str(record.msg)


def leave() -> None:
    """All are done."""
    global number, count, _at
    import torch.distributed as dist

    wait()
    dist.destroy_process_group()
    os.close(_at)  # type: ignore[arg-type]
    number, count, _at = 0, 1, None


def first() -> bool:
    """Whether this process writes what there is once: it is the first rank, or alone."""
    return number == 0


@contextmanager
def _exchange(what: str) -> Any:
    global _met
    _met += 1
    os.pwrite(_at, f"{_met:12} {what:40}\n".encode(), 0)  # type: ignore[arg-type]
    try:
        yield
    except (RuntimeError, EOFError) as error:
        raise Lost(f"rank {number} lost the others at exchange {_met} ({what}): {' '.join(str(error).split())[:300]}") from error


def gathered(thing: Any, what: str) -> list:
    """The thing of each rank, in their order. A picture of it by pickle, through the host's memory."""
    if count == 1:
        return [thing]
    import torch.distributed as dist

    found: list = [None] * count
    with _exchange(what):
        dist.all_gather_object(found, thing)
    return found


def of_first(thing: Any, what: str) -> Any:
    """The first rank's thing."""
    if count == 1:
        return thing
    import torch.distributed as dist

    found = [thing]
    with _exchange(what):
        dist.broadcast_object_list(found, src=0)
    return found[0]


def summed(tensor: Any, what: str) -> Any:
    """The sum over the ranks, equal on each bit for bit; in place."""
    if count > 1:
        import torch.distributed as dist

        with _exchange(what):
            dist.all_reduce(tensor)
    return tensor


def wait(what: str = "the others' end") -> None:
    """Until all have come."""
    gathered(None, what)


# -- for who starts them -------------------------------------------------------------------------------------------------------


def note_end(kind: str, text: str) -> None:
    """How this rank ends, where that is not well: `input`, `interrupted`, `memory`, `lost` or `error`."""
    assert _folder is not None
    part = _folder / f".ended-{number}"
    part.write_text(json.dumps([kind, text]))
    os.replace(part, _folder / f"ended-{number}")


def end_with_starter() -> None:
    """From now on this process dies when the one that started it does: that holds the other end of its standard input."""

    def watch() -> None:
        while os.read(0, 1):
            pass
        if _folder is not None:
            shutil.rmtree(_folder, ignore_errors=True)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True, name="end with the starter").start()

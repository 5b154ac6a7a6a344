"""What the ranks of a training (plumbing/ranks.py) say to each other. Without ranks each function gives back what it was given.

The engine is torch's: gloo between CPUs, NCCL between GPUs, opened with the first exchange. The ranks are no "world" for
transformers, accelerate or TRL, which each see one process: what is shared is shared here, explicitly, so that a training by
several ranks has the numbers of one (training/over_ranks.py).
"""

import atexit
import datetime
import logging
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

from workflow_scripts.plumbing import nodes, ranks


def _store() -> dist.Store:
    """By which the ranks find each other: a file; over several hosts the first rank's, at an address that it writes down."""
    assert ranks.meeting is not None
    if ranks.nodes == 1:
        return dist.FileStore(str(ranks.meeting / "store"), ranks.count)
    if not ranks.first():
        return dist.TCPStore(*nodes.read_address(ranks.meeting), ranks.count, is_master=False)
    store = dist.TCPStore(socket.gethostname(), 0, ranks.count, is_master=True, wait_for_workers=False)
    nodes.write_address(ranks.meeting, socket.gethostname(), store.port)
    return store


def _open() -> None:
    # Before it, transformers would warn that the ranks are no world of its own: so it is meant.
    logging.getLogger("transformers.training_args").addFilter(lambda record: "parallel_mode" not in str(record.msg))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if ranks.device == "cuda" else "gloo",
        store=_store(),
        rank=ranks.number,
        world_size=ranks.count,
        timeout=datetime.timedelta(seconds=1.5 * ranks.PATIENCE),  # who started the ranks sees sooner who did not come
    )
    atexit.register(dist.destroy_process_group)


@contextmanager
def _exchange(what: str) -> Iterator[None]:
    number = ranks.come(what)
    try:
        if not dist.is_initialized():
            _open()
        yield
    except (RuntimeError, EOFError) as error:
        said = " ".join(str(error).split())[:300]
        raise ranks.Lost(f"rank {ranks.number} lost the others at exchange {number} ({what}): {said}") from error


def gathered(thing: Any, what: str) -> list:
    """The thing of each rank, in their order; by pickle, through the host's memory."""
    found: list = [thing] * ranks.count
    if ranks.count > 1:
        with _exchange(what):
            dist.all_gather_object(found, thing)
    return found


def mesh(device: str) -> Any:
    """All ranks, for torch's engines that share a model out."""
    from torch.distributed.device_mesh import DeviceMesh

    wait("the weights to share out")  # opens what connects them
    assert dist.group.WORLD is not None
    return DeviceMesh.from_group(dist.group.WORLD, device)


def takes(place: int, of: int) -> tuple[bool, bool]:
    """Of the `place`-th of so many things that ranks share out: whether this rank computes it, and whether what it gets counts.

    Where ranks make each pass together, the last round is computed by all: there may be fewer things than ranks, or a smaller one
    that takes fewer passes.
    """
    mine = place % ranks.count == ranks.number
    return mine or ranks.in_step and place >= (of - 1) // ranks.count * ranks.count, mine


def shared_out(things: Any, do: Callable[[Any], Any], what: str, count: int | None = None) -> list:
    """`do` of each thing, in their order: of each by one rank, and all get it. On the host if they are tensors.

    count: how many there are, where `things` does not know.
    """
    mine, of = {}, len(things) if count is None else count
    for place, thing in enumerate(things):
        computes, counts = takes(place, of)
        made = do(thing) if computes else None
        if counts:
            mine[place] = made
    every = {place: made for part in gathered(mine, what) for place, made in part.items()}
    return [every[place] for place in sorted(every)]


def of_first(thing: Any, what: str) -> Any:
    """The first rank's thing."""
    found = [thing]
    if ranks.count > 1:
        with _exchange(what):
            dist.broadcast_object_list(found, src=0)
    return found[0]


def summed(tensor: Tensor, what: str) -> Tensor:
    """The sum over the ranks, the same on each bit for bit; in place."""
    if ranks.count > 1:
        with _exchange(what):
            dist.all_reduce(tensor)
    return tensor


def wait(what: str) -> None:
    """Until all have come."""
    gathered(None, what)

"""Jobs on a GPU: each asks for memory, and starts on the card that has most room. Plumbing: decides no number.

Snakemake counts, and does not say which GPU a job gets (its issue 281). So a step that computes on a GPU enters a ledger before
it loads anything: a folder of this host, for all its users, in which each holder is a file. An flock on that file says that the
holder lives, and ends with its process, whatever ends that. What a card has left is its memory, less what the holders asked for,
less what others use, as the driver says. A step goes to the card with the most left, and sees only that one
(CUDA_VISIBLE_DEVICES). It keeps to what it asked for (models/device.py sets torch's limit). Who finds no room waits its turn.

A step that asks for more than a card has, or does not say how much, gets a card for itself. Under a scheduler that hands out GPUs
the variable is set already: only those are looked at.
"""

import contextlib
import fcntl
import itertools
import json
import os
import socket
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from workflow_scripts.plumbing import cards
from workflow_scripts.plumbing.messages import InputError

LEDGER = Path("/tmp/phaseline-gpus")  # not TMPDIR: two shells may disagree on that
SECONDS = 1.0  # between two looks at cards that have no room, and at who else is on one's own
WHOLE = 10**9  # MiB that no card has: asks for a card for itself
# Beside what torch allocates: the context with the kernels of torch, cuBLAS and bitsandbytes (nvidia-smi shows 0.3 to 0.6 GiB
# more than torch reserves).
CONTEXT = int(0.6 * 2**30)
FRAGMENTATION = 1.1  # a tenth of the peak is held by the allocator in pieces that fit nothing
SPARE = 1.25  # the same for who shares a card: at 1.1, DPO's batches of many lengths met their limit on an H200
PATIENCE = 600.0  # seconds for which those who came later may pass one who waits for a card for itself
OF_THE_CARD = 1 / 8  # what others use of it at most, a desktop say, for a card that no job is on to count as free


def need(peak: float) -> float:
    """Bytes that a card must have for a peak of so many allocated bytes."""
    return FRAGMENTATION * peak + CONTEXT


def share(peak: float) -> float:
    """Bytes that a job with such a peak asks for beside others: it meets its limit, while a card of its own only fills up."""
    return max(SPARE * peak, peak + 0.5 * 2**30) + CONTEXT


@dataclass
class Claim:
    """A living holder, or one that waits: what stands in its file."""

    key: str
    pid: int
    gpus: list[str]  # the one that it holds, or those that it waits for
    bytes: int
    others: int  # bytes in use by others when it came
    who: str
    since: float

    def passable(self) -> bool:
        """Whether others may go first: who waits for a whole card would have the longest job on it keep all others waiting."""
        return self.bytes >= WHOLE * cards.MIB and time.time() - self.since < PATIENCE


@dataclass
class Held:
    """A place on a GPU, until its file is closed or the process ends."""

    gpu: str  # several: by commas
    file: IO[str]
    bytes: int | None  # what the step keeps to; None on a card for itself
    asked: int
    visible: str | None  # CUDA_VISIBLE_DEVICES before
    seconds: float = 0.0
    card_seconds: float = 0.0
    counted: float = field(default_factory=time.monotonic)
    counting: Any = field(default_factory=threading.Lock)
    more: list[IO[str]] = field(default_factory=list)  # of the other cards, where it holds several

    def count(self) -> None:
        """The card's time since the last count: a second with three jobs on it is a third of a second of each."""
        cards = self.gpu.split(",")
        on_it = sum(cards[0] in one.gpus for one in _living("held"))
        with self.counting:
            now = time.monotonic()
            self.seconds += now - self.counted
            self.card_seconds += len(cards) * (now - self.counted) / max(on_it, 1)
            self.counted = now

    def watch(self) -> None:
        while not self.file.closed:
            time.sleep(SECONDS)
            self.count()


held: Held | None = None  # by this process


@contextlib.contextmanager
def _ledger() -> Iterator[None]:
    """Hold the ledger, for as long as it takes to read and write it."""
    for last in (False, False, False, True):  # who makes it needs a moment for its mode
        with contextlib.suppress(FileExistsError):
            LEDGER.mkdir()
            LEDGER.chmod(0o1777)
        mode = LEDGER.lstat().st_mode
        if stat.S_ISDIR(mode) and mode & 0o1777 == 0o1777:
            break
        if last:
            raise InputError(
                f"{LEDGER}: not the folder in which the users of this host note who is on which GPU (mode 1777); have it removed"
            )
        time.sleep(0.1)
    lock = LEDGER / "lock"
    with contextlib.suppress(FileExistsError):
        os.close(os.open(lock, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o644))
    file = os.open(lock, os.O_RDONLY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
    finally:
        os.close(file)


def _write(kind: str, claim: Claim) -> IO[str]:
    """A file of the ledger, locked before it has its name; for as long as it is open."""
    part = LEDGER / f".{os.getpid()}-{uuid.uuid4().hex}"
    file = open(part, "x")
    os.fchmod(file.fileno(), 0o644)  # others count it, whatever the umask
    fcntl.flock(file, fcntl.LOCK_EX)
    json.dump(vars(claim), file)
    file.flush()
    os.replace(part, LEDGER / f"{kind}-{time.time_ns():020d}-{uuid.uuid4().hex}")
    return file


def _living(kind: str) -> list[Claim]:
    """Those of a kind (held, waits) whose process lives, oldest first. Files of the dead are cleared away."""
    found = []
    for path in sorted(LEDGER.glob(f"{kind}-*")):
        try:
            with open(path) as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    found.append(Claim(**json.load(file)))
                    continue
            path.unlink()
        except (OSError, ValueError, TypeError):
            continue  # gone meanwhile, or somebody else's to clear away
    return found


def _of_others(card: cards.Card, holders: list[Claim]) -> int:
    """Bytes of a card that are in use by processes outside the ledger."""
    if not holders:
        return card.used
    if (by_process := cards.users(card.gpu)) is not None:
        return max(0, card.used - sum(by_process.get(one.pid, 0) for one in holders))
    # Who uses what is not to be seen: no less than when the present holders came, and than what they did not ask for.
    return max(card.used - sum(one.bytes for one in holders), *(one.others for one in holders))


def _room(card: cards.Card, holders: list[Claim], asks: int) -> tuple[int, int, int | None]:
    """(bytes left, bytes of others, bytes that the newcomer would hold) on a card; None if it has no room for it."""
    others = _of_others(card, holders)
    if card.capacity is None:
        return 0, others, None if holders else WHOLE * cards.MIB
    left = card.capacity - others - sum(one.bytes for one in holders)
    if asks <= left and asks < card.capacity:
        return left, others, asks
    alone = not holders and (asks >= card.capacity or others <= OF_THE_CARD * card.capacity)
    return left, others, max(left, 0) if alone else None


def _place(ids: list[str], asks: int, before: list[Claim], count: int) -> list[tuple[str, int, int]] | str:
    """(GPU, bytes, bytes of others) for who asks for so many bytes of `count` GPUs, else why there is no place. before: who waits
    for longer."""
    known, all_holders, free, full = cards.here(), _living("held"), [], []
    for gpu in ids:
        card = known.get(gpu, cards.Card(gpu, None, 0))
        holders = [one for one in all_holders if gpu in one.gpus]
        left, others, bytes = _room(card, holders, asks)
        taken = "; ".join(f"{one.who}: {_gib(one.bytes, card.capacity)}" for one in holders)
        full.append(
            f"{gpu}: " + "; ".join(filter(None, [taken, f"others use {others / 2**30:.1f} GiB" if others > 2**30 else ""]))
        )
        if bytes is not None and not any(gpu in one.gpus for one in before):
            free.append((gpu, bytes, others, left))
    free.sort(key=lambda one: -one[3])  # stable: of equal ones the first
    return [one[:3] for one in free[:count]] if len(free) >= count else ". ".join(full)


def _gib(bytes: int, capacity: int | None) -> str:
    return "the whole card" if capacity is None or bytes >= 0.98 * capacity else f"{bytes / 2**30:.1f} GiB"


def take(say: Callable[[str], None], mebibytes: int = WHOLE, count: int = 1) -> Held | None:
    """Hold so much of one of the GPUs that this process may take, and make that the only one it sees. Of several, all in one go:
    who held some and waited for the rest would wait for one that does the same.

    Waits while none has room, after those who wait already, and says so once. None where there is no GPU: whoever loads torch
    then says what is missing.
    """
    global held
    if not (ids := cards.allowed()):
        return None
    if count > len(ids):
        raise InputError(
            f"gpus: {count} GPUs are asked for, and {len(ids)} may be used here ({', '.join(ids)}); set gpus: {len(ids)}"
        )
    asks, waits, key, began = mebibytes * cards.MIB, None, uuid.uuid4().hex, time.time()
    who = f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
    while True:
        with _ledger():
            before = [one for one in itertools.takewhile(lambda one: one.key != key, _living("waits")) if not one.passable()]
            found = _place(ids, asks, before, count)
            if not isinstance(found, str):
                gpu, bytes = ",".join(gpu for gpu, *_ in found), found[0][1]
                file, *more = [
                    _write("held", Claim(key, os.getpid(), [one], size, others, who, began)) for one, size, others in found
                ]
                if waits:
                    waits.close()
                break
            if not waits:
                waits = _write("waits", Claim(key, os.getpid(), ids, asks, 0, who, began))
                want = f"{asks / 2**30:.1f} GiB" if mebibytes < WHOLE else "a card for itself"
                want, none = (want, "none has") if count == 1 else (f"{count} cards for itself", "too few have")
                say(f"waiting for a GPU: asks for {want}; {len(ids)} may be used here, and {none} room: {found}")
        time.sleep(SECONDS)
    held = Held(gpu, file, bytes if bytes == asks else None, asks, os.environ.get("CUDA_VISIBLE_DEVICES"), more=more)
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    threading.Thread(target=held.watch, daemon=True).start()
    return held


def limit() -> int | None:
    """Bytes that torch may allocate, beside the context; None on a card for itself."""
    return max(held.bytes - CONTEXT, 0) if held is not None and held.bytes is not None else None


def facts() -> dict:
    """For run.json: seconds of the card that were this job's, and how many jobs shared it on the average of its time."""
    if held is None:
        return {}
    held.count()
    return {"gpu_seconds": round(held.card_seconds, 2), "gpu_jobs": round(held.seconds / max(held.card_seconds, 1e-9), 2)}


def out_of_memory(error: BaseException | None) -> bool:
    """Whether a step ended because its GPU had no memory for it, whichever library said so."""
    while error is not None:
        text = f"{type(error).__name__}: {error}"
        if "CUDA" in text and "out of memory" in text or "OutOfMemoryError" in text or "ALLOC_FAILED" in text:
            return True
        error = error.__cause__ or error.__context__
    return False


def known(file: Path, mebibytes: int) -> int:
    """What a step asks for: its estimate, or what such a step was found to need where that is more."""
    return max(mebibytes, _noted(file))


def _noted(file: Path) -> int:
    try:
        return int(json.loads(file.read_text())["mebibytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def learn(file: Path, mebibytes: int, peak: float | None) -> None:
    """Note what a step needs that was estimated at so many MiB. peak: bytes at its end; None if it did not reach that."""
    noted = _noted(file)
    found = WHOLE if peak is None else max(int(share(peak) / cards.MIB) + 1, noted if noted < WHOLE else 0)
    try:
        if found <= mebibytes:
            file.unlink(missing_ok=True)  # it was not the estimate
        elif found != noted:
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f".{file.name}.{os.getpid()}")
            part.write_text(json.dumps({"mebibytes": found, "estimated": mebibytes}) + "\n")
            os.replace(part, file)
    except OSError as error:  # the step itself is made
        print(f"{file}: what the step needs of a GPU is not noted: {error.strerror}", flush=True)


_earlier = 0  # a peak of torch's memory, before memory was set aside that no result needs


def remember_peak(seen: int) -> None:
    """The peak so far, in bytes, before torch forgets it: what is set aside now counts in none (training/captured.py)."""
    global _earlier
    _earlier = max(_earlier, seen)


def peak(now: int) -> int:
    """Bytes that torch had allocated at most, `now` since it was told to forget."""
    return max(_earlier, now)

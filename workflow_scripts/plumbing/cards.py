"""The GPUs of this host as its driver sees them: ids, memory, and who uses it. Plumbing: decides no number."""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

MIB = 2**20


@dataclass(frozen=True)
class Card:
    """One GPU. capacity: bytes that jobs can have, None where the driver does not say; used: bytes in use now, by anybody."""

    gpu: str
    capacity: int | None
    used: int


def _ask(query: str) -> list[list[str]] | None:
    """The rows that nvidia-smi prints for a query; None where there is no driver, or it does not know the question."""
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    return rows if done.returncode == 0 else None


def _bytes(mebibytes: str) -> int | None:
    return int(mebibytes) * MIB if mebibytes.isdigit() else None  # "[N/A]" on boards that share the host's memory


def here() -> dict[str, Card]:
    """The GPUs of this host by id, in the driver's order; none where there is no NVIDIA driver."""
    for query in ("uuid,memory.total,memory.used,memory.reserved", "uuid,memory.total,memory.used", "uuid"):
        if (rows := _ask(f"--query-gpu={query}")) is not None:
            break
    else:
        return {}
    cards = {}
    for gpu, *sizes in rows:
        if gpu.startswith("GPU-"):
            total, used, reserved = [*map(_bytes, sizes), None, None, None][:3]
            known = total is not None and used is not None
            cards[gpu] = Card(gpu, total - (reserved or 0) if known else None, used if known else 0)  # type: ignore[operator, arg-type]
    return cards


def users(gpu: str) -> dict[int, int] | None:
    """Process -> bytes that it uses of a GPU; None if the driver's list can't be matched with processes seen from here (in a
    container it names those of the host, or none)."""
    found: dict[int, int] = {}
    for row in _ask("--query-compute-apps=gpu_uuid,pid,used_gpu_memory") or []:
        if row[0] != gpu:
            continue
        pid, used = row[1], _bytes(row[2])
        if used is None or not Path(f"/proc/{pid}").exists():
            return None
        found[int(pid)] = found.get(int(pid), 0) + used
    return found or None


def allowed() -> list[str]:
    """Ids of the GPUs that this process may take: those that CUDA_VISIBLE_DEVICES names, by number or id, else all of the host.

    Numbers are nvidia-smi's. As in CUDA, a number that no GPU has ends the list.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    known = list(here())
    if named is None:
        return known
    ids = []
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

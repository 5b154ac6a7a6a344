"""Where code that a model wrote is run: a process with nothing to reach and little to use up. Linux alone.

`enter` makes the calling process such a place, with the kernel's namespaces, which need no root where the kernel lets an
ordinary user have them:

    user, network    no interface but a loopback that is down; and by a seccomp filter no socket but a pair of connected streams,
                     since one that has a path (Docker's, an agent's) is reached without a network
    process, IPC     it sees and can end its own processes only; all end with the first. No terminal; no keys of the kernel's
    mount            everything is read-only but `folder` and /dev/shm, empty file systems in memory of at most FOLDER_MB; of
                     devices there are DEVICES
    capabilities     none are left, and none can be gained, nor by a namespace within

`apart` runs one judgement in a child of that process, with what `eval.sandbox` allows of time, address space and processes, and
FILE_MB to a file. Afterwards whatever it started is ended and both folders are emptied, so that no answer meets
what another one left. What a judgement returns comes back as JSON, never as a pickle.

What this is not: a virtual machine. A fault of the kernel is not fenced off, files that the user may read can be read (though
nothing can be sent), and code that runs inside the process of its own judge can tell it to pass.
"""

import contextlib
import ctypes
import json
import os
import platform
import resource
import secrets
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workflow_scripts.plumbing.messages import InputError

FILE_MB, FOLDER_MB = 64, 256
OPEN_FILES, ANSWER_BYTES = 256, 2**20
SHARED = Path("/dev/shm")
DEVICES = ("null", "zero", "full", "random", "urandom")

# Of linux/sched.h, mount.h, prctl.h, capability.h, seccomp.h
NEW = {"user": 0x10000000, "mount": 0x20000, "process": 0x20000000, "network": 0x40000000, "IPC": 0x8000000}
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 0x2, 0x4, 0x1000, 0x4000, 0x40000
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, ATTR_RDONLY = 442, -100, 0x8000, 0x1
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_CAPBSET_DROP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
CAPABILITY_V3 = 0x20080522
# Of asm/unistd.h, of each machine: its number for seccomp; socketpair; calls that are refused: socket, io_uring_setup, shmget,
# semget, msgget, mq_open, add_key, request_key, keyctl. What the last seven make outlives the process that made it.
CALLS = {
    "x86_64": (0xC000003E, 53, (41, 425, 29, 64, 68, 240, 248, 249, 250)),
    "aarch64": (0xC00000B7, 199, (198, 425, 194, 190, 186, 180, 217, 218, 219)),
}
SOCK_STREAM, X32 = 1, 0x40000000

entered = False  # whether this process is in such a place


def check() -> None:
    """InputError where this machine gives no such place. A process tries it."""
    if sys.platform != "linux":
        raise InputError(f"allow_code: the sandbox is Linux's, and this is {sys.platform}; leave such tasks out here")
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", __name__, folder],
            env=environment(Path(folder)),
            capture_output=True,
            text=True,
        )
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise InputError(f"allow_code: there is no sandbox for the model's code on this machine: {said}")


def environment(folder: Path) -> dict[str, str]:
    """Variables for the process: no tokens, nothing of the user's but where programs and libraries are."""
    root = str(Path(__file__).parents[2])
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "CONDA_PREFIX", "VIRTUAL_ENV") if name in os.environ}
    own = dict.fromkeys(("HOME", "TMPDIR", "HF_HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"), str(folder))
    ours = {
        "LANG": "C.UTF-8", "PYTHONPATH": root, "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0",
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_ALLOW_CODE_EVAL": "1",
        "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    }  # fmt: skip
    return kept | own | ours


def enter(folder: Path) -> None:
    """Make this process, which has one thread, such a place; returns in a child of it, the first process there. OSError, which
    says what the kernel would not give."""
    global entered
    libc = ctypes.CDLL(None, use_errno=True)

    def ask(what: str, answer: int) -> None:
        if answer < 0:
            raise OSError(f"{what}: {os.strerror(ctypes.get_errno())}")

    def mount(source: str, to: str, kind: str, flags: int, data: str = "") -> None:
        texts = (one.encode() or None for one in (source, to, kind))
        ask(f"a mount of {kind or source or to}", libc.mount(*texts, ctypes.c_ulong(flags), data.encode() or None))

    user, group = os.geteuid(), os.getegid()
    of_its_own = f"namespaces of its own ({', '.join(NEW)}; see sysctl user.max_user_namespaces, AppArmor, a container's seccomp)"
    ask(of_its_own, libc.unshare(sum(NEW.values())))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        Path(f"/proc/self/{name}").write_text(text)
    if child := os.fork():
        _wait_as(child)
    ask("ending with its parent", libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    os.setsid()  # a terminal takes as typed what a process of its session puts there
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the first process hears of the others only what it handles
    mount("", "/", "", MS_REC | MS_PRIVATE)
    attributes = struct.pack("QQQQ", ATTR_RDONLY, 0, 0, 0)
    everything = libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes)))
    ask("a read-only view of the file system (Linux 5.12 has it)", everything)
    mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV)
    Path("/proc/sys/user/max_user_namespaces").write_text("0")  # in one within it would have all capabilities again
    devices = {name: os.open(f"/dev/{name}", os.O_PATH) for name in DEVICES}
    mount("tmpfs", "/dev", "tmpfs", MS_NOSUID, "size=1m,mode=755")
    for name, descriptor in devices.items():
        Path("/dev", name).touch()
        mount(f"/proc/self/fd/{descriptor}", f"/dev/{name}", "", MS_BIND)
        os.close(descriptor)
    os.symlink("/proc/self/fd", "/dev/fd")
    SHARED.mkdir()
    closed = libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/dev", 0, attributes, ctypes.c_size_t(len(attributes)))
    ask("a read-only /dev", closed)
    for place in (folder, SHARED):
        mount("tmpfs", str(place), "tmpfs", MS_NOSUID | MS_NODEV, f"size={FOLDER_MB}m,mode=700")
    os.chdir(folder)
    for capability in range(64):
        libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)  # those above the kernel's last are refused
    ask("no capabilities", libc.capset(struct.pack("Ii", CAPABILITY_V3, 0), bytes(24)))
    ask("a memory that its children can't write to", libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
    ask("no new privileges", libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    if platform.machine() not in CALLS:
        raise OSError(f"a seccomp filter for {platform.machine()}, which this code has none for")
    rules = _refusing(*CALLS[platform.machine()])
    kept = ctypes.create_string_buffer(rules, len(rules))
    program = struct.pack("HxxxxxxP", len(rules) // 8, ctypes.addressof(kept))
    ask("a seccomp filter", libc.prctl(PR_SET_SECCOMP, 2, program, 0, 0))
    entered = True


def _refusing(machine: int, pair: int, refused: tuple[int, ...]) -> bytes:
    """A filter in BPF: the calls `refused`, and a pair of sockets other than streams, fail; calls in another machine's numbers
    end the process. A pair of datagram sockets can be connected to any path, one of streams can't."""
    load, masked, equal, above, done = 0x20, 0x54, 0x15, 0x35, 0x06
    allow, refuse, end = 0x7FFF0000, 0x00050001, 0x80000000  # refuse: with EPERM
    rules = [
        (load, 0, 0, 4),
        (equal, 1, 0, machine),
        (done, 0, 0, end),
        (load, 0, 0, 0),
        (above, 0, 1, X32),
        (done, 0, 0, refuse),
    ]
    for call in refused:
        rules += [(equal, 0, 1, call), (done, 0, 0, refuse)]
    rules += [
        (equal, 0, 4, pair),
        (load, 0, 0, 24),  # the lower half of its second argument
        (masked, 0, 0, 0xF),  # without SOCK_CLOEXEC and SOCK_NONBLOCK
        (equal, 1, 0, SOCK_STREAM),
        (done, 0, 0, refuse),
        (done, 0, 0, allow),
    ]
    return b"".join(struct.pack("HBBI", *rule) for rule in rules)


def _wait_as(child: int) -> None:
    """Stand outside until the first process within has ended, and end as it did; with the parent at the latest."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os._exit(min(os.waitstatus_to_exitcode(status) % 256, 255))


def apart(judge: Callable[[], Any], most: dict) -> tuple[Any, str]:
    """(what `judge` returns, as JSON knows it; why there is nothing, or ""), from a child of its own. After `enter` alone.

    most: `seconds` on the clock and of a core, `memory_gb` of address space beside what is loaded, `processes` at once.

    Reasons: `seconds`, `processes`, `memory`, `ended` (by itself: exit(), a signal, a limit). InputError where judging raises.
    """
    assert entered, "outside the sandbox"
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        _judge(judge, receive, send, most)
    os.close(send)
    text, why = _read(receive, child, most)
    with contextlib.suppress(ProcessLookupError):
        os.kill(-1, signal.SIGKILL)  # all others that there are
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    os.close(receive)
    _empty(Path.cwd())
    _empty(SHARED)
    if why:
        return None, why
    try:
        said = json.loads(text)
        kind, value = said["kind"], said["value"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None, "ended"
    if kind == "raised":
        raise InputError(str(value)[:300])
    return (value, "") if kind == "judged" else (None, str(kind))


def _judge(judge: Callable[[], Any], receive: int, send: int, most: dict) -> None:
    """In the child: limits, no input or output, and an end in any case."""
    try:
        os.close(receive)
        nothing = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(nothing, number)
        os.closerange(3, send)  # where the scores go is among them
        os.closerange(send + 1, 2**16)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        for what, limit in (
            (resource.RLIMIT_CPU, most["seconds"]),
            (resource.RLIMIT_AS, pages * resource.getpagesize() + int(most["memory_gb"] * 2**30)),
            (resource.RLIMIT_FSIZE, FILE_MB * 2**20), (resource.RLIMIT_NOFILE, OPEN_FILES), (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_NPROC, 16 * most["processes"]),  # older kernels count all of the user; `_read` those within
        ):  # fmt: skip
            resource.setrlimit(what, (limit, limit))
        try:
            said = {"kind": "judged", "value": judge()}
        except MemoryError:
            said = {"kind": "memory", "value": None}
        except Exception as error:
            said = {"kind": "raised", "value": f"{type(error).__name__}: {' '.join(str(error).split())}"}
        os.write(send, json.dumps(said, default=float).encode())
    finally:
        os._exit(0)


def _read(receive: int, child: int, most: dict) -> tuple[bytes, str]:
    """(what the child wrote, "" or why it was stopped)."""
    text, until = b"", time.monotonic() + most["seconds"]
    while True:
        ended = os.waitpid(child, os.WNOHANG)[0] != 0
        while select.select([receive], [], [], 0 if ended else 0.02)[0]:
            part = os.read(receive, 65536)
            text += part
            if not part or len(text) > ANSWER_BYTES:
                return text, "" if len(text) <= ANSWER_BYTES else "ended"
        if ended:
            return text, ""
        if time.monotonic() > until:
            return text, "seconds"
        if sum(name.isdecimal() for name in os.listdir("/proc")) > most["processes"]:
            return text, "processes"


def _empty(folder: Path) -> None:
    """Whatever an answer did to it: what lies deeper comes up, since its path may be too long, and may be closed to its owner."""
    folder.chmod(0o700)
    while found := list(os.scandir(folder)):
        for one in found:
            if not one.is_dir(follow_symlinks=False):
                os.unlink(one.path)
                continue
            os.chmod(one.path, 0o700)
            for inner in list(os.scandir(one.path)):
                if inner.is_dir(follow_symlinks=False):
                    os.chmod(inner.path, 0o700)
                os.rename(inner.path, folder / secrets.token_hex(16))
            os.rmdir(one.path)


if __name__ == "__main__":
    try:
        enter(Path(sys.argv[1]))
    except OSError as missing:
        sys.exit(f"it needs {missing}")

"""Commands as forks of a process that has loaded their libraries: that is most of a dry run, and nearly all of a small step.

A run of Snakemake, or a tool, is such a fork itself. Where Snakemake runs steps, the first `python` of its PATH is `CLIENT`,
which asks for one. Nothing of this project is loaded beforehand: a fork takes it from the clone that it runs in, as a process of
its own would. Who kills the client kills the fork, but a moment later: tests of kills start steps as users do.
"""

import atexit
import functools
import gc
import importlib
import importlib.metadata
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

# What such a command imports; what is not here, it imports itself.
SNAKEMAKE = (
    "snakemake.cli", "snakemake.api", "snakemake.workflow", "snakemake.dag", "snakemake.persistence.file", "snakemake.report",
    "snakemake.scheduling.greedy", "snakemake.storage", "snakemake.report.html_reporter", "jinja2", "jsonschema", "yaml", "numpy",
    "scipy", "requests", "yte",
)  # fmt: skip
STEPS = (
    "torch", "datasets", "peft", "bitsandbytes", "transformers.models.qwen2.modeling_qwen2", "transformers.trainer",
    "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "trl.trainer.kto_trainer", "trl.trainer.reward_trainer",
    "trl.trainer.grpo_trainer", "trl.trainer.rloo_trainer", "nltk", "langdetect", "numpy", "scipy", "jsonschema", "yaml",
)  # fmt: skip
# What steps/cli.py sets before a step loads its libraries. A step that was planned otherwise is a process of its own.
QUIET = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}  # fmt: skip
BY_JOBS = ("workflow_scripts.steps.", "workflow_scripts.tools.rehearse")  # what runs by the `python` of the PATH
PYTHON = "WARM_PYTHON"  # the variable that gives a tool the client in place of its own interpreter: it starts a Snakemake by that
CLIENT = """#!{python} -SE
import json, os, socket, sys
command = ["python", *sys.argv[1:]]
if command[1:3] == ["-m", "snakemake"]:
    command = ["snakemake", *command[3:]]
elif command[1:2] != ["-m"] or not command[2].startswith({steps!r}) or os.environ.get("HF_ENDPOINT") != {hub!r}:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    asked = json.dumps([command, os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [len(asked).to_bytes(4, "big")], [0, 1, 2])
    server.sendall(asked)
    sys.exit(int(server.recv(64).split()[0]))
"""


class Warm:
    """The process. It loads the libraries when it is first asked for a fork, and ends with the one that started it."""

    def __init__(self, libraries: tuple[str, ...], env: dict[str, str] | None = None) -> None:
        self.hub = (env or {}).get("HF_ENDPOINT", os.environ.get("HF_ENDPOINT"))  # its library reads that as it is loaded
        self.folder = tempfile.TemporaryDirectory(prefix="warm.")
        self.address = f"{self.folder.name}/socket"
        command = [sys.executable, __file__, self.address, *libraries]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | (env or {}))
        assert self.process.stdout and self.process.stdout.readline() == b"ready\n"

    def bin(self) -> str:
        """A folder for the PATH, with the client as `python`."""
        client = Path(self.folder.name, "bin/python")
        if not client.exists():
            client.parent.mkdir()
            client.write_text(CLIENT.format(python=sys.executable, address=self.address, hub=self.hub, steps=BY_JOBS))
            client.chmod(0o755)
        return str(client.parent)

    def run(self, command: tuple[str, ...], cwd: Path, env: dict[str, str], text: str = "") -> subprocess.CompletedProcess:
        """Run a command to its end; `text` comes to it through a pipe, which holds as much as 64 kB."""
        from tests.support import cpu  # not above: the process itself loads nothing of this project

        given, giving = os.pipe()
        with open(giving, "w") as pipe:
            pipe.write(text)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, socket.socket(socket.AF_UNIX) as server:
            server.connect(self.address)
            asked = json.dumps([command, str(cwd), env]).encode()
            socket.send_fds(server, [len(asked).to_bytes(4, "big")], [given, out.fileno(), err.fileno()])
            server.sendall(asked)
            code, computed = server.recv(64).split()
            texts = [file.seek(0) or file.read().decode(errors="replace") for file in (out, err)]
        os.close(given)
        cpu.of_forks += float(computed)
        return subprocess.CompletedProcess(command, int(code), *texts)


def can_run(command: tuple[str, ...]) -> bool:
    """Whether a fork of the process with SNAKEMAKE does for it. In a run, steps are forks of the other one."""
    return command[0] == "snakemake" or (command[:2] == ("python", "-m") and command[2].startswith("workflow_scripts.tools."))


def runs_steps(command: tuple[str, ...]) -> bool:
    """Whether it starts steps, or is one."""
    return command[0] == "snakemake" or (command[:2] == ("python", "-m") and command[2].startswith("workflow_scripts.steps."))


def until_still(folder: Path) -> None:
    """Wait until nothing works in a clone: a fork is killed a moment after who asked for it."""
    import psutil

    while any(one.info["cwd"] == str(folder) for one in psutil.process_iter(["cwd"])):
        time.sleep(0.005)


# -- in the process, and in its forks ------------------------------------------------------------------------------------


def become(command: list[str], cwd: str, env: dict[str, str]) -> int:
    """Run a command as a new process would, from its environment on. Its exit status."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    first = [cwd] if command[0] == "python" else [str(Path(sys.executable).parent)]
    path = env["PYTHONPATH"].split(os.pathsep)
    sys.path[:1] = path if env.get("PYTHONSAFEPATH") else first + path
    try:
        if command[0] == "python":
            sys.executable = env.get(PYTHON, sys.executable)
            sys.argv = command[2:]
            runpy.run_module(command[2], run_name="__main__", alter_sys=True)
        else:
            sys.argv = command
            importlib.import_module("snakemake.cli").main()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def serve(client: socket.socket) -> None:
    """Fork what the client asks for, tell it how that ended; kill it if the client goes."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, descriptors, *_ = socket.recv_fds(client, 4, 3)
    asked = b""
    while len(asked) < int.from_bytes(size, "big"):
        asked += client.recv(1 << 20)
    if not (child := os.fork()):
        client.close()
        for number, descriptor in enumerate(descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        code = become(*json.loads(asked))
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    ended = os.pidfd_open(child)
    ready, _, _ = select.select([ended, client], [], [])
    if ended not in ready:
        os.kill(child, signal.SIGKILL)
    _, status, used = os.wait4(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if ended in ready:
        client.sendall(f"{code if code >= 0 else 128 - code} {used.ru_utime + used.ru_stime}".encode())


def load(*libraries: str) -> None:
    gc.disable()  # loading leaves next to no garbage
    for name in libraries:
        importlib.import_module(name)
    if "snakemake.cli" in libraries:
        sys.modules["snakemake.cli"].get_argument_parser()  # finds the plugins that are installed, once
    importlib.metadata.version = functools.cache(importlib.metadata.version)  # each step asks for those of all packages
    for one in importlib.metadata.distributions():
        importlib.metadata.version(one.name)
    gc.freeze()  # no fork looks through it, or copies the pages on which a look would leave its marks
    gc.enable()


def main(address: str, *libraries: str) -> None:
    sys.dont_write_bytecode = False  # a clone is compiled once
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for who serves a client
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address)
        server.listen()
        print("ready", flush=True)
        while True:
            ready, _, _ = select.select([server, sys.stdin], [], [])
            if server not in ready:
                return  # who started this has ended
            client, _ = server.accept()
            if libraries:
                load(*libraries)
                libraries = ()
            if not os.fork():
                server.close()
                serve(client)
                os._exit(0)
            client.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

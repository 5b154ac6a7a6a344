"""Dry runs of Snakemake, and the tools, as forks of a process that has loaded their libraries: that is two thirds of such a run.

Nothing of this project is loaded beforehand: a fork takes it from the clone that it runs in, as a process of its own would.
"""

import atexit
import importlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

# What a dry run imports; what is not here, it imports itself.
LIBRARIES = (
    "snakemake.cli", "snakemake.api", "snakemake.workflow", "snakemake.dag", "snakemake.persistence.file", "snakemake.report",
    "snakemake.scheduling.greedy", "jsonschema", "yaml", "numpy", "scipy", "requests", "yte",
)  # fmt: skip


class Warm:
    """The process; it ends with the one that started it."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True)

    def run(self, command: tuple[str, ...], cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess:
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            asked = {"command": command, "cwd": str(cwd), "env": env, "out": str(out), "err": str(err)}
            assert self.process.stdin and self.process.stdout
            print(json.dumps(asked), file=self.process.stdin, flush=True)
            code = int(self.process.stdout.readline())
            texts = [path.read_text(errors="replace") for path in (out, err)]
        return subprocess.CompletedProcess(command, code, *texts)


def can_run(command: tuple[str, ...]) -> bool:
    dry = command[0] == "snakemake" and "-n" in command
    return dry or (command[:2] == ("python", "-m") and command[2].startswith("workflow_scripts.tools."))


def become(command: list[str], cwd: str, env: dict[str, str], out: str, err: str) -> int:
    """In a fork: run a command as a new process would, from its environment on. Its exit status."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    first = cwd if command[0] == "python" else str(Path(sys.executable).parent)
    sys.path[:1] = [first, *env.get("PYTHONPATH", "").split(os.pathsep)]
    try:
        if command[0] == "python":
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


def main() -> None:
    for name in LIBRARIES:
        importlib.import_module(name)
    for line in sys.stdin:
        if child := os.fork():
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        else:
            code = become(**json.loads(line))
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


if __name__ == "__main__":
    main()

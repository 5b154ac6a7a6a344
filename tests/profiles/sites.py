"""A site: a clone of the repository, a scheduler's commands on PATH, and Snakemake with executor plugins."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.conftest import MICRO, ROOT, make_clone, warm_snakemake, warm_steps
from tests.profiles import scheduler

HERE = ROOT / "tests/profiles"
DOCS = (ROOT / "docs/cluster-others.md").read_text()
CUDA = [*MICRO, "cuda.yaml"]


def fence(text: str) -> str:
    """The block of YAML in the documentation that has this text."""
    (block,) = (found for found in re.findall(r"^```yaml\n(.*?)^```$", DOCS, flags=re.M | re.S) if text in found)
    return block


class Site:
    """A clone, what stands on PATH before the real commands, and Snakemake with the plugins."""

    def __init__(self, folder: Path, plugins: str):
        self.folder, self.packages = folder, plugins
        self.clone = make_clone(folder / "phaseline")
        (self.clone.folder / "cuda.yaml").write_text("device: cuda\nprecision: bf16\n")
        scheduler.install(folder / "bin")

    def plugins(self, executor: str) -> Path:
        """The packages without the plugins of other executors: each Snakemake loads all that it finds, with their clients."""
        folder = self.folder / "plugins" / executor
        if not folder.exists():
            folder.mkdir(parents=True)
            for path in Path(self.packages).glob("*"):
                if not path.name.startswith("snakemake_executor_plugin_") or f"_plugin_{executor}" in path.name:
                    (folder / path.name).symlink_to(path)
        return folder

    def environment(self, executor: str = "none", plugin: str | None = None, **more: str) -> dict[str, str]:
        path = [str(self.clone.folder), str(self.plugins(executor)), *([str(self.clone.folder / plugin)] if plugin else [])]
        commands = f"{self.folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return {**kept, "PYTHONPATH": ":".join(path), "PATH": commands, **more}

    def warmed(self, *given: str | None, **more: str) -> dict[str, str]:
        """The same, and what runs beside the executor, a look at the verifiers, is a fork: tests/support/warm.py."""
        found = self.environment(*given, **more)
        return found | {"PATH": f"{warm_steps().bin()}:{found['PATH']}"}

    def snakemake(self, *args: str, env: dict[str, str], cwd: Path | None = None) -> subprocess.CompletedProcess:
        command = ["snakemake", *args]
        return subprocess.run(command, cwd=cwd or self.clone.folder, env=env, capture_output=True, text=True, timeout=300)

    def jobs(self, *args: str, env: dict[str, str], configs: list[str] = CUDA) -> list[dict]:
        """What tests/profiles/jobs.py tells of each planned job."""
        out = self.folder / "jobs.jsonl"
        given = [str(out), *args, "--configfile", *configs]
        if self.packages == "no-plugins":  # what such a Snakemake loads is what a fork has loaded: tests/support/warm.py
            done = warm_snakemake().run(("python", "-m", "tests.profiles.jobs", *given), self.clone.folder, env)
        else:
            command = [sys.executable, str(HERE / "jobs.py"), *given]
            done = subprocess.run(command, cwd=self.clone.folder, env=env, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        return [json.loads(line) for line in out.read_text().splitlines()]

    def snippet(self, name: str) -> str:
        """Writes the profile of this name that the documentation shows; its folder."""
        (text,) = re.findall(rf"^```yaml\n# (?=profiles/{name}/profile.yaml$)(.*?)^```$", DOCS, flags=re.M | re.S)
        folder = self.clone.folder / "profiles" / name
        folder.mkdir(exist_ok=True)
        (folder / "profile.yaml").write_text(f"# {text}")
        return f"profiles/{name}"

    def queue(self, **more: str) -> dict[str, str]:
        """An empty queue for the commands of tests/profiles/scheduler.py, as environment variables."""
        shutil.rmtree(self.folder / "queue", ignore_errors=True)
        (self.folder / "queue").mkdir()
        return {"QUEUE": str(self.folder / "queue"), **more}

    def calls(self, name: str) -> list[list[str]]:
        lines = (self.folder / "queue/calls.jsonl").read_text().splitlines()
        return [call[1:] for call in map(json.loads, lines) if call[0] == name]

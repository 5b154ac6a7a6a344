"""Clones of the repository in a temporary folder, and Snakemake run in them as a user would."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MICRO = ["config/config.yaml", "tests/support/config/micro.yaml"]


class Clone:
    """A copy of the working tree, with its own results."""

    limit = 1200  # seconds of one command

    def __init__(self, folder: Path):
        self.folder = folder

    def environment(self) -> dict[str, str]:
        """The copy's own package comes before the installed one, in Snakemake and in the steps."""
        return {**os.environ, "PYTHONPATH": str(self.folder), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment(), capture_output=True, text=True, timeout=self.limit
        )
        if check and done.returncode:
            tail = f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")
        return done

    def snakemake(self, *args: str, configs: list[str] = MICRO, check: bool = True) -> subprocess.CompletedProcess:
        return self.run("snakemake", *args, *(["--configfile", *configs] if configs else []), check=check)

    def plan(self, *targets: str, configs: list[str] = MICRO) -> dict[str, int]:
        """Rule -> number of jobs that `snakemake -n` plans; empty where nothing is to be done."""
        done = self.snakemake("-n", *targets, configs=configs)
        text = done.stdout + done.stderr
        if "Nothing to be done" in text:
            return {}
        table = text.split("Job stats:")[-1]
        jobs = {rule: int(count) for rule, count in re.findall(r"^(\w+) +(\d+)$", table, flags=re.M)}
        jobs.pop("total")
        return jobs

    def overlay(self, text: str) -> list[str]:
        """The micro config with another file laid over it."""
        (self.folder / "overlay.yaml").write_text(text)
        return [*MICRO, "overlay.yaml"]

    def edit(self, path: str, old: str, new: str) -> None:
        text = (self.folder / path).read_text()
        assert old in text, f"{path} has no {old!r}"
        (self.folder / path).write_text(text.replace(old, new))


def make_clone(folder: Path) -> Clone:
    names = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return Clone(folder)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Clone:
    """A clone in which the main job of the micro config has run. Do not change it: take a copy with `clone`."""
    made = make_clone(tmp_path_factory.mktemp("finished") / "phaseline")
    made.snakemake("results/ifeval_base.json", "results/ifeval_sft_v2.json", "results/ifeval_dpo.json")
    return made


@pytest.fixture
def clone(finished: Clone, tmp_path: Path) -> Clone:
    """A copy of the finished clone, with results, times and Snakemake's records."""
    shutil.copytree(finished.folder, tmp_path / "phaseline", symlinks=True)
    return Clone(tmp_path / "phaseline")


@pytest.fixture
def fresh(tmp_path: Path) -> Clone:
    return make_clone(tmp_path / "phaseline")


@pytest.fixture(scope="session")
def speaking_base(tmp_path_factory) -> Path:
    """The manifest of a small model that speaks the tiny world's language and follows some instructions; to be read only."""
    from tests.support import small_steps

    shape = {"hidden_size": 64, "intermediate_size": 192}
    return small_steps.write_base(tmp_path_factory.mktemp("speaking") / "base", steps=300, shape=shape)


@pytest.fixture
def goes_when_listed(monkeypatch):
    """A function of a folder: it is removed at the moment that something lists it, as by a job of another process."""
    folders = set()

    def first_remove(listing):
        def listed(path="."):
            if str(path) in folders:
                shutil.rmtree(path, ignore_errors=True)
            return listing(path)

        return listed

    for name in ("listdir", "scandir"):
        monkeypatch.setattr(os, name, first_remove(getattr(os, name)))
    return lambda folder: folders.add(str(folder))

"""Clones of the repository in a temporary folder, Snakemake run in them as a user would, and what is made once for all tests."""

import contextlib
import functools
import gc
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.support import gains, processors, small_steps, warm
from tests.support.right_way import RightWay
from tests.support.shared import Shared

os.environ["OMP_NUM_THREADS"] = "1"  # two processes of tests share two cores
metadata.version = functools.cache(metadata.version)  # each step asks for those of all packages: a fifth of a small training
gc.disable()  # while the libraries are loaded, which makes millions of objects and next to no garbage
ROOT = Path(__file__).resolve().parents[1]
MICRO = ["config/config.yaml", "tests/support/config/micro.yaml"]
WORLD = ["config/config.yaml", "tests/support/config/world.yaml"]


class Clone:
    """A copy of the working tree, with its own results."""

    limit = 1200  # seconds of one command

    def __init__(self, folder: Path):
        self.folder = folder
        self.variables: dict[str, str] = {}  # of its commands alone

    def environment(self) -> dict[str, str]:
        """The copy's own package comes before the installed one, in Snakemake and in the steps."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        return {**kept, **self.variables, "PYTHONPATH": str(self.folder), "PATH": path}

    def warmed(self) -> dict[str, str]:
        """The same, and steps are forks of a process that has loaded torch: tests/support/warm.py."""
        found = self.environment()
        return found | {"PATH": f"{warm_steps(frozenset(self.variables.items())).bin()}:{found['PATH']}"}

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess:
        env = self.warmed() if warm.runs_steps(command) else self.environment()
        if warm.can_run(command):
            done = warm_snakemake().run(command, self.folder, env | {warm.PYTHON: f"{warm_snakemake().bin()}/python"})
        else:
            done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=self.limit)
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


@functools.cache
def warm_snakemake() -> warm.Warm:
    return warm.Warm(warm.SNAKEMAKE)


@functools.cache
def warm_steps(variables: frozenset[tuple[str, str]] = frozenset()) -> warm.Warm:
    return warm.Warm(warm.STEPS, warm.QUIET | dict(variables))


def make_clone(folder: Path) -> Clone:
    names = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for kept in (ROOT / "workflow_scripts").rglob("__pycache__/*"):  # what was compiled and parsed, by times and contents
        (folder / kept.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # just replaced
            shutil.copy2(kept, folder / kept.relative_to(ROOT))
    return Clone(folder)


# -- what is made once for the whole run, and only read ------------------------------------------------------------------


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Shared:
    return Shared(tmp_path_factory)


@pytest.fixture(scope="session")
def finished(shared) -> Clone:
    """A clone in which the main job of the micro config has run. Do not change it: take a copy with `clone`."""
    targets = [f"results/ifeval_{run}.json" for run in ("base", "sft_v2", "dpo")]
    return Clone(shared.folder("finished", lambda folder: make_clone(folder).snakemake(*targets)))


def run_world(shared: Shared, name: str, targets: list[str], configs: list[str]) -> Clone:
    """A clone in which these have been made, which may take hours."""

    def make(folder: Path) -> None:
        made = make_clone(folder)
        made.limit = 3 * 3600
        made.snakemake(*targets, configs=configs)

    return Clone(shared.folder(name, make))


@pytest.fixture(scope="session")
def world(shared) -> Clone:
    """The tiny world with what tests/support/gains.py names, from the base in tests/files/tiny_base. Do not change it."""
    if processors.WORLD:  # kept from run to run: what is stale in it is made again
        made = make_clone(Path(processors.WORLD))
        made.limit = 3 * 3600
        made.snakemake(*gains.targets(gains.METHODS, processors.SEED), "--cores", "1", configs=WORLD)
        return made
    return run_world(shared, "world", gains.targets(gains.MOST, processors.SEED), WORLD)


@pytest.fixture(scope="session")
def laid_out(shared) -> Clone:
    """A clone with results that look like those of the main job of the micro config. Do not change it: take `made`."""
    from tests.support.laid_out import MAIN_JOB, lay_out, plan_of

    def make(folder: Path) -> None:
        clone = make_clone(folder)
        lay_out(clone, plan_of(clone), *MAIN_JOB)

    return Clone(shared.folder("laid_out", make))


@pytest.fixture(scope="session")
def compared(shared) -> Path:
    """The tiny world's comparison as a finished one leaves it, with its page. Do not change it: take a copy."""
    from tests.support import report_world  # not above: it takes its own names from here

    return shared.folder("compared", report_world.compare)


@pytest.fixture(scope="session")
def base(shared) -> Path:
    """The manifest of a base model with random weights."""
    return shared.folder("base", small_steps.write_base) / "manifest.json"


@pytest.fixture(scope="session")
def speaking_base(shared) -> Path:
    """The manifest of a model that speaks the tiny world's language and follows some instructions: the world's own base."""
    return shared.folder("speaking/base", small_steps.copy_tiny_base) / "manifest.json"


@pytest.fixture(scope="session")
def right_way(shared) -> RightWay:
    return RightWay(shared)


@pytest.fixture(scope="session")
def stammering_base(shared) -> Path:
    """The manifest of a model that was pretrained a little: its answers end, at different lengths."""
    return shared.folder("stammering/base", lambda folder: small_steps.write_base(folder, steps=200)) / "manifest.json"


@pytest.fixture(scope="session")
def slices(shared) -> dict[str, Path]:
    """Slices of 40 rows, 8 of them held out: name, or experiment that trains on it -> manifest."""
    return small_steps.slices_in(shared.folder("data", small_steps.write_slices))


@pytest.fixture(scope="session")
def pairs(slices) -> Path:
    return slices["pairs"]


@pytest.fixture(scope="session")
def instructions(slices) -> Path:
    return slices["instructions"]


# -- what a test or a file of tests has for itself -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request) -> Path:
    """For what the tests of one file make and share."""
    return tmp_path_factory.mktemp(request.module.__name__.rpartition(".")[2])


@pytest.fixture
def clone(finished: Clone, tmp_path: Path) -> Clone:
    """A copy of the finished clone, with results, times and Snakemake's records."""
    shutil.copytree(finished.folder, tmp_path / "phaseline", symlinks=True)
    return Clone(tmp_path / "phaseline")


@pytest.fixture
def made(laid_out: Clone, tmp_path: Path) -> Clone:
    """A copy of the clone that looks finished."""
    shutil.copytree(laid_out.folder, tmp_path / "phaseline", symlinks=True)
    return Clone(tmp_path / "phaseline")


@pytest.fixture
def fresh(tmp_path: Path) -> Clone:
    return make_clone(tmp_path / "phaseline")


# -- which tests, and in which order -------------------------------------------------------------------------------------

# Rooms and files that train or run Snakemake. What takes longest comes first, so that neither of two processes of tests is left
# alone with it at the end.
SLOW = (
    "dag/test_tiny_gains", "slurm/", "dag/test_kills", "training/test_methods_broken", "dag/test_accounts",
    "steps/test_self_made_gains", "dag/test_dag", "dag/test_random_edits",
    "dag/test_s", "profiles/", "training/", "rl/test_ppo", "rl/test_r", "gpu/", "models/test_adapters",
    "models/test_distance", "models/test_models", "models/test_chat", "models/test_qwen_tokenizer", "models/test_end_tokens",
    "models/test_start_token", "report/test_trained", "report/test_report_browser", "evaluation/test_lm_eval_task",
    "evaluation/test_own_tasks", "evaluation/test_allow_code", "tools/test_tools", "tools/test_push", "tools/test_study",
    "tools/test_adopt", "tools/test_accept", "steps/test_shards", "steps/test_imports", "evaluation/test_compose",
    "report/test_report_placebos", "dag/test_methods",  # the last takes the world of the first
)  # fmt: skip
SNAKEMAKE = {"finished", "laid_out", "fresh", "clone", "world"}  # tests elsewhere that take such a clone


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def rank(item: pytest.Item) -> int:
        return next((i for i, name in enumerate(SLOW) if item.nodeid.startswith(f"tests/{name}")), len(SLOW))

    items.sort(key=rank)
    for item in items:
        if rank(item) < len(SLOW) or SNAKEMAKE & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    gc.freeze()  # what is loaded now stays: no later look for garbage goes through it
    gc.enable()


@pytest.fixture
def figure(record_property):
    """figure(name, value, at_least=..., at_most=...): asserts a measured value, and tells the table of `make test-processors`."""

    def measured(name: str, value: float, **thresholds: float) -> None:
        one = processors.Figure(name, value, **thresholds)
        record_property("figure", json.dumps(vars(one)))
        one.check()

    return measured


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

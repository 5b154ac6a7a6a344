"""Several jobs on a card, through the real rules and ledger: steps and cards are pretended, so that this runs anywhere."""

import hashlib
import json
import random
import re
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import MICRO, Clone
from tests.support import pretended_steps
from tests.support.pretended_gpus import PretendedGpus

TARGETS = [f"results/ifeval_{run}.json" for run in ("base", "dpo", "kto", "ppo", "grpo", "rloo")]
pytestmark = pytest.mark.slow


class Host(PretendedGpus):
    """A clone with a config for a GPU, on a host of pretended cards, with pretended steps."""

    def __init__(self, folder: Path, clone: Clone, *totals: int, config: str = ""):
        super().__init__(folder, *totals)
        self.clone = clone
        (folder / "site").mkdir()
        (folder / "site/sitecustomize.py").write_text(pretended_steps.text(str(folder)))
        self.configs = [*MICRO, *clone.overlay(f"device: cuda\n{config}")]
        self.env = {**clone.environment(), "PATH": self.environment()["PATH"], "PYTHONPATH": str(folder / "site")}
        self.begun: list[subprocess.Popen] = []

    def start(self, *targets: str, cores: int = 8, more: tuple[str, ...] = ()) -> subprocess.Popen:
        command = ["snakemake", "--cores", str(cores), *targets, *more, "--configfile", *self.configs]
        pipe = subprocess.PIPE
        self.begun.append(
            subprocess.Popen(
                command,
                cwd=self.clone.folder,
                env=self.env,
                stdout=pipe,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )  # fmt: skip
        )
        return self.begun[-1]

    def run(self, *targets: str, **options) -> str:
        process = self.start(*targets, **options)
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
        return said

    def jobs(self) -> list[tuple[str, int, str, float, float]]:
        """(GPU, MiB, output, from, to) of the jobs that ended on a card."""
        begun, found = {}, []
        for line in (self.folder / "notes").read_text().splitlines():
            what, pid, gpu, mib, out, when = line.split()
            if what == "begin":
                begun[pid] = float(when)
            else:
                found.append((gpu, int(mib), out, begun.pop(pid), float(when)))
        return found

    def most(self, gpu: str) -> tuple[int, int]:
        """(jobs, MiB) on a card at once, at most."""
        changes = sorted(
            change for one, mib, _, begin, end in self.jobs() if one == gpu for change in ((begin, 1, mib), (end, -1, -mib))
        )
        jobs = mebibytes = most_jobs = most_mebibytes = 0
        for _, one, mib in changes:
            jobs, mebibytes = jobs + one, mebibytes + mib
            most_jobs, most_mebibytes = max(jobs, most_jobs), max(mebibytes, most_mebibytes)
        return most_jobs, most_mebibytes


@pytest.fixture
def host(fresh, tmp_path):
    made: list[Host] = []

    def make(*totals: int, **options) -> Host:
        folder = tmp_path / f"host{len(made)}"
        folder.mkdir()
        made.append(Host(folder, fresh, *totals, **options))
        return made[-1]

    yield make
    for one in made:
        for process in one.begun:
            if process.poll() is None:
                process.kill()
            process.communicate()


def test_jobs_of_a_run_share_two_cards_and_no_card_holds_more_than_it_has(host):
    here = host(4000, 2500)
    here.run(*TARGETS)
    (first, first_mib), (second, second_mib) = here.most(here.gpus[0]), here.most(here.gpus[1])
    assert first_mib <= 4000 and second_mib <= 2500
    assert first >= 2 and second >= 1, "they did not share"


def test_a_training_over_two_cards_has_both_for_itself(host):
    """Unequal ones: asked of Snakemake is no more than there is."""
    accumulated = "train: {gradient_accumulation_steps: 2}"
    here = host(4000, 2500, config=f"methods: {{sft: {{gpus: 2, {accumulated}}}}}\n")
    said = here.run("results/ifeval_sft_v2.json", "results/ifeval_base.json")
    info = json.loads((here.clone.folder / "results/sft_v2/adapter/run.json").read_text())
    assert info["gpus"] == 2 and "waiting" not in said


@pytest.mark.long
def test_jobs_do_not_share_where_the_config_says_so(host):
    here = host(4000, 4000, config="share_gpu: never\n")
    here.run(*TARGETS)
    assert [here.most(gpu)[0] for gpu in here.gpus] == [1, 1]


@pytest.mark.long
def test_jobs_at_once_can_be_bounded(host):
    here = host(8000)
    here.run(*TARGETS, more=("--resources", "gpu=2"))
    assert here.most(here.gpus[0])[0] == 2


def test_what_others_wait_for_goes_first(host):
    """The reward model, for which PPO waits, before variants that nothing needs; and answers fill what is left."""
    here = host(4000)
    here.run(*TARGETS, more=("--resources", "gpu=1"))
    order = [out for _, _, out, _, _ in sorted(here.jobs(), key=lambda job: job[3])]
    place = {out.split("/")[1] + ("" if "adapter" in out else " answers"): order.index(out) for out in order}
    assert all(place["ppo"] < place[f"{run} answers"] for run in ("dpo", "kto", "grpo", "rloo"))
    assert place["rm"] < min(place[run] for run in ("dpo", "kto", "grpo", "rloo"))


def test_the_plan_is_that_of_a_host_without_a_gpu(host, tmp_path):
    here = host(4000)

    def plan(path: str) -> list[str]:
        command = ["snakemake", "-n", *TARGETS, "--configfile", *here.configs]
        done = subprocess.run(command, cwd=here.clone.folder, env={**here.env, "PATH": path}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.strip().startswith(("output", "resources"))]
        return sorted(" ".join(sorted(line.replace(",", " ").split())) for line in lines)  # their order is that of a set

    with_cards, without = plan(here.env["PATH"]), plan(here.clone.environment()["PATH"])
    assert with_cards == without and "gpu_mb" in "".join(without)


@pytest.mark.long
def test_sharing_is_in_no_fingerprint(host):
    here = host(4000)
    here.run("results/ifeval_dpo.json")
    said = here.run("results/ifeval_dpo.json", more=("--config", "share_gpu=never"))
    assert "Nothing to be done" in said


def published(folder: Path) -> dict[str, str]:
    """Relative path -> sha256 of all that is published but what varies from run to run."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "results").rglob("*"))
        if path.is_file() and ".work" not in path.parts and not path.name.startswith(".") and not path.name.endswith("run.json")
    }


@pytest.mark.long
def test_kills_at_random_times_leave_nothing_locked_and_the_same_bytes(host):
    """SIGKILL of a run with its steps, ten times; then to the end on the same cards."""
    here = host(4000)
    dice = random.Random(5)
    for _ in range(10):
        process = here.start(*TARGETS)
        time.sleep(dice.uniform(1.5, 5.0))
        for pid in re.findall(r"(?m)^(\d+)$", steps_of(process.pid)):
            subprocess.run(["kill", "-9", pid], check=False)
        process.wait(timeout=60)
    here.run(*TARGETS)
    killed = published(here.clone.folder)
    subprocess.run(["rm", "-rf", "results", ".snakemake"], cwd=here.clone.folder, check=True)
    here.run(*TARGETS)
    assert published(here.clone.folder) == killed and killed
    assert here.most(here.gpus[0])[1] <= 4000


def steps_of(session: int) -> str:
    return subprocess.run(["ps", "-o", "pid=", "-s", str(session)], capture_output=True, text=True).stdout.replace(" ", "")


@pytest.mark.long
def test_two_runs_of_two_configs_hold_no_more_than_the_card_has(host, fresh):
    here = host(4000)
    other = fresh.folder / "other.yaml"
    other.write_text("pathvars: {results: results/other, logs: logs/other, benchmarks: benchmarks/other}\n")
    first = here.start(*TARGETS)
    here.configs.append("other.yaml")
    second = here.start(*[target.replace("results/", "results/other/") for target in TARGETS])
    for process in (first, second):
        said, _ = process.communicate(timeout=300)
        assert process.returncode == 0, said
    outputs = {Path(out).parts[1] for _, _, out, _, _ in here.jobs()}
    assert "other" in outputs and "dpo" in outputs
    assert here.most(here.gpus[0])[1] <= 4000 and here.most(here.gpus[0])[0] >= 3

"""Kills, signals, several Snakemakes at once, and broken files: nothing is lost, nothing half written, and the remedy works.

A kill of some kinds of step here, of all of them in `make test-all`; a hundred and more: tests/support/kills.py.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from tests.support import kills, warm
from tests.support.kills import CONFIGS, SAMPLE, STRATA, Missed, Runs, kill_group, sealed, wait_for

SFT = "results/sft_v2/adapter/manifest.json"
MERGED = "results/sft_v2/merged/manifest.json"


pytestmark = pytest.mark.slow


@pytest.fixture(scope="session")
def prepared(shared):
    return Runs(shared.folder("kills/prepared", kills.prepare))


@pytest.fixture(scope="session")
def reference(shared, prepared):
    """The main job."""
    return Runs(shared.folder("kills/reference", lambda folder: kills.undisturbed(prepared, folder, kills.MAIN)))


@pytest.fixture(scope="session")
def whole(shared, reference):
    """Every method."""
    return Runs(shared.folder("kills/whole", lambda folder: kills.undisturbed(reference, folder)))


@pytest.fixture
def clone(prepared, tmp_path):
    """Base and slices are made, nothing is trained."""
    return prepared.copy(tmp_path / "phaseline")


@pytest.fixture
def trained(reference, tmp_path):
    """All is made."""
    return reference.copy(tmp_path / "phaseline")


@pytest.fixture
def mark(reference):
    return json.loads((reference.folder / SFT).read_text())["fingerprint"]


@pytest.fixture
def expected(reference):
    return kills.results(reference)


@pytest.fixture
def rarely(clone):
    """Checkpoints only where a signal asks for them."""
    (clone.folder / "rarely.yaml").write_text("checkpoint_minutes: 10\n")
    return [*CONFIGS, "rarely.yaml"]


REST = tuple(stratum for stratum in STRATA if stratum not in SAMPLE)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("strata, of", [(SAMPLE, "reference"), pytest.param(REST, "whole", marks=pytest.mark.long)])
def test_random_kills(prepared, tmp_path, request, strata, of):
    count, notes = kills.campaign(strata, 1, tmp_path, prepared, request.getfixturevalue(of), warmed=strata == SAMPLE)
    assert count.total() == len(strata) and set(count) == set(strata)
    resumed = notes["resumed at step N of "]
    assert resumed >= sum(count[run] for run in kills.TRAINERS) - count["publish"]  # publish may end a step that was killed
    assert notes["killed between rename and record"] or not count["publish"]


def test_checkpoints_are_looked_for_while_a_beginning_step_removes_the_folder(tmp_path, goes_when_listed):
    (tmp_path / "trainer/checkpoint-3").mkdir(parents=True)
    assert kills.opened(tmp_path / "trainer") == [3] and sealed(tmp_path / "trainer") == []
    (tmp_path / "trainer/checkpoint-3/complete.json").touch()
    assert sealed(tmp_path / "trainer") == [3]
    goes_when_listed(tmp_path / "trainer")
    assert sealed(tmp_path / "trainer") == [] and not (tmp_path / "trainer").exists()


# -- signals ----------------------------------------------------------------


def job_of(clone: Runs, mark: str) -> int:
    """The process that holds the lock of a step."""
    return int((clone.folder / f"results/.work/locks/{mark}.lock").read_text().removeprefix("process ").split()[0])


def until_training(clone: Runs, process: subprocess.Popen) -> None:
    log = clone.log("sft_v2/train.log")
    wait_for(
        lambda: log.exists() and re.search(r"^(sft_v2: 1/16|resumed at step)", log.read_text(errors="replace"), re.M) is not None,
        process,
    )


def test_sigterm_to_the_group_and_to_the_job_saves_and_ends_and_to_snakemake_lets_the_step_finish(clone, mark, expected, rarely):
    trainer, log = clone.work(mark) / "trainer", clone.log("sft_v2/train.log")
    steps = []
    for to_group in (True, False):
        log.unlink(missing_ok=True)
        process = clone.start(SFT, configs=rarely, warmed=not to_group)  # a fork is not of the group
        until_training(clone, process)
        started = time.monotonic()
        os.killpg(process.pid, signal.SIGTERM) if to_group else os.kill(job_of(clone, mark), signal.SIGTERM)
        assert process.wait(30) == 1 and time.monotonic() - started < 30
        (step,) = sealed(trainer)
        assert f"ended by SIGTERM at step {step} of 16, with a checkpoint" in log.read_text()
        assert [
            f"resumed at step {earlier} of 16" for earlier in steps if f"resumed at step {earlier} of" not in log.read_text()
        ] == []
        assert not (clone.folder / SFT).exists()
        steps.append(step)
    assert steps[0] < steps[1]
    log.unlink()
    process = clone.start(MERGED, configs=rarely, warmed=True)
    wait_for(lambda: log.exists() and "resumed at step" in log.read_text(), process)
    os.kill(process.pid, signal.SIGTERM)
    process.wait(120)
    assert f"resumed at step {steps[1]} of 16" in log.read_text()
    kills.check_whole(clone, expected)
    assert (clone.folder / SFT).exists() and kills.recorded(clone, SFT) and not (clone.folder / MERGED).exists()
    assert "Nothing to be done" in clone.finish(SFT, configs=rarely)


# -- several at once ----------------------------------------------------------------


class Watch:
    """Looks every few milliseconds at the files of a step: how often was it trained, did an output ever vanish?"""

    def __init__(self, clone: Runs, mark: str):
        self.trainer = clone.work(mark) / "trainer"
        self.outputs = [clone.folder / SFT, (clone.folder / SFT).with_name("adapter_model.safetensors")]
        self.steps: list[int] = []
        self.vanished: list[str] = []
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.look)

    def look(self) -> None:
        there: set[Path] = set()
        while not self.over.wait(0.003):
            now = {path for path in self.outputs if path.exists()}
            self.vanished += [path.name for path in there - now]
            there = now
            if (found := sealed(self.trainer)) and [found[-1]] != self.steps[-1:]:
                self.steps.append(found[-1])

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.thread.join()


@pytest.mark.parametrize("orphan", [False, True])
def test_three_at_once_train_once_delete_nothing_and_who_waits_names_the_holder(clone, mark, expected, orphan):
    """The same target twice, and another that needs it. `orphan`: the first Snakemake is killed, its training goes on."""
    runs = []
    with Watch(clone, mark) as watch:
        try:
            runs.append(clone.start(SFT, warmed=True))
            until_training(clone, runs[0])
            trainer = job_of(clone, mark)
            runs += [clone.start(SFT, warmed=True), clone.start(MERGED, warmed=True)]
            if orphan:
                os.kill(runs[0].pid, signal.SIGKILL)
            codes = [process.wait(300) for process in runs]
        finally:
            for process in runs:
                kill_group(process)
    said = [clone.said(process) for process in runs]
    assert codes == [-signal.SIGKILL if orphan else 0, 0, 0], said
    assert watch.steps == sorted(set(watch.steps)), f"trained more than once: {watch.steps}"
    # An orphan may end while the next run plans: Snakemake then deletes its outputs, and the step puts them back at once.
    assert orphan or watch.vanished == []
    for text in said[1:]:
        waited = re.search(r"waiting: .* process (\d+) on", text)
        planned_later = "train_sft" not in text  # it was trained by then, and only a merge was left
        assert waited or "Nothing to be done" in text or "taken over" in text or planned_later, text
        assert waited is None or int(waited[1]) in (trainer, *(process.pid for process in runs))
    kills.check_whole(clone, expected)
    assert "Nothing to be done" in clone.finish(MERGED)


def test_a_run_that_was_planned_before_the_step_was_made_neither_deletes_it_nor_trains_it_again(clone, mark):
    with Watch(clone, mark) as watch:
        first = clone.start(SFT, warmed=True)
        wait_for(lambda: "rule train_sft" in clone.said(first), first)
        late = clone.start(SFT, warmed=True)
        try:
            with contextlib.suppress(Missed):
                wait_for(lambda: "Job stats" in clone.said(late) or "waiting" in clone.said(late), late)
            os.killpg(late.pid, signal.SIGSTOP)  # as on a busy machine
            assert first.wait(120) == 0, clone.said(first)
            clone.finish(MERGED)
            os.killpg(late.pid, signal.SIGCONT)
            assert late.wait(120) == 0, clone.said(late)
        finally:
            kill_group(first)
            kill_group(late)
    assert watch.steps == sorted(set(watch.steps)) and watch.vanished == []


def test_a_step_that_was_made_before_is_not_made_twice_by_a_kill_before_the_record(trained, mark, expected):
    """Snakemake's record of the earlier time must not be taken for one of this time."""
    shutil.rmtree((trained.folder / SFT).parent)
    shutil.rmtree(trained.work(mark), ignore_errors=True)
    process = trained.start(SFT, warmed=True)
    wait_for((trained.folder / SFT).exists, process, every=0.0002)
    kill_group(process)
    warm.until_still(trained.folder)
    assert not kills.recorded(trained, SFT)
    assert "already made with this fingerprint: taken over" in trained.finish(SFT)
    kills.check_whole(trained, expected)


# -- broken files ----------------------------------------------------------------


def fails(clone: Runs, *targets: str) -> str:
    """The one line that a failing step says; AssertionError if it is none, or a traceback is shown."""
    done = clone.snakemake("--cores", "1", *targets, configs=CONFIGS, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 1, said
    lines = [line for line in said.splitlines() if re.match(r"results/\S+: error: ", line)]
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


def edit(path: Path, **change) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_a_truncated_adapter_an_edited_manifest_and_a_foreign_checkpoint_are_named_and_the_remedy_works(trained, mark, expected):
    adapter = trained.folder / "results/sft_v2/adapter/adapter_model.safetensors"
    merged, manifest = (trained.folder / MERGED).parent, trained.folder / SFT

    shutil.rmtree(merged)
    adapter.write_bytes(adapter.read_bytes()[:-100])
    said = fails(trained, MERGED)
    assert (
        f"{adapter.relative_to(trained.folder)}: altered since it was made" in said
        and "delete it and run snakemake again" in said
    )
    adapter.unlink()
    trained.finish(MERGED)
    kills.check_whole(trained, expected)

    shutil.rmtree(merged)
    edit(manifest, fingerprint="0" * len(mark))
    said = fails(trained, MERGED)
    assert SFT in said and f"delete {SFT} and run snakemake again" in said
    manifest.unlink()
    shutil.rmtree(trained.work(mark), ignore_errors=True)
    trainer = trained.work(mark) / "trainer/checkpoint-3"
    trainer.mkdir(parents=True)
    (trainer / "complete.json").write_text(json.dumps({"fingerprint": "0" * len(mark), "files": {}}))
    said = fails(trained, MERGED)
    assert "checkpoint-3: a checkpoint of another step (fingerprint 000000000000" in said and "remove the folder" in said
    shutil.rmtree(trained.folder / re.search(r"remove the folder (\S+) and run", said)[1])
    trained.finish(MERGED)
    kills.check_whole(trained, expected)


@pytest.fixture
def small(clone):
    """The results on a file system of a few hundred kilobytes: mounts it again with other options, for instance `size=60m`."""
    folder = clone.folder / "results"
    aside = folder.rename(folder.with_name("aside"))
    folder.mkdir()

    def mount(*options: str) -> bool:
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
        return subprocess.run(command, capture_output=True).returncode == 0

    if not mount("size=1000k"):
        pytest.skip("no right to mount a file system")
    try:
        shutil.copytree(aside, folder, dirs_exist_ok=True)
        yield lambda *options: mount("remount", *options)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_and_read_only_results_are_one_clear_line_and_the_run_goes_on_when_there_is_room(clone, small, expected):
    assert "o space left" in fails(clone, SFT)
    kills.check_whole(clone, expected)
    assert small("size=60m")
    clone.finish(SFT)
    kills.check_whole(clone, expected)
    assert small("ro")
    done = clone.snakemake("--cores", "1", MERGED, configs=CONFIGS, check=False)
    text = done.stdout + done.stderr
    assert done.returncode == 1
    said = [line for line in text.splitlines() if "ead-only" in line]
    assert len(said) == 1 and "results" in said[0] and "Traceback" not in text, text
    assert small("rw")
    clone.finish(MERGED)
    kills.check_whole(clone, expected)

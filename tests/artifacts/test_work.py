"""Locks, and outputs that appear whole or not at all."""

import errno
import json
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.toy_step import Toys, step_of
from workflow_scripts.artifacts import manifests, work
from workflow_scripts.artifacts.fingerprint import canonical, file_sha256, fingerprint
from workflow_scripts.plan import records
from workflow_scripts.plumbing.messages import InputError


@pytest.fixture
def step(tmp_path):
    return step_of(tmp_path)


@pytest.fixture
def start(tmp_path):
    toys = Toys(tmp_path)
    yield toys.start
    toys.stop()


@pytest.fixture
def run(tmp_path):
    return Toys(tmp_path).run


def job_of(tmp_path, step, inputs=(), name="manifest.json"):
    return manifests.Job(step, list(inputs), tmp_path / "out" / name, tmp_path / "work")


def make(job, files=(("data.txt", "content"),), parents=None):
    work.claim(job.work, fingerprint(job.step), job.out, job.step)  # as the command line does before a step begins
    with manifests.complete(job, "thing", parents or {}) as draft:
        for name, text in files:
            (draft.folder / name).write_text(text)
    return manifests.read(job.out)


def until(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


# -- artifacts ------------------------------------------------------------------------------------------------------------


def test_nothing_appears_if_the_block_raises_and_the_next_try_starts_clean(tmp_path, step):
    job = job_of(tmp_path, step)
    with pytest.raises(RuntimeError), manifests.complete(job, "thing", {}) as draft:
        (draft.folder / "data.txt").write_text("half")
        (draft.folder / "left_over.txt").write_text("half")
        raise RuntimeError
    assert not job.out.parent.exists()
    assert not work.republish(job.work, fingerprint(step), job.out)
    made = make(job)
    assert set(made.data["files"]) == {"data.txt"} and {path.name for path in job.out.parent.iterdir()} == {
        "data.txt", "manifest.json", "run.json",
    }  # fmt: skip


def test_a_failure_leaves_the_older_outputs_as_they_were(tmp_path, step):
    make(job_of(tmp_path, step))
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    job = job_of(tmp_path, step | {"seed": 2})
    with pytest.raises(RuntimeError), manifests.complete(job, "thing", {}) as draft:
        (draft.folder / "data.txt").write_text("new")
        raise RuntimeError
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_manifest_appears_last_and_each_file_whole(tmp_path, step, monkeypatch):
    job, order = job_of(tmp_path, step), []
    replace = os.replace

    def watched(source, target):
        if Path(target).name == "where.json":  # says whose working folder it is, from the start
            return replace(source, target)
        order.append(Path(target).name)
        assert job.out.exists() is False, "the manifest is there before its files"
        replace(source, target)

    monkeypatch.setattr(work.os, "replace", watched)
    make(job, [("a.txt", "1"), ("zz.txt", "2"), ("metrics.csv", "3")])
    assert order[-1] == "manifest.json" and sorted(order) == ["a.txt", "manifest.json", "metrics.csv", "run.json", "zz.txt"]


def test_files_are_listed_with_their_sha256_and_what_varies_is_not(tmp_path, step):
    made = make(job_of(tmp_path, step), [("data.txt", "abc"), ("metrics.csv", "x")])
    sha256_of_abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert made.data["files"] == {"data.txt": sha256_of_abc}
    assert made.data["step"] == step and made.fingerprint == fingerprint(step) and made.data["format"] == 1
    assert "started" in json.loads((tmp_path / "out/run.json").read_text()) and "started" not in made.path.read_text()
    first = made.path.read_bytes()
    assert make(job_of(tmp_path, step), [("data.txt", "abc"), ("metrics.csv", "y")]).path.read_bytes() == first


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_what_is_published_has_the_mode_that_the_umask_asks_for(tmp_path, step, umask, mode):
    before = os.umask(umask)
    try:
        with manifests.complete(job_of(tmp_path, step), "thing", {}) as draft:
            save_file({"weight": torch.zeros(1)}, draft.folder / "model.safetensors")  # writes 0600
            (draft.folder / "executable").touch(0o777)
    finally:
        os.umask(before)
    made = [path for path in (tmp_path / "out").iterdir() if path.is_file()]
    assert len(made) == 4 and {path.stat().st_mode & 0o777 for path in made} == {mode}


def test_a_file_that_was_altered_or_lost_is_refused(tmp_path, step):
    made = make(job_of(tmp_path, step))
    assert made.file("data.txt").read_text() == "content"
    with pytest.raises(InputError, match="manifest.json: lists no file other.txt"):
        made.file("other.txt")
    (tmp_path / "out/data.txt").write_text("tampered")
    with pytest.raises(InputError, match="data.txt: altered since it was made .*delete it and run snakemake again"):
        made.file("data.txt")
    (tmp_path / "out/data.txt").unlink()
    with pytest.raises(InputError, match="data.txt: missing, though manifest.json lists it"):
        made.file("data.txt")


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '"x"', "3", '{"fingerprint": "x"}'])
def test_what_is_no_manifest_is_said_to_be_none(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(InputError, match="manifest.json: not a manifest of this pipeline"):
        manifests.read(tmp_path / "manifest.json")
    assert not work.whole(tmp_path / "manifest.json", "x", tmp_path)


def test_parents_are_matched_by_fingerprint_and_a_wrong_one_is_named(tmp_path, step):
    first = make(job_of(tmp_path / "1", step))
    second = make(job_of(tmp_path / "2", step | {"seed": 2}))
    child = step | {"parents": {"start": first.fingerprint, "rows": second.fingerprint}}
    found = job_of(tmp_path, child, [second.path, second.folder / "data.txt", first.path]).parents()
    assert {role: artifact.path for role, artifact in found.items()} == {"start": first.path, "rows": second.path}
    with pytest.raises(InputError) as caught:
        job_of(tmp_path, child, [first.path]).parents()
    text = str(caught.value)
    assert f"none of its inputs is the rows that this step was planned with (fingerprint {second.fingerprint[:12]})" in text
    assert f"given: {first.path} ({first.fingerprint[:12]})" in text and text.endswith("run snakemake again")


# -- publishing -------------------------------------------------------------------------------------------------------------


def test_deleted_outputs_come_back_from_the_finished_copy(tmp_path, step):
    job = job_of(tmp_path, step)
    make(job)
    before = {path.name: path.read_bytes() for path in job.out.parent.iterdir()}
    assert work.republish(job.work, fingerprint(step), job.out)  # in place
    for name in before:
        (job.out.parent / name).unlink()
    assert work.republish(job.work, fingerprint(step), job.out)
    assert {path.name: path.read_bytes() for path in job.out.parent.iterdir()} == before
    (job.out.parent / "data.txt").unlink()
    assert work.republish(job.work, fingerprint(step), job.out) and (job.out.parent / "data.txt").exists()
    assert not work.republish(job.work, fingerprint(step | {"seed": 2}), job.out)


def test_a_file_is_read_once_for_its_sha256_and_again_where_it_was_altered(tmp_path, step, monkeypatch):
    made, read = make(job_of(tmp_path, step)), []
    monkeypatch.setattr(manifests, "file_sha256", lambda path: read.append(path) or file_sha256(path))
    path = made.file("data.txt")
    assert made.file("data.txt") == path and read == [path]
    before = path.stat()
    path.write_text("CONTENT")  # of the same size, and of the same time
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match="data.txt: altered since it was made"):
        made.file("data.txt")


def test_a_finished_copy_that_was_altered_is_not_put_in_place(tmp_path, step):
    job = job_of(tmp_path, step)
    make(job)
    for name in ("data.txt", "manifest.json"):
        (job.out.parent / name).unlink()
    (job.work / fingerprint(step) / "done/data.txt").write_text("tampered")
    assert not work.republish(job.work, fingerprint(step), job.out)
    assert not (job.out.parent / "data.txt").exists()


def test_an_output_that_was_altered_in_place_is_made_again(tmp_path, step, run):
    assert run(step).returncode == 0
    with open(tmp_path / "out/data.txt", "a") as file:  # in place: the finished copy is a hard link to it
        file.write("more")
    assert run(step).returncode == 0
    assert (tmp_path / "out/data.txt").read_text() == "content" and (tmp_path / "ran").read_text() == "ran\nran\n"


def test_publishing_works_without_hard_links(tmp_path, step, monkeypatch):
    def refuse(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr(work.os, "link", refuse)
    assert make(job_of(tmp_path, step)).file("data.txt").read_text() == "content"
    assert not list((tmp_path / "out").glob(".*"))


# -- clearing up --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Writes Snakemake's record of an output, as far as it matters here. Returns its file."""
    monkeypatch.chdir(tmp_path)

    def write(out: Path, params: list, **more) -> Path:
        file = records.record_file(str(out))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"params": params, "incomplete": False} | more))
        return file

    return write


@pytest.mark.parametrize(
    ("params", "more", "cleared"),
    [
        (lambda step: [repr(canonical(step))], {}, True),
        (lambda step: [repr("train_dpo"), repr(canonical(step))], {}, True),
        (lambda step: [repr(canonical(step | {"seed": 2}))], {}, False),
        (lambda step: [repr(canonical(step))], {"incomplete": True}, False),
        (lambda step: [], {}, False),
        (lambda step: None, {}, False),
        (None, {}, False),
    ],
)
def test_only_what_snakemake_has_recorded_is_cleared(tmp_path, record, step, params, more, cleared):
    job = job_of(tmp_path, step | {"rate": 5e-6})
    with work.exclusive(job.work, fingerprint(job.step), print):
        make(job)
    if params is not None:
        record(job.out, params(job.step), **more)
    assert records.clear_recorded(job.work) == ([fingerprint(job.step)] if cleared else [])
    assert (job.work / fingerprint(job.step)).exists() != cleared
    assert work.republish(job.work, fingerprint(job.step), job.out)  # the outputs are there in any case


def test_what_is_locked_or_unfinished_is_not_cleared(tmp_path, record, step):
    job = job_of(tmp_path, step)
    make(job)
    record(job.out, [repr(canonical(step))])
    with work.exclusive(job.work, fingerprint(step), print):
        assert records.clear_recorded(job.work) == []
    home = job.work / fingerprint(step)
    (home / "done").rename(home / "stage")
    assert records.clear_recorded(job.work) == []
    (home / "stage").rename(home / "done")
    assert records.clear_recorded(job.work) == [fingerprint(step)]


def test_what_was_begun_again_and_not_recorded_is_not_cleared_for_an_older_record(tmp_path, record, step):
    """Its outputs were deleted and are being made again: Snakemake keeps the older record, and a marker beside it."""
    job = job_of(tmp_path, step)
    make(job)
    marker = records.INCOMPLETE / record(job.out, [repr(canonical(step))]).name
    marker.parent.mkdir()
    marker.touch()
    assert records.clear_recorded(job.work) == []
    marker.unlink()
    assert records.clear_recorded(job.work) == [fingerprint(step)]


@pytest.mark.parametrize("text", ["", '{"out": "res', "[]", "{}"])
def test_a_note_that_was_cut_off_by_a_kill_does_not_stop_the_next_run(tmp_path, step, text):
    job = job_of(tmp_path, step)
    make(job)
    (job.work / fingerprint(step) / "where.json").write_text(text)
    assert records.clear_recorded(job.work) == []
    assert records.clear_recorded(tmp_path / "no such folder") == []


# -- locks ----------------------------------------------------------------------------------------------------------------


def test_a_second_process_waits_names_the_holder_and_takes_over_the_result(tmp_path, start):
    (tmp_path / "wait").touch()
    step = step_of(tmp_path, wait=str(tmp_path / "wait"))
    first = start(step)
    until(lambda: (tmp_path / "ran").exists())
    second = start(step, "--log", "second.log")
    until(lambda: (tmp_path / "second.log").exists() and "waiting" in (tmp_path / "second.log").read_text())
    assert second.poll() is None and not (tmp_path / "out").exists()
    (tmp_path / "wait").unlink()
    assert first.wait(30) == 0 and second.wait(30) == 0
    said = second.communicate()[1].splitlines()
    assert said[0].startswith(f"out/manifest.json: waiting: the same output is being made by process {first.pid} on ")
    assert said[1:] == ["out/manifest.json: already made with this fingerprint: taken over"]
    assert (tmp_path / "ran").read_text() == "ran\n"


def test_who_waits_leaves_the_log_of_the_holder_alone_and_begins_its_own(tmp_path, start):
    (tmp_path / "wait").touch()
    step, log = step_of(tmp_path, wait=str(tmp_path / "wait")), tmp_path / "step.log"
    first = start(step, "--log", "step.log")
    until(lambda: log.exists() and "some output" in log.read_text())
    second = start(step, "--log", "step.log")
    until(lambda: "waiting" in log.read_text())
    assert "some output" in log.read_text()
    (tmp_path / "wait").unlink()
    assert first.wait(30) == 0 and second.wait(30) == 0
    assert "taken over" in log.read_text() and "some output" not in log.read_text()


def test_the_lock_dies_with_its_holder_and_who_waits_makes_the_step(tmp_path, start):
    (tmp_path / "wait").touch()
    step = step_of(tmp_path, wait=str(tmp_path / "wait"))
    first = start(step)
    until(lambda: (tmp_path / "ran").exists())
    second = start(step, "--log", "second.log")
    until(lambda: (tmp_path / "second.log").exists() and "waiting" in (tmp_path / "second.log").read_text())
    first.kill()
    (tmp_path / "wait").unlink()
    assert second.wait(30) == 0
    assert (tmp_path / "ran").read_text() == "ran\nran\n" and (tmp_path / "out/data.txt").read_text() == "content"


def test_steps_of_two_configs_that_make_one_output_take_turns_and_the_later_one_stays(tmp_path, start):
    flag = tmp_path / "go on"
    flag.touch()
    older = start(step_of(tmp_path, text="older", wait=str(flag)))
    until(lambda: (tmp_path / "ran").exists())
    newer = start(step_of(tmp_path, text="newer"))
    assert f"waiting: the same output is being made by process {older.pid}" in newer.stderr.readline()
    flag.unlink()
    assert older.wait(30) == newer.wait(30) == 0
    assert (tmp_path / "out/data.txt").read_text() == "newer"
    assert json.loads((tmp_path / "out/manifest.json").read_text())["step"]["config"]["text"] == "newer"


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_said_to_be_one(tmp_path, monkeypatch, number):
    """As Lustre without `-o flock`."""

    def flock(file, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(work.fcntl, "flock", flock)
    said = rf"{tmp_path}/locks: its file system has no file locks \(flock: {os.strerror(number)}\).*-o flock.*pathvars: results"
    for lock in (lambda: work.turn(tmp_path, "results"), work.exclusive(tmp_path, "mark", print).__enter__):
        with pytest.raises(InputError, match=said):
            lock()


def test_other_steps_do_not_wait(tmp_path, step):
    said = []
    with work.exclusive(tmp_path, "a", said.append), work.exclusive(tmp_path, "b", said.append):
        pass
    assert said == []


def test_the_sha256_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "empty").touch()
    assert file_sha256(tmp_path / "empty") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

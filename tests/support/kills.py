"""Random kills: SIGKILL of a whole Snakemake process group at a chosen or random moment, and what the next command makes of it.

    python -m tests.support.kills --trials 100 --seed 1

A trial starts `snakemake` for one target of a micro chain in its own process group, waits for the moment that its stratum
names, kills the group, and looks at what lies there: every file under a declared name must equal that of an undisturbed run,
byte for byte. The next run of that target must go on where the killed one was: at the step of the checkpoint that lay there,
with the answers that were given, or by taking over the finished copy. When all trials of a round are over, one run of all
targets ends the chain, and all results are compared with those of the undisturbed run.
"""

import argparse
import functools
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.conftest import Clone, make_clone
from tests.support import warm
from workflow_scripts.plan import records

CONFIGS = ["config/config.yaml", "tests/support/config/micro.yaml", "tests/support/config/kills.yaml"]
SLICES = ("ifeval", "sft", "pairs", "rm_pairs", "instructions")
TRAINERS = {"sft_v2": 16, "dpo": 12, "kto": 12, "rm": 12, "ppo": 8, "grpo": 8, "rloo": 8}  # run -> steps under kills.yaml
MAIN = ("sft_v2", "dpo")  # the trainers of the main job
PREPARED = ["results/base/manifest.json", *(f"results/data/{name}.manifest.json" for name in SLICES)]
SAMPLE = ("sft_v2", "dpo", "generate", "publish")  # of the strata: those of the main job
STRATA = ("slice", "sft_v2", "merge", "dpo", "kto", "rm", "ppo", "grpo", "rloo", "generate", "publish")


class Missed(Exception):
    """The step ended before the moment came."""


def targets(trainers: Iterable[str]) -> list[str]:
    """The whole of a chain with these trainers."""
    return [*(f"results/{run}/adapter/manifest.json" for run in trainers), "results/ifeval_dpo.json"]


class Runs(Clone):
    """A clone in which Snakemake runs are started, watched and killed."""

    def start(self, *targets: str, configs: list[str] = CONFIGS, warmed: bool = False) -> subprocess.Popen:
        """A Snakemake run; see `begin`."""
        return self.begin("snakemake", "--cores", "1", *targets, "--configfile", *configs, warmed=warmed)

    def begin(self, *command: str, warmed: bool = False) -> subprocess.Popen:
        """A command in a process group of its own, as from a terminal. What it says goes to `said.<process>`.
        warmed: its steps are forks, which are quicker, and not of its group."""
        path = self.folder / f"said.{time.monotonic_ns()}"
        with open(path, "w") as file:
            process = subprocess.Popen(
                command, cwd=self.folder, env=self.warmed() if warmed else self.environment(),
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
            )  # fmt: skip
        path.rename(self.said_file(process))
        return process

    def said_file(self, process: subprocess.Popen) -> Path:
        return self.folder / f"said.{process.pid}"

    def said(self, process: subprocess.Popen) -> str:
        return self.said_file(process).read_text(errors="replace")

    def finish(self, *targets: str, configs: list[str] = CONFIGS) -> str:
        """Run to the end, undisturbed. Returns what Snakemake said; AssertionError if it failed."""
        done = self.snakemake("--cores", "1", *targets, configs=configs)
        return done.stdout + done.stderr

    def log(self, name: str) -> Path:
        return self.folder / "logs" / name

    def work(self, fingerprint: str) -> Path:
        return self.folder / "results/.work" / fingerprint

    def copy(self, folder: Path) -> "Runs":
        shutil.copytree(self.folder, folder, symlinks=True, copy_function=shutil.copy2)
        return Runs(folder)


def kill_group(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
    if number == signal.SIGKILL:
        process.wait()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, seconds: float = 300, every: float = 0.002) -> None:
    """Until `condition` holds. Missed if the process ends before."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise Missed
        assert time.monotonic() < end, "nothing happened"
        time.sleep(every)


def opened(trainer: Path) -> list[int]:
    """Steps of all checkpoints in a trainer's folder, those that are being written included."""
    try:
        names = os.listdir(trainer)  # Path.glob raises if the folder goes just then: a step that begins anew removes it
    except FileNotFoundError:
        return []
    return sorted(int(name.rsplit("-", 1)[1]) for name in names if name.startswith("checkpoint-"))


def sealed(trainer: Path) -> list[int]:
    """Steps of the whole checkpoints."""
    return [step for step in opened(trainer) if (trainer / f"checkpoint-{step}/complete.json").exists()]


def results(clone: Clone) -> dict[str, str]:
    """Every file under a declared name -> sha256, but for run.json, which differs between equal runs."""
    root, found = clone.folder / "results", {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and ".work" not in name.parts and not name.name.startswith(".") and not name.name.endswith("run.json"):
            found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def leftovers(clone: Clone) -> list[str]:
    """Hidden files between the results: what a kill left of a publication."""
    root = clone.folder / "results"
    return sorted(str(path.relative_to(root)) for path in root.rglob(".*") if path.is_file() and ".work" not in path.parts)


def record(clone: Clone, output: str, kind: str) -> Path:
    """Snakemake's note on an output: `metadata` (made) or `incomplete` (being made)."""
    return records.record_file(output, clone.folder / ".snakemake" / kind)


def recorded(clone: Clone, output: str) -> bool:
    """True if Snakemake has noted this output as made."""
    return record(clone, output, "metadata").exists() and not record(clone, output, "incomplete").exists()


def check_whole(clone: Clone, expected: dict[str, str]) -> None:
    """AssertionError if a file under a declared name is not that of the undisturbed run, or a manifest vouches for less."""
    found = results(clone)
    wrong = {name for name, sha256 in found.items() if expected.get(name) != sha256}
    assert not wrong, f"half written, or not what an undisturbed run makes: {sorted(wrong)}"
    for name in found:
        if name.endswith("manifest.json"):
            path = clone.folder / "results" / name
            for file, sha256 in json.loads(path.read_text())["files"].items():
                assert hashlib.sha256((path.parent / file).read_bytes()).hexdigest() == sha256, f"{name}: {file}"


def prepare(folder: Path) -> Runs:
    """A clone with the base model and the slices made."""
    clone = Runs(make_clone(folder).folder)
    clone.finish(*PREPARED)
    return clone


def undisturbed(prepared: Runs, folder: Path, trainers: Iterable[str] = TRAINERS) -> Runs:
    """A copy of the prepared clone in which the whole chain has run."""
    clone = prepared.copy(folder)
    clone.finish(*targets(trainers))
    return clone


class Round:
    """Trials in one copy of the prepared clone. The chain is that of the reference."""

    def __init__(self, prepared: Runs, reference: Runs, folder: Path, chance: random.Random, warmed: bool):
        self.clone, self.chance, self.expected = prepared.copy(folder), chance, results(reference)
        self.warmed = warmed
        self.reference = reference
        self.trainers = [run for run in TRAINERS if f"{run}/adapter/manifest.json" in self.expected]
        self.count: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.promised: dict[str, tuple[Path, str, int]] = {}  # fingerprint -> a log, what the next run must say in it, since when

    def mark(self, manifest: str) -> str:
        return json.loads((self.reference.folder / manifest).read_text())["fingerprint"]

    def seconds(self, benchmark: str) -> float:
        """How long the step took in the undisturbed run."""
        return float((self.reference.folder / "benchmarks" / benchmark).read_text().splitlines()[1].split("\t")[0])

    def keep_promises(self, at_end: bool = False) -> None:
        """AssertionError if a step that was started again since it was killed did not say what it had to."""
        for mark, (log, words, since) in list(self.promised.items()):
            if at_end or (log.exists() and log.stat().st_mtime_ns > since):
                del self.promised[mark]
                text = log.read_text(errors="replace") if log.exists() else ""
                assert words in text, f"{log}: expected {words!r} in\n{text[-2000:]}"
                self.notes[re.sub(r"\d+", "N", words)] += 1

    def trial(self, stratum: str) -> None:
        """One kill, and the look at what it left."""
        target, mark, log, moment = getattr(self, f"in_{stratum}", lambda: self.in_trainer(stratum))()
        log.unlink(missing_ok=True)
        self.count[stratum] += 1
        process = self.clone.start(target, warmed=self.warmed)
        try:
            moment(process)
            pause = "" if process.poll() is None else " (ended)"
        except Missed:
            pause = " (missed)"
        finally:
            kill_group(process)
            warm.until_still(self.clone.folder)
        if pause == " (missed)":
            raise AssertionError(f"{stratum}: the run ended before it could be killed:\n{self.clone.said(process)[-3000:]}")
        check_whole(self.clone, self.expected)
        self.keep_promises()
        next_run = self.promise(target, mark)
        if next_run is not None:
            self.promised[mark] = (log, next_run, time.time_ns())
        print(f"{stratum:9} {target:45} {next_run or 'starts again'}{pause}", flush=True)

    def promise(self, target: str, mark: str) -> str | None:
        """What the next run of the step must say, by what lies there now."""
        home = self.clone.work(mark)
        if (home / "done" / Path(target).name).exists():
            if recorded(self.clone, target):
                return None
            self.notes["killed between rename and record"] += 1
            return "already made with this fingerprint: taken over"
        if steps := sealed(home / "trainer"):
            return f"resumed at step {steps[-1]} of "
        if (home / "answers.jsonl").exists():
            whole = [line for line in (home / "answers.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
            return f"{len(whole)} prompts were answered before: taken over"
        return None

    def in_trainer(self, run: str):
        """At a random step: after its checkpoint, or while that is written."""
        target = f"results/{run}/adapter/manifest.json"
        mark = self.mark(target)
        trainer = self.clone.work(mark) / "trainer"
        if (self.clone.work(mark) / "done").exists() or (self.clone.folder / target).exists():
            self.forget(target)  # an earlier kill came too late
        last = max(sealed(trainer), default=0)
        # Leaves steps for the trials to come: the upper bound grows with what is there.
        step = self.chance.randint(last + 1, min(last + 3, TRAINERS[run] - 2)) if last < TRAINERS[run] - 2 else last
        saving = step >= 2 and step > last and self.chance.random() < 0.5
        delay = self.chance.uniform(0, 0.03 if saving else 0.2)
        log = self.clone.log(f"{run}/train.log")

        def moment(process):
            if step == last:  # as far as it may go: killed again right after it has resumed
                wait_for(lambda: log.exists() and f"resumed at step {last} of " in log.read_text(errors="replace"), process)
            else:
                wait_for(lambda: max(opened(trainer) if saving else sealed(trainer), default=0) >= step, process)
                wait_for(lambda: bool(sealed(trainer)), process)
            time.sleep(delay)

        return target, mark, log, moment

    def at_random(self, target: str, log: Path, seconds: float):
        """At a random moment of a step's life, the loading of its libraries included."""
        delay = self.chance.uniform(0, seconds)

        def moment(process):
            wait_for(log.exists, process)
            end = time.monotonic() + delay
            try:
                wait_for(lambda: time.monotonic() >= end, process)
            except Missed:
                pass  # a finished step is a moment as well

        return target, self.mark(target), log, moment

    def forget(self, manifest: str) -> None:
        """Take an artifact away with its finished copy and Snakemake's records: the next run makes it as a first time."""
        path, mark = Path(manifest), self.mark(manifest)
        for name in [path.name, *json.loads((self.reference.folder / manifest).read_text())["files"]]:
            (self.clone.folder / path.with_name(name)).unlink(missing_ok=True)
            record(self.clone, str(path.with_name(name)), "metadata").unlink(missing_ok=True)
        self.promised.pop(mark, None)
        shutil.rmtree(self.clone.work(mark), ignore_errors=True)

    def in_slice(self):
        name = self.chance.choice(SLICES[1:])  # the evaluation prompts are an input of the others
        target = f"results/data/{name}.manifest.json"
        self.forget(target)
        return self.at_random(target, self.clone.log(f"data/{name}.log"), self.seconds(f"data/{name}.tsv"))

    def in_merge(self):
        target = "results/sft_v2/merged/manifest.json"
        self.forget(target)
        return self.at_random(target, self.clone.log("sft_v2/merge.log"), self.seconds("sft_v2/merge.tsv"))

    def in_generate(self):
        """At a random batch of answers, or while one is written."""
        target = "results/dpo/ifeval_responses.manifest.json"
        mark = self.mark(target)
        saved = self.clone.work(mark) / "answers.jsonl"
        have = len(saved.read_text().splitlines()) if saved.exists() else 0
        batches, delay = min(have + self.chance.randint(1, 2), 8), self.chance.uniform(0, 0.01)

        def moment(process):
            wait_for(lambda: saved.exists() and len(saved.read_text().splitlines()) >= batches, process)
            time.sleep(delay)

        return target, mark, self.clone.log("dpo/generate_ifeval.log"), moment

    def in_publish(self):
        """Right after the finished copy or the manifest appeared: before Snakemake has noted anything."""
        logs = {f"results/{run}/adapter/manifest.json": f"{run}/train.log" for run in self.trainers}
        logs |= {"results/dpo/ifeval_responses.manifest.json": "dpo/generate_ifeval.log"}
        unfinished = [target for target in logs if not (self.clone.folder / target).exists()]
        if not unfinished or self.chance.random() < 0.3:
            name = self.chance.choice(SLICES[1:])
            target = f"results/data/{name}.manifest.json"
            self.forget(target)
            logs[target] = f"data/{name}.log"
        else:
            target = self.chance.choice(unfinished)
        seen = self.clone.work(self.mark(target)) / "done" if self.chance.random() < 0.3 else self.clone.folder / target

        def moment(process):
            wait_for(seen.exists, process, every=0.0002)

        return target, self.mark(target), self.clone.log(logs[target]), moment

    def close(self) -> None:
        """End the chain, and compare all of it with the undisturbed run."""
        self.clone.finish(*targets(self.trainers), *PREPARED)
        check_whole(self.clone, self.expected)
        missing = set(self.expected) - set(results(self.clone))
        assert not missing, f"missing at the end: {sorted(missing)}"
        self.notes["chains ended equal to the undisturbed one"] += 1
        self.keep_promises(at_end=True)
        self.notes["files left between the results"] += len(leftovers(self.clone))


def campaign(
    strata: Iterable[str], seed: int, folder: Path, prepared: Runs, reference: Runs, warmed: bool = False, per_round: int = 5
) -> tuple[Counter, Counter]:
    """A trial for each of `strata`, in rounds of at most `per_round` of one. Returns trials by stratum, and what was seen.
    warmed: steps are forks, spared their ten seconds of loading, and die a moment after their Snakemake.

    A failed trial is told at once and does not stop the others. AssertionError at the end if there was one.
    """
    count: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    failures: list[str] = []
    wanted = Counter(strata)
    while +wanted:
        chance = random.Random(f"{seed}/{count.total()}")
        now = Round(prepared, reference, folder / f"round{count.total()}", chance, warmed)
        trials_now = [stratum for stratum in STRATA for _ in range(min(per_round, wanted[stratum]))]
        steps: list[Callable[[], None]] = [*(functools.partial(now.trial, stratum) for stratum in trials_now), now.close]
        for do in steps:
            try:
                do()
            except AssertionError as error:
                failures.append(str(error))
                print(f"FAILED after {now.count.total()} kills of this round: {error}", flush=True)
        count, notes, wanted = count + now.count, notes + now.notes, wanted - now.count
        shutil.rmtree(now.clone.folder)
    assert not failures, f"{len(failures)} of {count.total()} trials failed, {notes}:\n" + "\n\n".join(failures)
    return count, notes


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--trials", type=int, default=len(STRATA))
    made.add_argument("--seed", type=int, default=1)
    made.add_argument("--folder", type=Path, help="where the clones go; an own temporary folder otherwise")
    args, started = made.parse_args(), time.monotonic()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="kills."))
    try:
        prepared = prepare(folder / "prepared")
        strata = itertools.islice(itertools.cycle(STRATA), args.trials)
        count, notes = campaign(strata, args.seed, folder, prepared, undisturbed(prepared, folder / "reference"))
    finally:
        if args.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"{count.total()} kills in {time.monotonic() - started:.0f} s, results equal to those of an undisturbed run")
    for what, number in [*count.items(), *notes.items()]:
        print(f"{number:5} {what}")


if __name__ == "__main__":
    main()

"""Checkpoints of a training step: a killed run goes on where it was, and ends with the same adapter bit for bit.

They lie outside the declared outputs, in `results/.work/<fingerprint>/trainer/`: a run only finds its own. A checkpoint counts
once the file SEAL is in it, written last, with the fingerprint and the sha256 of every other file; what a kill left half
written is passed over. Beyond what transformers keeps (adapter, optimiser, scheduler, random states, place in the data) it holds
what the trainer has summed up since its last log line, so that curves are equal too, and the held-out objective before training.

SIGTERM, or Ctrl-C, asks a training to save at its next step (with rollouts: at the next end of one) and to end: `Interrupted`. A
second Ctrl-C ends it at once. How often checkpoints are written decides no number: every `minutes`, from the command line.
"""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from workflow_scripts.artifacts.fingerprint import file_sha256
from workflow_scripts.plumbing import ranks
from workflow_scripts.plumbing.messages import InputError, Interrupted
from workflow_scripts.training import exchange

SEAL = "complete.json"
SUMS = "sums.json"
BEFORE = "before.json"


def latest(folder: Path, fingerprint: str) -> Path | None:
    """The newest whole checkpoint in `folder`. InputError if one belongs to another step.

    Half-written and damaged ones are passed over, with a line that says so.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rsplit("-", 1)[-1]))
    for checkpoint in found:
        try:
            seal = json.loads((checkpoint / SEAL).read_text())
            owner, files = seal["fingerprint"], seal["files"]
        except (OSError, ValueError, KeyError, TypeError):
            print(f"{checkpoint}: half written, passed over", flush=True)
            continue
        if owner != fingerprint:
            raise InputError(
                f"{checkpoint}: a checkpoint of another step (fingerprint {owner[:12]}, this one is {fingerprint[:12]}); "
                f"remove the folder {folder} and run snakemake again"
            )
        if all((checkpoint / name).is_file() and file_sha256(checkpoint / name) == sha for name, sha in files.items()):
            return checkpoint
        print(f"{checkpoint}: damaged (sha256 differs), passed over", flush=True)
    return None


class Checkpoints(TrainerCallback):
    """Writes checkpoints every `minutes` at steps that `boundary` divides, and at the next such step after a signal."""

    def __init__(self, trainer: Any, fingerprint: str, minutes: float, boundary: int, resumed: Path | None):
        self.trainer, self.fingerprint, self.boundary, self.resumed = trainer, fingerprint, boundary, resumed
        self.seconds, self.last = 60 * minutes, time.monotonic()
        self.asked_by, self.stopped = "", False
        self.heard: list[tuple[str, bool]] = []  # the wishes of all ranks, where there are several (training/over_ranks.py)

    def wishes(self) -> tuple[str, bool]:
        """(who asked for an end, whether it is time for a checkpoint)."""
        return self.asked_by, time.monotonic() - self.last >= self.seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.monotonic()
        if self.resumed is not None:
            restore_sums(self.trainer, json.loads((self.resumed / SUMS).read_text()))
            print(f"resumed at step {state.global_step} of {state.max_steps} from {self.resumed}", flush=True)

    def ask_to_stop(self, number, frame) -> None:
        self.asked_by, more = ("Ctrl-C", "; once more ends at once") if number == signal.SIGINT else ("SIGTERM", "")
        print(f"{self.asked_by}: saving at the next step that can be resumed from{more}", flush=True)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.boundary or state.global_step >= state.max_steps:
            return
        heard = self.heard or [self.wishes()]  # ranks that each went by their own clock would part here
        if asked := next((asked for asked, _ in heard if asked), ""):
            self.asked_by = asked
            self.stopped = control.should_save = control.should_training_stop = True
        elif heard[0][1]:
            control.should_save = True

    def on_save(self, args, state, control, **kwargs):
        self.last = time.monotonic()
        if not ranks.first():
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / SUMS).write_text(json.dumps(sums(self.trainer)))
        files = {str(p.relative_to(folder)): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file() and p.name != SEAL}
        part = folder / f"{SEAL}.part"
        part.write_text(json.dumps({"fingerprint": self.fingerprint, "files": files}))
        os.replace(part, folder / SEAL)
        self.last = time.monotonic()
        for other in folder.parent.glob("checkpoint-*"):  # only now that this one is whole
            if other != folder:
                shutil.rmtree(other, ignore_errors=True)


def sums(trainer: Any) -> dict:
    """What the trainer has summed up since its last log line: transformers' loss, TRL's metrics and tokens."""
    found = {
        "tr_loss": trainer._tr_loss.item(),
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        "tokens": getattr(trainer, "_total_train_tokens", None),
        "metrics": {mode: dict(values) for mode, values in getattr(trainer, "_metrics", {}).items()},
    }
    return json.loads(json.dumps(found))


def restore_sums(trainer: Any, found: dict) -> None:
    trainer._tr_loss.fill_(found["tr_loss"])
    trainer._total_loss_scalar, trainer._globalstep_last_logged = found["total_loss"], found["last_logged"]
    if found["tokens"] is not None:
        trainer._total_train_tokens = found["tokens"]
    for mode, values in found["metrics"].items():
        trainer._metrics[mode].update(values)


def train(trainer: Any, fingerprint: str, minutes: float, boundary: int, measure: Callable[[], Any]) -> tuple[Any, Any]:
    """Train to the end, from the last checkpoint if there is one. Returns what `measure` says before and after training.

    Raises Interrupted if SIGTERM or Ctrl-C ended the training early; a checkpoint was written then.
    """
    folder = Path(trainer.args.output_dir)
    resumed = exchange.of_first(latest(folder, fingerprint) if ranks.first() else None, "where to begin")
    if resumed is None:
        if ranks.first():
            shutil.rmtree(folder, ignore_errors=True)
        before = measure()
        if ranks.first():
            folder.mkdir(parents=True, exist_ok=True)
            (folder / BEFORE).write_text(json.dumps(before))
    else:
        before = json.loads((folder / BEFORE).read_text())
    watch = trainer.checkpoints = Checkpoints(trainer, fingerprint, minutes, boundary, resumed)
    trainer.add_callback(watch)
    before_us = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number, handler in before_us.items():
        if handler != signal.SIG_IGN:  # as a shell has it for SIGINT in the background
            signal.signal(number, watch.ask_to_stop)
    try:
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    finally:
        for number, handler in before_us.items():
            signal.signal(number, handler)
    exchange.wait("the end of training")  # the first may still be saving
    if watch.stopped:
        raise Interrupted(
            f"ended by {watch.asked_by} at step {trainer.state.global_step} of {trainer.state.max_steps}, with a checkpoint; run "
            "snakemake again to go on from there"
        )
    return before, measure()

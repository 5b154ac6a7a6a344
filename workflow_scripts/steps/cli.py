"""The command line of every step. Plumbing: decides no number.

    python -m workflow_scripts.steps.NAME --step STEP --inputs FILE... --out MANIFEST [--work DIR] [--log FILE]

STEP is the step's JSON, or a file that holds it: a finished manifest.json will do, so that any phase can be run again by
hand. An InputError is one line on standard error and exit status 1.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from workflow_scripts.artifacts import runinfo, work
from workflow_scripts.artifacts.fingerprint import fingerprint
from workflow_scripts.artifacts.manifests import Job
from workflow_scripts.plumbing import gpus, launch, nodes, progress, ranks, startup
from workflow_scripts.plumbing.messages import InputError, Interrupted


def parser(doc: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--step", required=True, help="the step's JSON, or a file with it (a manifest.json will do)")
    made.add_argument("--inputs", nargs="*", default=[], type=Path, help="manifests of the parents, and their files")
    made.add_argument("--out", required=True, type=Path, help="where the manifest goes; the other files go beside it")
    made.add_argument("--work", type=Path, default=Path("results/.work"), help="locks and unfinished work")
    made.add_argument(
        "--gpus", type=int, default=1, help="GPUs of the job: with 0 it takes none; a training by N, as N processes"
    )
    made.add_argument("--nodes", type=int, default=1, help="of a training by several in a Slurm job: nodes that share its GPUs")
    made.add_argument(
        "--shard", nargs="?", type=int, const=1, default=0, help="of a training by several: 1 where they share its base too"
    )
    made.add_argument("--gpu-mb", type=int, default=gpus.WHOLE, help="MiB of a GPU that it needs; a card for itself if not given")
    made.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # again, with a card for itself
    made.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # which of several processes this is (plumbing/launch.py)
    made.add_argument("--meet", type=Path, help=argparse.SUPPRESS)  # where they meet
    made.add_argument("--terminal", type=int, help=argparse.SUPPRESS)  # descriptor of the real one
    made.add_argument("--log", type=Path, help="write all messages here instead of to the terminal")
    made.add_argument("--track", default="none", choices=["none", "tensorboard", "wandb"], help="live training curves")
    made.add_argument("--checkpoint-minutes", type=float, default=10.0, help="how often a training saves where it is")
    made.add_argument("--slots", type=int, default=384, help="answers that are written at once, at most: decides memory alone")
    made.add_argument("--speed", type=json.loads, default={}, help="how a training computes on a GPU: the config's `speed`")
    made.add_argument("--deterministic", action="store_true", help="equal runs on a GPU end with equal bytes")
    made.add_argument("--board", type=Path, help="folder for its line of progress, where several jobs run at once")
    made.add_argument("--limits", type=json.loads, default={}, help="of slices: who trains on them, and how long rows may be")
    return made


def read_step(text: str) -> dict:
    """The step's JSON from the argument itself, or from the file that it names. InputError if it is none."""
    place = "--step"
    if not text.lstrip().startswith("{"):
        try:
            place, text = f"--step {text}", Path(text).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"--step {text[:200]}: neither JSON nor a file that can be read: {reason}") from None
    try:
        data = json.loads(text)
    except ValueError as error:
        raise InputError(f"{place}: not JSON: {error}") from None
    if isinstance(data, dict) and isinstance(data.get("step"), dict):
        data = data["step"]
    if not isinstance(data, dict) or (missing := sorted({"step", "config", "parents", "packages"} - set(data))):
        found = f"a mapping without {', '.join(missing)}" if isinstance(data, dict) else f"a {type(data).__name__}"
        raise InputError(f"{place}: found {found}, expected the JSON of a step, or a manifest.json that holds it")
    return data


def _needs_hub(step: dict) -> bool:
    """True if the step takes its model or its rows from a hub."""
    source = step["config"].get("source")
    source = source["composed"]["questions"] if isinstance(source, dict) and "composed" in source else source
    own_task = "hub" in step["config"].get("lm_eval", {})
    return own_task or source == "hub" or (isinstance(source, dict) and "hub" in source)


# Variables by which accelerate and torch compute in another precision, or look for other processes, than the step's JSON says.
STEERING = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "TORCHELASTIC_", "XLA_")
STEERING_NAMES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} | {
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
}


def _environment(threads: int, online: bool) -> list[str]:
    """Before any heavy import: quiet, as many threads as the step was planned with, offline unless its source is a hub (the
    user's own HF_HUB_OFFLINE stays), and nothing by which a shell decides what stands in no fingerprint. Returns what did."""
    acting = sorted(name for name in os.environ if name.startswith(STEERING) or name in STEERING_NAMES)
    for name in acting:
        del os.environ[name]
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    quiet = {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",  # the steps show their own progress, in lines that a log can hold
    }
    if not online:
        quiet |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    os.environ.update(quiet)
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # read once, when CUDA starts: products are the same in each run
    return acting


def _show_on(descriptor: int) -> None:
    """Progress moves on the real terminal, if that is one."""
    terminal = os.fdopen(descriptor, "w")
    progress.set_terminal(terminal if terminal.isatty() else None)


def _redirect(log: Path | None) -> tuple[int, int]:
    """Send standard output and error, C libraries' included, into the log. Returns descriptors of the real streams."""
    real, output = os.dup(2), os.dup(1)
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)  # emptied once the step has its lock
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.close(descriptor)
        _show_on(os.dup(real))
    return output, real


def _peak() -> float:
    """Bytes that torch allocated on the GPU at most."""
    return gpus.peak(sys.modules["torch"].cuda.max_memory_allocated()) if "torch" in sys.modules else 0.0


def _again_alone(out: int, error: int) -> NoReturn:
    """This command again in this process, with a card for itself. A new program: nothing of the old one stays on the card."""
    os.dup2(out, 1)
    os.dup2(error, 2)
    if gpus.held is not None:
        if gpus.held.visible is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpus.held.visible
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], "--alone"])


def _full(work: Path) -> str:
    """What libraries that write files do not always say: torch's own error is "unexpected pos"."""
    try:
        free = shutil.disk_usage(work).free
    except OSError:
        return ""
    return f"no space left where {work} is; free some and run snakemake again. " if free < 1_000_000 else ""


def _job(args: argparse.Namespace, step: dict) -> Job:
    how = args.track, args.checkpoint_minutes, args.slots, args.speed, args.limits
    return Job(step, args.inputs, args.out, args.work, *how, args.deterministic, bool(args.shard))


NO_SUCH_WAY = re.compile(r"(\w+) does not have a deterministic implementation")  # torch's words


def _done(main: Callable[[Job], None], job: Job) -> None:
    """The step itself. InputError where torch has no deterministic way of an operation, and is to compute in no other."""
    try:
        main(job)
    except RuntimeError as error:
        if not (job.deterministic and (found := NO_SUCH_WAY.search(str(error)))):
            raise
        traceback.print_exc()
        raise InputError(
            f"deterministic: true, but torch {sys.modules['torch'].__version__} can't do {found[1]} so that equal runs end with "
            "the same bytes; set `deterministic: false`, or leave out what needs it (top_p below 1 with `hf`, say)"
        ) from error


def _by_ranks(args: argparse.Namespace, mark: str, terminal: int) -> None:
    """This command by several processes, each with a GPU where there are any. This one holds locks and GPUs, and waits."""
    command, logs = launch.this_command(), args.work / mark / "ranks"
    if args.nodes > 1:
        threads = read_step(args.step).get("threads", 1)
        ended = nodes.run(command, args.nodes, args.gpus, threads, logs, ranks.PATIENCE)
    else:
        cards = gpus.held.gpu.split(",") if gpus.held is not None else None
        ended = launch.run([*command, "--terminal", str(terminal)], cards, args.gpus, logs, keep=(terminal,))
    if ended is None:
        return
    if ended.kind == "interrupted":
        raise Interrupted(ended.text)
    more = " Run snakemake again to go on from the last checkpoint" if ended.kind in ("killed", "late", "lost") else ""
    if ended.kind == "memory":
        more = " It had the GPU for itself; `make fits` names the keys that make it smaller"
    raise InputError(f"{ended.text}.{more}" if more else ended.text)


def _end_rank(kind: str, text: str, status: int) -> NoReturn:
    """At once: threads of a backend that has lost the other ranks would be waited for."""
    ranks.note_end(kind, text)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _as_rank(args: argparse.Namespace, main: Callable[[Job], None]) -> None:
    """One of several: it has its place in the log and its GPU from who started it, and tells that one how it ends."""
    ranks.end_with_starter()
    rank = args.rank if args.nodes == 1 else int(os.environ["SLURM_PROCID"])
    if args.board is not None and rank == 0:
        progress.set_board(args.board)
    if args.log is not None and rank == 0:
        with contextlib.suppress(OSError):
            _redirect(args.log) if args.nodes > 1 else _show_on(args.terminal)
    step = read_step(args.step)
    _environment(step.get("threads", 1), _needs_hub(step))
    try:
        ranks.become(rank, args.gpus, args.meet, step["device"], args.nodes)
        if args.nodes > 1:
            nodes.take_card()
        _done(main, _job(args, step))
    except InputError as error:
        _end_rank("input", str(error), 1)
    except Interrupted as where:
        _end_rank("interrupted", str(where), 128 + signal.SIGTERM)
    except BaseException as error:
        traceback.print_exc()
        kind = "memory" if gpus.out_of_memory(error) else "lost" if ranks.is_loss(error) else "error"
        _end_rank(kind, f"{type(error).__name__}: {' '.join(str(error).split())[:500]}", 1)


def run(main: Callable[[Job], None], doc: str | None, describe: Callable[[Path], None] | None = None) -> None:
    """Run a step: read the arguments, take its lock, take over a finished copy if there is one, else call `main`.

    describe: called with the folder of the artifact once that is there, to lay something beside it that decorates it. What goes
    wrong there is said, and fails nothing.
    """
    args = parser(doc or "").parse_args()
    startup.begin()
    if args.rank is not None:
        return _as_rank(args, main)
    output, real = _redirect(args.log)
    if args.board is not None:
        progress.set_board(args.board)

    def say(text: str) -> None:
        """One line for people on the terminal, and in the log where there is one."""
        if args.log is not None:
            print(text, file=sys.stderr, flush=True)
        os.write(real, f"{args.out}: {' '.join(text.split())}\n".encode())

    try:
        step = read_step(args.step)
        # Steps of one kind and one estimate are alike, whatever their seed.
        needs = args.work / "gpu_needs" / f"{step['step']}-{args.gpu_mb}.json"
        acting = _environment(step.get("threads", 1), _needs_hub(step))
        if args.log is not None:
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(args.log.parent / "tensorboard"))
        runinfo.check_packages(step)
        job = _job(args, step)
        if args.gpus > 1 and not step["step"].startswith("train_"):
            raise InputError(f"--gpus {args.gpus}: {step['step']} is done by one process; trainings alone are shared")
        with work.exclusive(args.work, work.place(args.out), say), work.exclusive(args.work, fingerprint(step), say):
            if args.log is not None and not args.alone:
                os.truncate(args.log, 0)  # the lines before are of an earlier run, or of who held the lock
            if acting:
                print(f"not heeded, since the config decides: {', '.join(acting)} in the environment", flush=True)
            if work.republish(args.work, fingerprint(step), args.out):
                say("already made with this fingerprint: taken over")
            else:
                work.claim(args.work, fingerprint(step), args.out, step)
                if step.get("device") == "cuda" and args.gpus and args.nodes == 1:  # else they are the job's own, on each node
                    whole = args.alone or args.gpus > 1
                    gpus.take(say, gpus.WHOLE if whole else gpus.known(needs, args.gpu_mb), args.gpus)  # until the process ends
                job.started = time.time()
                if args.gpus > 1:
                    _by_ranks(args, fingerprint(step), real)
                else:
                    _done(main, job)
                if gpus.held is not None and args.gpus <= 1:
                    gpus.learn(needs, args.gpu_mb, _peak())
            if describe is not None:
                try:
                    describe(args.out.parent)
                except Exception as error:
                    say(f"made, but not described: {type(error).__name__}: {error}")
    except InputError as error:
        say(f"error: {error}")
        sys.exit(1)
    except Interrupted as where:
        say(str(where))
        sys.exit(128 + signal.SIGTERM)
    except KeyboardInterrupt:
        say("ended by Ctrl-C; run snakemake again to go on from what was saved")
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        traceback.print_exc()
        what = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        if gpus.held is not None and gpus.out_of_memory(error):
            if gpus.held.bytes is not None:
                gpus.learn(needs, args.gpu_mb, None)
                asked = f"{gpus.held.asked / 2**30:.1f} GiB of the GPU were asked for"
                say(f"{asked}, and are not enough: {what}. Again, with a card for itself")
                _again_alone(output, real)
            what = f"it had the GPU for itself. `make fits` names the keys that make it smaller. {what}"
        say(f"error: {_full(args.work)}{what}" + (f" (details: {args.log})" if args.log else ""))
        sys.exit(1)

"""Snakemake's records of what it made, and where the artifacts that they are about lie. Plumbing: decides no number.

Snakemake plans from `.snakemake/metadata`, one JSON file for each output, and trusts blindly what has none. Here manifests are
the truth and those records a cache of them: they can be read, compared with the manifests, and written anew. The format is
that of the pinned Snakemake (its `FilePersistence`, record format 6); a test lets Snakemake write records and compares.
"""

import base64
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from workflow_scripts.artifacts.fingerprint import canonical, file_sha256
from workflow_scripts.config.names import CHOICE, DEVELOPMENT, EVALUATED, RUN_NAME

METADATA = Path(".snakemake/metadata")
INCOMPLETE = Path(".snakemake/incomplete")  # an entry here: the job was begun and not recorded; Snakemake runs it again
FORMAT = 6  # of Snakemake 9.27
CHECKSUM_LIMIT = 1_000_000  # bytes; Snakemake compares larger inputs by time
STEP_BYTES = 2**16  # of the end of a manifest, in which its step stands
LEFT_OUT = "phaseline: "  # begins the parameter of a record that never matches


@dataclass(frozen=True)
class Place:
    """Where an artifact lies: its manifest, the outputs that its rule declares (the manifest first), and what it is of."""

    manifest: str
    outputs: tuple[str, ...]
    kind: str  # of the step, as plan/plan.py names them: slice, samples, base, train, merge, generate_TASK, score_TASK, ...
    name: str  # of the slice, the run or the model; "" for the report


def _one(kind: str, name: str, folder: str, manifest: str, *others: str) -> Place:
    outputs = tuple(f"{folder}/{file}" for file in (manifest, *others))
    return Place(outputs[0], outputs, kind, name)


def place_of(results: str, kind: str, name: str) -> Place:
    """Where the rules put an artifact of this kind."""
    if kind == "slice":
        return _one(kind, name, f"{results}/data", f"{name}.manifest.json", f"{name}.jsonl")
    if kind == "samples":
        return _one(kind, name, f"{results}/data", f"{name}.answers.manifest.json", f"{name}.answers.jsonl")
    if kind == "base":
        return _one(kind, name, f"{results}/{name}", "manifest.json", "model.safetensors")
    if kind == "train":
        return _one(kind, name, f"{results}/{name}/adapter", "manifest.json", "adapter_model.safetensors")
    if kind == "merge":
        return _one(kind, name, f"{results}/{name}/merged", "manifest.json")
    if kind == "eval_rm":
        return _one(kind, name, f"{results}/{name}", "rm_eval.json")
    if kind == "report":
        return _one(kind, "", f"{results}/report", "manifest.json", "comparison.html", "comparison.csv")
    verb, _, task = kind.partition("_")
    if verb == "generate":
        return _one(kind, name, f"{results}/{name}", f"{task}_responses.manifest.json", f"{task}_responses.jsonl")
    assert verb == "score", kind
    return _one(kind, name, results, f"{task}_{name}.json")


def kinds_of(run: str) -> list[str]:
    """The kinds of artifacts that the folder of a run can have, and its score files."""
    return ["base", "train", "merge", "eval_rm"] + [
        f"{verb}_{task}"
        for task in (*EVALUATED, DEVELOPMENT)
        for verb in ("generate", "score")
        if verb == "score" or task not in CHOICE
    ]


def own_task_of(file: Path) -> str | None:
    """The task of `eval.tasks` whose scores of a run this file holds; None for any other file.

    Its end alone is read, where the step stands: what each item scored may be megabytes.
    """
    try:
        with open(file, "rb") as opened:
            opened.seek(max(0, os.path.getsize(file) - STEP_BYTES))
            end = opened.read().decode("utf-8", errors="replace")
        step = json.loads(end.rpartition('\n "step": ')[2].partition("\n }")[0] + "\n }")
        task = step["config"]["task"] if step["step"] == "own_task" else ""
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return task if task and file.stem.startswith(f"{task}_") and RUN_NAME.fullmatch(file.stem.removeprefix(f"{task}_")) else None


def find(results: str) -> Iterator[Place]:
    """The artifacts in a results folder whose manifest is there, parents before children except between runs.

    Only names are looked at, but of scores of a task that only some config knows (`eval.tasks`): they say what they are of. A
    folder that is no run, such as results/qwen05b, holds the results of another config and is left out (see `folders`).
    """
    folder, runs = Path(results), set()
    own: dict[str, list[str]] = {}  # run -> its tasks of `eval.tasks`
    for path in sorted(folder.glob("data/*.manifest.json")):
        name = path.name.removesuffix(".manifest.json")
        yield place_of(results, "samples" if name.endswith(".answers") else "slice", name.removesuffix(".answers"))
    for entry in os.scandir(folder) if folder.is_dir() else ():
        task, _, run = entry.name.removesuffix(".json").partition("_")
        if RUN_NAME.fullmatch(entry.name) and entry.is_dir():
            runs.add(entry.name)
        elif entry.name.endswith(".json") and task in (*EVALUATED, DEVELOPMENT) and RUN_NAME.fullmatch(run):
            runs.add(run)  # a score file stands when the run's folder is gone
        elif entry.name.endswith(".json") and (known := own_task_of(Path(entry.path))):
            run = entry.name.removesuffix(".json").removeprefix(f"{known}_")
            runs.add(run)
            own.setdefault(run, []).append(known)
    for run in sorted(runs - {"data", "report"}, key=lambda name: (name != "base", name)):
        for kind in [*kinds_of(run), *(f"score_{task}" for task in sorted(own.get(run, [])))]:
            if kind == "base" != run and not (folder / run / "tokenizer_config.json").exists():
                continue  # no model: some other file of this name
            place = place_of(results, kind, run)
            if os.path.exists(place.manifest):
                yield place
    if os.path.exists((place := place_of(results, "report", "")).manifest):
        yield place


def folders(results: str) -> list[str]:
    """`results` and the results folders below it: those that hold artifacts."""
    runs = {place.name for place in find(results)}
    found = [results] if runs else []
    for entry in sorted(os.scandir(results), key=lambda entry: entry.name) if os.path.isdir(results) else []:
        if (
            entry.is_dir(follow_symlinks=False)
            and not entry.name.startswith(".")
            and entry.name not in runs | {"data", "base", "report"}
        ):
            found += folders(f"{results}/{entry.name}")
    return found


# -- records ------------------------------------------------------------------------------------------------------------------


@cache
def _longest_name(folder: Path) -> int:
    """Bytes that a file name may have there."""
    try:
        return os.pathconf(folder, "PC_NAME_MAX") or 255
    except (OSError, ValueError):  # a folder that is not there yet
        return 255


def record_file(out: str, folder: Path | None = None) -> Path:
    """The file of an output's record. Names longer than the file system takes are cut into folders, as Snakemake does."""
    folder = METADATA if folder is None else folder
    name = base64.urlsafe_b64encode(out.encode()).decode()
    size = _longest_name(folder) - 1
    parts = [name[i : i + size] for i in range(0, len(name), size)]
    return folder.joinpath(*[f"@{part}" for part in parts[:-1]], parts[-1])


def read(out: str) -> dict | None:
    """The record of an output, None where there is none that Snakemake could read."""
    try:
        found = json.loads(record_file(out).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def rule_of(kind: str, step: dict) -> str:
    """The rule that runs a step: named as its module, but for the scorers: these share one, and one on development prompts."""
    if kind == f"score_{DEVELOPMENT}":
        return "score_development"
    return "score" if step["step"].startswith("score_") else step["step"]


def params_of(step: dict) -> list[str]:
    """What Snakemake records as the parameters of a step's job: the canonical JSON and, in training rules, the module."""
    more = [step["step"]] if step["step"].startswith("train_") else []
    return sorted(repr(value) for value in (canonical(step), *more))


def agrees(out: str, *steps: dict) -> bool:
    """True if the record of `out` is of one of these steps."""
    params = (read(out) or {}).get("params") or []
    return any(repr(canonical(step)) in params for step in steps)


def never_matches(out: str) -> str | None:
    """Why an output was left to be made again, if its record is one that never matches (`write`, `left_out`)."""
    params = (read(out) or {}).get("params") or [""]
    return params[0].removeprefix(LEFT_OUT) if params[0].startswith(LEFT_OUT) else None


def is_incomplete(out: str) -> bool:
    """True if Snakemake began to make `out` and has not recorded it: the next run makes it again, or takes it over."""
    return record_file(out, INCOMPLETE).exists()


def write(place: Place, step: dict, inputs: list[str], left_out: str = "") -> None:
    """Record the outputs of an artifact as made by `step`, as if Snakemake had made them.

    inputs: manifests that the step was made from. Where one is newer than the outputs, as after a copy, Snakemake compares
    its checksum with that in the record. left_out: why the artifact must be made again; its record then never matches.
    """
    for folder in (METADATA, INCOMPLETE):
        folder.mkdir(parents=True, exist_ok=True)  # without the second, Snakemake takes the first for an old format
    checksums = {
        file: f"sha256:{file_sha256(Path(file))}"
        for file in sorted(inputs)
        if os.path.isfile(file) and os.path.getsize(file) <= CHECKSUM_LIMIT
    }
    for out in place.outputs:
        made = os.path.getmtime(out) if os.path.exists(out) else os.path.getmtime(place.manifest)
        keep = read(out) or {}  # what only Snakemake knows, such as the command
        record = {
            **dict.fromkeys(("shellcmd", "code", "conda_env", "container_img_url", "software_stack_hash", "job_hash")),
            **{"external_jobid": None, "log": None, "input": None, "starttime": made},
            **keep,
            "rule": rule_of(place.kind, step),
            "params": [LEFT_OUT + left_out] if left_out else params_of(step),
            "record_format_version": FORMAT,
            "endtime": made,
            "incomplete": False,
            "input_checksums": checksums,
        }
        file = record_file(out)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = METADATA.parent / f"{os.getpid()}.part"
        part.write_text(json.dumps(record), encoding="utf-8")
        part.chmod(0o660)  # as Snakemake's own
        os.replace(part, file)


def clear_recorded(work: Path) -> list[str]:
    """Remove the working folders of the steps that are recorded as made. Returns their fingerprints.

    An older record of the same step stays while its job runs again: what was begun and not recorded is kept for the next run.
    """
    cleared = []
    for where in sorted(work.glob("*/where.json")):
        folder = where.parent
        try:
            target = json.loads(where.read_text())
            out, step = target["out"], target["step"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # cut off by a kill or a full disk: the step itself starts over
        (work / "locks").mkdir(exist_ok=True)
        with open(work / "locks" / f"{folder.name}.lock", "a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue  # being worked on
            recorded = agrees(out, step) and not is_incomplete(out) and not (read(out) or {}).get("incomplete")
            if (folder / "done").exists() and recorded:
                shutil.rmtree(folder)
                cleared.append(folder.name)
    return cleared

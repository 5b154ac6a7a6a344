"""Rewards that the config declares under `rewards:`: a function of the user's own, or a check with settings (rl/verifiers.py).

A function of one's own has TRL's signature: it is called with `prompts` and `completions` as conversations, `completion_ids`,
`trainer_state`, `log_extra`, `log_metric`, and each field of the rows as a column of its own, by name. It gives one finite
number for each completion. What it gives is looked at each time, and what it raises is told with file, line and row. It
gets copies, and what it draws at random is undone in the generators of `random`, numpy and torch: so it moves neither the
training's own draws nor, after a resume, its own.

The file is run as it was planned, or not at all: its hash, and that of what it imports beside it, are those of the step.
"""

import contextlib
import copy
import importlib.util
import inspect
import json
import math
import os
import random
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from workflow_scripts.artifacts import own_code
from workflow_scripts.artifacts.manifests import Job
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.rl import verifiers
from workflow_scripts.rl.placebos import Reward

# Answers that a reward is tried on. In a rollout, too, an answer may be empty.
TRIED = ("The answer is 18.", "")


def turns(prompt: str | list[dict]) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def file_of(job: Job, name: str) -> Path:
    """The file of a reward among the inputs of a step. InputError where it is not there as it was planned."""
    wanted, planned = job.config["rewards"][name]["file"], job.step["external"]["rewards"][name]
    given = [path for path in job.inputs if path.name == wanted]
    found = [path for path in given if own_code.read(path).logic == planned]
    if found:
        return found[0]
    if given:
        raise InputError(f"{given[0]}: it, or what it imports, changed since this step was planned; run snakemake again")
    raise InputError(f"{job.out}: expected {wanted}, the file of the reward {name}, among the inputs")


def make(name: str, settings: dict, file: Path | None, rows: list[dict], row_file: Any) -> Reward:
    """The reward that is declared by `settings`, once it has judged the first two rows. InputError on what is wrong with it.

    file: of a function of the user's own. rows: may be none, and then the file is only loaded. row_file: where they stand.
    """
    made = own(file, settings["function"]) if file else checked(name, settings)
    for field in [settings[kind]["field"] for kind in ("exact", "number", "math") if kind in settings]:
        for row in rows:
            if not isinstance(row.get(field), str | int | float):
                found = "no text or number" if field in row else "missing"
                raise InputError(
                    f"{row_file}: row {row['id']}: {field} is {found}, and the reward {name} compares answers with it"
                )
    if tried := rows[:2]:
        from transformers import TrainerState

        made(
            prompts=[turns(row["prompt"]) for row in tried],
            completions=[[{"role": "assistant", "content": text}] for text in TRIED[: len(tried)]],
            completion_ids=[[1, 2, 3], [1]][: len(tried)],
            id=[row["id"] for row in tried],
            row=[json.dumps(row) for row in tried],
            trainer_state=TrainerState(),
            log_extra=lambda *_: None,
            log_metric=lambda *_: None,
        )
    return made


def checked(name: str, settings: dict) -> Reward:
    """A reward of 1 or 0 by one of the checks in `rl/verifiers.py`."""
    (kind,) = set(settings) & {*verifiers.CHECKS}
    check = verifiers.CHECKS[kind](settings[kind])

    def judge(prompts: list, completions: list, row: list[str], **columns: Any) -> list[float | None]:
        rows = [json.loads(text) for text in row]
        return [float(check(answer[-1]["content"], one)) for answer, one in zip(completions, rows, strict=True)]

    return judge


# -- a function of the user's own -----------------------------------------------------------------------------------------------


def own(path: Path, name: str) -> Reward:
    source = own_code.read(path)
    function = getattr(_module(path), name, None)
    if not callable(function):
        raise InputError(f"{path}: has no function {name!r}")
    line = getattr(getattr(function, "__code__", None), "co_firstlineno", None)
    place = f"{path}: line {line}: {name}" if line else f"{path}: {name}"

    def call(given: dict) -> Any:
        with _draws_undone():
            return function(**copy.deepcopy({key: value for key, value in given.items() if key not in LIVE}), **live(given))

    def judge(prompts: list, completions: list, id: list, row: list[str], **columns: Any) -> list[float | None]:
        given = (
            _columns([json.loads(text) for text in row]) | {"prompts": prompts, "completions": completions, "id": id} | columns
        )
        _check_signature(place, function, given)
        try:
            found = call(given)
        except (Exception, SystemExit) as error:
            raise InputError(f"{said(error, source)} ({_row_of(error, call, given)})") from error
        return _numbers(place, found, id)

    return judge


LIVE = ("trainer_state", "log_extra", "log_metric")  # not of a row, and handed on as they are


def live(given: dict) -> dict:
    return {key: given[key] for key in LIVE if key in given}


def _columns(rows: list[dict]) -> dict[str, list]:
    """Each field of the rows as a column, but for those that TRL keeps to itself."""
    fields = dict.fromkeys(field for row in rows for field in row if field not in ("prompt", "completion", "heldout"))
    return {field: [row.get(field) for row in rows] for field in fields}


def _check_signature(place: str, function: Callable, given: dict) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(**given)
    except TypeError as error:
        raise InputError(f"{place}: {error}; it is called with {', '.join(given)}, by their names") from None


def _row_of(error: BaseException, call: Callable[[dict], Any], given: dict) -> str:
    """The row on which a function fails by itself in the way in which it did on the batch."""
    for i, row in enumerate(given["id"]):
        try:
            call({key: value if key in LIVE else value[i : i + 1] for key, value in given.items()})
        except (Exception, SystemExit) as again:
            if type(again) is type(error):
                return f"row {row}"
    return f"rows {given['id'][0]} to {given['id'][-1]}, all at once"


def _numbers(place: str, found: Any, ids: list) -> list[float | None]:
    values = found.tolist() if hasattr(found, "tolist") else found
    if not isinstance(values, list | tuple):
        raise InputError(
            f"{place} gives a {type(found).__name__}, expected a list of {len(ids)} numbers, one for each completion"
        )
    if len(values) != len(ids):
        raise InputError(f"{place} gives {len(values)} numbers for {len(ids)} completions, expected one for each")
    numbers: list[float | None] = []
    for row, value in zip(ids, values, strict=True):
        try:
            number = math.nan if isinstance(value, str) else float(value)
        except (TypeError, ValueError, RuntimeError):
            number = math.nan
        if not math.isfinite(number):
            raise InputError(f"{place} gives {' '.join(repr(value).split())[:80]} for row {row}, expected a finite number")
        numbers.append(number)
    return numbers


def said(error: BaseException, source: own_code.Own) -> str:
    """An exception of the user's code: the innermost line of a file of theirs, and what was raised."""
    files = {os.path.realpath(path): path for path in source.files}
    frames = [(os.path.realpath(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    theirs = [f"{files[name]}: line {line}" for name, line in frames if name in files]
    place = theirs[-1] if theirs else str(source.path)
    text = " ".join(str(error).split())[:300]
    return f"{place}: {type(error).__name__}{': ' if text else ''}{text}"


@contextlib.contextmanager
def _draws_undone() -> Iterator[None]:
    import numpy
    import torch

    before = random.getstate(), numpy.random.get_state()
    cards = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(cards):
            yield
    finally:
        random.setstate(before[0])
        numpy.random.set_state(before[1])


@cache
def _module(path: Path) -> ModuleType:
    """The file, run. What it imports beside it is found behind all that is installed, and has to be found there.

    No bytecode is kept: it is told from its source by whole seconds and size, and an edit may change neither.
    """
    source = own_code.read(path)
    folder = Path(os.path.abspath(path.parent))
    sys.dont_write_bytecode = True
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    importlib.invalidate_caches()
    for name in source.beside:
        if not _is_beside(name, folder):
            raise InputError(f"{path}: imports {name}, and another module has that name; rename {folder / name}, which is meant")
    name = path.stem if path.stem not in sys.modules else f"own_{path.stem}"
    module = ModuleType(name)
    module.__file__ = os.path.abspath(path)
    sys.modules[name] = module
    try:
        exec(compile(path.read_bytes(), os.path.abspath(path), "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        missing = isinstance(error, ModuleNotFoundError)
        remedy = "; install it into the environment of the jobs, or lay it beside the file" if missing else ""
        raise InputError(f"{said(error, source)}{remedy}") from error
    return module


def _is_beside(name: str, folder: Path) -> bool:
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # already there, by somebody who does not say from where
        return False
    places = [spec.origin] if spec and spec.origin else [*(spec.submodule_search_locations or [])] if spec else []
    theirs = [os.path.realpath(folder / one) for one in (f"{name}/__init__.py", f"{name}.py", name)]
    return any(os.path.realpath(place) in theirs for place in places)

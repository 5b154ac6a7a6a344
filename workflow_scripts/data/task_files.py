"""Definitions of lm-eval's tasks, read without lm-eval: the YAML with what it includes, the code that it names, its data.

A plan has to know what a task's numbers depend on, in milliseconds, and to refuse what can't be run. Nothing here runs a task's
code: `!function module.name` is read as a text.
"""

import ast
import contextlib
import functools
import glob
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from workflow_scripts.plumbing.messages import InputError

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}  # ending of a file -> who reads it
LOCAL = {*BUILDERS.values(), "text", "arrow"}  # names under `dataset_path` that read files
# Names on top of a file; those of a tag stand behind it, or one a line below it.
NAMED = re.compile(
    rb"^[\"']?(task|group|tag|include)[\"']?:[ \t]*(?:[\"']?([^\s\"'#\[{]+)|(?=\r?\n((?:[ \t]*-[ \t]*\S+[ \t]*\r?\n?)+)))", re.M
)


class Function(str):
    """What stands after `!function`."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """A SafeLoader that takes lm-eval's one tag for a text."""


_Loader.add_constructor("!function", lambda loader, node: Function(loader.construct_scalar(node)))  # type: ignore[arg-type]


def sha256(files: Sequence[Path | str]) -> str:
    """Of the contents of files, in their order."""
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


@dataclass
class Definition:
    """data: the YAML, what it includes laid under it; of a group that of its first task. tasks: that of each task. files: that
    were read for it, its own first. code: of its functions."""

    path: Path
    data: dict[str, Any]
    tasks: list[dict[str, Any]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    code: list[Path] = field(default_factory=list)

    def sha256(self) -> str:
        """Of the contents of all that defines the task, whatever folder it lies in."""
        return sha256([*self.files, *self.code])


def read(path: Path) -> Definition:
    """The definition in a file: of a task, or of a group with all its tasks. InputError where it, or what it names, can't be
    read."""
    found = Definition(path, {})
    found.data = _read(path, found)
    found.tasks = [found.data]
    if "group" in found.data and not isinstance(found.data.get("task"), str):
        found.tasks = []
        for member in members(path, found.data):
            seen, found.files = found.files, []  # two tasks may include one file
            found.tasks.append(_read(member, found))
            found.files = list(dict.fromkeys([*seen, *found.files]))
        found.data = found.tasks[0]
    return found


def top(path: Path) -> dict[str, Any]:
    """What a file says, with what it includes; of a group not its tasks'."""
    return _read(path, Definition(path, {}))


@functools.cache
def named(name: str) -> Definition | None:
    """The definition of a task of lm-eval's own, of a group, or of all tasks under a tag; None for another name."""
    kind, files = _index().get(name, ("", []))
    if kind != "tag":
        return read(_folder() / files[0]) if files else None
    found = Definition(_folder() / files[0], {})
    for definition in map(_own, files):
        found.tasks += definition.tasks
        found.files = list(dict.fromkeys([*found.files, *definition.files]))
    found.data = found.tasks[0]
    return found


def members(path: Path, group: dict[str, Any]) -> list[Path]:
    """The files of the tasks in a group: by names of lm-eval's (tasks, groups, tags), or files beside the group's own."""
    found: list[Path] = []
    listed = group.get("task")
    for one in listed if isinstance(listed, list) else [listed]:
        if isinstance(one, dict) and "group" in one:
            found += members(path, one)
            continue
        name = one["task"] if isinstance(one, dict) and set(one) <= {"task", "task_alias"} else one
        if not isinstance(name, str):
            raise InputError(f"{path}: has a task with settings of its own inside the group, which is not done; name its tasks")
        if name.endswith((".yaml", ".yml")):
            found.append(path.parent / name)
        elif files := own_files(name):
            found += files
        else:
            raise InputError(f"{path}: lm-eval has no task {name!r}, which the group names")
    return list(dict.fromkeys(found))


def _read(path: Path, into: Definition) -> dict[str, Any]:
    path = Path(os.path.abspath(path))
    if path in into.files:
        raise InputError(f"{path}: includes itself")
    into.files.append(path)
    try:
        data = yaml.load(path.read_bytes(), Loader=_Loader)  # noqa: S506, a SafeLoader
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of keys on top, found {type(data).__name__}")
    for name in _functions(data):
        _add_module(path, name, into)
    includes, merged = data.pop("include", []), dict[str, Any]()
    for one in includes if isinstance(includes, list) else [includes]:
        merged |= {key: value for key, value in _read(path.parent / str(one), into).items() if key != "task_list"}
    return merged | data


def _functions(node: Any) -> list[str]:
    if isinstance(node, Function):
        return [node]
    below = node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    return [name for one in below for name in _functions(one)]


def _add_module(yaml_file: Path, name: str, into: Definition) -> None:
    """The file of a function's module, as lm-eval looks for it: beside the YAML, else a module of lm-eval."""
    module = name.rpartition(".")[0]
    file = yaml_file.parent / f"{module.replace('.', '/')}.py"
    if file.is_file():
        _add_code(file, into)
    elif module.split(".")[0] != "lm_eval":
        raise InputError(f"{yaml_file}: !function {name}: there is no {file}; the code of a task lies beside its file")


def _add_code(file: Path, into: Definition) -> None:
    """A module, and those of one's own that it imports: beside it, or below the working folder."""
    if (file := Path(os.path.abspath(file))) in into.code:
        return
    into.code.append(file)
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError) as error:
        raise InputError(f"{file}: can't be read as Python: {error}") from None
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    for name in sorted(names):
        for folder in (file.parent, Path()):
            for end in (".py", "/__init__.py"):
                other = folder / (name.replace(".", "/") + end)
                if other.is_file():
                    _add_code(other, into)


# -- lm-eval's own ------------------------------------------------------------------------------------------------------------


def own_file(name: str) -> Path | None:
    """lm-eval's file of a task, or of the first one in a group or under a tag; None where it has no such name."""
    found = own_files(name)
    return found[0] if found else None


@functools.cache
def own_files(name: str) -> list[Path]:
    """lm-eval's file of a task; of a group, or a tag, those of all its tasks."""
    kind, files = _index().get(name, ("", []))
    if kind == "group":
        return members(_folder() / files[0], _read(_folder() / files[0], Definition(Path(name), {})))
    return [_folder() / file for file in files]


@functools.cache
def _own(file: str) -> Definition:
    return read(_folder() / file)


def known() -> list[str]:
    """The names of lm-eval's tasks, and of its groups."""
    return [name for name, (kind, _) in _index().items() if kind != "tag"]


def _folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")  # finds it, and imports nothing
    if spec is None or spec.origin is None:
        raise InputError("eval.tasks: lm-eval is not installed here; source .venv/bin/activate")
    return Path(spec.origin).parent / "tasks"


@functools.cache
def _index() -> dict[str, tuple[str, list[str]]]:
    """Name -> (task, group or tag, its file below the folder of tasks; of a tag the files of all its tasks).

    The first of a name in the order of paths, as in lm-eval.
    Fourteen thousand files are looked through once for each installation, and what was found is kept beside the .pyc files.
    """
    folder = _folder()
    stamp = [str(folder), os.stat(folder).st_mtime_ns, "with tags of what is included"]
    kept = Path(__file__).parent / "__pycache__" / "lm_eval_tasks.json"
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        found = json.loads(kept.read_text(encoding="utf-8"))
        if found["stamp"] == stamp:
            return {name: (kind, files) for name, (kind, files) in found["names"].items()}
    names: dict[str, tuple[str, list[str]]] = {}
    tags: dict[str, list[str]] = {}
    for file in sorted(folder.rglob("*.yaml"), key=lambda path: path.as_posix()):
        below, named = file.relative_to(folder).as_posix(), False
        for match in NAMED.finditer(file.read_bytes()):
            if match[1] in (b"task", b"group") and match[2]:
                names.setdefault(match[2].decode(), (match[1].decode(), [below]))
                named = named or match[1] == b"task"
        for tag in _tags(file) if named else ():
            tags.setdefault(tag, []).append(below)
    names = {tag: ("tag", files) for tag, files in tags.items() if tag not in names} | names
    part = kept.with_suffix(f".{os.getpid()}.part")
    with contextlib.suppress(OSError):
        kept.parent.mkdir(exist_ok=True)
        part.write_text(json.dumps({"stamp": stamp, "names": names}), encoding="utf-8")
        os.replace(part, kept)
    return names


def _tags(file: Path) -> list[str]:
    """The tags of a task's file, or else of what it includes."""
    try:
        matches = list(NAMED.finditer(file.read_bytes()))
    except OSError:
        return []
    if tagged := [match for match in matches if match[1] == b"tag"]:
        listed = [[match[2]] if match[2] else re.findall(rb"-[ \t]*[\"']?([^\s\"'#]+)", match[3] or b"") for match in tagged]
        return [one.decode() for found in listed for one in found]
    included = next((match[2] for match in matches if match[1] == b"include" and match[2]), None)
    return _tags(file.parent / included.decode()) if included else []


def metrics(data: dict[str, Any]) -> dict[str, str]:
    """Values that a definition's metrics give -> the metric: of the same name, or with k: [1, 4] the function behind `pass@4`."""
    found: dict[str, str] = {}
    for one in data.get("metric_list") or []:
        metric, many = one.get("metric"), one.get("k") or []
        name = metric.__name__ if callable(metric) else str(metric).rpartition(".")[2]
        found |= {f"pass@{k}": name for k in ([many] if isinstance(many, int) else many)} or {name: name}
    return found


# -- data ---------------------------------------------------------------------------------------------------------------------


def laid_over(data: dict[str, Any], asked: dict) -> dict[str, Any]:
    """A definition with the keys of `eval.tasks.NAME.lm_eval` that change it."""
    data = data | {"num_fewshot": asked["num_fewshot"]}
    if "data_files" in asked:
        data = with_files(data, asked["data_files"])
    if "revision" in asked:
        data["dataset_kwargs"] = {**(data.get("dataset_kwargs") or {}), "revision": asked["revision"]}
    return data


def with_files(data: dict[str, Any], files: dict[str, str]) -> dict[str, Any]:
    """A definition whose splits are these files, in place of what it names. InputError on an ending that nobody reads."""
    endings = {Path(file).suffix for file in files.values()}
    builders = {BUILDERS.get(ending) for ending in endings}
    if len(builders) != 1 or None in builders:
        raise InputError(f"found files that end in {', '.join(sorted(endings))}; expected one of {', '.join(BUILDERS)} for all")
    (builder,) = builders
    return data | {"dataset_path": builder, "dataset_name": None, "dataset_kwargs": {"data_files": dict(files)}}


def data_files(data: dict[str, Any]) -> list[str]:
    """The local files that a definition's rows come from; [] where they come from a hub. InputError where neither is so."""
    if "custom_dataset" in data:
        raise InputError("makes its rows by custom_dataset, where no change of them is seen; name files, or a hub's data set")
    where = data.get("dataset_path")
    if not isinstance(where, str):
        raise InputError(f"found dataset_path {where!r}, expected json with dataset_kwargs.data_files, or a hub's data set")
    if where not in LOCAL:
        if os.path.exists(where) or where.endswith(".py"):
            raise InputError(f"found dataset_path {where!r}, which is here: name its files, by dataset_path: json and data_files")
        return []
    named = (data.get("dataset_kwargs") or {}).get("data_files")
    splits: list[Any] = list(named.values()) if isinstance(named, dict) else [named]
    found: list[str] = [file for split in splits for file in (split if isinstance(split, list) else [split])]
    if not found or not all(isinstance(file, str) for file in found):
        raise InputError(f"found dataset_path {where} and no files under dataset_kwargs.data_files")
    if remote := next((file for file in found if "://" in file), None):
        raise InputError(f"reads {remote}; fetch it, and name the file under data_files")
    files = [match for file in found for match in (sorted(glob.glob(file)) if glob.has_magic(file) else [file])]
    for file in files:
        if not os.path.isfile(file):
            raise InputError(f"{file} is missing, which its rows come from (from the folder in which snakemake runs)")
    return list(dict.fromkeys(files))


def hub_of(data: dict[str, Any]) -> dict[str, Any] | None:
    """{id, revision} of a hub's data set that the rows come from, without revision where none is named; None for local files."""
    if (where := data.get("dataset_path")) in LOCAL:
        return None
    revision = (data.get("dataset_kwargs") or {}).get("revision")
    return {"id": where} | ({"revision": revision} if revision else {})

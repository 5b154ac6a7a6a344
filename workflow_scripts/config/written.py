"""What the user wrote: the config files laid over each other, and in which of them each key stands. Nothing is judged here.

`config/methods.yaml` comes first (the methods' defaults and the constant LoRA and quantisation blocks), then the files that the
user named, each merged over the one before, then what stands on the command line. A slice, an experiment, a model, an
evaluation, a family or a control that is `null` there is left out.
"""

import copy
from typing import Any

import yaml

from workflow_scripts.artifacts.fingerprint import ROOT
from workflow_scripts.config.names import DEVELOPMENT, EVALUATED
from workflow_scripts.config.schema_errors import dotted
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.plumbing.messages import InputError

METHODS_FILE = ROOT / "config" / "methods.yaml"
# Blocks whose entries have names of the user's: `name: null` in a file leaves out what a file before it has there.
NAMED = (
    ("data", "slices"), ("experiments",), ("models",), ("eval",), ("tune", "experiments"), ("report", "families"),
    ("report", "controls"),
)  # fmt: skip


def merge(base: dict, over: dict) -> dict:
    """`over` laid over `base`, mappings key by key, anything else replaced. Neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        merged[key] = merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def merge_all(parts: list[dict]) -> dict:
    merged: dict = {}
    for part in parts:
        merged = merge(merged, part)
    return merged


def _beyond(user: dict, files: dict) -> dict:
    """What of `user` the files do not say: the keys that were added or changed on the command line."""
    more = {}
    for key, value in user.items():
        if key not in files or repr(value) != repr(files[key]):
            both = isinstance(value, dict) and isinstance(files.get(key), dict)
            if not both:
                more[key] = value
            elif deeper := _beyond(value, files[key]):
                more[key] = deeper
    return more


def _read_again(value: Any) -> Any:
    """Snakemake reads what stands inside a list or a mapping of `--config` as texts: `seeds=[1,2]` as "1" and "2". A hash of
    digits alone stays a text."""
    if isinstance(value, dict):
        return {key: _read_again(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_read_again(one) for one in value]
    if isinstance(value, str) and len(value) < 20:
        try:
            found = yaml.safe_load(value)
        except yaml.YAMLError:
            return value
        return found if isinstance(found, bool | int | float) or value == "null" else value
    return value


def _source(sources: list[tuple[str, dict]], path: list) -> str:
    """The last file in which the key at `path` stands, else that of its nearest parent."""
    for length in range(len(path), 0, -1):
        for name, data in reversed(sources):
            node: Any = data
            try:
                for key in path[:length]:
                    node = node[key]
            except (KeyError, IndexError, TypeError):
                continue
            return name
    return sources[-1][0]


def _at(data: dict, path: tuple[str, ...]) -> dict:
    """The mapping at `path`, {} where there is none."""
    for key in path:
        data = found if isinstance(found := data.get(key), dict) else {}
    return data


class Written:
    """The merged tree (`data`), the file of each key, and what follows from single blocks of it."""

    def __init__(self, user: dict, files: list[str] | None = None):
        """user: the merged config (as Snakemake hands it over); files: where it came from, for the errors."""
        methods = read_yaml(METHODS_FILE)
        self._sources = [(str(METHODS_FILE.relative_to(ROOT)), methods)]
        self._sources += [(str(name), read_yaml(name)) for name in files or []]
        for name, data in self._sources:
            if {"fingerprint", "step"} <= set(data):
                raise InputError(
                    f"{name}: is a result, no config; `--configfile` takes all words that follow it. Put the target before it: "
                    f"snakemake {name} --configfile ..."
                )
        if more := _beyond(user, merge_all([data for _, data in self._sources[1:]])):
            more = {key: _read_again(value) if isinstance(value, dict | list) else value for key, value in more.items()}
            self._sources.append(("--config", more))
        self.data: dict[str, Any] = merge(methods, merge(copy.deepcopy(user), more))
        for path in NAMED:
            named, before = _at(self.data, path), [_at(data, path) for _, data in self._sources]
            for name in [name for name, body in named.items() if body is None and any(one.get(name) for one in before)]:
                del named[name]
        self.slice_copies: dict[str, str] = {}  # slice of a later round, or of a rank sweep -> the slice that it is a copy of

    def fail(self, path: list, problem: str) -> InputError:
        """The error of a key: its file, its path, and what is wrong."""
        return InputError(f"{_source(self._sources, path)}: {dotted(path)}: {problem}")

    def place(self, name: str, path: list) -> list:
        """Where the key at `path` of an experiment stands: in itself, in one that it extends, or in its method."""
        bodies, seen, one = [], [], name
        while one in self.data["experiments"] and one not in seen:
            seen.append(one)
            bodies.append((["experiments", one], self.data["experiments"][one]))
            one = bodies[-1][1].get("extends")
        method = next((body["method"] for _, body in bodies if "method" in body), None)
        if method is not None:
            bodies.append((["methods", method], self.data["methods"][method]))
        for place, body in bodies:
            node: Any = body
            for key in path:
                node = node.get(key) if isinstance(node, dict) else None
            if node is not None:
                return [*place, *path]
        return ["experiments", name, *path]

    @property
    def evaluations(self) -> dict[str, str]:
        """Task -> the slice of its prompts, for the tasks that the config evaluates: ifeval always, others where named."""
        return {task: self.data["eval"][task]["prompts"] for task in EVALUATED if task in self.data["eval"]}

    @property
    def own_tasks(self) -> dict[str, dict]:
        """The tasks of lm-eval that `eval.tasks` names: they bring rows of their own, so no slice stands behind them."""
        return self.data["eval"].get("tasks", {})

    @property
    def scored(self) -> list[str]:
        """Every task that gives a score file for each run."""
        return [*self.evaluations, *self.own_tasks]

    @property
    def development(self) -> dict[str, str]:
        """`task` and `prompts` by which trials are chosen; {} where nothing is tuned, or only by the methods' own objectives."""
        choose = self.data.get("tune", {}).get("choose")
        return choose if isinstance(choose, dict) else {}

    @property
    def asked(self) -> dict[str, str]:
        """Task -> slice, of the evaluations and of the development prompts."""
        more = {DEVELOPMENT: self.development["prompts"]} if self.development else {}
        return self.evaluations | more

    def task(self, name: str) -> dict:
        """The block of a task under `eval:`. Development prompts are put as those of the task that they stand for."""
        return self.data["eval"][self.development["task"] if name == DEVELOPMENT else name]

    def drawn(self, name: str) -> dict:
        """How a task's answers are drawn: samples, temperature, seed, top_k, top_p; {} where each prompt has one, greedy."""
        body = self.own_tasks[name] if name in self.own_tasks else self.task(name)
        if "samples" not in body:
            return {}
        return {key: body[key] for key in ("samples", "temperature")} | self.data["eval"]["drawn"]

    @property
    def models(self) -> dict[str, dict]:
        """The models that are not trained here: the base, which experiments are made from, and those only scored beside it."""
        return {"base": self.data["base"], **self.data.get("models", {})}

    def slice_body(self, name: str) -> dict:
        """The block of a slice; of one that is of a seed, `best_of_8.seed2`, that of all seeds."""
        return self.data["data"]["slices"][name.partition(".")[0]]

    def trains_on(self, slice_name: str) -> bool:
        """False for prompts that are only answered and scored: taken whole, without `heldout`."""
        body = self.slice_body(slice_name)
        return "heldout" in body or body["kind"] not in EVALUATED.values()

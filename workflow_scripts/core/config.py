"""The config: files merged, every key and type checked once, experiments resolved. Runs at parse time, in milliseconds.

`config/methods.yaml` comes first (the methods' defaults and the constant LoRA and quantisation blocks), then the files
that the user named, each merged over the one before; `config/schema.yaml` judges the result. Every error names the file
and the path of the key. Nothing is detected here (no GPU, no network): a login node plans what a GPU node plans.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from workflow_scripts.core.fingerprint import ROOT
from workflow_scripts.core.messages import InputError
from workflow_scripts.core.schema_errors import dotted, explain

METHODS_FILE = ROOT / "config" / "methods.yaml"
SCHEMA_FILE = ROOT / "config" / "schema.yaml"
RUN_NAME = re.compile(r"(?P<experiment>[a-z][a-z0-9_]{0,40})(\.seed(?P<seed>\d+))?")
CONSTANT_BLOCKS = ("lora", "quant")


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where PyYAML would silently keep the last one."""


def _mapping(loader: _StrictLoader, node: yaml.MappingNode) -> dict:
    seen: set = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if key in seen:
            raise InputError(f"{loader.name}: line {key_node.start_mark.line + 1}: the key {key!r} stands here twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml(path: Path | str) -> dict:
    """The mapping in a YAML file. InputError on a syntax error, a doubled key, or anything but a mapping."""
    try:
        with open(path, encoding="utf-8") as file:
            data = yaml.load(file, Loader=_StrictLoader)  # noqa: S506, a SafeLoader
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of keys on top, found {type(data).__name__}")
    return data


def merge(base: dict, over: dict) -> dict:
    """`over` laid over `base`, mappings key by key, anything else replaced. Neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        merged[key] = merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


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


SCHEMA = read_yaml(SCHEMA_FILE)


class Config:
    """A config that has been checked. `data` is the merged tree, `experiments` the resolved experiments by name."""

    def __init__(self, user: dict, files: list[str] | None = None):
        """user: the merged config (as Snakemake hands it over); files: where it came from, for the errors.

        Raises InputError with the file and the path of the key.
        """
        methods = read_yaml(METHODS_FILE)
        self._sources = [(str(METHODS_FILE.relative_to(ROOT)), methods)]
        self._sources += [(str(name), read_yaml(name)) for name in files or []]
        if merge_all([data for _, data in self._sources[1:]]) != user:
            self._sources.append(("--config", user))
        self.data: dict[str, Any] = merge(methods, copy.deepcopy(user))
        self._refuse_overrides()
        self._check_schema()
        self.experiments: dict[str, dict] = {name: self._resolve(name) for name in sorted(self.data["experiments"])}
        self._check_references()

    def fail(self, path: list, problem: str) -> InputError:
        return InputError(f"{_source(self._sources, path)}: {dotted(path)}: {problem}")

    def _refuse_overrides(self) -> None:
        """The constant blocks stand once, on top: a copy inside a method or an experiment is refused with the reason."""
        for group in ("methods", "experiments"):
            bodies = self.data.get(group)
            for name, body in bodies.items() if isinstance(bodies, dict) else ():
                for block in CONSTANT_BLOCKS:
                    if isinstance(body, dict) and block in body:
                        keys = sorted(body[block]) if isinstance(body[block], dict) else []
                        raise self.fail(
                            [group, name, block, *keys[:1]],
                            f"refused: `{block}:` is one block for all methods, because a comparison of methods is fair only at "
                            f"equal adapter capacity. Set the global `{block}:` on top of the config, for every method",
                        )

    def _check_schema(self) -> None:
        found = sorted(Draft202012Validator(SCHEMA).iter_errors(self.data), key=lambda e: [str(p) for p in e.absolute_path])
        explained = [explain(error, SCHEMA) for error in found]
        lines = [str(self.fail(path, problem)) for path, problem in filter(None, explained)]
        if lines:
            raise InputError("\n".join(dict.fromkeys(lines)))

    def _follow(self, name: str, key: str, parent_of: Callable[[str], str | None]) -> list[str]:
        """`name` and the experiments that it reaches by `key`. InputError, naming the key, on unknown names and loops."""
        chain = [name]
        while (parent := parent_of(chain[-1])) is not None:
            if parent not in self.data["experiments"]:
                known = ", ".join([*(["base"] if key == "start_from" else []), *sorted(self.data["experiments"])])
                raise self.fail(["experiments", chain[-1], key], f"found {parent!r}, expected one of {known}")
            if parent in chain:
                raise self.fail(["experiments", chain[-1], key], "a loop: " + " -> ".join([*chain, parent]))
            chain.append(parent)
        return chain

    def _resolve(self, name: str) -> dict:
        """The experiment laid over what it extends, and that over the defaults of its method."""
        experiments = self.data["experiments"]
        body: dict = {}
        for ancestor in reversed(self._follow(name, "extends", lambda one: experiments[one].get("extends"))):
            body = merge(body, experiments[ancestor])
        body.pop("extends", None)
        if "method" not in body:
            raise self.fail(["experiments", name, "method"], "missing; name a method, or an experiment with `extends:`")
        return merge(self.data["methods"][body["method"]], body)

    def _start(self, name: str) -> str | None:
        start = self.experiments[name]["start_from"]
        return None if start == "base" else start

    def _check_references(self) -> None:
        slices = self.data["data"]["slices"]
        for name, body in slices.items():
            if body["kind"] != "ifeval" and "heldout" not in body:
                problem = "missing; rows kept from training show whether a method trained at all"
                raise self.fail(["data", "slices", name, "heldout"], problem)
        for name, body in self.experiments.items():
            self._follow(name, "start_from", self._start)
            kind, chosen = self.slice_kind(body["method"]), body["slice"]
            fitting = ", ".join(sorted(key for key in slices if slices[key]["kind"] == kind))
            if slices.get(chosen, {}).get("kind") != kind:
                raise self.fail(["experiments", name, "slice"], f"found {chosen!r}, expected a slice of kind {kind}: {fitting}")
            for key in sorted(set(body["train"]) - self.train_keys(body["method"])):
                known = ", ".join(sorted(self.train_keys(body["method"])))
                raise self.fail(
                    ["experiments", name, "train", key], f"unknown key for method {body['method']}; known here: {known}"
                )
        prompts = self.data["eval"]["ifeval"]["prompts"]
        if slices.get(prompts, {}).get("kind") != "ifeval":
            raise self.fail(["eval", "ifeval", "prompts"], f"found {prompts!r}, expected a slice of kind ifeval")

    @staticmethod
    def slice_kind(method: str) -> str:
        return {"sft": "sft", "dpo": "preference"}[method]

    @staticmethod
    def train_keys(method: str) -> set[str]:
        defs = SCHEMA["$defs"]
        return set(defs["train"]["properties"]) | set(defs[f"train_{method}"]["properties"])

    def run(self, name: str) -> tuple[str, int]:
        """(experiment, seed) of a run's name, such as `dpo` (seed 1) or `dpo.seed2`. InputError if there is none."""
        match = RUN_NAME.fullmatch(name)
        if not match or match["experiment"] not in self.experiments:
            raise InputError(f"{name}: no experiment of this config ({', '.join(self.experiments)})")
        if match["seed"] is not None and (int(match["seed"]) < 2 or match["seed"].startswith("0")):
            raise InputError(f"{name}: {match['experiment']} without a suffix is seed 1; suffixes start at .seed2")
        return match["experiment"], int(match["seed"] or 1)


def run_name(experiment: str, seed: int) -> str:
    return experiment if seed == 1 or experiment == "base" else f"{experiment}.seed{seed}"


def merge_all(parts: list[dict]) -> dict:
    merged: dict = {}
    for part in parts:
        merged = merge(merged, part)
    return merged


def load(*files: Path | str) -> Config:
    """The config of files given in the order in which they are laid over each other."""
    return Config(merge_all([read_yaml(file) for file in files]), [str(file) for file in files])

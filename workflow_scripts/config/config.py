"""The config: files merged, every key and type checked once, experiments resolved. Runs at parse time, in milliseconds.

`config/methods.yaml` comes first (the methods' defaults and the constant LoRA and quantisation blocks), then the files
that the user named, each merged over the one before; `config/schema.yaml` judges the result. Every error names the file
and the path of the key. Nothing is detected here (no GPU, no network): a login node plans what a GPU node plans.
"""

import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator, validators

from workflow_scripts.artifacts.fingerprint import ROOT
from workflow_scripts.config import bases, choices, judged, sweep
from workflow_scripts.config.schema_errors import dotted, explain
from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.data import formats
from workflow_scripts.plumbing.messages import InputError

METHODS_FILE = ROOT / "config" / "methods.yaml"
SCHEMA_FILE = ROOT / "config" / "schema.yaml"
RUN_NAME = re.compile(r"(?P<experiment>[a-z][a-z0-9_]{0,40})(\.seed(?P<seed>[0-9]+))?")
CONSTANT_BLOCKS = ("lora", "quant")
# Kind of a slice -> (the tiny world's splits for it, the keys that stand beside `split`).
TINY_SOURCES = {
    "sft": (("sft",), {"follow", "numeric"}),
    "preference": (("pairs",), set()),
    "numeric": (("pairs", "eval", "dev"), set()),
    "ifeval": (("pairs", "eval", "dev"), set()),
}
# Method -> kinds of the slices that it trains on. Methods with a reward take what their rewards need (`slice_kinds`).
SLICE_KINDS = {"sft": ("sft",), "dpo": ("preference",), "kto": ("preference", "unpaired"), "rm": ("preference",)}
# Task -> the kind of the slice that its prompts are.
EVALUATED = {"ifeval": "ifeval", "gsm8k": "numeric", "mmlu": "choice", "truthfulqa": "truthfulqa", "judge": "prompts"}
VERIFIERS = ("ifeval", "numeric")  # rewards that are functions; each needs the fields of the slice kind of its name


def merge(base: dict, over: dict) -> dict:
    """`over` laid over `base`, mappings key by key, anything else replaced. Neither is changed."""
    merged = dict(base)
    for key, value in over.items():
        merged[key] = merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def lay(base: dict, over: dict) -> dict:
    """`merge` for experiments: a reward, like class weights, replaces that of the base whole, since a mixture is one choice."""
    whole = {key: over[key] for key in ("reward", "class_weights") if key in over}
    return merge(base, over) | whole


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
# An integer is written as one (JSON Schema takes 16.0 for an integer, `random.sample` and TRL do not), a number is finite.
_Validator = validators.extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine(
        "integer", lambda _, value: isinstance(value, int) and not isinstance(value, bool)
    ).redefine(
        "number", lambda _, value: isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ),
)


def _violations(schema: dict, data: dict) -> list[tuple[list, str]]:
    """(path of the key, sentence) of each mistake, once, in the order of the paths."""
    errors = sorted(_Validator(schema).iter_errors(data), key=lambda e: [str(p) for p in e.absolute_path])
    return [found for error in errors for found in explain(error, SCHEMA)]


class Config:
    """A config that has been checked. `data` is the merged tree, `experiments` the resolved experiments by name."""

    def __init__(self, user: dict, files: list[str] | None = None):
        """user: the merged config (as Snakemake hands it over); files: where it came from, for the errors.

        Raises InputError with the file and the path of the key.
        """
        methods = read_yaml(METHODS_FILE)
        self._sources = [(str(METHODS_FILE.relative_to(ROOT)), methods)]
        self._sources += [(str(name), read_yaml(name)) for name in files or []]
        if more := _beyond(user, merge_all([data for _, data in self._sources[1:]])):
            self._sources.append(("--config", more))
        self.data: dict[str, Any] = merge(methods, copy.deepcopy(user))
        self.copies: dict[str, str] = {}  # of a rank sweep -> the experiment that each is a copy of
        self._refuse_overrides()
        self._check_schema()
        self.experiments: dict[str, dict] = {name: self._resolve(name) for name in sorted(self.data["experiments"])}
        self._check_experiments()
        self._check_references()
        self.experiments, self.copies = sweep.expand(self, RUN_NAME)

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
                            f"equal adapter capacity. Set the global `{block}:` on top of the config, for every method"
                            + (", or declare a rank sweep with `sweep: rank`" if block == "lora" else ""),
                        )

    def _check_schema(self) -> None:
        self._raise([self.fail(path, problem) for path, problem in _violations(SCHEMA, self.data)])

    def _check_experiments(self) -> None:
        """Each resolved experiment against the schema of its method: which keys and values fit is known only now."""
        schemas = {name: {"$defs": SCHEMA["$defs"], "$ref": f"#/$defs/method_{name}"} for name in self.data["methods"]}
        errors = []
        for name, body in self.experiments.items():
            own = {key: value for key, value in body.items() if key not in ("method", "sweep")}
            for path, problem in _violations(schemas[body["method"]], own):
                problem = problem.replace("unknown key;", f"unknown key for method {body['method']};")
                place = self._place(name, path)
                if place[0] == "experiments" and self.experiments[place[1]]["method"] != body["method"]:
                    problem += f" (experiments.{name} inherits it)"
                errors.append(self.fail(place, problem))
        self._raise(errors)

    @staticmethod
    def _raise(errors: list[InputError]) -> None:
        """One line for each mistake, if there is any."""
        if errors:
            raise InputError("\n".join(dict.fromkeys(map(str, errors))))

    def _follow(self, name: str, key: str, parent_of: Callable[[str], str | None]) -> list[str]:
        """`name` and the experiments that it reaches by `key`. InputError, naming the key, on unknown names and loops."""
        chain = [name]
        while (parent := parent_of(chain[-1])) is not None:
            if parent not in self.data["experiments"]:
                known = ", ".join([*(["base"] if key == "start_from" else []), *sorted(self.data["experiments"])])
                raise self.fail(self._place(chain[-1], [key]), f"found {parent!r}, expected one of {known}")
            if parent in chain:
                loop = " -> ".join([*chain[chain.index(parent) :], parent])
                raise self.fail(self._place(chain[-1], [key]), f"a loop: {loop}; one of them must start elsewhere")
            chain.append(parent)
        return chain

    def _resolve(self, name: str) -> dict:
        """The experiment laid over what it extends, and that over the defaults of its method."""
        experiments = self.data["experiments"]
        body: dict = {}
        for ancestor in reversed(self._follow(name, "extends", lambda one: experiments[one].get("extends"))):
            body = lay(body, experiments[ancestor])
        body.pop("extends", None)
        if "method" not in body:
            raise self.fail(["experiments", name, "method"], "missing; name a method, or an experiment with `extends:`")
        return lay(self.data["methods"][body["method"]], body)

    def _place(self, name: str, path: list) -> list:
        """Where the key at `path` of an experiment stands: in itself, in one that it extends, or in its method."""
        name = self.copies.get(name, name)
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

    def _start(self, name: str) -> str | None:
        start = self.experiments[name]["start_from"]
        return None if start == "base" else start

    def _check_references(self) -> None:
        bases.check(self)
        choices.check(self)
        judged.check(self)
        if (self.data["device"], self.data["precision"]) == ("cpu", "fp16"):
            raise self.fail(["precision"], "found fp16 with device: cpu, where nothing scales its losses; set fp32")
        slices = self.data["data"]["slices"]
        for task, slice_name in self.evaluations.items():
            if slices.get(slice_name, {}).get("kind") != (kind := EVALUATED[task]):
                raise self.fail(["eval", task, "prompts"], f"found {slice_name!r}, expected a slice of kind {kind}")
            for key in ("heldout", "max_prompt_tokens"):
                if key in slices[slice_name]:
                    problem = "the prompts of an evaluation are taken as they are and are all held out; leave the key out"
                    raise self.fail(["data", "slices", slice_name, key], problem)
        for name, body in slices.items():
            self._check_slice(name, body)
        for name, body in self.experiments.items():
            self._follow(name, "start_from", self._start)
            self._check_start(name, body)
            self._check_reward(name, body)
            kinds, chosen = self.slice_kinds(body), body["slice"]
            fitting = ", ".join(sorted(key for key in slices if self.trains_on(key) and slices[key]["kind"] in kinds))
            if chosen not in slices or not self.trains_on(chosen) or slices[chosen]["kind"] not in kinds:
                problem = f"found {chosen!r}, expected a slice of kind {' or '.join(kinds)} to train on: "
                problem += fitting or "there is none yet"
                raise self.fail(self._place(name, ["slice"]), problem)

    def _check_start(self, name: str, body: dict) -> None:
        start = self._start(name)
        if start is not None and self.experiments[start]["method"] == "rm":
            problem = f"found {start!r}, a reward model: it scores answers and writes none; start from another experiment"
            raise self.fail(self._place(name, ["start_from"]), problem)

    def _check_reward(self, name: str, body: dict) -> None:
        """The rewards of an experiment are verifiers or reward models, and none of them is made from the experiment itself."""
        place = self._place(name, ["reward"])
        if len(verifiers := [reward for reward in rewards(body) if reward in VERIFIERS]) > 1:
            problem = (
                f"found {' and '.join(verifiers)} in one mixture, but no row has what both need; take one experiment for each"
            )
            raise self.fail(place, problem)
        if "reward" in body:
            self._check_rollouts(name, body["train"])
        for reward in rewards(body):
            if reward in VERIFIERS:
                continue
            models = ", ".join(one for one, other in self.experiments.items() if other["method"] == "rm")
            known = f"expected {', '.join(VERIFIERS)} or a reward model's experiment: {models or 'there is none yet'}"
            if reward not in self.experiments:
                raise self.fail(place, f"found {reward!r}, {known}")
            if (method := self.experiments[reward]["method"]) != "rm":
                raise self.fail(place, f"found {reward!r}, an experiment of method {method}, which is no reward model; {known}")
            if name in (chain := self._made_from(reward)):
                loop = " -> ".join([name, *chain[: chain.index(name) + 1]])
                raise self.fail(place, f"a loop: {loop}; the reward model must start elsewhere")
            for key in ("start_from", "quantise") if body["method"] == "ppo" else ():
                if (theirs := self.experiments[reward][key]) != body[key]:
                    problem = (
                        f"found {reward!r}, whose {key} is {theirs}, and that of {name} is {body[key]}; give both the same: "
                    )
                    raise self.fail(place, problem + "PPO's policy and reward model lie on one backbone")

    def _check_rollouts(self, name: str, train: dict) -> None:
        """A batch holds whole groups of answers to one prompt: TRL says so only once the phases before are done."""
        steps = train.get("steps_per_generation", train["gradient_accumulation_steps"])
        if "num_generations" not in train:  # PPO
            if steps % (accumulated := train["gradient_accumulation_steps"]):
                problem = f"found {steps}, expected a multiple of gradient_accumulation_steps ({accumulated}): whole mini-batches"
                raise self.fail(self._place(name, ["train", "steps_per_generation"]), problem)
            return
        for size, group, times in (
            ("per_device_train_batch_size", "num_generations", steps),
            ("per_device_eval_batch_size", "num_generations_eval", 1),
        ):
            if train[size] * times % train[group]:
                rollout = f"{train[size]} x {times} answers" if times > 1 else f"{train[size]} answers"
                problem = f"found {train[size]}: a rollout of {rollout} must be a multiple of {group} ({train[group]})"
                raise self.fail(self._place(name, ["train", size]), problem)

    def _made_from(self, name: str) -> list[str]:
        """`name` and every experiment that it is made from, by `start_from` and `reward`; each once, so that loops end."""
        found: list[str] = []
        todo = [name]
        while todo:
            one = todo.pop()
            if one in self.experiments and one not in found:
                found.append(one)
                body = self.experiments[one]
                todo += [body["start_from"], *(reward for reward in rewards(body) if reward not in VERIFIERS)]
        return found

    def _check_slice(self, name: str, body: dict) -> None:
        """What a slice's kind asks of its other keys."""
        path, kind = ["data", "slices", name], body["kind"]
        if self.trains_on(name):
            if "heldout" not in body:
                raise self.fail([*path, "heldout"], "missing; rows kept from training show whether a method trained at all")
            if not 1 <= body["heldout"] < body["rows"]:
                problem = (
                    f"found {body['heldout']}, expected at least 1 and below rows ({body['rows']}); these rows show whether a "
                )
                raise self.fail([*path, "heldout"], problem + "method trained at all")
        self._check_rows(path, body)
        if "tiny" in body["source"]:
            if kind not in TINY_SOURCES:
                raise self.fail([*path, "kind"], f"found {kind}, expected one of {', '.join(TINY_SOURCES)} for the tiny world")
            tiny, (splits, keys) = body["source"]["tiny"], TINY_SOURCES[kind]
            path += ["source", "tiny"]
            if tiny["split"] not in splits:
                raise self.fail([*path, "split"], f"found {tiny['split']!r}, expected {' or '.join(splits)} for kind {kind}")
            for key in sorted((set(tiny) - {"split"}) ^ keys):
                problem = "missing, and it has no default" if key in keys else f"not for a slice of kind {kind}; leave it out"
                raise self.fail([*path, key], problem)

    def _check_rows(self, path: list, body: dict) -> None:
        """What a slice's rows are asked for: format, groups, files of different names, a revision."""
        kind, source = body["kind"], body["source"]
        for key in ("format", "group_by"):
            if key in body and (kind == "ifeval" or "tiny" in source):
                raise self.fail([*path, key], "not for rows of kind ifeval or of the tiny world; leave it out")
        if "format" in body and body["format"] not in formats.names(kind):
            known = ", ".join(formats.names(kind))
            raise self.fail([*path, "format"], f"found {body['format']!r}, expected one of {known} for kind {kind}")
        if body.get("group_by") in formats.RESERVED:
            problem = f"found {body['group_by']!r}, a key of this pipeline's own rows; rename it in the source"
            raise self.fail([*path, "group_by"], problem)
        names = [file.rsplit("/", 1)[-1] for file in source.get("paths", [])]
        if twice := [name for name in names if names.count(name) > 1]:
            problem = f"two files are called {twice[0]}, and row ids could not tell them apart; rename one"
            raise self.fail([*path, "source", "paths"], problem)
        if "hub" in source and "revision" not in source and not self.data.get("allow_unpinned"):
            problem = "missing; name the full commit (40 hexadecimal digits), or set allow_unpinned: true and let the rows be "
            raise self.fail([*path, "source", "revision"], problem + "whatever the hub holds that day")

    @property
    def evaluations(self) -> dict[str, str]:
        """Task -> the slice of its prompts, for the tasks that the config evaluates: ifeval always, others where named."""
        return {task: self.data["eval"][task]["prompts"] for task in EVALUATED if task in self.data["eval"]}

    @property
    def models(self) -> dict[str, dict]:
        """The models that are not trained here: the base, which experiments are made from, and those only scored beside it."""
        return {"base": self.data["base"], **self.data.get("models", {})}

    def trains_on(self, slice_name: str) -> bool:
        """False for prompts that are only answered and scored: taken whole, without `heldout`."""
        body = self.data["data"]["slices"][slice_name]
        return "heldout" in body or body["kind"] not in EVALUATED.values()

    @staticmethod
    def slice_kinds(body: dict) -> tuple[str, ...]:
        """The kinds of slices that a resolved experiment can train on. A verifier needs its own; a reward model only prompts."""
        if "reward" not in body:
            return SLICE_KINDS[body["method"]]
        needed = tuple(reward for reward in rewards(body) if reward in VERIFIERS)
        return needed or ("preference", "unpaired", "numeric", "ifeval")

    def run(self, name: str) -> tuple[str, int]:
        """(experiment, seed) of a run's name, such as `dpo` (seed 1) or `dpo.seed2`. InputError if there is none."""
        match = RUN_NAME.fullmatch(name)
        if not match or match["experiment"] not in self.experiments:
            raise InputError(f"{name}: no experiment of this config ({', '.join(self.experiments)})")
        if match["seed"] is not None and (int(match["seed"]) < 2 or match["seed"].startswith("0")):
            raise InputError(f"{name}: {match['experiment']} without a suffix is seed 1; suffixes start at .seed2")
        return match["experiment"], int(match["seed"] or 1)


def rewards(body: dict) -> dict[str, float]:
    """Reward -> weight of a resolved experiment: `reward: numeric` is a weight of 1; none for a method without a reward."""
    reward = body.get("reward", {})
    return {reward: 1.0} if isinstance(reward, str) else dict(sorted(reward.items()))


def merge_all(parts: list[dict]) -> dict:
    merged: dict = {}
    for part in parts:
        merged = merge(merged, part)
    return merged


def load(*files: Path | str) -> Config:
    """The config of files given in the order in which they are laid over each other."""
    return Config(merge_all([read_yaml(file) for file in files]), [str(file) for file in files])

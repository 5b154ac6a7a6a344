"""What differs between two versions of a step's JSON, in the words of who changed it: config keys, files of code, packages.

The parents are left out: whether a parent will be made again is known only with the whole plan (see `explain`). Nothing is
passed over in silence: a part of the JSON that has no words here is shown by its own name.
"""

import ast
import json
from typing import Any

from workflow_scripts.artifacts import fingerprint
from workflow_scripts.config import own_tasks, sampled
from workflow_scripts.config.config import Config
from workflow_scripts.config.names import CHOICE, DEVELOPMENT, JUDGED
from workflow_scripts.config.schema import CONSTANT_BLOCKS
from workflow_scripts.config.schema_errors import dotted

UNSET = "(not set)"
LONGEST = 60  # characters of a value; a longer one is cut
# Parts of a step's JSON that are not settings, or that a function of its own puts into words.
APART = ("config", "parents", "code", "packages", "external", "step")
# Settings that are one choice: shown whole, not key by key.
WHOLE = ("reward", "class_weights")
# Settings of `eval:` that hold for every task.
ALL_TASKS = ("batch_size", "decoding")
# Keys of a reward model's evaluation -> where the training has them.
EVAL_RM = {"batch_size": "per_device_eval_batch_size", "max_length": "max_length"}


def differences(config: Config, kind: str, name: str, old: dict, new: dict) -> list[str]:
    """One line for each thing that differs between two versions of the step `kind` of `name` (`Plan.step`'s arguments).

    old: the step's JSON in a manifest; new: the one that is planned now, from `config`.
    """
    old, new = plain(old), plain(new)
    lines = []
    if old.get("step") != new["step"] and kind != "train":  # a training's module follows its method, which is a key
        lines.append(f"step: {text(old.get('step', UNSET))} -> {new['step']}")
    lines += _settings(config, kind, name, old, new)
    lines += _external(config, kind, name, old.get("external", {}), new.get("external", {}))
    lines += _code(old.get("code", {}), new["code"])
    lines += _packages(old.get("packages", {}), new["packages"])
    return lines


def plain(step: dict) -> dict:
    """A step's JSON as a manifest would hold it: 1.0 and 1 are one setting."""
    return json.loads(fingerprint.canonical(step))


def changed(old: dict, new: dict, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any, Any]]:
    """(path of the key, old, new) of each value that differs, by the order of the keys; UNSET where a side lacks the key."""
    found = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key, UNSET), new.get(key, UNSET)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict) and key not in WHOLE:
            found += changed(before, after, (*path, key))
        else:
            found.append(((*path, key), before, after))
    return found


def text(value: Any) -> str:
    """A value as YAML would have it, on one line, cut where it is long."""
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False).replace('"', "")
    shown = " ".join(shown.split())
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 3]}..."


def arrow(key: str, old: Any, new: Any) -> str:
    """`key: old -> new`; where the cut would hide the difference, only that it changed."""
    before, after = text(old), text(new)
    return f"{key}: changed ({before})" if before == after else f"{key}: {before} -> {after}"


def place(config: Config, kind: str, name: str, path: list[str]) -> str:
    """The key at `path` of a step's config, as it stands in the user's files: `methods.dpo.train.beta`, `data.max_drop`."""
    if _judges(kind):  # of its settings only the reward model's training has any
        kind, name = "eval_rm", config.data["eval"][JUDGED]["reward"]
    verb, _, task = kind.partition("_")
    task = config.development["task"] if task == DEVELOPMENT else task  # whose settings development prompts are put by
    top = path[0]
    if top in CONSTANT_BLOCKS or top == "rewards":
        return dotted(path)
    if top == "correction":
        return "generation.cap"
    if top == "generation":
        if kind in ("train", "samples"):
            return "generation.rollouts"
        chunks = config.generation()["backend"] == "vllm"
        return dotted((["generation", "chunk"] if chunks else ["eval", path[-1]]) if path[-1] == "batch_size" else path)
    if kind in ("train", "merge", "eval_rm"):
        if top == "optim":
            return "optim (follows device)"
        if top == "placebo":
            path = ["reward"]
        if kind == "eval_rm" and top in EVAL_RM:
            path = ["train", EVAL_RM[top]]
        return dotted(config.place(config.run(name)[0], path))
    if kind == "samples" or kind == "slice" and "sampled" in config.slice_body(name)["source"]:
        if top in ("reward", "placebo", "strip_think", "require_reward_above_chance"):
            path = ["source", "sampled", "reward" if top == "placebo" else top]
        own = config.slice_body(name)
        return dotted(["data", *path] if top not in own and top in config.data["data"] else sampled.place(config, name, path))
    if kind == "slice":
        own = config.data["data"]["slices"][name]
        if top not in own and top in config.data["data"]:  # one value for all slices
            return dotted(["data", *path])
        if top == "source":
            path = ["source", *({"file": "path", "files": "paths"}.get(key, key) for key in path[1:])]
        return dotted(["data", "slices", name, *path])
    if top == "drawn":  # `samples` and `temperature` are the task's, the rest is the same for all
        if path[-1] in config.data["eval"]["drawn"]:
            return dotted(["eval", *path])
        return dotted(["eval", *(["tasks"] if task in config.own_tasks else []), task, *(path[1:] or ["samples"])])
    if verb == "score" and task in config.own_tasks and top not in ALL_TASKS:
        return dotted(["eval", "tasks", task, *path])
    if verb in ("generate", "score"):
        return dotted(["eval", *([] if top in ALL_TASKS and task not in CHOICE else [task]), *path])
    return dotted([kind, *path])


def _judges(kind: str) -> bool:
    """Whether a step has a reward model score answers."""
    return kind == f"score_{JUDGED}"


def _asks_the_policy(kind: str) -> bool:
    """Whether a step puts prompts to what is evaluated: on the base and in the precision of `eval:`."""
    return kind.startswith(("generate_", "score_", "samples")) and not _judges(kind)


def _settings(config: Config, kind: str, name: str, old: dict, new: dict) -> list[str]:
    """Keys of the config, then seed, precision, device, threads and what else stands on top of the JSON."""
    lines = []
    for path, before, after in changed(old.get("config", {}), new["config"]):
        if path == ("quant",) and UNSET in (before, after):
            if _asks_the_policy(kind):
                key = f"base that it is judged on (eval.base: {config.data['eval']['base']})"
                lines.append(arrow(key, *("full precision" if value == UNSET else value["type"] for value in (before, after))))
            continue  # else it comes and goes with `quantise`, which is shown
        lines.append(arrow(place(config, kind, name, list(path)), before, after))
    rest_old, rest_new = ({key: value for key, value in step.items() if key not in APART} for step in (old, new))
    for path, before, after in changed(rest_old, rest_new):
        key = dotted(list(path))
        if key == "precision" and _asks_the_policy(kind):
            key = "eval.precision"
        if key.startswith("allow_"):  # the key stands in a step only where it is true
            before, after = (False if value == UNSET else value for value in (before, after))
        lines.append(arrow(key, before, after))
    return lines


def _external(config: Config, kind: str, name: str, old: dict, new: dict) -> list[str]:
    """What the files that a step reads from outside hold. A hub's name and revision are keys of the config: shown there."""
    lines = []
    for (key, *rest), before, after in changed(old, new):
        if key == "candidate_rows" and after != UNSET:
            source = config.data["data"]["slices"][name]["source"]
            source = source["composed"]["questions"] if "composed" in source else source
            files = source.get("paths") or [source["path"]]
            lines.append(f"external content: candidate rows of {', '.join(files)} changed")
        elif key == "definition" and after != UNSET:
            lines.append(f"external content: {config.own_tasks[kind.partition('_')[2]]['lm_eval']['file']}, or its code, changed")
        elif key == "rows" and after != UNSET:
            lines.append(f"external content: rows of {', '.join(own_tasks.rows(config, kind.partition('_')[2]))} changed")
        elif key == "content" and after != UNSET:
            lines.append(f"external content: files of {config.data['base']['path']} changed")
        elif key in ("candidate_rows", "content", "definition", "rows"):
            lines.append("external content: none any more")
        elif key == "rewards" and len(rest) == 2:
            what = "added" if before == UNSET else "removed" if after == UNSET else "changed"
            lines.append(f"external content: {rest[1]} of the reward {rest[0]} {what}")
    return lines


def _code(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """The modules of the step's import closure that were changed, added or taken away, as files."""
    said: dict[str, list[str]] = {"changed": [], "added": [], "removed": []}
    for (module,), before, after in changed(old, new):
        what = "added" if before == UNSET else "removed" if after == UNSET else "changed"
        said[what].append(_file(module) + (" (or a file that it names)" if what == "changed" and _names_files(module) else ""))
    parts = [f"{', '.join(files)} {what}" for what, files in said.items() if files]
    return [f"code: {'; '.join(parts)}"] if parts else []


def _file(module: str) -> str:
    """`steps.train_dpo` -> `steps/train_dpo.py`; a package is its __init__.py."""
    if module == fingerprint.PACKAGE:
        return "__init__.py"
    path = module.replace(".", "/")
    return f"{path}/__init__.py" if (fingerprint.ROOT / fingerprint.PACKAGE / path).is_dir() else f"{path}.py"


def _names_files(module: str) -> bool:
    """True if the module names a template or a table, whose content counts as the module's own."""
    path = fingerprint.ROOT / fingerprint.PACKAGE / _file(module)
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError):
        return False
    constants = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str))
    return any(fingerprint._resource(value, path.parent) for value in constants)


def _packages(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Python, and the locked versions of the libraries that the step uses."""
    parts = []
    for (package,), before, after in changed(old, new):
        if before == UNSET or after == UNSET:
            parts.append(f"{package} {'added' if before == UNSET else 'removed'}")
        else:
            parts.append(f"{package} {before} -> {after}")
    return [f"packages: {', '.join(parts)}"] if parts else []

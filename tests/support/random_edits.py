"""Random edits of a clone in which everything is made, each with the phases that depend on it directly (random_oracle.py)."""

import ast
import json
import os
import random
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import Clone
from tests.support import random_graph as graph
from tests.support import random_oracle as oracle
from tests.support.random_graph import Phase, Run
from tests.support.random_oracle import NOTHING
from tests.support.source_edits import LAYOUT, LOGIC, added_statement, changed_number

CONFIGS = ["config/config.yaml", "tests/support/config/micro.yaml", "tests/support/config/random_edits.yaml"]
PACKAGE = "workflow_scripts"


class Box:
    """Edits of a clone that are put back: contents and times."""

    def __init__(self, clone: Clone, rng: random.Random):
        self.clone, self.rng, self.folder = clone, rng, clone.folder
        self.kept: dict[Path, tuple[bytes, os.stat_result]] = {}
        self.overlay: dict = {}
        self.taken: set[str] = set()  # what was edited already; an edit of the same would hide it
        self.direct: set[Phase] = set()
        self.runs: dict[str, Run] = {}
        self.did: list[str] = []

    def keep(self, path: Path) -> None:
        if path not in self.kept:
            self.kept[path] = (path.read_bytes(), path.stat())

    def write(self, path: Path, content: bytes) -> None:
        """Write as an editor does, or by `cp -p` of an older file over it, which may even be of the same age and size."""
        self.keep(path)
        how = self.rng.choice(("edited", "edited", "cp -p of an older one", "cp -p of one of the same time", "renamed over"))
        if how == "edited":
            path.write_bytes(content)
        else:
            other = path.with_name(path.name + ".other")
            other.write_bytes(content)
            when = 15 * 10**17 if "older" in how else path.stat().st_mtime_ns
            os.utime(other, ns=(when, when))
            if how == "renamed over":
                os.replace(other, path)
            else:
                subprocess.run(["cp", "-p", other, path], check=True)
                other.unlink()
        self.did.append(f"  ({how})")

    def free(self, *names: str) -> bool:
        """True, and from then on taken, if nothing of these names was edited yet."""
        if self.taken & set(names):
            return False
        self.taken.update(names)
        return True

    def set(self, key: str, value: Any) -> None:
        *above, last = key.split(".")
        node = self.overlay
        for name in above:
            node = node.setdefault(name, {})
        node[last] = value

    def configs(self) -> list[str]:
        """Config files, the last with the edits;
        or `--config` with them, where none is nested (Snakemake would make texts of the numbers)."""
        if not self.overlay:
            return CONFIGS
        if not any(isinstance(value, dict | list) for value in self.overlay.values()) and self.rng.random() < 0.5:
            self.did.append("(by --config)")
            return [*CONFIGS, "--config", *(f"{key}={value}" for key, value in self.overlay.items())]
        (self.folder / "overlay.yaml").write_text(yaml.safe_dump(self.overlay))
        return [*CONFIGS, "overlay.yaml"]

    def restore(self) -> None:
        for path, (content, stat) in self.kept.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        (self.folder / "overlay.yaml").unlink(missing_ok=True)


# -- the edits: each changes the box's clone and returns what depends on it directly, or None if it would hide another one -----


def a_key(box: Box) -> set[Phase] | None:
    """A key of the config, in a file laid over the others."""
    name = box.rng.choice(sorted(oracle.KEYS))
    values, direct = oracle.KEYS[name]
    key, value = name.split()[0], box.rng.choice(values)
    parts = key.split(".")
    names = [key]  # what this edit could hide, or be hidden by
    if parts[0] == "experiments":
        names.append(".".join(parts[:2]))
        if "train" in parts:
            names.append(f"methods.{graph.RUNS[parts[1]].method}.train.{parts[-1]}")
    elif key.endswith("max_prompt_tokens"):
        names = ["max_prompt_tokens"]
    if not box.free(*names):
        return None
    box.set(key, value)
    box.did.append(f"{name}: {value}")
    return direct


def a_method_key(box: Box) -> set[Phase] | None:
    """A key of a method's `train:`, for the method or for one experiment."""
    method = box.rng.choice(sorted(oracle.METHOD_KEYS))
    key = box.rng.choice(sorted(oracle.METHOD_KEYS[method]))
    value = box.rng.choice(oracle.METHOD_KEYS[method][key])
    names = sorted({run.split(".")[0] for run, body in graph.RUNS.items() if body.method == method})
    experiment = box.rng.choice([None, *names])
    if experiment and key in oracle.OWN.get(experiment, ()):
        experiment = None  # it has another value of its own
    if not box.free(f"methods.{method}.train.{key}", *([f"experiments.{experiment}"] if experiment else [])):
        return None
    box.set(f"experiments.{experiment}.train.{key}" if experiment else f"methods.{method}.train.{key}", value)
    box.did.append(f"{experiment or method}: {key}: {value}")
    return oracle.who_has(method, key, experiment)


def a_rewiring(box: Box) -> set[Phase] | None:
    """Another start, slice or reward; one in a trial."""
    key, value, runs, direct = box.rng.choice(oracle.REWIRINGS)
    if box.runs or not box.free(".".join(key.split(".")[:2]), key):
        return None
    box.set(key, value)
    box.runs = runs
    box.did.append(f"{key}: {value}")
    return direct


def in_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]


def _line_of(text: str, keys: list[str]) -> int:
    """The line of a key in a YAML file of blocks."""
    lines, i = text.splitlines(), -1
    for depth, key in enumerate(keys):
        i = next(n for n in range(i + 1, len(lines)) if re.match(rf"{'  ' * depth}{key}:", lines[n]))
    return i


def a_config_file(box: Box) -> set[Phase] | None:
    """A line of methods.yaml or config.yaml themselves: a key of a method, a shared block, or a comment."""
    file = box.rng.choice(("methods.yaml", "config.yaml"))
    method = box.rng.choice(sorted(oracle.METHOD_KEYS))
    path = box.folder / "config" / file
    text = path.read_text()
    key = box.rng.choice(sorted(set(yaml.safe_load(text)["methods"][method]["train"]) & set(oracle.METHOD_KEYS[method])))
    value = box.rng.choice(oracle.METHOD_KEYS[method][key])
    what = box.rng.choice(("key", "key", "key", "comment", "blank", "written anew"))
    if not box.free(f"config/{file}", f"methods.{method}.train.{key}"):
        return None
    if what == "written anew":  # other order, no comments, no anchors
        in_order, flow = box.rng.random() < 0.5, box.rng.random() < 0.5
        content = yaml.safe_dump(yaml.safe_load(text), sort_keys=in_order, default_flow_style=flow)
    else:
        at = _line_of(text, ["methods", "grpo" if file == "config.yaml" and method == "rloo" else method, "train", key])
        lines = text.splitlines()
        new = {"comment": lines[at] + "    # another", "blank": "\n" + lines[at]}
        lines[at] = new.get(what, f"      {key}: {in_yaml(value)}")
        content = "\n".join(lines) + "\n"
    box.did.append(f"{file}: {method}.{key}: {what} {value}")
    box.write(path, content.encode())
    if what != "key" or (file == "methods.yaml" and key in oracle.SAID_AGAIN[method]):
        return NOTHING
    if file == "config.yaml" and key in oracle.IN_MICRO.get(method, ()):
        return NOTHING
    together = ("grpo", "rloo") if file == "config.yaml" and method in ("grpo", "rloo") else (method,)  # one block with an anchor
    return set().union(*(oracle.who_has(one, key) for one in together))


def a_code_file(box: Box) -> set[Phase] | None:
    """A line of logic, a comment, a docstring or the layout of a module; a line of a template or a table."""
    file = box.rng.choice(sorted(oracle.CODE))
    path = box.folder / PACKAGE / file
    if not box.free(file):
        return None
    source, number = path.read_bytes(), box.rng.randint(2, 10**6)
    if path.suffix != ".py":
        box.did.append(f"{file}: a line")
        box.write(path, source + b"edited\n")
        return oracle.running(oracle.CODE[file])
    edit = box.rng.choice((*LOGIC, *LAYOUT))
    if edit is changed_number and (path.stem == "__init__" or file.removesuffix(".py") in oracle.PLANNING):
        edit = added_statement
    content = edit(source, box.rng, number)
    ast.parse(content)
    box.did.append(f"{file}: {edit.__name__}")
    box.write(path, content)
    return oracle.running(oracle.CODE[file]) if edit in LOGIC else NOTHING


def own_reward(box: Box) -> set[Phase] | None:
    """A line of logic, a comment, a docstring or the layout of the user's reward, of what it imports, or of what it does not."""
    file = box.rng.choice(sorted(oracle.OWN_REWARD))
    if not box.free(file):
        return None
    edit = box.rng.choice((*LOGIC, *LAYOUT))
    box.did.append(f"{file}: {edit.__name__}")
    box.write(box.folder / file, edit((box.folder / file).read_bytes(), box.rng, box.rng.randint(2, 10**6)))
    return oracle.OWN_REWARD[file] if edit in LOGIC else NOTHING


def a_locked_version(box: Box) -> set[Phase] | None:
    name = box.rng.choice(sorted(oracle.PACKAGES))
    path = box.folder / f"envs/{'dev' if name in oracle.CHECKS else 'requirements'}.lock"
    if not box.free(path.name):
        return None
    text = path.read_text()
    found = re.search(rf"^{name}==.*$", text, flags=re.M)
    assert found, f"{path.name}: no {name}"
    new = box.rng.choice((".post9", ".post9", "+cpu", "    # why"))
    box.did.append(f"{found[0]}{new}")
    box.write(path, text.replace(found[0], found[0] + new).encode())
    return oracle.running(oracle.PACKAGES[name]) if new == ".post9" else NOTHING


def a_file_that_decides_nothing(box: Box) -> set[Phase] | None:
    """A comment in it, or, in the rules, another claim on memory and time, and another command."""
    file = box.rng.choice(oracle.UNUSED)
    if not box.free(file):
        return None
    path = box.folder / file
    text = path.read_text()
    if file.endswith(".smk") and box.rng.random() < 0.7:
        text = re.sub(r"mem_mb=\d+", "mem_mb=777", text).replace('runtime="', 'runtime="1')
        text = text.replace('"exec python', '"exec nice python')
    if file == "config/schema.yaml":
        text = text.replace("minimum: 300", "minimum: 200").replace("description: ", "description: edited ", 1)
    box.did.append(file)
    box.write(path, (text + "\n# edited\n").encode())
    return NOTHING


def rows(box: Box) -> set[Phase] | None:
    """Rows of the user's own files: changed, added, taken away, or only written in another way."""
    file = box.rng.choice(("pairs.jsonl", "pairs.jsonl", "more.json"))
    path = box.folder / "mine" / file
    if not box.free(file):
        return None
    before = {name: oracle.selection(box.folder, name) for name in oracle.LOCAL}
    text, rng = path.read_text(), box.rng
    if file == "more.json":
        listed = json.loads(text)
        how = rng.choice(("a row changed", "rows added", "indented"))
        if how == "a row changed":
            rng.choice(listed)["chosen"] = "better"
        elif how == "rows added":
            listed += [{"prompt": "new", "chosen": "good", "rejected": "bad"}] * rng.randint(1, 3)
        text = json.dumps(listed, indent=rng.choice((1, 2, 4)) if how == "indented" else None)
    else:
        lines = text.splitlines()
        taken = sorted({number for name in oracle.LOCAL for one, number, _ in before[name] if one.endswith(file)})
        others = sorted(set(range(1, len(lines) + 1)) - set(taken))
        hows = ["inside"] * 3 + ["outside"] * 2 + ["row added", "row removed", "blank line", "blank at the end", "CRLF"]
        how = rng.choice(hows)
        at = rng.choice(taken if how == "inside" else others) - 1
        if how in ("inside", "outside"):
            lines[at] = lines[at].replace("good", rng.choice(("fine", "better")))
        elif how == "row removed":
            del lines[at]
        else:
            where = len(lines) if how == "blank at the end" else at
            lines[where:where] = {"row added": [lines[0]], "CRLF": []}.get(how, ["  "])
        text = ("\r\n" if how == "CRLF" else "\n").join(lines) + "\n"
    box.did.append(f"{file}: {how}")
    box.write(path, text.encode())
    return oracle.slices(*(name for name in oracle.LOCAL if oracle.selection(box.folder, name) != before[name]))


def times(box: Box) -> set[Phase] | None:
    """`touch`, in the past or future, of the big source, of one file or of all; `cp -p` of a file over itself."""
    left_out = {".snakemake", ".work", "__pycache__"}
    files = [p for p in sorted(box.folder.rglob("*")) if p.is_file() and not left_out & set(p.parts)]
    what = box.rng.choice(("the source", "one", "results", "results one by one", "sources", "all", "same again"))
    chosen = {
        "the source": [box.folder / "mine/pairs.jsonl"],
        "one": [box.rng.choice(files)],
        "sources": [p for p in files if "results" not in p.parts],
        "all": files,
        "same again": box.rng.sample(files, 5),
    }.get(what, [p for p in files if "results" in p.parts])
    box.did.append(f"times of {what}: {chosen[0].name}, ... ({len(chosen)})")
    when = time.time() + box.rng.choice((-(10**7), 0, 1000))
    for path in chosen:
        box.keep(path)
        if what == "same again":
            box.write(path, path.read_bytes())
        else:
            os.utime(path, (when, when + (box.rng.randint(-5000, 5000) if what == "results one by one" else 0)))
    return NOTHING


def a_cache(box: Box) -> set[Phase] | None:
    """What can be lost: merged weights, logs, the cache of contents."""
    caches = [*box.folder.glob("results/*/merged/model.safetensors"), *box.folder.glob("logs/*/*.log")]
    caches += [*box.folder.glob("benchmarks/*/*.tsv"), box.folder / "results/.work/content_cache.json"]
    path = box.rng.choice(sorted(path for path in caches if path.is_file()))
    if not box.free(str(path)):
        return None
    box.keep(path)
    if path.suffix == ".json" and box.rng.random() < 0.5:
        path.write_text(box.rng.choice(("{", "[1]", "")))
    else:
        path.unlink()
    box.did.append(f"lost: {path.relative_to(box.folder)}")
    return NOTHING


EDITS = {
    a_key: 8, a_method_key: 5, a_rewiring: 3, a_config_file: 4, a_code_file: 9, a_locked_version: 3,
    a_file_that_decides_nothing: 3, rows: 4, times: 4, a_cache: 1, own_reward: 3,
}  # fmt: skip

"""Pin what a config takes from a hub: write the full commit of each model and data set that has none into the YAML.

    python -m workflow_scripts.tools.pin --configfile config/mine.yaml
    python -m workflow_scripts.tools.pin --configfile config/mine.yaml --dry-run

A branch or tag moves; a commit does not. A missing `revision` is resolved to the commit of the default branch now, a branch,
tag or shortened commit to its full one; 40 hex digits stay as they are. Only these places of the text change: comments and
layout stay. Needs the hub: it is asked, and nothing is guessed.
"""

import argparse
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from workflow_scripts.config.yaml_files import read_yaml
from workflow_scripts.data import task_files
from workflow_scripts.plumbing.jsonl import write_atomically
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import runs

COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Place:
    """A model or data set that a YAML text names, and where in the text its commit goes."""

    path: str  # such as base.hub
    kind: str  # model or dataset
    id: str
    revision: str | None  # as written
    start: int  # of the text to replace; start == end: nothing stands there yet
    end: int
    before: str  # what goes before the commit

    @property
    def pinned(self) -> bool:
        return self.revision is not None and COMMIT.fullmatch(self.revision) is not None


def places(text: str) -> list[Place]:
    """Everything of a hub in a config: `hub: {id, revision}`, `hub` with `revision` beside it, the rows of a task of lm-eval."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return _below(text, root, []) if isinstance(root, yaml.MappingNode) else []


def _below(text: str, node: yaml.MappingNode, path: list[str]) -> list[Place]:
    found = []
    for key, value in node.value:
        here = [*path, str(key.value)]
        if key.value == "hub":
            mapping, name = (value, "id") if isinstance(value, yaml.MappingNode) else (node, "hub")
            place = _place(text, mapping, name, here)
            found += [place] if place else []
        elif key.value == "lm_eval" and isinstance(value, yaml.MappingNode):
            found += _of_task(text, value, here)
        elif isinstance(value, yaml.MappingNode):
            found += _below(text, value, here)
    return found


def _of_task(text: str, mapping: yaml.MappingNode, path: list[str]) -> list[Place]:
    """The hub's data set of a task of `eval.tasks`, which only the task's definition names."""
    keys = {key.value: value.value for key, value in mapping.value}
    name = "task" if "task" in keys else "file"
    place = None if "data_files" in keys else _place(text, mapping, name, path)
    found = place and (task_files.named(place.id) if name == "task" else task_files.read(Path(place.id)))
    hub = task_files.hub_of(found.data) if found else None
    return [replace(place, id=hub["id"])] if place and hub and "revision" not in hub else []


def _place(text: str, mapping: yaml.MappingNode, name: str, path: list[str]) -> Place | None:
    nodes = {key.value: (key, value) for key, value in mapping.value}
    if name not in nodes or not isinstance(nodes[name][1], yaml.ScalarNode):
        return None
    key, value = nodes[name]
    kind = "model" if path[0] in ("base", "models") else "dataset"
    where = (".".join(path), kind, value.value)
    if "revision" in nodes:
        label, given = nodes["revision"]
        null = given.tag == "tag:yaml.org,2002:null"
        empty = given.start_mark.index == given.end_mark.index  # `revision:` and nothing after it
        start = label.end_mark.index + 1 if empty else given.start_mark.index
        end = start if empty else given.end_mark.index
        return Place(*where, None if null else given.value, start, end, " " if empty else "")
    if mapping.flow_style:
        return Place(*where, None, value.end_mark.index, value.end_mark.index, ", revision: ")
    newline = text.find("\n", value.end_mark.index)  # behind a comment on the line of the id
    at = newline if newline >= 0 else len(text)
    return Place(*where, None, at, at, "\n" + " " * key.start_mark.column + "revision: ")


def resolve(api: Any, place: Place) -> str:
    """The full commit of a model or data set now. InputError where the hub does not say."""
    from huggingface_hub import errors

    ask = api.model_info if place.kind == "model" else api.dataset_info
    try:
        commit = ask(place.id, revision=place.revision).sha
    except errors.OfflineModeIsEnabled:
        problem = "huggingface_hub is set to offline (HF_HUB_OFFLINE); unset it where there is a network"
        raise InputError(f"{place.path}: {place.kind} {place.id}: {problem}, or write its commit yourself") from None
    except Exception as error:  # a text of the network's own may hold more than is for the screen: only its kind is told
        status = getattr(getattr(error, "response", None), "status_code", None)
        problem = f"the hub answers {status} to this name" if status else f"no answer from the hub ({type(error).__name__})"
        remedy = "check the name and, if it is gated, your login" if status else "run this where there is a network"
        raise InputError(f"{place.path}: {place.kind} {place.id}: {problem}; {remedy}, or write its commit yourself") from None
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit):
        raise InputError(f"{place.path}: {place.kind} {place.id}: the hub names {commit!r}, expected a commit of 40 hex digits")
    return commit


def pin(text: str, api: Any) -> tuple[str, list[tuple[Place, str]]]:
    """The text with every open revision filled in, and what was filled in."""
    made = [(place, resolve(api, place)) for place in places(text) if not place.pinned]
    for place, commit in sorted(made, key=lambda one: -one[0].start):
        word = commit if isinstance(yaml.safe_load(commit), str) else f'"{commit}"'  # digits alone would be a number
        text = text[: place.start] + place.before + word + text[place.end :]
    for place, commit in made:
        if not any(now.path == place.path and now.revision == commit for now in places(text)):
            raise InputError(f"{place.path}: cannot be edited in place; write `revision: {commit}` there yourself")
    return text, made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configfile", nargs="+", type=Path, required=True, help="the config files to pin")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be written")
    args = parser.parse_args()
    api = None
    for file in args.configfile:
        read_yaml(file)  # says what is wrong with it
        with open(file, encoding="utf-8", newline="") as opened:  # the line ends stay, too
            text = opened.read()
        open_places = [place for place in places(text) if not place.pinned]
        if open_places and api is None:
            from huggingface_hub import HfApi

            api = HfApi()
        new, made = pin(text, api)
        for place, commit in made:
            print(f"{file}: {place.path}: {place.id} {place.revision or '(no revision)'} -> {commit}")
        if not made:
            print(f"{file}: nothing to pin: {len(places(text))} of {len(places(text))} hub sources have a full commit")
        elif not args.dry_run:
            write_atomically(file, new.encode("utf-8"))


if __name__ == "__main__":
    runs.command(main)

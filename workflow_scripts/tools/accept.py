"""Accept a change for one artifact: "it does not matter here", so that nothing is made again because of it.

    python -m workflow_scripts.tools.accept results/dpo/adapter/manifest.json --reason "only a log line" [--configfile FILE...]

Prints what differs between the step in the artifact's manifest and the step that the config plans today, and accepts exactly
that, for this artifact and for those below it whose only change is that they are made from it. The reason is noted in
`accepted.json` beside each manifest, and Snakemake's record is written with today's parameters. Another change, later, is
planned as ever. Refused without a reason, and while something that the artifact is made from is stale itself: accept that
first, or let snakemake make it (`snakemake --touch` would accept all of it without a word).

The manifest stays as it is: it says how the artifact was made. `verify` shows what was accepted, `adopt` honours it.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from workflow_scripts.core import artifacts, fingerprint, records
from workflow_scripts.core import config as configs
from workflow_scripts.core.artifacts import Artifact
from workflow_scripts.core.jsonl import write_atomically
from workflow_scripts.core.messages import InputError
from workflow_scripts.core.plan import Plan
from workflow_scripts.core.records import Place
from workflow_scripts.tools import adopt, runs, verify

Key = tuple[str, str]  # kind and name of a step, as core/plan.py has them


@dataclass(frozen=True)
class Change:
    """One artifact for which a change is accepted, with the differences in words."""

    key: Key
    artifact: Artifact
    what: list[str]


class Graph:
    """The steps of a config, with whatever of them lies in the results folder, and who is made from whom."""

    def __init__(self, plan: Plan):
        self.plan = plan
        here = [place for place in records.find(plan.results) if adopt.planned(plan.config, place)]
        self.runs = {place.name for place in here if place.kind != "slice"} | set(plan.runs()) | {"base"}
        for run in list(self.runs):  # a seed that the config does not list brings the seeds that it starts from
            while run not in ("", "base"):
                self.runs.add(run)
                run = plan.start_run(run)
        self.runs.discard("")

    @cached_property
    def keys(self) -> dict[Key, str]:
        """Every step -> its fingerprint today, parents before children."""
        plan, order = self.plan, {"slice": 0, "base": 1, "train": 2, "merge": 3}
        found = {("slice", name): "" for name in plan.config.data["data"]["slices"]} | {("base", ""): ""}
        for run in self.runs:
            kinds = ["eval_rm"] if run != "base" and plan.is_reward_model(run) else [
                f"{verb}_{task}" for task in plan.config.evaluations for verb in ("generate", "score")
            ]  # fmt: skip
            if run != "base":
                kinds += ["train", *([] if plan.is_reward_model(run) else ["merge"])]
            found |= {(kind, run): "" for kind in kinds}
        marks = {key: plan.fingerprint(*key) for key in found}
        made: dict[Key, str] = {}
        names = sorted(marks, key=lambda key: (order.get(key[0], 4), key))
        equal: dict[str, list[Key]] = {}  # two experiments with equal settings are one step with two names: both come first
        for key in names:
            equal.setdefault(marks[key], []).append(key)

        def visit(key: Key) -> None:
            if key not in made:
                for mark in plan.step(*key)["parents"].values():
                    for one in equal[mark]:
                        visit(one)
                made[key] = marks[key]

        for key in names:
            visit(key)
        return made

    @cached_property
    def by_mark(self) -> dict[str, list[Key]]:
        """Fingerprint -> the steps that have it: two experiments with equal settings are one step with two names."""
        found: dict[str, list[Key]] = {}
        for key, mark in self.keys.items():
            found.setdefault(mark, []).append(key)
        return found

    def place(self, key: Key) -> Place:
        return records.place_of(self.plan.results, *key)

    def parents(self, key: Key) -> dict[str, Key]:
        """Role -> the step that is planned in this role; of equal steps, the one whose files the rule takes."""
        found = {}
        for role, mark in self.plan.step(*key)["parents"].items():
            equal = self.by_mark[mark]
            taken = self._inputs(key[1]) if len(equal) > 1 else set()
            found[role] = next((one for one in equal if self.place(one).manifest in taken), equal[0])
        return found

    def _inputs(self, name: str) -> set[str]:
        """What the rules of a run take as inputs."""
        plan = self.plan
        files = [file for prompts in plan.config.evaluations.values() for file in plan.slice_inputs(prompts)]
        if name in self.runs:
            files += [f"{plan.results}/{name}/{task}_responses.manifest.json" for task in plan.config.evaluations]
            files += plan.train_inputs(name) + plan.adapter_inputs(name) if name != "base" else []
        return set(files)

    def artifact(self, key: Key) -> Artifact | None:
        place = self.place(key)
        return verify.open_artifact(place) if os.path.exists(place.manifest) else None

    def is_current(self, key: Key, artifact: Artifact) -> bool:
        """True if the artifact is, or was accepted as, what the config plans, and Snakemake knows."""
        step = self.plan.step(*key)
        known = all(records.agrees(out, step) for out in self.place(key).outputs)
        return known and self.keys[key] in artifact.stands_for()

    def above(self, key: Key) -> Iterator[Key]:
        """Everything that a step is made from, from the top down."""
        seen: set[Key] = set()
        todo = [key]
        while todo:
            one = todo.pop()
            parents = set(self.parents(one).values()) - seen
            seen |= parents
            todo += parents
        return (one for one in self.keys if one in seen)


def find_target(graph: Graph, target: str) -> Key:
    wanted = os.path.normpath(target)
    for key in graph.keys:
        if wanted in map(os.path.normpath, graph.place(key).outputs):
            return key
    raise InputError(
        f"{target}: not an output of this config; name a manifest, an adapter or a score file in {graph.plan.results}, such as "
        f"{graph.place(('score_ifeval', 'base')).manifest}, and its config with --configfile (make: CONFIG=)"
    )


def flat(value: object, path: str = "") -> dict[str, object]:
    if isinstance(value, dict) and value:
        return {key: leaf for name, part in value.items() for key, leaf in flat(part, f"{path}.{name}" if path else name).items()}
    return {path: value}


def differences(old: dict, new: dict) -> list[str]:
    """What differs between two steps, a sentence each: keys with both values, code by file, parents by fingerprint."""
    said = []
    for group in sorted(set(old) | set(new)):
        before, after = flat({group: old.get(group)}), flat({group: new.get(group)})
        for key in sorted(set(before) | set(after)):
            was, now = before.get(key), after.get(key)
            if was == now:
                continue
            if group == "code" and key != "code":
                how = "changed" if was and now else "added" if now else "gone"
                said.append(f"code: {key.removeprefix('code.').replace('.', '/')}.py {how}")
            elif group == "parents":
                said.append(f"{key}: {str(was)[:12]} -> {str(now)[:12]}")
            else:
                said.append(f"{key}: {_short(was)} -> {_short(now)}")
    return said


def _short(value: object) -> str:
    text = "nothing" if value is None else fingerprint.canonical(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def refuse_stale_ancestors(graph: Graph, key: Key) -> None:
    target = graph.place(key).manifest
    for one in graph.above(key):
        place, artifact = graph.place(one), graph.artifact(one)
        if artifact is None:
            continue  # not here, so nothing of it is accepted: the target's own step names it by its fingerprint
        if adopt.is_blind(place):
            raise InputError(f"{place.manifest}: Snakemake has no record of it; run `make adopt` first")
        if not graph.is_current(one, artifact):
            what = differences(artifact.data["step"], graph.plan.step(*one))
            raise InputError(
                f"{target}: made from {place.manifest}, which is stale itself ({'; '.join(what) or 'to be made again'}); accept "
                "that change first, or let snakemake make it again"
            )


def refuse_altered(place: Place) -> Artifact:
    finding = verify.examine(place)
    altered = [text for text in finding.problems.get("altered", []) if not text.endswith("is gone")]
    if altered or finding.artifact is None:
        raise InputError(f"{place.manifest}: {'; '.join(altered)}; a change of the file itself can't be accepted, delete it")
    return finding.artifact


def only_its_parents(graph: Graph, key: Key, artifact: Artifact, accepted: dict[Key, set[str]]) -> bool:
    """True if a step differs from the plan only in that it was made from artifacts that are accepted in place of others."""
    plan = graph.plan.step(*key)
    parents = graph.parents(key)
    for step in verify.steps_of(artifact):
        if {**step, "parents": 0} != {**plan, "parents": 0} or set(step["parents"]) != set(parents):
            continue
        if all(step["parents"][role] in accepted.get(parent, {graph.keys[parent]}) for role, parent in parents.items()):
            return True
    return False


def changes(graph: Graph, target: Key) -> tuple[list[Change], list[str]]:
    """(what is accepted: the target and what differs only by it, and the manifests below it that stay stale)."""
    artifact = refuse_altered(graph.place(target))
    found, stale = [], []
    accepted = {target: {*artifact.stands_for(), graph.keys[target]}}  # step -> fingerprints that its artifact stands for
    if not graph.is_current(target, artifact):
        found.append(Change(target, artifact, differences(artifact.data["step"], graph.plan.step(*target))))
    below = {target}
    for key in graph.keys:
        if key in below or not os.path.exists(graph.place(key).manifest):
            continue
        try:
            one = graph.artifact(key)
        except InputError:
            continue  # `verify` names it
        assert one is not None
        parents = set(graph.parents(key).values())
        if not parents & below:
            if graph.is_current(key, one):
                accepted[key] = one.stands_for()
            continue
        below.add(key)
        if graph.is_current(key, one):
            accepted[key] = one.stands_for()
        elif only_its_parents(graph, key, one, accepted) and settled(graph, parents, accepted):
            refuse_altered(graph.place(key))
            found.append(Change(key, one, differences(one.data["step"], graph.plan.step(*key))))
            accepted[key] = {*one.stands_for(), graph.keys[key]}
        else:
            stale.append(graph.place(key).manifest)
    return found, stale


def settled(graph: Graph, parents: set[Key], accepted: dict[Key, set[str]]) -> bool:
    """True if none of these steps will be made again: a child of one that will be can't be accepted."""
    return all(key in accepted or not os.path.exists(graph.place(key).manifest) for key in parents)


def write(graph: Graph, change: Change, why: str, when: str, target: str) -> None:
    """The note first, then the record: a kill in between leaves the artifact stale, and the same command goes on."""
    place, step = graph.place(change.key), graph.plan.step(*change.key)
    path = artifacts.accepted_file(change.artifact.path)
    entry = {
        "what": change.what, "why": why, "when": when, "with": target,
        "from": change.artifact.fingerprint, "to": graph.keys[change.key], "step": step,
    }  # fmt: skip
    note = {"accepted": [*artifacts.accepted(change.artifact), entry]}
    write_atomically(path, artifacts.dump(note).encode("utf-8"))
    records.write(place, step, verify.ancestors(place, change.artifact))


def accept(plan: Plan, target: str, why: str) -> tuple[list[Change], list[str]]:
    """Accept the change of one artifact. Returns what `changes` does. InputError where that is refused."""
    if not why.strip():
        raise InputError(f'{target}: say why the change does not matter: --reason (make: REASON="..."); it is noted and shown')
    graph = Graph(plan)
    key = find_target(graph, target)
    place = graph.place(key)
    if not os.path.exists(place.manifest):
        raise InputError(f"{place.manifest}: not here, so there is nothing to accept; make it with snakemake")
    refuse_stale_ancestors(graph, key)
    if adopt.is_blind(place):
        raise InputError(f"{place.manifest}: Snakemake has no record of it; run `make adopt` first")
    found, stale = changes(graph, key)
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for change in found:
        write(graph, change, " ".join(why.split()), when, place.manifest)
    return found, stale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="an output: a manifest, an adapter or a score file")
    parser.add_argument("--reason", default="", help="why the change does not matter; required")
    parser.add_argument("--configfile", nargs="+", default=["config/config.yaml"], metavar="FILE", help="as for snakemake")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    args = parser.parse_args()
    plan = Plan(configs.load(*args.configfile))
    found, stale = accept(plan, args.target, args.reason)
    if args.json:
        shown = [{"path": str(one.artifact.path), "what": one.what} for one in found]
        print(json.dumps({"accepted": shown, "stale": stale}, indent=1))
        return
    for one in found:
        print(f"accepted  {one.artifact.path}: {'; '.join(one.what) or 'as the config plans it'}")
    for path in stale:
        print(f"stale     {path}: has changed in another way as well; snakemake makes it again")
    if not found:
        print(f"{args.target}: what the config plans; nothing to accept")


if __name__ == "__main__":
    runs.command(main)

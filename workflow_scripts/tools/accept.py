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
from pathlib import Path

from workflow_scripts.artifacts import manifests, work
from workflow_scripts.artifacts.manifests import Artifact
from workflow_scripts.config import config as configs
from workflow_scripts.plan import records
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plan.records import Place
from workflow_scripts.plumbing.jsonl import write_atomically
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import adopt, differences, graph, runs, verify

Key = tuple[str, str]  # kind and name of a step, as plan/plan.py has them


@dataclass(frozen=True)
class Change:
    """One artifact for which a change is accepted, with the differences in words."""

    key: Key
    artifact: Artifact
    what: list[str]


class Graph:
    """The steps of a config and of the seeds that lie in its results folder, and who is made from whom."""

    def __init__(self, plan: Plan):
        self.plan = plan
        here = [place.manifest for place in records.find(plan.results) if adopt.planned(plan.config, place)]
        ordered = graph.in_order(plan, graph.phases_by_file(plan, here).values())
        self.keys: dict[Key, str] = {key: plan.fingerprint(*key) for key in ordered}  # its fingerprint today, parents first

    def place(self, key: Key) -> Place:
        return records.place_of(self.plan.results, *key)

    def parents(self, key: Key) -> dict[str, Key]:
        """Role -> the step that is planned in this role."""
        return {role: (phase.kind, phase.name) for role, phase in graph.parents(self.plan, graph.Phase(*key)).items()}

    def differences(self, key: Key, artifact: Artifact) -> list[str]:
        """What differs between the step in an artifact's manifest and the one that is planned, a sentence each."""
        old, new = artifact.data["step"], self.plan.step(*key)
        marks = [
            (role, old["parents"].get(role), new["parents"].get(role)) for role in sorted({*old["parents"], *new["parents"]})
        ]
        made_from = [f"parents.{role}: {str(was)[:12]} -> {str(now)[:12]}" for role, was, now in marks if was != now]
        return differences.differences(self.plan.config, *key, old, new) + made_from

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


def find_target(steps: Graph, target: str) -> Key:
    wanted = os.path.normpath(target)
    for key in steps.keys:
        if wanted in map(os.path.normpath, steps.place(key).outputs):
            return key
    raise InputError(
        f"{target}: not an output of this config; name a manifest, an adapter or a score file in {steps.plan.results}, such as "
        f"{steps.place(('score_ifeval', 'base')).manifest}, and its config with --configfile (make: CONFIG=)"
    )


def refuse_stale_ancestors(steps: Graph, key: Key) -> None:
    target = steps.place(key).manifest
    for one in steps.above(key):
        place, artifact = steps.place(one), steps.artifact(one)
        if artifact is None:
            continue  # not here, so nothing of it is accepted: the target's own step names it by its fingerprint
        if adopt.is_blind(place):
            raise InputError(f"{place.manifest}: Snakemake has no record of it; run `make adopt` first")
        if not steps.is_current(one, artifact):
            what = steps.differences(one, artifact)
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


def only_its_parents(steps: Graph, key: Key, artifact: Artifact, accepted: dict[Key, set[str]]) -> bool:
    """True if a step differs from the plan only in that it was made from artifacts that are accepted in place of others."""
    plan = steps.plan.step(*key)
    parents = steps.parents(key)
    for step in verify.steps_of(artifact):
        if {**step, "parents": 0} != {**plan, "parents": 0} or set(step["parents"]) != set(parents):
            continue
        if all(step["parents"][role] in accepted.get(parent, {steps.keys[parent]}) for role, parent in parents.items()):
            return True
    return False


def changes(steps: Graph, target: Key) -> tuple[list[Change], list[str]]:
    """(what is accepted: the target and what differs only by it, and the manifests below it that stay stale)."""
    artifact = refuse_altered(steps.place(target))
    found, stale = [], []
    accepted = {target: {*artifact.stands_for(), steps.keys[target]}}  # step -> fingerprints that its artifact stands for
    if not steps.is_current(target, artifact):
        found.append(Change(target, artifact, steps.differences(target, artifact)))
    below = {target}
    for key in steps.keys:
        if key in below or not os.path.exists(steps.place(key).manifest):
            continue
        try:
            one = steps.artifact(key)
        except InputError:
            continue  # `verify` names it
        assert one is not None
        parents = set(steps.parents(key).values())
        if not parents & below:
            if steps.is_current(key, one):
                accepted[key] = one.stands_for()
            continue
        below.add(key)
        if steps.is_current(key, one):
            accepted[key] = one.stands_for()
        elif only_its_parents(steps, key, one, accepted) and settled(steps, parents, accepted):
            refuse_altered(steps.place(key))
            found.append(Change(key, one, steps.differences(key, one)))
            accepted[key] = {*one.stands_for(), steps.keys[key]}
        else:
            stale.append(steps.place(key).manifest)
    return found, stale


def settled(steps: Graph, parents: set[Key], accepted: dict[Key, set[str]]) -> bool:
    """True if none of these steps will be made again: a child of one that will be can't be accepted."""
    return all(key in accepted or not os.path.exists(steps.place(key).manifest) for key in parents)


def write(steps: Graph, change: Change, why: str, when: str, target: str) -> None:
    """The note first, then the record: a kill in between leaves the artifact stale, and the same command goes on."""
    place, step = steps.place(change.key), steps.plan.step(*change.key)
    path = manifests.accepted_file(change.artifact.path)
    entry = {
        "what": change.what, "why": why, "when": when, "with": target,
        "from": change.artifact.fingerprint, "to": steps.keys[change.key], "step": step,
    }  # fmt: skip
    note = {"accepted": [*manifests.accepted(change.artifact), entry]}
    write_atomically(path, manifests.dump(note).encode("utf-8"))
    records.write(place, step, verify.ancestors(place, change.artifact))


def accept(plan: Plan, target: str, why: str) -> tuple[list[Change], list[str]]:
    """Accept the change of one artifact. Returns what `changes` does. InputError where that is refused."""
    if not why.strip():
        raise InputError(f'{target}: say why the change does not matter: --reason (make: REASON="..."); it is noted and shown')
    steps = Graph(plan)
    key = find_target(steps, target)
    place = steps.place(key)
    if not os.path.exists(place.manifest):
        raise InputError(f"{place.manifest}: not here, so there is nothing to accept; make it with snakemake")
    refuse_stale_ancestors(steps, key)
    if adopt.is_blind(place):
        raise InputError(f"{place.manifest}: Snakemake has no record of it; run `make adopt` first")
    found, stale = changes(steps, key)
    when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    for change in found:
        write(steps, change, " ".join(why.split()), when, place.manifest)
    return found, stale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", help="an output: a manifest, an adapter or a score file")
    parser.add_argument("--reason", default="", help="why the change does not matter; required")
    parser.add_argument("--configfile", nargs="+", default=["config/config.yaml"], metavar="FILE", help="as for snakemake")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    args = parser.parse_args()
    plan = Plan(configs.load(*args.configfile))
    with work.turn(Path(plan.work), plan.results):
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

"""Recompute every hash in a results folder, and follow every result back to what it was made from. Changes nothing.

    python -m workflow_scripts.tools.verify results [--quick] [--json]

What is wrong (exit status 1):

    altered    a file has another content than its manifest says, or is gone; a manifest does not belong to its step
    ancestor   what it was made from is not here, or is another by now
    records    Snakemake's record says that it was made by another step than the manifest does (`--touch` does that)
    scores     scoring the responses again gives other scores

And what is only said: changes that were accepted (`make accept`), merged weights that were deleted and can be rebuilt,
package versions other than the locked ones, sources without a pinned revision. `--quick` does not score again.
Results of other configs below the folder, such as results/qwen05b, are verified with it.
"""

import argparse
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from workflow_scripts.artifacts import fingerprint, manifests, runinfo
from workflow_scripts.artifacts.manifests import WEIGHTS, Artifact
from workflow_scripts.plan import records
from workflow_scripts.plan.records import Place
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import runs

EDITED = "edited by hand: its fingerprint is not that of its step"


@dataclass
class Finding:
    """One artifact. problems: sentences by kind (see above). gone: declared outputs that can be made again from the rest."""

    place: Place
    artifact: Artifact | None
    problems: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)

    def wrong(self, kind: str, sentence: str) -> None:
        self.problems.setdefault(kind, []).append(sentence)

    @property
    def step(self) -> dict:
        """The step that it stands for now: its own, or the last one in whose place it was accepted."""
        assert self.artifact is not None
        return steps_of(self.artifact)[-1]


def steps_of(artifact: Artifact) -> list[dict]:
    """Its own step, and those in whose place it was accepted, oldest first."""
    return [artifact.data["step"], *(entry["step"] for entry in manifests.accepted(artifact))]


def open_artifact(place: Place) -> Artifact:
    """The artifact at its place, under the path that Snakemake knows it by. InputError if it is none, or not that of its step."""
    artifact = Artifact(Path(place.manifest), manifests.read(place.manifest).data)
    step, files = artifact.data.get("step"), artifact.data["files"]
    try:
        whole = isinstance(files, dict) and fingerprint.fingerprint(step) == artifact.fingerprint  # type: ignore[arg-type]
        whole = whole and isinstance(step["step"], str) and set(step["parents"]) == set(artifact.data["parents"])  # type: ignore[index]
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise InputError(EDITED)
    return artifact


def examine(place: Place) -> Finding:
    """One artifact: its files by sha256, its parents by fingerprint."""
    try:
        finding = Finding(place, open_artifact(place))
    except InputError as error:
        finding = Finding(place, None)
        finding.wrong("altered", str(error).removeprefix(f"{place.manifest}: ").split(";")[0])
        return finding
    assert finding.artifact is not None
    check_files(finding, finding.artifact)
    check_parents(finding, finding.artifact)
    return finding


def check_files(finding: Finding, artifact: Artifact) -> None:
    declared = {Path(out).name for out in finding.place.outputs}
    for name, sha256 in sorted(artifact.data["files"].items()):
        path = artifact.folder / name
        if not path.is_file():
            merged = artifact.data.get("kind") == "merged" and name == WEIGHTS
            finding.gone += [str(path)] if name in declared or merged else []
            if merged:
                finding.notes.append(f"{name} was deleted; it is rebuilt when something needs it")
            else:
                finding.wrong("altered", f"{name} is gone")
        elif fingerprint.file_sha256(path) != sha256:
            finding.wrong("altered", f"{name} has another content than when it was made")


def parent_places(place: Place, artifact: Artifact) -> dict[str, str]:
    """Role -> manifest of the parent: at its place in the same results folder, wherever that was copied to.

    A parent from elsewhere (a step that was run by hand) is looked for where the manifest says.
    """
    root = root_of(place.manifest)
    found = {}
    for role, listed in artifact.data["parents"].items():
        was = root_of(listed["path"])
        here = f"{root}/{Path(listed['path']).relative_to(was)}" if was else ""
        found[role] = here if here and os.path.exists(here) else listed["path"] if os.path.exists(listed["path"]) else here
    return found


def root_of(manifest: str) -> str:
    """The results folder of a manifest or score file, by its place in it; "" for one that is in none."""
    path = Path(manifest)
    if path.name != "manifest.json" and not path.name.endswith((".manifest.json", "rm_eval.json")):
        return str(path.parent)
    levels = 2 if path.parent.name in ("adapter", "merged") else 1
    return str(path.parents[levels]) if len(path.parents) > levels else ""


def check_parents(finding: Finding, artifact: Artifact) -> None:
    parents: dict[str, Artifact] = {}
    for role, manifest in parent_places(finding.place, artifact).items():
        try:
            parents[role] = manifests.read(manifest)
        except InputError:
            missing = "which cannot be read" if os.path.exists(manifest) else "which is not here"
            finding.wrong("ancestor", f"made from {role} {manifest or artifact.data['parents'][role]['path']}, {missing}")
    others = []
    for step in steps_of(artifact):  # one state of it must fit all its parents
        others = [role for role, parent in parents.items() if step["parents"][role] not in parent.stands_for()]
        if not others:
            return
    for role in others:
        was, now = artifact.data["step"]["parents"][role][:12], parents[role].fingerprint[:12]
        finding.wrong("ancestor", f"made from another {role} ({was}) than {parents[role].path} is now ({now})")


def ancestors(place: Place, artifact: Artifact) -> list[str]:
    """The manifests of everything that an artifact was made from, as far as they are here."""
    found: list[str] = []
    todo = list(parent_places(place, artifact).values())
    while todo:
        manifest = todo.pop()
        if manifest and manifest not in found and os.path.exists(manifest):
            found.append(manifest)
            try:
                one = manifests.read(manifest)
                todo += parent_places(Place(manifest, (), "", ""), one).values()
            except (InputError, KeyError, TypeError, AttributeError):
                continue  # no manifest any more: said where it is examined
    return sorted(found)


def check_records(finding: Finding, artifact: Artifact) -> None:
    """Snakemake's records, where there are any: of the same step, and of the same bytes of its parents' manifests."""
    for out in finding.place.outputs:
        record = records.read(out)
        if record is None or records.is_incomplete(out) or records.never_matches(out):
            continue
        if not records.agrees(out, *steps_of(artifact)):
            finding.wrong("records", f"Snakemake's record of {Path(out).name} is of another step: touched, or copied over")
        if out == finding.place.manifest and "ancestor" not in finding.problems:
            for parent, checksum in sorted((record.get("input_checksums") or {}).items()):
                if parent.endswith("manifest.json") and os.path.exists(parent):
                    if checksum != f"sha256:{fingerprint.file_sha256(Path(parent))}":
                        finding.wrong("ancestor", f"{parent} has another content than when it was made from it")


def check_scores(finding: Finding, artifact: Artifact) -> None:
    """Score the responses again, by the same code and versions: equal scores, number by number."""
    step = artifact.data["step"]
    if step["step"] in ("lm_eval_task", "judge_answers", "own_task"):
        finding.notes.append("not scored again: it takes a model")
        return
    places = {role: Path(path) for role, path in parent_places(finding.place, artifact).items()}
    module = fingerprint.PACKAGE + ".steps." + step["step"]
    different = runinfo.check_packages(step | {"allow_package_mismatch": True})
    if different or fingerprint.code(module) != step["code"]:
        versions = ", ".join(f"{name} {one['installed']}" for name, one in different.items())
        what = f"the lock file's versions are not here ({versions})" if different else "the scorer has changed since"
        finding.notes.append(f"not scored again: {what}")
        return
    from workflow_scripts.evaluation import gsm8k, ifeval
    from workflow_scripts.plumbing.jsonl import read_jsonl

    score = {"score_ifeval": ifeval.score, "score_gsm8k": gsm8k.score}[step["step"]]
    try:
        parents = {role: manifests.read(path) for role, path in places.items()}
        responses = parents["responses"]
        rows = read_jsonl(responses.file(responses.path.name.replace(".manifest.json", ".jsonl")))
        again = score(parents["prompts"].rows(), rows, step["config"]["strip_think"])
    except InputError as error:
        finding.notes.append(f"not scored again: {error}")
        return
    again = json.loads(manifests.dump(again))  # tuples become lists, as in the file
    for key in sorted(key for key, value in again.items() if artifact.data.get(key, "nothing") != value):
        was, now = artifact.data.get(key, "nothing"), again[key]
        numbers = not isinstance(now, list | dict)
        finding.wrong("scores", f"{key} does not follow from {responses.path}" + (f": {was}, should be {now}" if numbers else ""))


def note(finding: Finding, artifact: Artifact) -> None:
    for entry in manifests.accepted(artifact):
        finding.notes.append(f"accepted {entry['when'][:10]}, {entry['why']!r}: {'; '.join(entry['what'])}")
    for out in finding.place.outputs:
        if why := records.never_matches(out):
            finding.notes.append(f"snakemake makes it again: {why}")
            break
    for name, versions in artifact.data.get("package_mismatch", {}).items():
        finding.notes.append(f"made with {name} {versions['installed']}, the lock file says {versions['locked']}")
    if artifact.data.get("pinned") is False or artifact.data.get("unpinned"):
        finding.notes.append("its source had no pinned revision")


def verify(results: str, quick: bool = False) -> list[Finding]:
    """Everything below a results folder. InputError if nothing is there."""
    if not os.path.isdir(results):
        raise InputError(f"{results}: no such folder; give a results folder")
    findings = []
    for folder in records.folders(results):
        for place in records.find(folder):
            finding = examine(place)
            if finding.artifact is not None:
                check_records(finding, finding.artifact)
                if place.kind.startswith("score_") and not quick:
                    check_scores(finding, finding.artifact)
                note(finding, finding.artifact)
            findings.append(finding)
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", default="results", help="a results folder (default: results)")
    parser.add_argument("--quick", action="store_true", help="hashes and ancestors only: do not score again")
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    args = parser.parse_args()
    findings = verify(args.results.rstrip("/") or "/", args.quick)
    bad = [finding for finding in findings if finding.problems]
    if args.json:
        shown = [{"path": one.place.manifest, "problems": one.problems, "notes": one.notes} for one in findings]
        print(json.dumps({"artifacts": shown, "wrong": len(bad)}, indent=1))
    else:
        for one in findings:
            for sentence in [text for texts in one.problems.values() for text in texts]:
                print(f"WRONG  {one.place.manifest}: {sentence}")
            for sentence in one.notes:
                print(f"note   {one.place.manifest}: {sentence}")
        print(f"{len(findings)} artifacts in {args.results}: {len(bad) or 'none'} with something wrong")
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    runs.command(main)

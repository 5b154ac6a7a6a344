"""Adopt results that came without Snakemake's records (rsync, another machine): verified, then recorded as made here.

    python -m workflow_scripts.tools.adopt [results] [--configfile FILE...]

Snakemake trusts blindly what it has no record of: a changed config would plan nothing. So the pipeline stops where it finds
such outputs (`check`, at parse time), and this tool writes the records from the manifests' own values: a change since then
is found as ever. Each file is hashed first, each parent compared by fingerprint. What was altered, or lacks an ancestor, is
named and gets a record that matches no config: the next `snakemake` that needs it makes it again. What `make accept`
accepted stays accepted. What has a record that fits is left alone.

RESULTS is the folder as the config names it (`pathvars: results`), and that of the config files if they are given. Results
of other configs below it are adopted with it.
"""

import argparse
import os
from pathlib import Path

from workflow_scripts.artifacts import manifests, work
from workflow_scripts.config import config as configs
from workflow_scripts.config.config import Config
from workflow_scripts.config.names import RUN_NAME, run_name
from workflow_scripts.plan import records
from workflow_scripts.plan.records import Place
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import runs, verify


def is_blind(place: Place) -> bool:
    """True if Snakemake would judge an artifact without a record, or by a record of something else.

    An output that Snakemake began to make and has not recorded is its own concern. Looked at twice, since another Snakemake
    may record it just now.
    """
    return looks_blind(place) and not any(map(records.is_incomplete, place.outputs)) and looks_blind(place)


def looks_blind(place: Place) -> bool:
    """Cheap: names and times. Only where a manifest was put in place after its record was written, which no run does, but a
    copy over other files, are the two read and compared.
    """
    suspect = False
    try:
        placed = os.stat(place.manifest).st_ctime
        for out in place.outputs:
            suspect = os.stat(records.record_file(out)).st_mtime < placed or suspect
    except OSError:
        return os.path.exists(place.manifest)  # without a record, unless the manifest went away just now
    return suspect and not all(map(records.never_matches, place.outputs)) and not agrees(place)


def agrees(place: Place) -> bool:
    """True if the records of an artifact are of the step in its manifest, or of one that was accepted in its place."""
    try:
        steps = verify.steps_of(manifests.read(place.manifest))
    except (InputError, KeyError):
        return False
    return all(records.agrees(out, *steps) for out in place.outputs)


def planned(config: Config, place: Place) -> bool:
    """True if a rule of this config makes the artifact: other people's files and other configs' runs are no concern of it."""
    if place.kind in ("slice", "samples"):
        name, _, seed = place.name.partition(".seed")
        source = config.data["data"]["slices"].get(name, {}).get("source", {})
        known = "sampled" in source or place.kind == "slice" and source and not seed
        return bool(known) and "answers_of" not in (source.get("sampled", {}) if place.kind == "samples" else {})
    if place.name in ("", *config.models):
        return True
    match = RUN_NAME.fullmatch(place.name)
    known = match is not None and match["experiment"] in {*config.experiments, *config.judged}
    return known and place.name == run_name(match["experiment"], int(match["seed"] or 1))  # type: ignore[index]


def check(config: Config, results: str) -> None:
    """At parse time. InputError, naming the remedy, if Snakemake would be blind to some of the outputs of this config."""
    blind = [place.manifest for place in records.find(results) if planned(config, place) and is_blind(place)]
    if blind:
        remedy = "make adopt" + ("" if results == "results" else f" RESULTS={results}")
        raise InputError(
            f"{blind[0]}{f' and {len(blind) - 1} more' if blind[1:] else ''}: here without a record of Snakemake's that fits, as "
            f"after a copy; it would be trusted whatever the config says. `{remedy}` verifies and records what is here"
        )


def adopt(results: str) -> tuple[list[Place], list[verify.Finding]]:
    """Record what lacks a record. Returns (adopted, findings on what was left to be made again)."""
    adopted, left = [], []
    for folder in records.folders(results):
        for place in records.find(folder):
            if any(map(records.is_incomplete, place.outputs)) or not lacks_record(place):
                continue
            finding = verify.examine(place)
            if finding.artifact is None:
                records.write(place, {"step": place.kind}, [], left_out=reason(finding))
            else:
                again = reason(finding)
                records.write(place, finding.step, verify.ancestors(place, finding.artifact), left_out=again)
            if reason(finding):
                left.append(finding)
            else:
                adopted.append(place)
    return adopted, left


def lacks_record(place: Place) -> bool:
    """Without regard to times, which a copy may have set at will."""
    return any(records.read(out) is None for out in place.outputs) or not agrees(place)  # or never_matches: agrees with nothing


def reason(finding: verify.Finding) -> str:
    """Why an artifact must be made again; "" if not. Outputs that were deleted are Snakemake's to make, when it needs them."""
    sentences = [text for texts in finding.problems.values() for text in texts]
    gone = {f"{os.path.basename(path)} is gone" for path in finding.gone}
    return "; ".join(text for text in sentences if text not in gone)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", help="the results folder, as the config names it (default: results)")
    parser.add_argument("--configfile", nargs="+", default=[], metavar="FILE", help="take the results folder of this config")
    args = parser.parse_args()
    named = configs.load(*args.configfile).data.get("pathvars", {}).get("results") if args.configfile else None
    results = os.path.normpath(args.results) if args.results else named or "results"
    if not os.path.isdir(results):
        raise InputError(f"{results}: no such folder; copy the results here first, or name their folder")
    with work.turn(Path(results) / ".work", results):
        adopted, left = adopt(results)
    for finding in left:
        print(f"{finding.place.manifest}: {reason(finding)}; snakemake makes it again")
    print(f"{results}: {len(adopted)} artifacts adopted, {len(left)} left to be made again")


if __name__ == "__main__":
    runs.command(main)

"""Why `snakemake TARGET` would run what it would run: each phase with its state, the reasons, and the time that it took before.

    python -m workflow_scripts.tools.explain TARGET... [--configfile FILE...] [--json]

The jobs are those of `snakemake -n` with the same targets and config files; this tool only explains them. It compares the
step's JSON in each phase's manifest with the one that is planned now, from the first phase to the targets. States:

    up to date        made with what the config, the code and the parents are now
    accepted          differs, and `make accept` said that the difference does not matter
    not needed        its manifest is gone, and nothing that will run needs it
    will run          Snakemake plans it, because of the reasons given
    STALE             differs, but Snakemake does not plan it

Expected times are those of the last run of the same phase (run.json, else the benchmark), whatever its settings were.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from workflow_scripts.artifacts import manifests
from workflow_scripts.artifacts.manifests import WEIGHTS, Artifact
from workflow_scripts.config import config as configs
from workflow_scripts.config import sampled
from workflow_scripts.config.names import DEVELOPMENT
from workflow_scripts.config.schema_errors import dotted
from workflow_scripts.plan import records
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import graph, runs
from workflow_scripts.tools.differences import UNSET, arrow, differences, plain
from workflow_scripts.tools.graph import Phase

DEFAULT_CONFIG = "config/config.yaml"  # the Snakefile's own, where no --configfile is given
UP_TO_DATE, ACCEPTED, NOT_NEEDED, WILL_RUN, STALE = "up to date", "accepted", "not needed", "will run", "STALE"
UNPLANNED = "stale, but Snakemake does not plan it: its record is missing or was touched; see `make adopt`"
COLOURS = {UP_TO_DATE: "32", ACCEPTED: "36", NOT_NEEDED: "2", WILL_RUN: "33", STALE: "1;31"}


class Job(NamedTuple):
    """A job that Snakemake plans: its rule, its outputs, Snakemake's own reason, and its benchmark file."""

    rule: str
    outputs: list[str]
    reason: str
    benchmark: str


@dataclass
class Finding:
    """What there is to say of a phase. `seconds`: how long it took last time, for a phase that will run."""

    phase: str
    output: str | None
    state: str
    reasons: list[str] = field(default_factory=list)
    seconds: float | None = None


# -- what Snakemake plans ------------------------------------------------------------------------------------------------


def planned_jobs(targets: list[str], files: list[str]) -> list[Job]:
    """The jobs of `snakemake -n`. InputError with Snakemake's own message where it refuses."""
    command = [sys.executable, "-m", "snakemake", "-n", *targets, "--nocolor", "--quiet", "host"]
    done = subprocess.run([*command, *(["--configfile", *files] if files else [])], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"snakemake -n: {_complaint(done.stdout, done.stderr)}")
    found = parse_jobs(done.stdout)
    total = re.search(r"^total +(\d+)$", done.stdout, flags=re.M)
    if len(found) != (int(total[1]) if total else 0) or (not total and "Nothing to be done" not in done.stdout):
        raise InputError(
            f"snakemake -n: it counts {total[1] if total else 'no'} jobs, and {len(found)} could be read from what it prints; "
            "this tool reads Snakemake 9.27, run `snakemake -n` itself"
        )
    return found


def parse_jobs(printed: str) -> list[Job]:
    """The jobs in what `snakemake -n` prints: a line `rule NAME:`, then `key: value` lines that are indented further."""
    found = []
    heads = list(re.finditer(r"^( *)(?:local)?(?:rule|checkpoint) (\w+):\n", printed, flags=re.M))
    for head in heads:
        body = re.compile(rf"(?:{head[1]}    .*\n)*").match(printed, head.end())
        assert body is not None  # it may be empty
        pairs = dict(re.findall(r"^ +(\w+): (.*)$", body[0], flags=re.M))
        made = pairs["output"].split(", ") if "output" in pairs else []
        found.append(Job(head[2], made, pairs.get("reason", ""), pairs.get("benchmark", "")))
    return found


def _complaint(out: str, err: str) -> str:
    """One line of what Snakemake said when it stopped: the exception's text, else the last thing that it said."""
    said = f"{err}\n{out}"
    if match := re.search(r"^\w+(?:Exception|Error)\b.*:\n((?:.+\n?)+)", said, flags=re.M):
        return " ".join(match[1].split())
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    noise = ("Using workflow specific profile", "Using profile", "Building DAG", "Assuming unrestricted")
    return next((line for line in reversed(lines) if not line.startswith(noise)), "failed without a message")


def shortened(reason: str) -> str:
    """Snakemake's reason without the parameters that it prints in full; of long lists of files the first ones, by name."""
    said = []
    for part in re.sub(r"(Params have changed since last execution): .*", r"\1", reason).split("; "):
        words, colon, listed = part.partition(": ")
        files = sorted(listed.split(", "))  # Snakemake's order is that of a set
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        said.append(words + colon + ", ".join(files[:3]) + more)
    return "; ".join(said)


# -- the comparison ------------------------------------------------------------------------------------------------------


def read_manifest(path: Path) -> Artifact | None:
    """A manifest that can be compared; None where it is missing, cut off, or none of this pipeline."""
    data = runs.read_json(path)
    if data is None or not isinstance(data.get("fingerprint"), str) or not isinstance(data.get("parents"), dict):
        return None
    step = data.get("step")
    parts = ("config", "parents", "code", "packages", "external")
    whole = isinstance(step, dict) and all(isinstance(step.get(part, {}), dict) for part in parts)
    return Artifact(path, data) if whole else None


def seconds_of(manifest: Path, benchmark: str) -> float | None:
    """How long the phase took last time: from run.json beside its manifest, else from Snakemake's benchmark of it."""
    if manifest.name.endswith("manifest.json"):
        run = runs.read_json(manifest.with_name(manifest.name.replace("manifest.json", "run.json"))) or {}
        if isinstance(run.get("seconds"), int | float):
            return float(run["seconds"])
    try:
        head, *rows = Path(benchmark).read_text(encoding="utf-8").splitlines()
        return float(dict(zip(head.split("\t"), rows[-1].split("\t"), strict=False))["s"])
    except (OSError, ValueError, KeyError, IndexError):
        return None


def jobs_on_card(manifest: Path) -> float | None:
    """How many jobs shared the GPU with the phase last time, itself among them, on the average of its time."""
    if not manifest.name.endswith("manifest.json"):
        return None
    return (runs.read_json(manifest.with_name(manifest.name.replace("manifest.json", "run.json"))) or {}).get("gpu_jobs")


def explain(plan: Plan, targets: list[str], jobs: list[Job]) -> list[Finding]:
    """What to say of each phase that the targets are made from, in the order of the DAG, then of Snakemake's other jobs."""
    by_file = graph.phases_by_file(plan, [*targets, *(file for job in jobs for file in job.outputs)])
    files = [os.path.normpath(target) for target in targets] + [file for job in jobs for file in job.outputs]
    if "all" in targets:  # the rules that can be asked for by name
        files += [file for run in [*plan.config.models, *plan.shown()] for file in plan.results_of(run)]
    if "make_base" in targets:
        files += [file for model in plan.config.models for file in plan.base_inputs(model)]
    job_of = {file: job for job in jobs for file in job.outputs}
    causes: dict[Phase, list[Phase]] = {}
    found = []
    for phase in graph.in_order(plan, [by_file[file] for file in files if file in by_file]):
        job = next((job_of[file] for file in graph.outputs(plan, phase) if file in job_of), None)
        found.append(_explain_phase(plan, phase, job, causes))
    for job in jobs:  # `all`, or a rule that the plan knows nothing of
        if not any(file in by_file for file in job.outputs):
            output = job.outputs[0] if job.outputs else None
            seconds = seconds_of(Path(output), job.benchmark) if output else 0.0
            found.append(Finding(f"rule {job.rule}", output, WILL_RUN, [f"Snakemake: {shortened(job.reason)}"], seconds))
    return found


def _explain_phase(plan: Plan, phase: Phase, job: Job | None, causes: dict[Phase, list[Phase]]) -> Finding:
    """One phase. `causes` holds, for each phase that isn't up to date, those with which that began; this one is added."""
    files = [Path(file) for file in graph.outputs(plan, phase)]
    artifact, gone = read_manifest(files[0]), [file for file in files if not file.is_file()]
    reasons = [] if artifact is None else own_differences(plan, phase, artifact, causes)
    if artifact is None and files[0] not in gone:
        reasons.append(f"manifest: {files[0]} is no manifest, or cut off; delete it and run snakemake again")
    same = artifact is None or plain(last_step(artifact)) == plain(plan.step(*phase))
    if job is None and artifact and plan.fingerprint(*phase) in artifact.stands_for() - {artifact.fingerprint}:
        why = [f"accepted: {entry['why']}" for entry in manifests.accepted(artifact)[-1:]]
        return Finding(phase.label, str(files[0]), ACCEPTED, why)
    if job is None and same and not reasons:
        if phase.kind == "merge" and not files[0].with_name(WEIGHTS).is_file():
            gone.append(files[0].with_name(WEIGHTS))
        note = [f"not here: {', '.join(path.name for path in gone)}; made again when something needs it"] if gone else []
        return Finding(phase.label, str(files[0]), UP_TO_DATE if artifact else NOT_NEEDED, note)

    seconds = seconds_of(files[0], job.benchmark) if job else None
    if job and len(gone) == len(files):
        reasons.append("missing: never made" if seconds is None else "missing: its files are gone")
    elif job and gone:
        reasons.append(f"missing: {', '.join(map(str, gone))}")
    above = [parent for parent in dict.fromkeys(graph.parents(plan, phase).values()) if parent in causes]
    if above and not reasons:
        causes[phase] = list(dict.fromkeys(root for parent in above for root in causes[parent]))
        reasons.append(f"because of: {', '.join(root.label for root in causes[phase])}")
    else:
        causes[phase] = [phase]
        if artifact is not None:  # one that isn't here is made whatever its parents are
            reasons += [_again(plan, parent, planned=job is not None) for parent in above]
    if job is None:
        return Finding(phase.label, str(files[0]), STALE, [UNPLANNED, *reasons])
    if not reasons:
        why_left = records.never_matches(str(files[0]))
        reasons.append(f"left by `make adopt`: {why_left}" if why_left else f"Snakemake: {shortened(job.reason)}")
    return Finding(phase.label, str(files[0]), WILL_RUN, reasons, seconds)


def _again(plan: Plan, parent: Phase, planned: bool) -> str:
    """A parent that isn't up to date either, in the words that fit beside reasons of the phase's own."""
    if not planned:
        return f"parent {parent.label} is stale too"
    if parent.kind != "slice":
        return f"parent {parent.label} will be made again"
    artifact = read_manifest(Path(graph.outputs(plan, parent)[0]))
    rows = artifact.data.get("rows") if artifact else None
    kept = f"kept {rows['kept']} -> ?" if isinstance(rows, dict) and "kept" in rows else "not cut yet"
    return f"input: rows of {parent.name} ({kept})"


def last_step(artifact: Artifact) -> dict:
    """The step's JSON that an artifact stands for: its own, or the last one in whose place it was accepted."""
    return [artifact.data["step"], *(entry["step"] for entry in manifests.accepted(artifact))][-1]


def own_differences(plan: Plan, phase: Phase, artifact: Artifact, causes: dict[Phase, list[Phase]]) -> list[str]:
    """Reasons of the phase's own: its settings, code, packages and files, another parent, or one that changed since."""
    old, new, named = last_step(artifact), plan.step(*phase), graph.parents(plan, phase)
    lines = differences(plan.config, *phase, old, new)
    marks = old.get("parents", {})
    for role in sorted(set(marks) | set(new["parents"])):
        if marks.get(role) == new["parents"].get(role):
            continue
        if role in ("start", "rows") and named.get("adapter") in causes:
            continue  # those of the adapter, which says why
        listed = artifact.data["parents"].get(role)
        before = parent_name(listed["path"]) if role in marks and isinstance(listed, dict) and "path" in listed else UNSET
        after = parent_name(graph.outputs(plan, named[role])[0]) if role in named else UNSET
        if before != after:
            lines.append(arrow(_role_key(plan, phase, role), before, after))
        elif named.get(role) not in causes:  # as it should be by now, and not what this phase was made from
            lines.append(f"input: {named[role].label if role in named else role} has changed since")
    return lines


def parent_name(path: str) -> str:
    """A parent's name in the config, from the path of its manifest in whatever results folder: slice, experiment or `base`."""
    *folders, file = Path(path).parts
    if file != "manifest.json":
        return file.split(".")[0]
    name = folders[-2] if folders[-1:] in (["merged"], ["adapter"]) and len(folders) > 1 else folders[-1] if folders else ""
    return name.split(".")[0]  # without .seedN


def _role_key(plan: Plan, phase: Phase, role: str) -> str:
    """The key of the config that says which parent has this role."""
    if phase.kind == "samples" or phase.kind == "slice" and role in ("answers", "prompts"):
        named = {"prompts": "prompts", "answers": "answers_of"}.get(role, "run")
        return dotted(sampled.place(plan.config, phase.name, ["source", "sampled", named]))
    if phase.kind == "slice" and role.startswith(("reward ", "start of ")):
        return dotted(sampled.place(plan.config, phase.name, ["source", "sampled", "reward"]))
    if role.endswith("prompts"):
        task = role.removesuffix("_prompts") if role != "prompts" else phase.kind.partition("_")[2] or "ifeval"
        return "tune.choose.prompts" if task == DEVELOPMENT else f"eval.{task}.prompts"
    if role == "fewshot":
        return f"eval.{phase.kind.partition('_')[2]}.fewshot"
    key = {"start": "start_from", "rows": "slice"}.get(role)
    if key is None or phase.name in ("", *plan.config.models):
        return f"parent ({role})"
    return dotted(plan.config.place(plan.config.run(phase.name)[0], [key]))


# -- what is printed -----------------------------------------------------------------------------------------------------


def duration(seconds: float) -> str:
    """`17 s`, `3 min 51 s`, `48 min`, `3 h 12 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 600:
        return f"{whole // 60} min" + (f" {whole % 60} s" if whole % 60 else "")
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def lines(found: list[Finding], colour: bool) -> list[str]:
    """A table of phases, states and reasons, one reason a line, and the sum."""
    width = max(len(finding.phase) for finding in found)
    shown, states = [], {}
    for finding in found:
        state = finding.state
        if state == WILL_RUN:
            state += f", {'time unknown' if finding.seconds is None else duration(finding.seconds)}"
        states[id(finding)] = state
    wide = max(map(len, states.values()))
    for finding in found:
        state = states[id(finding)].ljust(wide)
        if colour:
            state = f"\033[{COLOURS[finding.state]}m{state}\033[0m"
        first, *more = finding.reasons or [""]
        shown.append(f"{finding.phase.ljust(width)}  {state}  {first}".rstrip())
        shown += [f"{'':{width + wide + 4}}{reason}" for reason in more]
    return [*shown, "", *summary(found)]


def summary(found: list[Finding]) -> list[str]:
    planned = [finding for finding in found if finding.state == WILL_RUN]
    stale = [finding for finding in found if finding.state == STALE]
    said = []
    if planned:
        known = [finding.seconds for finding in planned if finding.seconds is not None]
        unknown = len(planned) - len(known)
        time = f"{duration(sum(known))}, and {unknown} of unknown time" if unknown else duration(sum(known))
        time = time if any(known) else "unknown"
        said.append(f"{len(planned)} of {len(found)} phases will run; expected time, one after another: {time}")
    elif not stale:
        said.append("nothing to be done")
    if stale:
        said.append(f"STALE: {len(stale)} of {len(found)} phases are not what is planned now, and Snakemake would leave them so")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="files or rules, as for snakemake; before --configfile")
    parser.add_argument("--configfile", nargs="+", default=[], metavar="FILE", help="as for snakemake: a config and its overlays")
    parser.add_argument("--json", action="store_true", help="a list of {phase, output, state, reasons, seconds}")
    args = parser.parse_args()
    if not args.targets:
        taken = f"; --configfile took all of {' '.join(args.configfile)}" if args.configfile else ""
        raise InputError(f"no target{taken}: name one first, such as results/ifeval_dpo.json")
    plan = Plan(configs.load(*(args.configfile or [DEFAULT_CONFIG])))
    found = explain(plan, args.targets, planned_jobs(args.targets, args.configfile))
    if args.json:
        print(json.dumps([asdict(finding) for finding in found], indent=1, ensure_ascii=False))
    elif found:
        print("\n".join(lines(found, sys.stdout.isatty() and not os.environ.get("NO_COLOR"))))
    else:
        print(f"{', '.join(args.targets)}: no phase of the plan; Snakemake has nothing to do for it")


if __name__ == "__main__":
    runs.command(main)

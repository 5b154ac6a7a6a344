# What is looked at before the first job of a real run (`onstart` in the Snakefile).
import json
import os
import subprocess
import sys
from pathlib import Path

from workflow_scripts.artifacts import fingerprint, manifests, work
from workflow_scripts.data import hub
from workflow_scripts.plumbing.environment import check_writable
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import rehearse
from workflow_scripts.tools.differences import differences


def preflight():
    """Stop at once if what the jobs take from elsewhere can't be had, or what they make can't be written or computed here."""
    if workflow.is_main_process:
        say_what_is_replaced()
    try:
        check_writable(path for job in workflow.dag.needrun_jobs() for path in written_by(job))
        hub.check_jobs(workflow.dag.needrun_jobs())
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)
    if workflow.is_main_process:
        try_the_card()
        try_the_judges()
        put_first()


def written_by(job):
    """What a job writes: its files, and the two locks that its step holds (steps/cli.py)."""
    yield from [*job.output, *job.log, *filter(None, [job.benchmark])]
    if "step" in job.params.keys():
        for lock in (work.place(Path(job.output[0])), fingerprint.of_text(job.params.step)):
            yield f"{PLAN.work}/locks/{lock}.lock"


def say_what_is_replaced():
    """A base that is made anew by other settings than before: two configs with one results folder replace each other's."""
    for job in workflow.dag.needrun_jobs():
        manifest = job.output.get("manifest", "")
        if job.rule.name != "make_base" or not os.path.exists(manifest):
            continue
        try:
            old = manifests.read(manifest).data["step"]
        except (InputError, KeyError):
            continue  # it is made anew for that
        changed = differences(PLAN.config, "base", job.wildcards.run, old, json.loads(job.params.step))
        if changed:
            sys.stderr.write(
                f"{manifest}: is made anew, and then all that was made from it: {'; '.join(changed[:4])}. "
                f"Where two configs are meant to stand side by side, each has `pathvars` of its own\n"
            )


def try_the_card():
    """Evaluations may be declared in another precision than training: a card without it is known now, not after the training."""
    if not workflow.local_exec or not any(job.resources.get("gpu") for job in workflow.dag.needrun_jobs()):
        return
    precisions = {PLAN.config.data["precision"], PLAN.config.data["eval"]["precision"]}
    command = [sys.executable, "-m", "workflow_scripts.tools.gpu", "--precision", *sorted(precisions)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.stderr.write(f"{(done.stderr or done.stdout).strip().splitlines()[-1]}\n")
        sys.exit(1)


def try_the_judges():
    """Scorers and verifiers run last: what they lack on this machine is known now, not after the training. By jobs' own python."""
    if workflow.touch or workflow.deployment_settings.deployment_method:
        return  # no job runs, or in an environment of its own
    if parts := rehearse.parts(PLAN, workflow.dag.needrun_jobs()):
        command = ["python", "-m", "workflow_scripts.tools.rehearse", json.dumps(parts)]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            sys.stderr.write("python: not found on the PATH, where jobs look for it; source .venv/bin/activate\n")
            sys.exit(1)
        if done.returncode:
            sys.stderr.write(f"{(done.stderr or done.stdout).strip().splitlines()[-1]}\n")
            sys.exit(1)

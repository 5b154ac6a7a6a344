# What is looked at before the first job of a real run (`onstart` in the Snakefile).
import json
import os
import sys

from workflow_scripts.artifacts import manifests
from workflow_scripts.data import hub
from workflow_scripts.plumbing import gpus
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools.differences import differences


def preflight():
    """Stop at once if what the jobs take from elsewhere can't be had."""
    offered = getattr(workflow.global_resources.get("gpu"), "value", None)
    if GPU and workflow.local_exec and offered is not None and offered < (there := len(gpus.allowed())):
        sys.stderr.write(f"{there} GPUs are here, and {offered} may be used at once: --resources gpu={there} uses all\n")
    if workflow.is_main_process:
        say_what_is_replaced()
    try:
        hub.check_jobs(workflow.dag.needrun_jobs())
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)


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

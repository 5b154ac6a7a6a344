# What is looked at before the first job of a real run (`onstart` in the Snakefile).
import sys

from workflow_scripts.data import hub
from workflow_scripts.plumbing import gpus
from workflow_scripts.plumbing.messages import InputError


def preflight():
    """Stop at once if what the jobs take from elsewhere can't be had."""
    offered = getattr(workflow.global_resources.get("gpu"), "value", None)
    if GPU and workflow.local_exec and offered is not None and offered < (there := len(gpus.allowed())):
        sys.stderr.write(f"{there} GPUs are here, and {offered} may be used at once: --resources gpu={there} uses all\n")
    try:
        hub.check_jobs(workflow.dag.needrun_jobs())
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(1)

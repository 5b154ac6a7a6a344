"""Snakemake, with a scheduler that waits for nothing: each planned job is described in a file and handed to the executor.

    python tests/profiles/jobs.py FILE ARGUMENT...        the arguments of a snakemake command

Executor, profile, plan and the code that submits a job are the real ones; only the order of jobs is not. With -n nothing is
submitted. FILE gets one JSON object for each job; the process then ends without waiting for anything.
"""

import json
import os
import sys

from snakemake import cli
from snakemake.scheduling.job_scheduler import JobScheduler


def describe(job) -> dict:
    known = {name: value for name, value in job.resources.items() if isinstance(value, (int, str)) and name != "tmpdir"}
    return {
        "rule": job.rule.name,
        "wildcards": dict(job.wildcards_dict),
        "local": bool(job.is_local),
        "threads": job.threads,
        "resources": dict(sorted(known.items())),
        "params": {name: str(value) for name, value in sorted(job.params.items())},
        "input": [str(file) for file in job.input],
        "output": [str(file) for file in job.output],
        "shell": str(job.shellcmd),
    }


def schedule(self):
    jobs = sorted(self.workflow.dag.needrun_jobs(), key=lambda job: (job.rule.name, sorted(job.wildcards_dict.items())))
    with open(FILE, "w") as file:
        for job in jobs:
            if not job.is_local and not self.dryrun:
                self._executor.run_job(job)
            file.write(json.dumps(describe(job), sort_keys=True) + "\n")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    FILE, *arguments = sys.argv[1:]
    JobScheduler.schedule = schedule
    cli.main(arguments)

"""The state of a job for Snakemake: prints running, success or failed.

    python profiles/cluster-generic/status.py pbs|sge JOBID

Ends with status 0 whatever happens: Snakemake gives up everything when this command fails. A server that does not answer
says nothing about the job, so that counts as running. A job that the server has forgotten counts as failed: if it had
finished, the next attempt finds its results under results/.work and only puts them in place.
"""

import re
import subprocess
import sys


def ask(*command: str) -> tuple[str, str]:
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout, done.stderr


def pbs(job: str) -> str:
    out, errors = ask("qstat", "-x", "-f", job)
    state = re.search(r"^\s*job_state = (\w)", out, flags=re.M)
    if state is None:
        return "failed" if re.search(r"unknown job|has finished", errors, flags=re.I) else "running"
    if state[1] not in "FCX":  # finished; C in Torque
        return "running"
    status = re.search(r"^\s*exit_status = (-?\d+)", out, flags=re.M | re.I)
    return "success" if status and int(status[1]) == 0 else "failed"


def sge(job: str) -> str:
    out, errors = ask("qstat", "-j", job)
    if out.strip() or not re.search(r"do(es)? not exist", errors):
        return "running"
    out, errors = ask("qacct", "-j", job)  # appears some seconds after the end
    if not out.strip():
        return "running"
    ended = dict(line.split(None, 1) for line in out.splitlines() if len(line.split(None, 1)) == 2)
    return "success" if ended.get("exit_status", "").strip() == "0" and ended.get("failed", "").split()[:1] == ["0"] else "failed"


if __name__ == "__main__":
    scheduler, job = sys.argv[1:]
    try:
        print({"pbs": pbs, "sge": sge}[scheduler](job))
    except OSError as error:
        print(f"{scheduler}: {error}", file=sys.stderr)
        print("running")

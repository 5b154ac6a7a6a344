"""A scheduler of a few lines under the names of real ones: qsub, qstat, qdel (PBS), bsub, badmin, lsclusters, bhist (LSF),
sbatch and its like (Slurm).

    QUEUE=FOLDER qsub -l walltime=60 job.sh       a command of each name calls this file; the folder is the queue

Each call leaves its arguments in FOLDER/calls.jsonl; without QUEUE it says and does nothing. With RUN_JOBS set, qsub runs the
job's script in the background and keeps its exit status for qstat. QUEUE_ENDS=KILL: the first job is killed at once, without a
word to Snakemake.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

QUEUE = Path(os.environ.get("QUEUE", "/nowhere"))
NAMES = ["qsub", "qstat", "qdel", "bsub", "badmin", "lsclusters", "bhist", "bjobs"]
NAMES += ["sbatch", "sinfo", "scontrol", "squeue", "sacct", "scancel"]


def install(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in NAMES:
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {name} "$@"\n')
        (folder / name).chmod(0o755)


def qsub(arguments: list[str], number: int) -> str:
    script = arguments[-1]
    (QUEUE / f"{number}.sh").write_text(Path(script).read_text())
    ended = QUEUE / f"{number}.status"
    if os.environ.get("QUEUE_ENDS") == "KILL" and number == 1:
        ended.write_text("271")  # PBS: 256 and the signal
    elif os.environ.get("RUN_JOBS"):
        log = open(QUEUE / f"{number}.log", "w")
        command = f"/bin/sh {script}; echo $? > {ended}.part; mv {ended}.part {ended}"
        subprocess.Popen(["/bin/sh", "-c", command], stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    return f"{number}.pbs"


def qstat(arguments: list[str]) -> str:
    number = arguments[-1].split(".")[0]
    ended = QUEUE / f"{number}.status"
    if not ended.exists():
        return f"Job Id: {number}.pbs\n    job_state = R"
    return f"Job Id: {number}.pbs\n    job_state = F\n    Exit_status = {ended.read_text().strip()}"


def main(name: str, arguments: list[str]) -> None:
    if "QUEUE" not in os.environ:  # a plugin that looks around while it is loaded
        return
    with open(QUEUE / "calls.jsonl", "a") as file:
        file.write(json.dumps([name, *arguments]) + "\n")
    calls = (QUEUE / "calls.jsonl").read_text().splitlines()
    number = sum(json.loads(call)[0] == name for call in calls)
    if name == "qsub":
        print(qsub(arguments, number))
    elif name == "qstat":
        print(qstat(arguments))
    elif name == "sbatch":
        print(number)
    elif name == "sinfo":
        print("batch*")
    elif name == "bsub":
        print(f"Job <{number}> is submitted to queue <gpu>.")
    elif name == "badmin":
        print(f"MBD configuration\n LSB_SHAREDIR = {QUEUE}\n LSF_CONFDIR = {QUEUE}\n LSF_UNIT_FOR_LIMITS = MB")
        params = QUEUE / "lsbatch/fake/configdir/lsb.params"
        params.parent.mkdir(parents=True, exist_ok=True)
        params.write_text("DEFAULT_QUEUE = normal\n")
    elif name == "lsclusters":
        print("CLUSTER_NAME STATUS\nfake ok")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])

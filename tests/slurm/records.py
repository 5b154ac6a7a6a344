"""What Slurm and Snakemake have on record of a job: requests, states."""

import os
import re
import subprocess
from pathlib import Path

UNITS = {"": 1 / 1024 / 1024, "K": 1 / 1024, "M": 1, "G": 1024, "T": 1024 * 1024}


def show(*what: str) -> list[dict[str, str]]:
    said = subprocess.run(["scontrol", "--oneliner", "show", *what], check=True, capture_output=True, text=True).stdout
    return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in said.splitlines() if "=" in line]


def job(number: str) -> dict[str, str]:
    return show("job", number)[0]


def running(comment: str) -> dict[str, str]:
    """The job that runs a rule now."""
    found = [one for one in show("job") if one["JobState"] == "RUNNING" and one.get("Comment", "").startswith(comment)]
    assert len(found) == 1, f"{len(found)} jobs of {comment} are running"
    return found[0]


def node_state() -> str:
    return show("node", "node1")[0]["State"]


def requested(found: dict[str, str]) -> dict[str, int]:
    """What Slurm was asked for, in the words of a rule."""
    amount, unit = re.fullmatch(r"([\d.]+)([KMGT]?)", found["MinMemoryNode"]).groups()
    days, clock = re.fullmatch(r"(?:(\d+)-)?([\d:]+)", found["TimeLimit"]).groups()
    hours, minutes, _ = clock.split(":")
    gpus = re.search(r"gpu[:=](?:\w+:)?(\d+)", found.get("TresPerJob", ""))
    return {
        "gpu": int(gpus[1]) if gpus else 0,
        "mem_mb": round(float(amount) * UNITS[unit]),
        "runtime": (int(days or 0) * 24 + int(hours)) * 60 + int(minutes),
        "threads": int(found["CPUs/Task"]) * int(found["NumTasks"]),
    }


def asked(said: str) -> dict[str, tuple[str, dict[str, int]]]:
    """Slurm's job number -> the rule, and what it asked for, from what Snakemake said."""
    blocks: dict[str, tuple[str, dict[str, int]]] = {}
    found = {}
    for block in re.split(r"\n(?=\[|Job \d|\w*rule )", said):
        head = re.match(r"(local)?rule (\w+):", block)
        if head and (jobid := re.search(r"^    jobid: (\d+)", block, re.M)):
            resources = dict(re.findall(r"(\w+)=(\d+)", block[block.index("    resources:") :]))
            threads = re.search(r"^    threads: (\d+)", block, re.M)
            numbers = {name: int(resources.get(name, 0)) for name in ("gpu", "mem_mb", "runtime")}
            blocks[jobid[1]] = (head[2], {**numbers, "threads": int(threads[1]) if threads else 1})
        for snakemakes, slurms in re.findall(r"^Job (\d+) has been submitted with SLURM jobid (\d+)", block, re.M):
            found[slurms] = blocks[snakemakes]
    return found


def phases(said: str) -> set[str]:
    """Rules that ran, but for those on the submitting machine."""
    return set(re.findall(r"^rule (\w+):", said, re.M))


def compare(said: str) -> list[str]:
    """AssertionError if a job is not what its rule asked for, by Slurm's own records. Returns a line for each rule."""
    ended = Path(os.environ["SLURM_DIR"], "log/jobcomp.log").read_text()
    lines, completed = {}, set()
    for number, (rule, wanted) in asked(said).items():
        got = requested(job(number))
        if f"JobId={number} " in ended and re.search(rf"^JobId={number} .*JobState=COMPLETED", ended, re.M):
            completed.add(rule)
        if shortened(number):
            wanted, got = {**wanted, "runtime": 0}, {**got, "runtime": 0}
        assert got == wanted, f"job {number}, {rule}: asked for {wanted}, Slurm has {got}"
        lines[rule] = f"{rule} {' '.join(f'{name}={value}' for name, value in got.items() if value)}"
    assert completed == phases(said), f"ran as Slurm jobs: {sorted(completed)}, rules: {sorted(phases(said))}"
    return list(lines.values())


def shortened(number: str) -> bool:
    """True if the time limit of a job was changed after it was submitted: slurmctld's log says so."""
    return "setting time_limit to" in "".join(
        line for line in Path(os.environ["SLURM_DIR"], "log/slurmctld.log").read_text().splitlines() if f"JobId={number}" in line
    )

"""Remove the working folders that no step of a config will go on from, and say how much that frees.

    python -m workflow_scripts.tools.clean [--configfile F...] [--all] [--dry-run]        (make clean-checkpoints)

A killed training leaves its checkpoints in `results/.work/<fingerprint>/`, and the next run of the same step goes on from them.
They are of no use once that step has changed: its fingerprint is another then. Kept are the folders of steps as the config has
them now, of steps that are at work, and, without --all, of outputs that the config does not know (another config of the same
results folder).
"""

import argparse
import fcntl
import json
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from workflow_scripts.config import config
from workflow_scripts.plan.plan import Plan
from workflow_scripts.plumbing.messages import InputError
from workflow_scripts.tools import graph, runs, status


class Left(NamedTuple):
    """A working folder: what it was for, its size, and why it goes or stays."""

    folder: Path
    out: str
    size: int
    goes: bool
    why: str


def at_work(folder: Path) -> bool:
    lock = folder.parent / "locks" / f"{folder.name}.lock"
    if not lock.exists():
        return False
    with open(lock) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def examine(plan: Plan, everything: bool) -> list[Left]:
    """What is to be done with each working folder below the config's results; everything: with unknown outputs' as well."""
    folders = sorted(path for path in Path(plan.work).glob("*") if re.fullmatch(r"[0-9a-f]{32}", path.name) and path.is_dir())
    outs = {}
    for folder in folders:
        try:
            outs[folder] = str(json.loads((folder / "where.json").read_text())["out"])
        except (OSError, ValueError, KeyError, TypeError):
            outs[folder] = ""
    phases = graph.phases_by_file(plan, outs.values())
    found = []
    for folder, out in outs.items():
        goes, why = True, "its step has changed since"
        if at_work(folder):
            goes, why = False, "at work"
        elif not out:
            why = "nothing says what it was for"
        elif out not in phases:
            goes, why = everything, "of an output that this config does not know"
        elif plan.fingerprint(*phases[out]) == folder.name:
            goes, why = False, "the next run goes on from it"
        found.append(Left(folder, out or "?", status.disk([folder])[0], goes, why))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configfile", nargs="+", default=["config/config.yaml"], help="as given to snakemake")
    parser.add_argument("--all", action="store_true", help="also folders of outputs that this config does not know")
    parser.add_argument("--dry-run", action="store_true", help="say only what would be removed")
    args = parser.parse_args()
    plan = Plan(config.load(*args.configfile))
    if not Path(plan.results).is_dir():
        raise InputError(f"{plan.results}: no such folder; run this where snakemake runs")
    found = examine(plan, args.all)
    for left in found:
        verb, size = "remove" if left.goes else "keep", status.human_bytes(left.size)
        print(f"{verb:<7}{size:>9}  {left.out} ({left.folder.name[:12]}): {left.why}")
        if left.goes and not args.dry_run:
            shutil.rmtree(left.folder)
    freed = status.human_bytes(sum(left.size for left in found if left.goes))
    print(f"{'would free' if args.dry_run else 'freed'} {freed} of {status.human_bytes(sum(left.size for left in found))}")


if __name__ == "__main__":
    runs.command(main)

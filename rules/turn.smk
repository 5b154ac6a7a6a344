# One Snakemake at a time on a results folder.
import os
import sys
from pathlib import Path

from workflow_scripts.artifacts import work
from workflow_scripts.plan import records
from workflow_scripts.plumbing.environment import check_links, check_writable
from workflow_scripts.plumbing.messages import InputError

_turn = []


def take_turn():
    """Once, where the planning of a real run begins: asked for by every edge of the DAG (rules/common.smk).

    Who planned before another one finished a step would delete that step's outputs. Snakemake's own lock is off (see
    profiles/default): it outlives a SIGKILL, and any second run removes it. This one dies with its process.
    """
    if _turn or workflow.execution_settings is None or not workflow.is_main_process or workflow.touch:
        return
    try:
        if workflow.dryrun:  # takes none; Snakemake would end with a traceback over what it leaves
            _turn.append(None)
            return check_writable([".snakemake/iocache/latest.pkl"])
        check_links(Path(PLAN.work))
        _turn.append(work.turn(Path(PLAN.work), PLAN.results))
        records.clear_recorded(Path(PLAN.work))
        offer_gpus()
    except InputError as error:
        stop(str(error))
    except OSError as error:
        stop(f"{error.filename}: {error.strerror}; make the results folder writable, or free some space")


def offer_gpus():
    """Tell Snakemake what GPUs this host has, so that it starts as many jobs as have room. Their ledger (plumbing/gpus.py) has the
    last word. `--resources gpu=N` bounds the number of jobs at once."""
    if not GPU or not workflow.local_exec:
        return
    have, offered = cards.here(), workflow.global_resources
    ids = cards.allowed()
    sizes = {gpu: have[gpu].capacity // cards.MIB for gpu in ids if gpu in have and have[gpu].capacity}
    if SHARE and len(sizes) == len(ids) > 0:
        OFFERED.update(sizes)
        offered.setdefault("gpu_mb", sum(sizes.values()))
    else:
        offered.setdefault("gpu", max(1, len(ids)))


def stop(words):
    """Snakemake would wrap an exception or SystemExit from here in its own report of a broken input function."""
    sys.stderr.write(f"{words}\n")
    sys.stderr.flush()
    os._exit(1)

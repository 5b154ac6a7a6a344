"""A step by several ranks, each a fork of the test's own process, which has loaded the libraries. And what trainings noted."""

import csv
import importlib
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.support import small_steps
from workflow_scripts.artifacts import manifests
from workflow_scripts.plumbing import ranks


def together(count: int, do: Callable[[int], None], device: str = "cpu") -> list[int]:
    """Call `do(rank)` in each of so many ranks. Their exit statuses; a traceback goes to standard error, that is to pytest."""
    children = []
    with tempfile.TemporaryDirectory(prefix="ranks.") as folder:
        for rank in range(count):
            if not (child := os.fork()):
                status = 1
                try:
                    import datasets.fingerprint

                    datasets.fingerprint._TEMP_DIR_FOR_TEMP_CACHE_FILES = None  # a process of its own has its own
                    ranks.become(rank, count, Path(folder), device)
                    do(rank)
                    status = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(status)
            children.append(child)
        return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def run(job: manifests.Job, count: int) -> manifests.Artifact:
    """The step's artifact, made by so many ranks; by this process where it is one."""
    if count == 1:
        return small_steps.run(job)
    main = importlib.import_module(f"workflow_scripts.steps.{job.step['step']}").main
    assert together(count, lambda rank: main(job)) == [0] * count
    return manifests.read(job.out)


def curve(adapter: manifests.Artifact) -> list[dict[str, float]]:
    """The lines of metrics.csv."""
    with open(adapter.folder / "metrics.csv") as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]

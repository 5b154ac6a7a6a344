"""SIGTERM for a step whose Snakemake alone hears it. Plumbing: decides no number.

On a cluster a step runs below a Snakemake of its own, which on SIGTERM waits until the step has ended. Slurm, where it follows
processes by control group (most clusters do), signals only the first process of a job step: that Snakemake. The training would
hear nothing, write no checkpoint, and be killed when the time of grace is over.
"""

import os
import signal
import threading
from collections.abc import Callable


def pass_on(wanted: Callable[[], bool]) -> None:
    """From now on, SIGTERM to this process goes to its children too, if `wanted()` when it comes. For the main thread.

    Whatever handler is set, now or later, still runs: Python tells the numbers of the signals that it handles through a pipe.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_listen, args=(reading, wanted), daemon=True, name="pass SIGTERM on").start()


def _listen(reading: int, wanted: Callable[[], bool]) -> None:
    import psutil

    while numbers := os.read(reading, 64):
        if signal.SIGTERM in numbers and wanted():
            for child in psutil.Process().children():  # theirs are their own affair: a data loader's end would end the training
                try:
                    child.terminate()
                except psutil.NoSuchProcess:
                    pass
